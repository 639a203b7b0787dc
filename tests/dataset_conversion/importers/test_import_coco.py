"""COCO JSON, in the form of cocodataset.org/#format-data, on painted objects."""

import json

import numpy as np
import pytest
from importer_oracle import covered, lies_on, painted, read, save_picture

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.imported import BoxMark, PointMark, RasterMask, Region, Tag
from nnunet_dsp.dataset_conversion.importers import coco
from nnunet_dsp.dataset_conversion.importers._rle import decode, encode, runs_of

# x, y, width, height of importer_oracle.PAINTED
CELL_BOX = [31, 5, 16, 7]
CELL_POLYGON = [31.0, 5.0, 47.0, 5.0, 47.0, 12.0, 31.0, 12.0]
# what pycocotools 2.0.11 makes of the painted cell, and of the ellipse of test_..._pycocotools below
CELL_PACKED = "mV17Q100000000000000000000000000000S`0"
ELLIPSE_PACKED = "cd03S14M2N2N2O0O2O0O2O00000O2O00000000000000000001N1000001N101N101N2N2N3Lg:"
CATEGORIES = [
    {"supercategory": "tissue", "id": 7, "name": "vessel"},
    {"supercategory": "tissue", "id": 3, "name": "cell", "keypoints": ["centre"], "skeleton": []},
    {"supercategory": "person", "id": 9, "name": "person", "keypoints": ["nose", "left_eye"], "skeleton": [[1, 2]]},
]


def runs_by_hand(mask):
    """Runs of 0, 1, 0, ... down the columns."""
    runs, value = [0], 0
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if int(mask[y, x]) != value:
                runs.append(0)
                value = 1 - value
            runs[-1] += 1
    return runs


@pytest.fixture
def export(tmp_path):
    """Write a COCO file for one painted image and read it; returns its marks, or all of the SourceImage."""

    def make(*annotations, whole=False, options=(), **image):
        save_picture(tmp_path / "a 1.png")
        content = {
            "info": {"year": 2024},
            "licenses": [],
            "images": [{"id": 42, "width": 60, "height": 40, "file_name": "a 1.png", "license": 1, **image}],
            "annotations": [{"id": 100 + i, "image_id": 42, **a} for i, a in enumerate(annotations)],
            "categories": CATEGORIES,
        }
        (tmp_path / "instances.json").write_text(json.dumps(content))
        (found,) = read(coco, tmp_path / "instances.json", *options)
        return found if whole else found.marks

    return make


def test_a_coco_box_touches_the_painted_cell_on_every_side(export):
    (box,) = export({"category_id": 3, "bbox": CELL_BOX, "area": 112, "iscrowd": 0, "segmentation": []})
    assert isinstance(box, BoxMark) and box.label == "cell" and box.tight
    assert lies_on(box, painted()[1]["cell"])


def test_coco_polygons_and_runs_cover_the_painted_cell_and_bring_its_box(export):
    mask = painted()[1]["cell"]
    forms = (
        [CELL_POLYGON],
        {"counts": runs_by_hand(mask), "size": [40, 60]},
        {"counts": CELL_PACKED, "size": [40, 60]},
    )
    for form in forms:
        area, box = export({"category_id": 3, "bbox": CELL_BOX, "segmentation": form, "iscrowd": 0})
        assert isinstance(area, (Region, RasterMask)) and area.entry == box.entry
        assert lies_on(area, mask) and lies_on(box, mask)
        assert len(export({"category_id": 3, "bbox": CELL_BOX, "segmentation": form}, options=("--no-boxes",))) == 1


def test_coco_runs_are_those_of_pycocotools():
    y, x = np.mgrid[:40, :60]
    ellipse = (y - 20) ** 2 / 90 + (x - 33) ** 2 / 300 < 1
    runs = runs_of(ELLIPSE_PACKED, 2400, "file", "entry")
    assert list(runs) == runs_by_hand(ellipse) == encode(ellipse)
    np.testing.assert_array_equal(decode(runs, 40, 60), ellipse)
    np.testing.assert_array_equal(decode(encode(~ellipse), 40, 60), ~ellipse)


def test_parts_of_a_coco_object_are_joined_not_cut_out_of_each_other(export):
    twice = [CELL_POLYGON, [40.0, 8.0, 50.0, 8.0, 50.0, 10.0, 40.0, 10.0]]
    marks = export({"category_id": 3, "segmentation": twice})
    joined = np.logical_or.reduce([covered(mark, (40, 60)) for mark in marks])
    expected = painted()[1]["cell"]
    expected[8:10, 40:50] = True
    np.testing.assert_array_equal(joined, expected)


def test_a_coco_crowd_is_a_mask_and_no_object(export):
    crowd = {
        "category_id": 3,
        "bbox": CELL_BOX,
        "iscrowd": 1,
        "segmentation": {"counts": CELL_PACKED, "size": [40, 60]},
    }
    (mask,) = export(crowd)
    assert isinstance(mask, RasterMask) and mask.crowd
    image = export(crowd | {"segmentation": []}, whole=True)
    assert image.marks == () and image.incomplete == ("cell",) and "crowd" in image.notes[0]


def test_a_single_coco_keypoint_is_a_point_and_skeletons_are_left_out(export):
    whole, between, hidden, missing, several = (
        {"category_id": 3, "keypoints": [46, 11, 2], "num_keypoints": 1},
        {"category_id": 3, "keypoints": [31.2, 5.9, 2], "bbox": [0, 0, 0, 0]},
        {"category_id": 3, "keypoints": [40, 8, 1]},
        {"category_id": 3, "keypoints": [0, 0, 0]},
        {"category_id": 9, "keypoints": [40, 8, 2, 41, 8, 2], "num_keypoints": 2},
    )
    image = export(whole, between, hidden, missing, several, whole=True)
    cell = painted()[1]["cell"]
    assert all(isinstance(mark, PointMark) and lies_on(mark, cell) for mark in image.marks) and len(image.marks) == 2
    assert image.marks[0].at == (11.0, 46.0) and image.marks[1].at == pytest.approx((5.4, 30.7))
    assert any("hidden" in note for note in image.notes) and any("several" in note for note in image.notes)


def test_a_coco_annotation_without_a_place_is_a_tag(export):
    (tag,) = export({"category_id": 7})
    assert tag == Tag("vessel", True, "annotations[0] (id 100)")


def test_lvis_says_what_is_absent_and_what_is_complete(export):
    one = {"category_id": 3, "bbox": CELL_BOX}
    two = {"category_id": 7, "bbox": [8, 20, 7, 13]}
    image = export(one, two, whole=True, neg_category_ids=[9], not_exhaustive_category_ids=[7])
    assert Tag("person", False, "images[0].neg_category_ids") in image.marks
    assert image.complete == {"boxes": ("cell",)}


def test_coco_classes_keep_their_order_and_the_stated_size(export):
    image = export(whole=True)
    assert image.classes == ("vessel", "cell", "person") and image.expected_shape == (40, 60) and image.marks == ()


def test_every_coco_file_of_a_folder_finds_the_images_beside_it(tmp_path):
    for number, part in enumerate(("train", "valid")):
        picture = painted()[0] + number
        save_picture(tmp_path / part / "same.png", picture)
        content = {"images": [{"id": 0, "file_name": "same.png"}], "annotations": [], "categories": CATEGORIES}
        (tmp_path / part / "_annotations.coco.json").write_text(json.dumps(content))
    (tmp_path / "settings.json").write_text("{}")
    assert [image.file.parent.name for image in read(coco, tmp_path)] == ["train", "valid"]


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"category_id": 4}, r"annotations\[0\] \(id 100\).category_id: there is no category with the id 4"),
        ({"category_id": 3, "image_id": 1}, r"annotations\[0\]: there is no image with the id 1"),
        ({"category_id": 3, "bbox": [1, 2, 3]}, r"bbox: expected \[x, y, width, height\]"),
        ({"category_id": 3, "bbox": [1, 2, "a", 4]}, r"bbox\[2\]: expected a number, but got 'a'"),
        ({"category_id": 3, "bbox": [1, 2, 1e300, 4]}, r"bbox\[2\]: expected a number"),
        ({"category_id": 3, "segmentation": [[1, 2, 3]]}, r"segmentation\[0\]: expected pairs of x and y"),
        ({"category_id": 3, "segmentation": {"counts": [2400], "size": [60, 40]}}, "60 rows and 40 columns"),
        ({"category_id": 3, "segmentation": {"counts": [2399], "size": [40, 60]}}, "add up to 2399 pixels"),
        ({"category_id": 3, "segmentation": {"counts": "é", "size": [40, 60]}}, "belongs to no run length"),
        ({"category_id": 3, "segmentation": {"counts": [10**18], "size": [40, 60]}}, "expected a whole number from 0"),
        ({"category_id": 3, "iscrowd": 2}, "iscrowd: expected 0 or 1"),
        ({"category_id": 3, "keypoints": [1, 2]}, "expected x, y, visibility"),
    ],
)
def test_what_cannot_be_in_coco_is_named(export, annotation, message):
    with pytest.raises(AnnotationError, match=message):
        export(annotation)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ('{"images": [', "not valid JSON.*cut off"),
        ('{"images": [], "images": []}', "stands twice"),
        ('{"images": [NaN]}', "NaN is no number"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ('{"images": []}', 'expected a list "annotations"'),
        ("[1]", "expected COCO's object"),
    ],
)
def test_a_file_that_is_not_coco_is_named(tmp_path, text, message):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(AnnotationError, match=rf"broken\.json: .*{message}"):
        read(coco, tmp_path / "broken.json")


def test_no_image_outside_of_the_folder_is_read(export, tmp_path):
    save_picture(tmp_path.parent / "outside.png")
    for name in ("../outside.png", str(tmp_path.parent / "outside.png"), "..\\outside.png"):
        with pytest.raises(AnnotationError, match=r"images\[0\]: there is no image"):
            export(file_name=name)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_file_of_a_folder_that_lacks_one_of_the_lists_is_named_not_passed_over(tmp_path, key):
    for part in "ab":
        save_picture(tmp_path / f"{part}.png")
        content = {"images": [{"id": 1, "file_name": f"{part}.png"}], "annotations": [], "categories": CATEGORIES}
        if part == "b":
            del content[key]
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=rf'b\.json: expected a list "{key}", but got null'):
        read(coco, tmp_path)


@pytest.mark.parametrize("number", [2**31, 20240501123456, 10**30, "20240501123456"])
def test_ids_may_have_any_size(tmp_path, number):
    save_picture(tmp_path / "a.png")
    content = {
        "images": [{"id": number, "file_name": "a.png"}],
        "annotations": [{"id": number, "image_id": number, "category_id": number, "bbox": CELL_BOX}],
        "categories": [{"id": number, "name": "cell"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    (image,) = read(coco, tmp_path / "c.json")
    assert [mark.label for mark in image.marks] == ["cell"]
