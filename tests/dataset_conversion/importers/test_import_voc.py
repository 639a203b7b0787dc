"""Pascal VOC XML, in the form of the VOC2012 development kit and of LabelImg."""

import pytest
from importer_oracle import lies_on, painted, read, save_picture

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion import import_annotations
from nnunet_dsp.dataset_conversion.imported import BoxMark
from nnunet_dsp.dataset_conversion.importers import voc

XML = """<annotation>
    <folder>JPEGImages</folder>
    <filename>{filename}</filename>
    <source><database>Unknown</database></source>
    <size><width>{width}</width><height>40</height><depth>1</depth></size>
    <segmented>0</segmented>
    {objects}
</annotation>
"""
OBJECT = """<object>
        <name>cell</name><pose>Unspecified</pose><truncated>{truncated}</truncated><difficult>{difficult}</difficult>
        <bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
    </object>"""
CELL = (32, 6, 47, 12)  # the painted cell: columns 31 to 46 and rows 5 to 11, counted from 0


def an_object(box=CELL, truncated=0, difficult=0):
    return OBJECT.format(box=box, truncated=truncated, difficult=difficult)


@pytest.fixture
def export(tmp_path):
    """Write Annotations/a.xml and JPEGImages/a.png; returns the SourceImage."""

    def make(*objects, options=(), filename="a.png", width=60):
        save_picture(tmp_path / "JPEGImages" / "a.png")
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        text = XML.format(filename=filename, width=width, objects="".join(objects))
        (tmp_path / "Annotations" / "a.xml").write_text(text)
        (image,) = read(voc, tmp_path, *options)
        return image

    return make


def test_voc_counts_from_1_and_xmax_is_the_last_pixel(export):
    image = export(an_object())
    (box,) = image.marks
    assert isinstance(box, BoxMark) and box.label == "cell" and box.tight and lies_on(box, painted()[1]["cell"])
    assert image.expected_shape == (40, 60)


def test_a_zero_based_voc_box_is_read_as_such(export):
    (box,) = export(an_object((31, 5, 47, 12)), options=("--zero-based",)).marks
    assert lies_on(box, painted()[1]["cell"])


def test_truncated_and_difficult_voc_boxes_are_not_tight(export):
    image = export(an_object(truncated=1), an_object(difficult=1), an_object())
    assert [box.tight for box in image.marks] == [False, False, True] and len(image.notes) == 2
    assert [b.tight for b in export(an_object(difficult=1), options=("--difficult", "keep")).marks] == [True]
    dropped = export(an_object(difficult=1), options=("--difficult", "drop"))
    assert dropped.marks == () and dropped.incomplete == ("cell",) and "difficult" in dropped.notes[0]


def test_a_voc_box_of_one_pixel_is_a_box_and_an_empty_one_is_left_out(export, nnunet, call, tmp_path, capsys):
    image = export(an_object((10, 20, 10, 20)), an_object((10, 20, 9, 20)), an_object((30, 20, 10, 20)))
    assert [(b.start, b.stop) for b in image.marks] == [
        ((19, 9), (20, 10)), ((19, 9), (20, 9)), ((19, 29), (20, 10)),
    ]  # fmt: skip
    assert call(import_annotations, "voc", tmp_path, "-d", 1, "--dry-run") == 0
    assert "2 x left out: boxes without extent (first: a.xml: object[1])" in capsys.readouterr().out


def test_a_voc_box_from_0_is_told(export):
    assert "--zero-based" in export(an_object((0, 3, 9, 9))).notes[0]


def test_a_voc_file_with_a_wrong_image_name_belongs_to_the_image_of_its_own_name(export):
    assert export(an_object(), filename="elsewhere.jpg").file.name == "a.png"


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ("<object><bndbox/></object>", r"a\.xml: object\[0\]: it has no <name>"),
        ("<object><name>a</name></object>", "'a' has no <bndbox>"),
        ("<object><name>a</name><bndbox><xmin>1</xmin></bndbox></object>", "bndbox: it has no <ymin>"),
        (an_object(("nan", 1, 2, 3)), r"bndbox.xmin: expected a number, but got 'nan'"),
        (an_object(truncated="maybe"), "truncated: expected 0 or 1"),
        ("<object>", "not valid XML"),
    ],
)
def test_what_cannot_be_in_voc_is_named(export, objects, message):
    with pytest.raises(AnnotationError, match=message):
        export(objects)


def test_voc_entities_are_refused(tmp_path):
    save_picture(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>'
    )
    with pytest.raises(AnnotationError, match="do harm"):
        read(voc, tmp_path)


def test_real_voc_boxes_come_in_with_one_command(shared, nnunet, call, capsys):
    source = shared("bccd")
    assert call(import_annotations, "voc", source, "-d", 7, "--dry-run", "--complete", "boxes=WBC") == 0
    out = capsys.readouterr().out
    assert "40 images (2D, 3 channel(s), .png)" in out and "206 x boxes of truncated objects" in out
    assert [line.split() for line in out.splitlines() if line.split()[:1] == ["RBC"]] == [["RBC", "40", "687"]]
    assert not list(nnunet.iterdir())
