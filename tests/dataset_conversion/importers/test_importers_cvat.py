"""CVAT for images 1.1, in the form that CVAT's own exporter writes."""

import numpy as np
import pytest
from importer_oracle import covered, lies_on, painted, read, save_picture

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.imported import BoxMark, PointMark, RasterMask, Region, Scribble, Tag
from nnunet_dsp.dataset_conversion.importers import cvat
from nnunet_dsp.dataset_conversion.importers._xml import parse_xml

META = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <id>12</id>
      <name>cells</name>
      <size>2</size>
      <mode>annotation</mode>
      <labels>
        <label><name>cell</name><color>#33ddff</color><type>any</type><attributes></attributes></label>
        <label><name>vessel</name><color>#33ff00</color><type>any</type><attributes></attributes></label>
        <label><name>head</name><type>points</type><parent>person</parent></label>
      </labels>
    </task>
    <dumped>2024-05-02 09:17:03.1+00:00</dumped>
  </meta>
"""
IMAGE = '  <image id="0" name="{name}" width="60" height="40">\n{shapes}\n  </image>\n'


@pytest.fixture
def export(tmp_path):
    """Write annotations.xml for one painted image and read it; returns its marks, or all of the SourceImage."""

    def make(*shapes, whole=False, picture=True):
        if picture:
            save_picture(tmp_path / "images" / "field 1.png")
        text = META + IMAGE.format(name="field 1.png", shapes="\n".join(shapes)) + "</annotations>\n"
        (tmp_path / "annotations.xml").write_text(text, encoding="utf-8")
        (image,) = read(cvat, tmp_path)
        return image if whole else image.marks

    return make


def rle(mask):
    """Runs of outside, inside, ..., by a loop over the pixels."""
    runs, value = [0], False
    for pixel in mask.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return ", ".join(map(str, runs))


def test_a_cvat_box_touches_the_painted_cell_on_every_side(export):
    (box,) = export(
        '<box label="cell" source="file" occluded="0" xtl="31.00" ytl="5.00" xbr="47.00" ybr="12.00" z_order="0"></box>'
    )
    assert isinstance(box, BoxMark) and box.tight and box.label == "cell"
    assert lies_on(box, painted()[1]["cell"])


def test_cvat_points_lie_on_the_pixels_that_were_clicked(export):
    # The outermost clicks in the object's corner pixels: half a pixel off and they leave it
    marks = export('<points label="vessel" occluded="0" points="8.10,20.10;14.90,32.90;8.20,32.80" z_order="0"/>')
    assert len(marks) == 3 and all(isinstance(mark, PointMark) for mark in marks)
    assert all(lies_on(mark, painted()[1]["vessel"]) for mark in marks)
    assert marks[0].at == pytest.approx((19.6, 7.6))


def test_a_cvat_polyline_is_a_scribble_along_the_painted_line(export):
    (line,) = export('<polyline label="nerve" occluded="0" points="3.50,18.50;30.00,18.20;54.90,18.90" z_order="0"/>')
    assert isinstance(line, Scribble) and line.width is None
    assert lies_on(line, painted()[1]["nerve"])


def test_a_cvat_polygon_fills_exactly_the_painted_cell(export):
    (region,) = export('<polygon label="cell" points="31.00,5.00;47.00,5.00;47.00,12.00;31.00,12.00" z_order="0"/>')
    assert isinstance(region, Region) and lies_on(region, painted()[1]["cell"])


def test_a_cvat_mask_covers_exactly_what_was_painted_with_the_brush(export):
    brush = np.zeros((40, 60), bool)
    brush[7, 30:41] = brush[8, 28:33] = brush[8, 36:44] = brush[9, 40] = True
    cut = brush[7:10, 28:44]
    assert not cut[0, 0]
    (mask,) = export(
        f'<mask label="cell" source="manual" occluded="0" rle="{rle(cut)}" left="28" top="7" width="16" height="3" '
        'z_order="0"></mask>'
    )
    assert isinstance(mask, RasterMask) and mask.offset == (7, 28)
    assert (covered(mask, brush.shape) == brush).all()


def test_a_cvat_mask_that_begins_inside_begins_with_a_run_of_no_pixels(export):
    (mask,) = export('<mask label="cell" rle="0, 2, 3, 1" left="4" top="2" width="3" height="2" z_order="0"/>')
    assert mask.load().tolist() == [[True, True, False], [False, False, True]]


def test_a_cvat_ellipse_covers_the_pixels_whose_centres_lie_in_it(export):
    (region,) = export('<ellipse label="cell" cx="30.25" cy="18.75" rx="12.00" ry="5.50" z_order="0"/>')
    y, x = np.indices((40, 60)) + 0.5
    assert (covered(region, (40, 60)) == (((x - 30.25) / 12) ** 2 + ((y - 18.75) / 5.5) ** 2 < 1)).all()


def test_a_turned_cvat_ellipse_turns_clockwise(export):
    (region,) = export(
        '<ellipse label="cell" cx="30.25" cy="18.75" rx="12.00" ry="3.50" rotation="30.00" z_order="0"/>'
    )
    y, x = np.indices((40, 60)) + 0.5
    # Back into the ellipse's own axes: its long one runs down to the right on the screen
    angle = np.deg2rad(30)
    u = (x - 30.25) * np.cos(angle) + (y - 18.75) * np.sin(angle)
    v = -(x - 30.25) * np.sin(angle) + (y - 18.75) * np.cos(angle)
    assert (covered(region, (40, 60)) == ((u / 12) ** 2 + (v / 3.5) ** 2 < 1)).all()


def test_a_turned_cvat_box_becomes_the_loose_box_around_it(export):
    image = export(
        '<box label="cell" occluded="0" xtl="20.00" ytl="10.00" xbr="40.00" ybr="16.00" rotation="30.00" z_order="0"/>',
        whole=True,
    )
    (box,) = image.marks
    half = np.array([[np.cos(np.pi / 6), -np.sin(np.pi / 6)], [np.sin(np.pi / 6), np.cos(np.pi / 6)]]) @ [
        [10, 10, -10, -10],
        [3, -3, 3, -3],
    ]
    assert not box.tight and "turned boxes" in image.notes[0]
    assert box.start == pytest.approx((13 + half[1].min(), 30 + half[0].min()))
    assert box.stop == pytest.approx((13 + half[1].max(), 30 + half[0].max()))


def test_a_cvat_box_after_a_quarter_turn_is_still_tight(export):
    (box,) = export('<box label="cell" xtl="20.00" ytl="10.00" xbr="40.00" ybr="16.00" rotation="90.00"/>')
    assert box.tight and box.start == (3, 27) and box.stop == (23, 33)


def test_cvat_tags_say_what_is_in_the_image(export):
    (tag,) = export('<tag label="vessel" source="manual"></tag>')
    assert tag == Tag("vessel", True, "image 'field 1.png', tag[0]")


def test_cvat_shapes_come_in_the_order_in_which_cvat_stacks_them(export):
    marks = export(
        '<polygon label="cell" points="1,1;2,1;2,2" z_order="3"/>',
        '<polygon label="vessel" points="1,1;2,1;2,2" z_order="-1"/>',
        '<polygon label="nerve" points="1,1;2,1;2,2" z_order="3"/>',
    )
    assert [mark.label for mark in marks] == ["vessel", "cell", "nerve"]


def test_cvat_attributes_are_left_out_and_told(export):
    image = export(
        '<box label="cell" xtl="1" ytl="1" xbr="3" ybr="3"><attribute name="stage">late</attribute></box>', whole=True
    )
    assert image.notes == ("left out: the attribute 'stage' of shapes",)
    assert image.classes == ("cell", "vessel")
    assert image.expected_shape == (40, 60) and image.name == "field 1"


def test_one_cvat_file_holds_many_images_in_subfolders_and_subsets(tmp_path):
    save_picture(tmp_path / "images" / "a" / "x.png")
    save_picture(tmp_path / "images" / "b" / "x.png")
    save_picture(tmp_path / "images" / "train" / "y.png")
    shape = '<tag label="cell"/>'
    text = META + IMAGE.format(name="b/x.png", shapes=shape) + IMAGE.format(name="a/x.png", shapes="")
    text += '<image id="2" name="y.png" subset="train" task_id="4" width="60" height="40"><tag label="vessel"/></image>'
    (tmp_path / "annotations.xml").write_text(text + "</annotations>")
    found = {str(i.file.relative_to(tmp_path)): [m.label for m in i.marks] for i in read(cvat, tmp_path)}
    assert found == {"images/b/x.png": ["cell"], "images/a/x.png": [], "images/train/y.png": ["vessel"]}


def test_unannotated_images_that_were_not_exported_are_left_out_and_told(tmp_path):
    save_picture(tmp_path / "images" / "x.png")
    text = META + IMAGE.format(name="x.png", shapes='<tag label="cell"/>') + IMAGE.format(name="gone.png", shapes="")
    (tmp_path / "annotations.xml").write_text(text + "</annotations>")
    (image,) = read(cvat, tmp_path)
    assert "1 images without annotations that are not there ('gone.png' first)" in image.notes[0]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ('<skeleton label="person" z_order="0"><points label="head" points="1,1"/></skeleton>', "skeleton of 'person'"),
        ('<cuboid label="car" xtl1="1"/>', "cuboid of 'car'"),
        ('<box label="cell" xtl="1" ytl="2" xbr="nan" ybr="4"/>', r"box\[0\], xbr: expected a number, but got 'nan'"),
        ('<box label="cell" xtl="1" ytl="2" xbr="3"/>', r"box\[0\]: it lacks ybr"),
        ('<box xtl="1" ytl="2" xbr="3" ybr="4"/>', r"box\[0\]: it has no label"),
        ('<polygon label="cell" points="1,1;2,2"/>', "needs three points, but it has 2"),
        ('<polygon label="cell" points="1,1;2"/>', "number 1 is '2'"),
        ('<points label="cell" points=""/>', "expected points as"),
        ('<mask label="cell" rle="1, 2" left="0" top="0" width="2" height="2"/>', "its runs cover 3 pixels"),
        ('<mask label="cell" rle="1, -1, 4" left="0" top="0" width="2" height="2"/>', "but got '-1'"),
        ('<mask label="cell" rle="4" left="59" top="0" width="2" height="2"/>', "leaves the image of 60 x 40"),
        ('<mask label="cell" rle="4" left="0" top="0" width="0" height="2"/>', "is none"),
        ('<ellipse label="cell" cx="1" cy="1" rx="0" ry="2"/>', "radii above 0"),
        ('<blob label="cell"/>', "but got <blob>"),
    ],
)
def test_what_cannot_be_read_in_a_cvat_image_is_named(export, shape, message):
    with pytest.raises(AnnotationError, match=message) as caught:
        export(shape)
    assert "annotations.xml: image 'field 1.png'" in str(caught.value)


def test_cvat_tracks_are_refused_with_what_to_export_instead(tmp_path):
    (tmp_path / "annotations.xml").write_text(META + '<track id="7" label="cell"></track></annotations>')
    with pytest.raises(AnnotationError, match="track '7'.*Export the task as 'CVAT for images 1.1'"):
        read(cvat, tmp_path)


def test_an_annotated_cvat_image_that_is_missing_is_named(export):
    with pytest.raises(AnnotationError, match="no image 'field 1.png'.*--images DIR"):
        export('<tag label="cell"/>', picture=False)


def test_voc_files_given_to_cvat_are_recognised(tmp_path):
    (tmp_path / "a.xml").write_text("<annotation></annotation>")
    with pytest.raises(AnnotationError, match="Pascal VOC"):
        read(cvat, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'<!DOCTYPE a [<!ENTITY b "c">]><annotations>&b;</annotations>', "declares a document type"),
        (b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotations/>', "declares a document type"),
        (b"", "is empty"),
        (b"<annotations><image", "not valid XML at line 1"),
        (b"<annotations>", "cut off"),
        (b"<a>" * 100, "nested more than 64 deep"),
        (b'<?xml version="1.0" encoding="klingon"?><a/>', "cannot be decoded"),
    ],
)
def test_harmful_and_broken_xml_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "a.xml").write_bytes(content)
    with pytest.raises(AnnotationError, match=message):
        parse_xml(tmp_path / "a.xml")


def test_xml_beyond_the_limit_is_refused_before_it_is_parsed(tmp_path):
    (tmp_path / "a.xml").write_bytes(b"<a>" + b" " * 2**20 + b"</a>")
    with pytest.raises(AnnotationError, match="larger than 1 MiB"):
        parse_xml(tmp_path / "a.xml", limit=2**20)
    assert parse_xml(tmp_path / "a.xml", limit=2**21).tag == "a"
