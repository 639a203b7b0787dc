"""check.py and report/: each thing that can be wrong with a dataset is planted, and must be found, alone, in words."""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import re
import shutil
from html.parser import HTMLParser
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image
from skimage import io as skio

from nnunet_dsp import check
from nnunet_dsp.annotations import Annotations, Box, Point, write_annotations
from nnunet_dsp.dataset_conversion.parallel import default_num_processes
from nnunet_dsp.report.findings import KINDS, Severity

LABELS = {"background": 0, "cell": 1, "nucleus": 2, "ignore": 3}
NAME = "Dataset007_Planted"


class Planted:
    """A small 2D dataset in which nothing is wrong: three masked cases, two weak ones, one unlabelled.

    In each image a cell fills [10, 30) x [12, 40) and a nucleus [14, 22) x [20, 30) of it.
    """

    cell = Box("cell", (10, 12), (30, 40))
    nucleus = Box("nucleus", (14, 20), (22, 30))

    def __init__(self, root: Path) -> None:
        self.folder = root / NAME
        self.labels = dict(LABELS)
        for part in ("imagesTr", "labelsTr", "annotationsTr"):
            (self.folder / part).mkdir(parents=True)
        for number in range(3):
            self.add(f"masked_{number}", self.truth(), seed=number)
        for number in range(2):
            ignored = np.full((48, 64), 3, np.uint8)
            self.add(f"weak_{number}", ignored, self.said(), seed=10 + number)
        self.add("unlabelled", np.full((48, 64), 3, np.uint8), seed=20)
        self.write_json()

    def truth(self) -> np.ndarray:
        mask = np.zeros((48, 64), np.uint8)
        mask[10:30, 12:40] = 1
        mask[14:22, 20:30] = 2
        return mask

    def said(self, **changes: object) -> Annotations:
        said = {
            "points": (Point("nucleus", (17, 25)), Point("background", (40, 50))),
            "boxes": (self.cell, self.nucleus),
            "present": ("cell", "nucleus"),
        }
        return Annotations(**{**said, **changes})

    def add(self, case: str, mask: np.ndarray | None, said: Annotations | None = None, seed: int = 0) -> None:
        noise = np.random.default_rng(seed).integers(0, 60, (48, 64))
        self.write_image((60 * self.truth() + noise).astype(np.uint8), case)
        if mask is not None:
            self.write_mask(mask, case)
        if said is not None:
            self.say(case, said)

    def write_image(self, pixels: np.ndarray, case: str) -> None:
        skio.imsave(self.folder / "imagesTr" / f"{case}_0000.png", pixels, check_contrast=False)

    def write_mask(self, mask: np.ndarray, case: str) -> None:
        skio.imsave(self.folder / "labelsTr" / f"{case}.png", mask.astype(np.uint8), check_contrast=False)

    def say(self, case: str, said: Annotations) -> None:
        write_annotations(self.folder / "annotationsTr" / f"{case}.json", said)

    def write_json(self, **changes: object) -> None:
        content = {
            "channel_names": {"0": "EM"},
            "labels": self.labels,
            "numTraining": len(list((self.folder / "imagesTr").iterdir())),
            "file_ending": ".png",
        }
        (self.folder / "dataset.json").write_text(json.dumps({**content, **changes}))


def options(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return parser.parse_args(["-d", "7", "--num-processes", "1", *map(str, arguments)])


@pytest.fixture
def planted(tmp_path, monkeypatch):
    raw = tmp_path / "nnUNet_raw"
    raw.mkdir()
    monkeypatch.setenv("nnUNet_raw", str(raw))
    return Planted(raw)


def look(dataset: Planted):
    return check.check(dataset.folder, options())


def run(tmp_path: Path, *arguments: object) -> tuple[int, str]:
    """The exit status and the page."""
    status = check.run(options("-o", tmp_path / "out", *arguments))
    return status, (tmp_path / "out" / f"{NAME}_check.html").read_text(encoding="utf-8")


# --- what is found


def test_a_dataset_without_faults_has_no_findings(planted, tmp_path, capsys):
    report = look(planted)
    assert [finding.text for finding in report.findings] == []
    assert {case.name: case.status for case in report.cases} == {
        **{f"masked_{n}": "masked" for n in range(3)},
        **{f"weak_{n}": "weak" for n in range(2)},
        "unlabelled": "unlabelled",
    }
    status, page = run(tmp_path)
    assert status == 0
    assert "Nothing wrong was found" in page
    assert str(tmp_path / "out" / f"{NAME}_check.html") in capsys.readouterr().out


def plant_point_in_another_class(d: Planted) -> None:
    d.say("masked_0", Annotations(points=(Point("cell", (17, 25)),)))


def plant_two_classes_at_a_point(d: Planted) -> None:
    d.say("weak_0", d.said(points=(Point("cell", (5, 5)), Point("nucleus", (5, 5)))))


def plant_empty_box(d: Planted) -> None:
    d.say("masked_0", Annotations(boxes=(Box("nucleus", (35, 50), (40, 56)),)))


def plant_object_without_box(d: Planted) -> None:
    mask = d.truth()
    mask[40:45, 50:58] = 2
    d.write_mask(mask, "masked_0")
    d.say("masked_0", Annotations(boxes=(d.nucleus,), complete_boxes=("nucleus",)))


def plant_wrong_tag(d: Planted) -> None:
    d.say("masked_0", Annotations(absent=("nucleus",)))


def plant_unknown_value(d: Planted) -> None:
    mask = d.truth()
    mask[:3, :3] = 9
    d.write_mask(mask, "masked_0")


def plant_shape_mismatch(d: Planted) -> None:
    d.write_mask(d.truth()[:40], "masked_0")


def plant_truncated_image(d: Planted) -> None:
    file = d.folder / "imagesTr" / "masked_1_0000.png"
    file.write_bytes(file.read_bytes()[:60])


def plant_infinite_values(d: Planted) -> None:
    """In all cases, since only TIFF holds them, and a dataset has one file ending."""
    for part in ("imagesTr", "labelsTr"):
        for file in list((d.folder / part).iterdir()):
            dtype = np.float32 if part == "imagesTr" else np.uint8
            tifffile.imwrite(file.with_suffix(".tif"), skio.imread(file).astype(dtype))
            file.unlink()
    file = d.folder / "imagesTr" / "weak_1_0000.tif"
    image = skio.imread(file)
    image[3, 4:6] = -np.inf
    tifffile.imwrite(file, image)
    d.write_json(file_ending=".tif")


def plant_broken_annotation_file(d: Planted) -> None:
    (d.folder / "annotationsTr" / "weak_0.json").write_text('{"format": "nnunet_dsp.annotations", "version": 1, "poi')


def plant_point_outside(d: Planted) -> None:
    d.say("weak_0", d.said(points=(Point("cell", (20, 70)),)))


def plant_annotations_of_no_case(d: Planted) -> None:
    d.say("weak_7", d.said())


def plant_unknown_case_in_splits(d: Planted) -> None:
    (d.folder / "splits_final.json").write_text(json.dumps([{"train": ["masked_0"], "val": ["masked_9"]}]))


def plant_labels_with_a_gap(d: Planted) -> None:
    d.labels = {"background": 0, "cell": 1, "nucleus": 4}


def plant_image_without_channel_number(d: Planted) -> None:
    d.write_mask(d.truth(), "embryo")
    shutil.copy(d.folder / "imagesTr" / "masked_0_0000.png", d.folder / "imagesTr" / "embryo.png")


def plant_list_of_channels(d: Planted) -> None:
    d.write_json(channel_names=["EM1"])


def plant_ending_without_dot(d: Planted) -> None:
    d.write_json(file_ending="png")


def plant_regions(d: Planted) -> None:
    d.labels = {"background": 0, "whole": [1, 2], "nucleus": 2, "ignore": 3}
    d.write_json(labels=d.labels, regions_class_order=[1, 2])
    for number in range(2):
        d.say(f"weak_{number}", Annotations(points=(Point("nucleus", (17, 25)),)))


def plant_single_voxel_box(d: Planted) -> None:
    d.say("weak_0", d.said(boxes=(d.cell, Box("nucleus", (16, 25), (17, 26)))))


def plant_flat_box(d: Planted) -> None:
    d.say("weak_0", d.said(boxes=(d.cell, Box("nucleus", (16, 25), (17, 35)))))


def plant_box_twice(d: Planted) -> None:
    d.say("weak_0", d.said(boxes=(d.cell, d.nucleus, d.nucleus)))


def plant_whole_image_box(d: Planted) -> None:
    d.say("weak_0", d.said(boxes=(Box("cell", (0, 0), (48, 64)), d.nucleus)))


def plant_close_points(d: Planted) -> None:
    d.say("weak_0", d.said(points=(Point("nucleus", (17, 25)), Point("nucleus", (17, 26)))))


def plant_generous_box(d: Planted) -> None:
    d.say("masked_0", Annotations(boxes=(Box("nucleus", (14, 20), (22, 36)),)))


def plant_twin_images(d: Planted) -> None:
    shutil.copy(d.folder / "imagesTr" / "masked_0_0000.png", d.folder / "imagesTr" / "weak_1_0000.png")


def plant_flat_image(d: Planted) -> None:
    d.write_image(np.full((48, 64), 77, np.uint8), "unlabelled")


def plant_unused_class(d: Planted) -> None:
    d.labels = {"background": 0, "cell": 1, "nucleus": 2, "spindle": 3, "ignore": 4}
    for case in ("weak_0", "weak_1", "unlabelled"):
        d.write_mask(np.full((48, 64), 4), case)


def plant_mask_without_image(d: Planted) -> None:
    d.write_mask(d.truth(), "nobody")


def plant_empty_annotation_file(d: Planted) -> None:
    d.say("unlabelled", Annotations())


def plant_no_label_file(d: Planted) -> None:
    (d.folder / "labelsTr" / "weak_0.png").unlink()


def plant_wrong_count(d: Planted) -> None:
    d.write_json(numTraining=99)


def plant_background_only(d: Planted) -> None:
    d.write_mask(np.zeros((48, 64)), "masked_2")


def plant_speck(d: Planted) -> None:
    mask = d.truth()
    mask[40, 60] = 2
    d.write_mask(mask, "masked_0")


def plant_rare_class(d: Planted) -> None:
    for number in range(2):
        d.write_mask(np.minimum(d.truth(), 1), f"masked_{number}")


PLANTS = [
    (plant_point_in_another_class, {"point"}, r"masked_0: points\[0\] marks 'cell' at \(17, 25\).*'nucleus'", True),
    (plant_two_classes_at_a_point, {"point"}, r"weak_0: points\[0\] and points\[1\] mark the voxel \(5, 5\)", True),
    (plant_empty_box, {"box"}, r"masked_0: boxes\[0\] from \(35, 50\).* holds no voxel of 'nucleus'", True),
    (plant_object_without_box, {"complete"}, r"40 voxels of 'nucleus' outside every box", True),
    (plant_wrong_tag, {"tag"}, r"'nucleus' as absent, but the mask has 80 voxels", True),
    (plant_unknown_value, {"integrity"}, r"integrity: masked_0: Unexpected labels .* Found: \[0. 1. 2. 9.\]", True),
    (plant_shape_mismatch, {"integrity"}, r"integrity: masked_0: Shape mismatch .* Shape images: \(1, 48, 64\)", True),
    (plant_truncated_image, {"unreadable"}, r"masked_1: its image cannot be read \(masked_1_0000.png\)", False),
    (plant_infinite_values, {"unreadable"}, r"weak_1: 2 voxel\(s\) of its image are infinite", False),
    (plant_broken_annotation_file, {"annotation-file"}, r"weak_0.json\): not valid JSON .* cut off", True),
    (plant_point_outside, {"annotation-file"}, r"points\[0\] lies at \(20, 70\), outside the image", True),
    (plant_annotations_of_no_case, {"annotation-file"}, r"no case 'weak_7'", False),
    (plant_unknown_case_in_splits, {"split"}, r"masked_9", False),
    (plant_labels_with_a_gap, {"dataset"}, r"numbered 0, 1, 2", False),
    (
        plant_image_without_channel_number,
        {"dataset", "orphan-label", "unprepared"},
        r"such as embryo.png. Rename it to embryo_0000.png",
        False,
    ),
    (plant_list_of_channels, {"dataset"}, r'channel_names of the form \{"0": "NAME"\}', False),
    (plant_ending_without_dot, {"dataset"}, r'file_ending such as ".png", but got "png"', False),
    (plant_regions, {"regions"}, r"plain labels", False),
    (plant_single_voxel_box, {"thin-box"}, r"weak_0: boxes\[1\] of 'nucleus' .* a single voxel", True),
    (plant_flat_box, {"thin-box"}, r"one voxel thin", True),
    (plant_box_twice, {"double-box"}, r"boxes\[1\] and boxes\[2\] \(both 'nucleus'\) are the same", True),
    (plant_whole_image_box, {"huge-box"}, r"boxes\[0\] of 'cell' .* spans the image", True),
    (plant_close_points, {"close-points"}, r"points\[0\] and points\[1\]", True),
    (plant_generous_box, {"loose-fit"}, r"boxes\[0\] of 'nucleus' .* 6 of its rows, columns or slices", True),
    (plant_twin_images, {"twins"}, r"masked_0, weak_1 are the same image", True),
    (plant_flat_image, {"flat-image"}, r"unlabelled: the image holds the value 77 only", True),
    (plant_unused_class, {"never"}, r"'spindle' occurs in no mask", False),
    (plant_mask_without_image, {"orphan-label"}, r"nobody", False),
    (plant_empty_annotation_file, {"empty-file"}, r"unlabelled.json\) says nothing", False),
    (plant_no_label_file, {"unprepared"}, r"1 of 6 cases have no label file \(weak_0\)", False),
    (plant_wrong_count, {"unprepared"}, r"numTraining 99", False),
    (plant_background_only, {"no-foreground"}, r"masked_2", True),
    (plant_speck, {"speck"}, r"the first at \(40, 60\)", True),
    (plant_rare_class, {"rare"}, r"'nucleus' is in the mask of one case only, masked_2", False),
]


WRITING_JSON = (
    plant_wrong_count, plant_regions, plant_infinite_values, plant_list_of_channels, plant_ending_without_dot,
)  # fmt: skip


@pytest.mark.parametrize(
    ("plant", "kinds", "words", "pictured"), PLANTS, ids=[plant.__name__[6:] for plant, *_ in PLANTS]
)
def test_a_planted_fault_is_found_and_nothing_else(planted, plant, kinds, words, pictured):
    plant(planted)
    if plant not in WRITING_JSON:
        planted.write_json()
    report = look(planted)
    texts = "\n".join(f"{finding.kind}: {finding.text}" for finding in report.findings)
    assert {finding.kind for finding in report.findings} == kinds, texts
    assert re.search(words, texts), texts
    assert any(finding.picture is not None for finding in report.findings) == pictured
    bad = any(KINDS[kind].severity == Severity.ERROR for kind in kinds)
    assert (report.errors > 0) == bad


def test_boxes_that_are_all_off_by_one_are_told_as_a_habit_with_axis_and_side(planted):
    for number in range(3):
        boxes = (Box("cell", (11, 12), (30, 40)), Box("nucleus", (15, 20), (22, 30)))
        planted.say(f"masked_{number}", Annotations(boxes=boxes))
    report = look(planted)
    assert [finding.kind for finding in report.findings] == ["shifted"]
    assert "In 6 of 6 tight boxes" in report.findings[0].text
    assert "begin 1 voxel(s) before the box's start along y" in report.findings[0].text


def test_boxes_of_objects_that_touch_are_not_called_shifted(planted):
    """Where the mask of a class goes on beyond the box, nobody knows where the object ends."""
    tiles = [((y, x), (y + 8, x + 8)) for y in range(4, 36, 8) for x in range(4, 60, 8)]
    mask = np.zeros((48, 64), np.uint8)
    mask[4:36, 4:60] = 1
    mask[40:44, 40:44] = 2
    for number in range(3):
        planted.write_mask(mask, f"masked_{number}")
        planted.say(f"masked_{number}", Annotations(boxes=tuple(Box("cell", *tile) for tile in tiles)))
    assert [finding.text for finding in look(planted).findings] == []


def test_swapped_axes_are_suspected_in_words(planted):
    points = tuple(Point("cell", (x, y)) for y, x in ((12, 36), (13, 37), (11, 38)))
    planted.say("masked_0", Annotations(points=points))
    texts = " ".join(finding.text for finding in look(planted).findings)
    assert "were they written as (x, y)?" in texts


def test_errors_come_before_doubts_and_doubts_before_notes(planted):
    for plant in (plant_speck, plant_close_points, plant_empty_annotation_file):
        plant(planted)
    planted.say("masked_1", Annotations(absent=("nucleus",)))
    assert [finding.kind for finding in look(planted).findings] == ["tag", "close-points", "empty-file", "speck"]


def test_a_dataset_that_cannot_be_listed_still_gets_its_report(planted, tmp_path, capsys):
    (planted.folder / "dataset.json").write_text("{")
    status, page = run(tmp_path)
    assert status == 1
    assert "dataset.json is not valid JSON" in page
    assert "is not valid JSON" in capsys.readouterr().err


def test_an_unprepared_dataset_without_any_label_file_is_checked(planted):
    """A dataset as `import` leaves it: no ignore label, no label files for weak cases."""
    shutil.rmtree(planted.folder / "labelsTr")
    planted.labels.pop("ignore")
    planted.write_json()
    report = look(planted)
    assert report.errors == 0
    assert {finding.kind for finding in report.findings} == {"unprepared", "no-mask"}
    assert {case.status for case in report.cases} == {"weak", "unlabelled"}


def test_a_mask_of_some_classes_is_partial_and_its_background_is_not_called_complete(planted):
    planted.write_mask(np.where(planted.truth() == 2, 0, planted.truth()), "masked_0")
    planted.say("masked_0", Annotations(points=(Point("nucleus", (17, 25)),), mask_labels=("cell",)))
    report = look(planted)
    assert report.errors == 0
    assert report.cases[0].status == "partly masked"


def test_the_counts_are_those_of_the_files(planted):
    planted.say("weak_0", planted.said(boxes=(planted.cell, Box("nucleus", (14, 20), (25, 33), tight=False))))
    report = look(planted)
    nucleus = next(count for count in report.classes if count.name == "nucleus")
    assert (nucleus.voxels, nucleus.mask_cases) == (3 * 80, 3)
    assert (nucleus.points, nucleus.point_cases) == (2, 2)
    assert (nucleus.tight_boxes, nucleus.loose_boxes, nucleus.box_cases) == (1, 1, 2)
    assert (nucleus.present, nucleus.absent) == (2, 0)


@pytest.mark.parametrize("fault", [None, "spacing", "nan", "value"])
def test_it_finds_an_error_exactly_where_nnunets_own_check_fails(tmp_path, monkeypatch, fault):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = tmp_path / NAME
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for case in ("a", "b"):
        image = np.random.default_rng(ord(case)).normal(size=(4, 12, 10)).astype(np.float32)
        mask = (image > 1).astype(np.uint8)
        spacing = (0.5, 0.5, 2.0)
        if case == "b" and fault == "nan":
            image[1, 2, 3] = np.nan
        if case == "b" and fault == "value":
            mask[0, 0, 0] = 5
        write_volume(image, folder / "imagesTr" / f"{case}_0000.mha", spacing)
        write_volume(mask, folder / "labelsTr" / f"{case}.mha", (0.5, 0.5, 3.0) if fault == "spacing" else spacing)
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "cell": 1}, "numTraining": 2}
    (folder / "dataset.json").write_text(json.dumps({**content, "file_ending": ".mha"}))
    # threads instead of processes: starting one takes longer than all of this
    with_threads, own = SimpleNamespace(Pool=ThreadPool), multiprocessing.get_context()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: with_threads if method else own)
    report = check.check(folder, options())
    kinds = {finding.kind for finding in report.findings if finding.severity == Severity.ERROR}
    if fault is None:
        verify_dataset_integrity(str(folder), 1)
        assert not kinds
    else:
        with pytest.raises(RuntimeError, match="Some (segmentation )?images"):
            verify_dataset_integrity(str(folder), 1)
        assert kinds == {"integrity"}


def write_volume(array: np.ndarray, file: Path, spacing: tuple[float, float, float]) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file))


# --- what the pictures show


def decode(picture) -> np.ndarray:
    """The bitmap as shown, stretched to display units."""
    image = Image.open(io.BytesIO(picture.image)).convert("L")
    return np.asarray(image.resize((round(picture.width), round(picture.height)), Image.Resampling.NEAREST))


def bright_extent(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """x, y, width and height of what is bright."""
    rows, columns = np.nonzero(pixels > 128)
    return columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1


def test_boxes_and_points_are_drawn_where_the_voxels_are(planted):
    pixels = np.zeros((48, 64), np.uint8)
    pixels[10:30, 12:40] = 255
    planted.write_image(pixels, "weak_0")
    centre = (19.5, 25.5)  # of a block of an even number of voxels
    planted.say("weak_0", Annotations(boxes=(planted.cell,), points=(Point("cell", centre),)))
    picture = next(case for case in look(planted).cases if case.name == "weak_0").pictures[0]
    box = next(mark for mark in picture.marks if mark.shape == "box")
    point = next(mark for mark in picture.marks if mark.shape == "point")
    x, y, width, height = bright_extent(decode(picture))
    np.testing.assert_allclose(box.at, (x, y, width, height), atol=1.0)
    np.testing.assert_allclose(point.at, (x + width / 2, y + height / 2), atol=1.0)


@pytest.mark.parametrize("thick_axis", [0, 1])
def test_volumes_are_cut_across_their_thick_axis_and_keep_their_proportions(tmp_path, monkeypatch, thick_axis):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = tmp_path / NAME
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    shape = [30, 30, 30]
    shape[thick_axis] = 9
    plane = [axis for axis in range(3) if axis != thick_axis]
    spacing = [1.0, 1.0, 1.0]  # array order
    spacing[thick_axis], spacing[plane[0]] = 6.0, 2.0
    start, stop = [4, 4, 4], [10, 10, 10]
    start[thick_axis], stop[thick_axis] = 6, 8
    start[plane[1]], stop[plane[1]] = 15, 27
    image = np.zeros(shape, np.float32)
    image[tuple(map(slice, start, stop))] = 1000
    write_volume(image, folder / "imagesTr" / "a_0000.nii.gz", tuple(spacing[::-1]))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "cell": 1, "ignore": 2}, "numTraining": 1}
    (folder / "dataset.json").write_text(json.dumps({**content, "file_ending": ".nii.gz"}))
    point = [(a + b - 1) / 2 for a, b in zip(start, stop, strict=True)]
    point[thick_axis] = 6
    said = Annotations(boxes=(Box("cell", tuple(start), tuple(stop)),), points=(Point("cell", tuple(point)),))
    write_annotations(folder / "annotationsTr" / "a.json", said)
    picture = check.check(folder, options()).cases[0].pictures[0]
    assert "slice 6 of 0 to 8" in picture.caption
    assert picture.height == pytest.approx(2 * picture.width, rel=0.01)
    box = next(mark for mark in picture.marks if mark.shape == "box")
    x, y, width, height = bright_extent(decode(picture))
    np.testing.assert_allclose(box.at, (x, y, width, height), atol=2.0)
    point_mark = next(mark for mark in picture.marks if mark.shape == "point")
    np.testing.assert_allclose(point_mark.at, (x + width / 2, y + height / 2), atol=2.0)


def test_masks_lie_on_the_image_in_their_classes_colours(planted):
    picture = look(planted).cases[0].pictures[0]
    layer = np.asarray(Image.open(io.BytesIO(picture.layer)).convert("RGBA"))
    assert layer.shape[:2] == (48, 64)
    truth = planted.truth()
    for label, colour in ((1, (0xE6, 0x9F, 0x00)), (2, (0x56, 0xB4, 0xE9))):
        assert (layer[truth == label][:, :3] == colour).all()
        assert (layer[truth == label][:, 3] > 60).all()
    assert (layer[truth == 0][:, 3] == 0).all()


def test_a_close_up_shows_what_the_finding_is_about(planted):
    plant_empty_box(planted)
    finding = look(planted).findings[0]
    shapes = [mark.shape for mark in finding.picture.marks]
    assert shapes.count("box") == 1
    assert shapes.count("look") == 1
    box, here = (next(m for m in finding.picture.marks if m.shape == shape) for shape in ("box", "look"))
    assert here.at[0] < box.at[0] and here.at[1] < box.at[1]
    assert here.at[2] > box.at[2] and here.at[3] > box.at[3]


def test_slices_are_chosen_so_that_annotations_are_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = tmp_path / NAME
    (folder / "imagesTr").mkdir(parents=True)
    image = np.random.default_rng(0).normal(size=(40, 12, 12)).astype(np.float32)
    write_volume(image, folder / "imagesTr" / "a_0000.nii.gz", (1, 1, 1))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "cell": 1}, "numTraining": 1}
    (folder / "dataset.json").write_text(json.dumps({**content, "file_ending": ".nii.gz"}))
    points = tuple(Point("cell", (z, 5, 5)) for z in (3, 11, 30))
    boxes = (Box("cell", (9, 2, 2), (13, 8, 8)), Box("cell", (33, 2, 2), (36, 8, 8)))
    write_annotations(folder / "annotationsTr" / "a.json", Annotations(points=points, boxes=boxes))
    pictures = check.check(folder, options()).cases[0].pictures
    shown = [int(picture.caption.split()[1]) for picture in pictures]
    assert {3, 11, 30} <= set(shown)
    assert any(33 <= z < 36 for z in shown)
    assert len(shown) == 4
    few = check.check(folder, options("--slices", 2)).cases[0]
    assert len(few.pictures) == 2
    assert "points and boxes lie in others" in few.hidden


def test_colour_images_are_shown_in_colour(planted):
    rgb = np.zeros((48, 64, 3), np.uint8)
    rgb[..., 0] = 200
    rgb[:24, :, 2] = 120
    for file in (planted.folder / "imagesTr").iterdir():
        skio.imsave(file, rgb + np.uint8(len(file.name) % 7), check_contrast=False)
    planted.write_json(channel_names={"0": "R", "1": "G", "2": "B"})
    report = look(planted)
    assert report.errors == 0
    shown = np.asarray(Image.open(io.BytesIO(report.cases[0].pictures[0].image)).convert("RGB")).astype(int)
    assert shown[40, 30, 0] > 170 and shown[40, 30, 2] < 50 and shown[5, 30, 2] > 90


def test_a_grey_picture_among_colour_pictures_is_named_and_shown(planted):
    for file in (planted.folder / "imagesTr").iterdir():
        if file.name != "masked_0_0000.png":
            grey = skio.imread(file)
            skio.imsave(file, np.dstack([grey] * 3), check_contrast=False)
    planted.write_json(channel_names={"0": "R", "1": "G", "2": "B"})
    report = look(planted)
    assert [finding.kind for finding in report.findings] == ["integrity"]
    assert "masked_0: Unexpected number of modalities. Expected: 3. Got: 1" in report.findings[0].text
    assert report.cases[0].pictures


# --- the page


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text outside script and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.words.append(data)


def test_names_from_files_cannot_put_markup_into_the_page(planted, tmp_path):
    evil = "<script>alert(1)</script>"
    planted.labels = {"background": 0, evil: 1, '"><img src=x onerror=alert(2)>': 2, "ignore": 3}
    for number in range(2):
        said = Annotations(points=(Point(evil, (17, 25)),), present=(evil,))
        planted.say(f"weak_{number}", said)
    case = "<b onclick=alert(3)>'&amp;{{7*7}}"
    planted.add(case, planted.truth(), Annotations(absent=(evil,)), seed=99)
    planted.write_json(description="<iframe src=//x></iframe>")
    status, page = run(tmp_path)
    assert status == 1
    parsed = Tags(page)
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert not {"b", "iframe"} & {tag for tag, attrs in parsed.tags if tag != "b" or attrs}
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    text = " ".join(parsed.words)
    assert evil in text and case in text


def test_the_page_loads_nothing_and_runs_no_script_but_its_own(planted, tmp_path):
    plant_close_points(planted)
    _, page = run(tmp_path)
    parsed = Tags(page)
    for _, attrs in parsed.tags:
        assert (attrs.get("src") or "data:").startswith("data:")
        assert (attrs.get("href") or "#").startswith("#")
    policy = next(attrs["content"] for tag, attrs in parsed.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    assert all(attrs.get("alt") is not None for tag, attrs in parsed.tags if tag == "img")


def test_pictures_beyond_the_size_asked_for_are_left_out_and_this_is_said(planted, tmp_path):
    plant_close_points(planted)  # weak_0 has a finding, so its picture is the last to go
    report = look(planted)
    case = next(case for case in report.cases if case.name == "weak_0")
    finding = report.findings[0].picture
    limit = finding.num_bytes + sum(picture.num_bytes for picture in case.pictures) + 10
    page = check.write(report, tmp_path, limit).read_text()
    assert "The pictures of 5 of 6 cases" in page
    assert case.pictures


def test_json_holds_findings_and_counts(planted, tmp_path):
    plant_wrong_tag(planted)
    status, _ = run(tmp_path, "--json", tmp_path / "deep" / "found.json")
    found = json.loads((tmp_path / "deep" / "found.json").read_text())
    assert status == 1
    assert (found["format"], found["version"], found["errors"]) == ("nnunet_dsp.check", 1, 1)
    assert found["findings"][0]["case"] == "masked_0"
    assert found["findings"][0]["severity"] == "error"
    assert {case["case"]: case["status"] for case in found["cases"]}["weak_1"] == "weak"
    assert next(entry for entry in found["classes"] if entry["name"] == "cell")["points"] == 0


def test_the_dataset_is_left_as_it_was(planted, tmp_path):
    def contents() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in planted.folder.rglob("*") if p.is_file()}

    before = contents()
    run(tmp_path)
    assert contents() == before


@pytest.mark.parametrize(("flag", "value"), [("--num-processes", 0), ("--batches", -1), ("--slices", 0)])
def test_senseless_numbers_are_refused(planted, flag, value):
    with pytest.raises(ValueError, match=f"Expected {flag} to be at least"):
        check.run(options(flag, value))


def test_a_channel_that_is_not_there_is_refused(planted):
    with pytest.raises(ValueError, match="Expected --channel to be at most 0, .* names 1 channel.*, but got 7"):
        check.run(options("--channel", 7))


def test_batches_of_a_dataset_that_is_not_planned_are_refused_at_once(planted, tmp_path, monkeypatch):
    (tmp_path / "pre").mkdir()
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))
    with pytest.raises(FileNotFoundError, match="nnUNetv2_plan_and_preprocess"):
        check.run(options("--batches", 1))


def test_the_default_is_as_many_processes_as_elsewhere():
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    assert parser.parse_args(["-d", "1"]).num_processes == default_num_processes()
