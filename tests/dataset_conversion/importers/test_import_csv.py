"""Tables: tags, points and boxes, under the names that people give their columns."""

import numpy as np
import pytest
from importer_oracle import lies_on, painted, read, save_picture

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion import import_annotations
from nnunet_dsp.dataset_conversion.imported import BoxMark, PointMark, Tag
from nnunet_dsp.dataset_conversion.importers import csv_tables


@pytest.fixture
def table(tmp_path):
    """Write a table beside a.png and b.png; returns the SourceImages by the stem of their file."""

    def make(text, *options, name="table.csv", encoding="utf-8"):
        for stem in "ab":
            save_picture(tmp_path / f"{stem}.png")
        (tmp_path / name).write_bytes(text.encode(encoding))
        return {image.file.stem: image for image in read(csv_tables, tmp_path / name, *options)}

    return make


def tags(image):
    return {mark.label: mark.present for mark in image.marks if isinstance(mark, Tag)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_column_for_each_class_says_yes_no_or_nothing(table, separator, encoding):
    text = "Image,Zelle,Gefäß\r\na.png,yes,0\r\nb.png,,X\r\n".replace(",", separator)
    found = table(text, encoding=encoding)
    assert tags(found["a"]) == {"Zelle": True, "Gefäß": False} and tags(found["b"]) == {"Gefäß": True}
    assert found["a"].classes == ("Zelle", "Gefäß")


SPELLINGS = {"1": True, "1.0": True, "TRUE": True, "Present": True, "0": False, "no": False, "-": False}


UNKNOWN = dict.fromkeys(["", "?", "NaN", "-1.0", "unknown"])


@pytest.mark.parametrize(("cell", "said"), [*(SPELLINGS | UNKNOWN).items()])
def test_the_usual_spellings_of_yes_no_and_unknown(table, cell, said):
    assert tags(table(f"filename,cell\na.png,{cell}\n")["a"]).get("cell") is said


def test_a_column_that_is_no_class_is_refused_by_name_or_passed_over(table):
    text = "image_id,age,cell,split\na,63,1,train\nb,20,0,val\n"
    with pytest.raises(
        AnnotationError, match=r"line 2, column 'age': expected yes, no or unknown, but got '63'.*--class-col"
    ):
        table(text)
    assert tags(table(text, "--class-columns", "cell")["b"]) == {"cell": False}


def test_lists_of_labels_and_one_label_a_row(table):
    found = table('Image Index,Finding Labels\na.png,"cell|vessel"\n', "--columns", "image,labels")
    assert tags(found["a"]) == {"cell": True, "vessel": True} and list(found) == ["a"]
    found = table('filename,tags,absent\na.png,"cell; vessel",nerve\nb.png,,cell\n')
    assert tags(found["a"]) == {"cell": True, "vessel": True, "nerve": False} and tags(found["b"]) == {"cell": False}
    assert tags(table("file,class\na.png,cell\na.png,vessel\n")["a"]) == {"cell": True, "vessel": True}


@pytest.mark.parametrize(
    "text",
    [
        "image,x,y,class\na.png,46,11,cell\na.png,31.2,5.7,cell\n",
        "class;Y;X;file\ncell;11;46;a.png\ncell;5,7;31,2;a.png\n",
        "row\tcol\tlabel\timage\n11\t46\tcell\ta\n5.7\t31.2\tcell\ta\n",
    ],
)
def test_points_lie_on_the_painted_cell(table, text):
    marks = table(text)["a"].marks
    assert [mark.at for mark in marks] == [(11.0, 46.0), pytest.approx((5.2, 30.7))]
    assert all(isinstance(mark, PointMark) and lies_on(mark, painted()[1]["cell"]) for mark in marks)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("filename,width,height,class,xmin,ymin,xmax,ymax\na.png,60,40,cell,31,5,47,12\n", ()),
        ("a.png,31,5,47,12,cell\n", ("--columns", "image,xmin,ymin,xmax,ymax,label")),
        ("img,label,x,y,w,h\na.png,cell,31,5,16,7\n", ()),
        ("image,label,left,top,width,height\na.png,cell,31,5,16,7\n", ()),
        ("image,label,x0,y0,x1,y1\na.png,cell,31,5,47,12\n", ()),
        ("image,label,x1,y1,x2,y2\na.png,cell,31,5,46,11\n", ("--inclusive",)),
        ("image,label,x1,y1,x2,y2\na.png,cell,32,6,47,12\n", ("--inclusive", "--first-pixel", "1")),
        ("image,x1,y1,x2,y2\na.png,31,5,47,12\n", ("--label", "cell")),
        ("image,label,center_x,center_y,width,height\na.png,cell,39,8.5,16,7\n", ()),
        ("image,label,cx,cy,w,h\na.png,cell,40,9.5,16,7\n", ("--first-pixel", "1")),
        ("image,label,x,centroid_y,w,h\na.png,cell,31,8.5,16,7\n", ()),
    ],
)
def test_boxes_touch_the_painted_cell_on_every_side(table, text, options):
    image = table(text, *options)["a"]
    (box,) = image.marks
    assert isinstance(box, BoxMark) and box.label == "cell" and lies_on(box, painted()[1]["cell"])
    assert image.expected_shape == ((40, 60) if "width,height,class" in text else None)


def test_width_and_height_of_the_image_beside_points_are_no_boxes(table):
    points = "image,width,height,x,y,label\na.png,60,40,46,11,cell\nb.png,60,40,31,5,cell\n"
    for name, image in table(points).items():
        assert all(isinstance(mark, PointMark) and lies_on(mark, painted()[1]["cell"]) for mark in image.marks), name
        assert image.expected_shape == (40, 60) and len(image.marks) == 1
    boxes = table(points + "b.png,16,7,31,5,cell\n")  # one is smaller: they are boxes
    assert [type(mark) for mark in boxes["b"].marks] == [BoxMark, BoxMark]
    (whole,) = table("image,width,height,x,y,label\na.png,60,40,0,0,cell\n")["a"].marks
    assert isinstance(whole, BoxMark) and whole.stop == (40, 60)


@pytest.mark.parametrize("columns", ["xmin,ymin,xmax,ymax", "left,top,width,height", "cx,cy,w,h"])
def test_boxes_in_fractions_of_the_image_are_refused(table, columns):
    with pytest.raises(AnnotationError, match=r"table\.csv: expected .* but all lie between 0 and 1.*Multiply"):
        table(f"image,{columns},label\na.png,0.5,0.25,0.75,1,cell\nb.png,0,0,1,1,cell\n")
    assert len(table(f"image,{columns},label\na.png,0,0,1,1,cell\n")["a"].marks) == 1


def test_a_row_without_a_place_names_an_image_without_objects(table):
    found = table("a.png,,,,,\n", "--columns", "image,xmin,ymin,xmax,ymax,label")
    assert found["a"].marks == ()


def test_one_text_file_an_image_as_x_y_class(tmp_path):
    save_picture(tmp_path / "Dataset" / "1.png")
    save_picture(tmp_path / "Dataset" / "2.png")
    (tmp_path / "Label").mkdir()
    (tmp_path / "Label" / "1.txt").write_text("46 11 3\r\n\r\n31 5 3\r\n")
    (tmp_path / "Label" / "2.txt").write_text("")
    (tmp_path / "README.txt").write_text("a text")
    one, two = read(csv_tables, tmp_path)
    assert [mark.label for mark in one.marks] == ["3", "3"] and two.marks == () and two.file.name == "2.png"
    assert all(lies_on(mark, painted()[1]["cell"]) for mark in one.marks)


def test_several_tables_of_a_folder_are_joined_by_image(tmp_path):
    save_picture(tmp_path / "a.png")
    (tmp_path / "tags.csv").write_text("image,nerve\na,yes\n")
    (tmp_path / "points.tsv").write_text("image\tx\ty\tlabel\na\t40\t8\tcell\n")
    (image,) = read(csv_tables, tmp_path)
    assert tags(image) == {"nerve": True} and len(image.marks) == 2


def test_points_in_3d_have_a_z(tmp_path):
    import tifffile

    tifffile.imwrite(tmp_path / "v.tif", np.zeros((5, 6, 7), np.uint8))
    (tmp_path / "t.csv").write_text("image,x,y,z,label\nv.tif,6,5,4,cell\n")
    (image,) = read(csv_tables, tmp_path / "t.csv")
    assert image.marks[0].at == (4, 5, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,zmin,zmax,xmin,ymin,w,h,label\na,1,2,3,4,5,6,cell\n", "line 1: boxes in 3D need zmin and zmax"),
        ("", "the table holds no row"),
        ("image,x,y,class\na.png,1,2\n", "line 2: expected 4 cells.*got 3"),
        ("image,x,y,class\na.png,1,,cell\n", "line 2, y: expected a number, but got ''"),
        ("image,x,y,class\na.png,1,two,cell\n", "line 2, y: expected a number, but got 'two'"),
        ("image,x,y,class\na.png,1,2,\n", "line 2: it names no class.*--label"),
        ("image,x,y,class\n,1,2,cell\n", "line 2: it names no image"),
        ("image,x,y,class\nc.png,1,2,cell\n", "line 2: there is no image 'c.png'"),
        ("a.png,1,2,3,4,cell\n", "no column is called image.*--columns"),
        ("image,cell,cell\na.png,1,1\n", "two columns are called 'cell'"),
        ('image,class\na.png,"cell\n', "no table: .*quotation mark"),
        ("image\na.png\n", "no column with classes"),
    ],
)
def test_what_cannot_be_in_a_table_is_named(table, text, message):
    with pytest.raises(AnnotationError, match=rf"(?s)table\.csv: .*{message}"):
        table(text)


def test_a_picture_given_as_a_table_is_refused(tmp_path):
    with pytest.raises(AnnotationError, match="NUL characters"):
        read(csv_tables, save_picture(tmp_path / "a.png"))


def test_real_points_come_in_with_one_command(shared, nnunet, call, capsys):
    source = shared("chula_rbc")
    assert call(import_annotations, "csv", source, "-d", 7, "--dry-run") == 0
    out = capsys.readouterr().out
    expected = sum(len(f.read_text().split()) // 3 for f in (source / "Label").glob("*.txt"))
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("class_")]
    assert sum(int(row[2]) for row in rows) == expected and [row[0] for row in rows][:2] == ["class_0", "class_1"]
    assert "29 images (2D, 3 channel(s), .png)" in out
