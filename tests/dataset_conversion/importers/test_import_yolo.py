"""YOLO txt as Ultralytics documents it: detect, segment, pose, oriented boxes."""

import pytest
from importer_oracle import lies_on, painted, read, save_picture

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.imported import BoxMark, PointMark, Region
from nnunet_dsp.dataset_conversion.importers import yolo

# columns 31 to 46 of 60, rows 5 to 11 of 40
CELL_BOX = f"1 {39 / 60:.6f} {8.5 / 40:.6f} {16 / 60:.6f} {7 / 40:.6f}"
CORNERS = [(31, 5), (47, 5), (47, 12), (31, 12)]
CELL_POLYGON = "1 " + " ".join(f"{x / 60:.6f} {y / 40:.6f}" for x, y in CORNERS)
YAML = "path: ../cells\ntrain: images/train\nval: images/val\nnames:\n  0: vessel\n  1: cell\n"


@pytest.fixture
def export(tmp_path):
    """Write data.yaml, images/train/a.png and labels/train/a.txt; returns the SourceImage."""

    def make(text, *options, names=YAML, names_file="data.yaml"):
        save_picture(tmp_path / "images" / "train" / "a.png")
        (tmp_path / "labels" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "labels" / "train" / "a.txt").write_text(text)
        (tmp_path / names_file).write_text(names)
        (image,) = read(yolo, tmp_path, *options)
        return image

    return make


def test_a_yolo_box_touches_the_painted_cell_on_every_side(export):
    image = export(CELL_BOX + "\n\n")
    (box,) = image.marks
    assert isinstance(box, BoxMark) and box.label == "cell" and box.tight and lies_on(box, painted()[1]["cell"])
    assert image.classes == ("vessel", "cell") and image.file.name == "a.png"


def test_a_yolo_polygon_covers_the_painted_cell(export):
    (region,) = export(CELL_POLYGON).marks
    assert isinstance(region, Region) and lies_on(region, painted()[1]["cell"])


def test_four_corners_are_a_box_only_if_that_is_said(export):
    (box,) = export(CELL_POLYGON, "--oriented").marks
    assert isinstance(box, BoxMark) and box.tight and lies_on(box, painted()[1]["cell"])
    turned = export("0 0.5 0.2 0.7 0.5 0.5 0.8 0.3 0.5", "--oriented")
    assert not turned.marks[0].tight and turned.marks[0].start == pytest.approx((8, 18)) and "turned" in turned.notes[0]


def test_a_yolo_pose_of_one_keypoint_is_a_box_and_a_point(export):
    point = f" {46.5 / 60:.6f} {11.5 / 40:.6f} 2"
    box, mark = export(CELL_BOX + point, names=YAML + "kpt_shape: [1, 3]\n").marks
    assert isinstance(mark, PointMark) and mark.at == (11.0, 46.0) and lies_on(box, painted()[1]["cell"])
    assert len(export(CELL_BOX + " 0.1 0.1 0", names=YAML + "kpt_shape: [1, 3]\n").marks) == 1


@pytest.mark.parametrize("names_file", ["classes.txt", "obj.names"])
def test_names_may_stand_in_a_text_file(export, names_file):
    assert export(CELL_BOX, names="vessel\ncell\n", names_file=names_file).marks[0].label == "cell"


def test_an_empty_yolo_file_is_an_image_without_objects_and_the_file_may_lie_beside_the_image(tmp_path):
    save_picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "README.txt").write_text("not labels")
    (tmp_path / "classes.txt").write_text("cell\n")
    (image,) = read(yolo, tmp_path)
    assert image.marks == () and image.file == tmp_path / "a.png"


def test_label_files_without_an_image_are_counted_not_passed_over(tmp_path):
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "s.tif.png")
    (tmp_path / "classes.txt").write_text("vessel\ncell\n")
    for name in ("a", "b", "c", "s.tif"):
        (tmp_path / f"{name}.txt").write_text(CELL_BOX + "\n")
    (tmp_path / "train.txt").write_text("images/a.png\nimages/b.png\n")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(AnnotationError, match=r"b\.txt: 2 label file\(s\) .* belong to no image.*--images DIR"):
        read(yolo, tmp_path)
    for name in "bc":
        (tmp_path / f"{name}.txt").unlink()
    assert [image.file.name for image in read(yolo, tmp_path)] == ["a.png", "s.tif.png"]


def test_a_mask_that_is_called_like_the_image_is_not_taken_for_it(export, tmp_path):
    save_picture(tmp_path / "masks" / "train" / "a.png")
    assert export(CELL_BOX).file.parent.parent.name == "images"
    (tmp_path / "images" / "train" / "a.png").unlink()
    save_picture(tmp_path / "images" / "train" / "a.bmp")
    (image,) = read(yolo, tmp_path)
    assert image.file.name == "a.bmp"


def test_images_of_one_name_in_two_parts_are_told_apart(tmp_path):
    for part in ("train", "val"):
        save_picture(tmp_path / "images" / part / "a.png")
        (tmp_path / "labels" / part).mkdir(parents=True)
        (tmp_path / "labels" / part / "a.txt").write_text(CELL_BOX)
    (tmp_path / "data.yaml").write_text(YAML)
    assert [image.file.parent.name for image in read(yolo, tmp_path)] == ["train", "val"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "line 1, class: there is no name for class 2, known are 0 to 1"),
        ("0 320 240 10 10", "expected fractions .* but got 320.*Are these pixels"),
        ("0 0.5 0.5 0.1", "expected a class and x, y, width, height"),
        ("0 0.5 0.5 0.1 nan", "line 1, number 5: expected a number"),
        ("cell 0.5 0.5 0.1 0.1", "line 1, class: expected a number, but got 'cell'"),
    ],
)
def test_what_cannot_be_in_yolo_is_named(export, text, message):
    with pytest.raises(AnnotationError, match=message):
        export(text)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("names: 3", "expected the list of classes"),
        ("names: [a", "not valid YAML"),
        ("names: !!python/name:os.system", "YAML"),
    ],
)
def test_a_broken_data_yaml_is_named(export, names, message):
    with pytest.raises(AnnotationError, match=rf"data\.yaml: .*{message}"):
        export(CELL_BOX, names=names)


def test_without_names_they_are_asked_for(tmp_path):
    save_picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(CELL_BOX)
    with pytest.raises(AnnotationError, match="no class names.*--names FILE"):
        read(yolo, tmp_path)
