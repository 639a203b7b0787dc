"""Which file a tool meant by the name that it wrote down: never that of another folder, whatever roots are called."""

import base64
import json

import pytest
from importer_oracle import read, save_picture

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.image_files import ImageFolder
from nnunet_dsp.dataset_conversion.importers import coco, cvat, labelme, voc

FLAT = ("s1.png", "s2.png")
TWO = ("p1/s2.png", "p2/s1.png")


@pytest.fixture
def find(tmp_path):
    """Make empty images and ask for one; returns its path below the folder `scans`."""

    def ask(there, name):
        root = tmp_path / "scans"
        for file in there:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
        return ImageFolder(root).find(name, "a.json").relative_to(root).as_posix()

    return ask


@pytest.mark.parametrize(
    ("there", "name", "found"),
    [
        (FLAT, "s1.png", "s1.png"),
        (FLAT, "p1/s1.png", "s1.png"),
        (FLAT, "/home/ann/study/p1/s1.png", "s1.png"),
        (FLAT, r"C:\study\p1\s1.tif", "s1.png"),
        (FLAT, "../images/s1.png", "s1.png"),
        (TWO, "s1.png", "p2/s1.png"),
        (TWO, "study/p2/s1.png", "p2/s1.png"),
        (TWO, "scans/p2/s1.jpg", "p2/s1.png"),
        (TWO, r"D:\p2\s1.png", "p2/s1.png"),
        (("images/p1/s1.png", "images/p2/s1.png"), "p1/s1.png", "images/p1/s1.png"),
        (("images/p1/s1.png", "images/p2/s1.png"), r"\\server\raw\p2\s1.png", "images/p2/s1.png"),
        (("2024/p1/s1.png", "2024/p2/s1.png"), "p2/s1.png", "2024/p2/s1.png"),
        (("2024/p1/s1.png",), "/data/study/p1/s1.png", "2024/p1/s1.png"),
        (("images/s1.png",), "raw/s1.png", "images/s1.png"),
        (("images/s1.png", "masks/s1.png"), "masks/s1", "masks/s1.png"),
        (("p1/s1.png", "p2/s1.jpg"), "p2/s1.png", "p2/s1.jpg"),
    ],
)
def test_roots_of_other_computers_and_one_flat_folder_do_not_matter(find, there, name, found):
    assert find(there, name) == found


@pytest.mark.parametrize(
    ("there", "name"),
    [
        (TWO, "p1/s1.png"),
        (TWO, "/home/ann/p1/s1.png"),
        (TWO, "p3/s1.png"),
        (("p2/s1.png",), "p1/s1.png"),
        (("p1/s1.png", "p2/s1.png"), "p3/s1.png"),
        (("s1.png", "p1/s2.png"), "p1/s1.png"),
        (("2023/p1/s1.png",), "2024/p1/s1.png"),
        (("p2/p1/s1.png", "p1/p2/s2.png"), "p1/p2/s1.png"),
        (("images/train/s1.png", "images/val/s2.png"), "images/val/s1.png"),
    ],
)
def test_an_image_of_the_same_name_in_another_folder_is_another_image(find, there, name):
    with pytest.raises(AnnotationError, match=r"there is no image .*s1\.png lies in another folder.*--images"):
        find(there, name)


def test_a_coco_box_does_not_land_on_another_patients_image(tmp_path):
    for name in TWO:
        save_picture(tmp_path / name)
    content = {
        "images": [{"id": i, "file_name": f"p1/s{i}.png"} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 6, 7, 8]}],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=r"images\[0\]: there is no image 'p1/s1.png'"):
        read(coco, tmp_path / "c.json")


def test_labelme_takes_the_image_it_carries_rather_than_one_of_another_folder(tmp_path):
    carried = save_picture(tmp_path / "elsewhere.png").read_bytes()
    save_picture(tmp_path / "set" / "p2" / "1.png")
    content = {"shapes": [], "imagePath": "1.png", "imageData": base64.b64encode(carried).decode()}
    (tmp_path / "set" / "p1").mkdir()
    (tmp_path / "set" / "p1" / "1.json").write_text(json.dumps(content))
    (image,) = read(labelme, tmp_path / "set")
    assert image.embedded == carried


def test_cvat_leaves_out_an_image_without_annotations_that_only_another_folder_has(tmp_path):
    save_picture(tmp_path / "images" / "a" / "1.png")
    (tmp_path / "annotations.xml").write_text(
        '<annotations><image id="0" name="a/1.png" width="60" height="40">'
        '<box label="cell" xtl="1" ytl="1" xbr="9" ybr="9"/></image>'
        '<image id="1" name="b/1.png" width="60" height="40"></image></annotations>'
    )
    (image,) = read(cvat, tmp_path)
    assert image.file.parent.name == "a" and "'b/1.png' first" in image.notes[0]


def test_voc_does_not_look_for_the_same_name_in_another_folder(tmp_path):
    save_picture(tmp_path / "p2" / "1.png")
    save_picture(tmp_path / "p1" / "2.png")
    (tmp_path / "p1" / "1.xml").write_text("<annotation><filename>p1/1.png</filename></annotation>")
    with pytest.raises(AnnotationError, match=r"there is no image 'p1/1.png'"):
        read(voc, tmp_path)
