"""`nnunet_dsp import` from marks to files: what is written, refused, told, and what is left behind (nothing)."""

import json
import os
import shutil

import numpy as np
import pytest
import tifffile
from importer_oracle import painted, save_picture
from PIL import Image
from skimage import io

from nnunet_dsp.annotations import AnnotationError, LabelNames, read_annotations
from nnunet_dsp.cli import main
from nnunet_dsp.dataset_conversion import import_annotations
from nnunet_dsp.dataset_conversion.import_writing import case_names
from nnunet_dsp.dataset_conversion.imported import SourceImage

CELL, VESSEL, NERVE = 1, 2, 3
CATEGORIES = [{"id": CELL, "name": "cell"}, {"id": VESSEL, "name": "vessel"}, {"id": NERVE, "name": "nerve"}]
for category in CATEGORIES:
    category["keypoints"] = ["point"]


def box(category, x, y, width, height, **more):
    return {"category_id": category, "bbox": [x, y, width, height], **more}


def polygon(category, *xy, **more):
    return {"category_id": category, "segmentation": [list(xy)], **more}


def rectangle(category, x0, y0, x1, y1, **more):
    return polygon(category, x0, y0, x1, y0, x1, y1, x0, y1, **more)


@pytest.fixture
def source(tmp_path):
    """Write a COCO file: annotations by image name; returns it. Images are the painted one unless they exist."""

    def make(**annotations):
        folder = tmp_path / "source"
        images, entries = [], []
        for number, (name, marks) in enumerate(annotations.items()):
            file = folder / f"{name}.png"
            if not file.exists():
                save_picture(file)
            images.append({"id": number, "file_name": file.name})
            entries += [{"id": len(entries) + i, "image_id": number, **m} for i, m in enumerate(marks)]
        content = {"images": images, "annotations": entries, "categories": CATEGORIES}
        (folder / "coco.json").write_text(json.dumps(content))
        return folder / "coco.json"

    return make


@pytest.fixture
def imported(nnunet, call, source):
    """Import marks of one image `a` (or of several, by name) as dataset 1; returns what was written."""

    def run(marks, *options):
        file = source(**(marks if isinstance(marks, dict) else {"a": marks}))
        assert call(import_annotations, "coco", file, "-d", 1, "--name", "X", "--overwrite", *options) == 0
        return Written(nnunet / "Dataset001_X")

    return run


class Written:
    """A dataset on disk."""

    def __init__(self, folder):
        self.folder = folder
        self.json = json.loads((folder / "dataset.json").read_text())
        self.labels = self.json["labels"]

    def said(self, case="a"):
        return read_annotations(self.folder / "annotationsTr" / f"{case}.json", LabelNames.from_dataset_json(self.json))

    def mask(self, case="a"):
        return io.imread(self.folder / "labelsTr" / f"{case}.png")


def test_boxes_points_and_tags_arrive_in_voxels_of_the_image(imported):
    written = imported(
        [box(CELL, 31, 5, 16, 7), {"category_id": VESSEL, "keypoints": [14, 32, 2]}, {"category_id": NERVE}]
    )
    said = written.said()
    assert (said.boxes[0].start, said.boxes[0].stop, said.boxes[0].tight) == ((5, 31), (12, 47), True)
    assert said.points[0].label == "vessel" and said.points[0].at == (32, 14)
    assert said.present == ("nerve",) and said.shape == (40, 60)
    assert written.labels == {"background": 0, "cell": 1, "vessel": 2, "nerve": 3, "ignore": 4}
    assert written.json["numTraining"] == 1 and written.json["channel_names"] == {"0": "image"}
    assert not (written.folder / "labelsTr" / "a.png").exists()  # prepare writes those


def test_regions_are_a_partial_mask_unless_their_classes_were_drawn_completely(imported):
    masks = painted()[1]
    cell = rectangle(CELL, 31, 5, 47, 12)
    np.testing.assert_array_equal(imported([cell]).mask(), np.where(masks["cell"], 1, 4))
    written = imported([cell], "--mask-labels", "cell,vessel")
    np.testing.assert_array_equal(written.mask(), masks["cell"])
    assert written.said().mask_labels == ("cell", "vessel") and written.labels["ignore"] == 4
    written = imported([cell], "--mask-labels", "all")
    np.testing.assert_array_equal(written.mask(), masks["cell"])
    assert "ignore" not in written.labels and not (written.folder / "annotationsTr" / "a.json").exists()
    written = imported([cell], "--mask-labels", "vessel")  # a cell was drawn, but not every cell
    np.testing.assert_array_equal(written.mask(), np.where(masks["cell"], 1, 4))


def test_the_smaller_of_two_regions_lies_on_top_and_that_is_told(imported, capsys):
    written = imported([rectangle(VESSEL, 10, 10, 14, 14), rectangle(CELL, 0, 0, 30, 30)])
    mask = written.mask()
    assert (mask[10:14, 10:14] == 2).all() and mask[9, 9] == 1 and (mask == 1).sum() == 900 - 16
    assert "'vessel' drawn over 'cell'" in capsys.readouterr().out


def test_a_region_smaller_than_a_voxel_is_still_a_voxel(imported):
    mask = imported([rectangle(CELL, 10.6, 20.6, 10.9, 20.9)]).mask()
    assert np.argwhere(mask == 1).tolist() == [[20, 10]]


def test_a_box_holds_the_region_of_its_own_object(imported):
    said = imported([rectangle(CELL, 10, 20, 15, 26, bbox=[10.7, 20, 4.3, 6])], "--complete", "boxes=cell").said()
    assert said.boxes[0].start == (20, 10) and said.complete_boxes == ("cell",)


@pytest.mark.parametrize(
    ("given", "start", "stop", "tight"),
    [
        ((10.4, 20.5, 3.2, 4.0), (20, 10), (24, 14), True),  # 10.4 to 13.6, 20.5 to 24.5: centres 10.5.., 20.5..
        ((10.6, 20.6, 0.3, 0.3), (20, 10), (21, 11), True),  # no centre in it: the voxel it lies in
        ((-0.5, 3, 9, 9), (3, 0), (12, 8), True),
        ((-4, 3, 9, 9), (3, 0), (12, 5), False),  # who knows what the part outside touched
        ((55, 33, 9, 9), (33, 55), (40, 60), False),
    ],
)
def test_boxes_become_the_voxels_whose_centres_they_hold(imported, given, start, stop, tight):
    (found,) = imported([box(CELL, *given)]).said().boxes
    assert (found.start, found.stop, found.tight) == (start, stop, tight)


def test_loose_boxes_are_not_tight(imported):
    assert not imported([box(CELL, 1, 2, 3, 4)], "--loose", "3").said().boxes[0].tight


def test_a_box_without_extent_is_left_out_told_and_makes_its_class_incomplete(imported, capsys):
    written = imported(
        {"a": [box(CELL, 1, 2, 3, 4), box(CELL, 9, 9, 0, 5)], "b": [box(CELL, 1, 2, 3, 4)]},
        "--complete", "boxes=cell,vessel",
    )  # fmt: skip
    assert len(written.said("a").boxes) == 1
    assert written.said("a").complete_boxes == ("vessel",) and written.said("b").complete_boxes == ("cell", "vessel")
    out = capsys.readouterr().out
    assert "1 x left out: boxes without extent (first: coco.json, a.png: annotations[1] (id 1))" in out


def test_a_crowd_is_no_complete_boxing(imported):
    crowd = rectangle(CELL, 20, 20, 30, 30, iscrowd=1, bbox=[20, 20, 10, 10])
    said = imported([box(CELL, 1, 2, 3, 4), crowd], "--complete", "boxes=all").said()
    assert len(said.boxes) == 1 and said.complete_boxes == ("vessel", "nerve")


@pytest.mark.parametrize(
    ("mark", "where"),
    [
        ({"category_id": CELL, "keypoints": [70, 8, 2]}, r"a point of 'cell' at \(8, 70\)"),
        (box(CELL, 60, 3, 5, 5), r"a box of 'cell' at \(3, 60\) to \(8, 65\)"),
        (rectangle(CELL, 60, 3, 65, 8), r"a region of 'cell' at \(3, 60\) to \(8, 65\)"),
    ],
)
def test_what_lies_outside_is_refused_or_dropped_on_demand(imported, nnunet, mark, where, capsys):
    with pytest.raises(AnnotationError, match=rf"coco\.json, a\.png: annotations\[1\] \(id 1\): {where} lies outside"):
        imported([box(CELL, 1, 2, 3, 4), mark])
    assert not list(nnunet.iterdir())
    written = imported([box(CELL, 1, 2, 3, 4), mark], "--drop-outside", "--complete", "boxes=cell")
    assert len(written.said().boxes) == 1 and "left out (--drop-outside)" in capsys.readouterr().out
    assert written.said().complete_boxes == (() if "bbox" in mark else ("cell",))


def test_a_point_on_the_very_border_is_moved_inside(imported):
    said = imported([{"category_id": CELL, "keypoints": [60, 39.9, 2]}]).said()
    assert said.points[0].at == pytest.approx((39.4, 59.5))


def test_complete_tags_say_what_is_absent_but_not_of_what_is_marked(imported):
    said = imported([{"category_id": CELL}, box(VESSEL, 1, 2, 3, 4)], "--complete", "tags=all").said()
    assert said.present == ("cell",) and said.absent == ("nerve",)


def test_images_without_a_mark_say_nothing_unless_they_were_looked_at(imported, capsys):
    marks = {"a": [box(CELL, 1, 2, 3, 4), rectangle(CELL, 1, 2, 4, 6)], "b": []}
    options = ("--complete", "boxes=cell", "--mask-labels", "all")
    written = imported(marks, *options)
    assert not (written.folder / "annotationsTr" / "b.json").exists() and written.labels["ignore"] == 4
    assert "1 images have no mark at all. Were they looked at, and show nothing? --negatives" in capsys.readouterr().out
    written = imported(marks, *options, "--negatives")
    assert written.said("b").complete_boxes == ("cell",) and not written.mask("b").any()


def test_images_that_nobody_mentions_come_in_only_on_demand(imported, source, tmp_path):
    source(a=[])
    save_picture(tmp_path / "source" / "spare.png")
    marks = [box(CELL, 1, 2, 3, 4)]
    assert imported(marks).json["numTraining"] == 1
    written = imported(marks, "--unlabelled")
    assert written.json["numTraining"] == 2 and (written.folder / "imagesTr" / "spare_0000.png").is_file()


def test_a_map_renames_joins_and_drops(imported, tmp_path, capsys):
    (tmp_path / "map.csv").write_text("name,class\ncell,blood cell\nvessel,blood cell\nnerve,\n")
    marks = [box(CELL, 1, 2, 3, 4), box(VESSEL, 5, 6, 3, 4), box(NERVE, 9, 9, 9, 9)]
    written = imported(marks, "--map", tmp_path / "map.csv")
    assert written.labels == {"background": 0, "blood cell": 1, "ignore": 2}
    assert [b.label for b in written.said().boxes] == ["blood cell", "blood cell"]
    assert "1 x left out by --map: 'nerve'" in capsys.readouterr().out
    (tmp_path / "map.json").write_text('{"cell": "cell", "vessel": "vesel"}')
    with pytest.raises(
        AnnotationError, match=r"(?s)1 class name.*'nerve' \(1 times, first at coco\.json, a\.png: annotations"
    ):
        imported(marks, "--map", tmp_path / "map.json")


def test_only_used_leaves_out_classes_that_nothing_is_marked_with(imported):
    assert imported([box(VESSEL, 1, 2, 3, 4)], "--only-used").labels == {"background": 0, "vessel": 1, "ignore": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--complete", "boxes=cel"), r"--complete boxes: there is no class 'cel'.*Did you mean 'cell'\?"),
        (("--complete", "cells=all"), "expected KIND=CLASS,CLASS or KIND=all"),
        (("--mask-labels", "liver"), "--mask-labels: there is no class 'liver'"),
        (("--map", "nowhere.csv"), "nowhere.csv: expected a file"),
        (("--loose", "-1"), "--loose must be at least 0"),
        (("--images", "nowhere"), "There is no folder nowhere"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(imported, nnunet, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        imported([box(CELL, 1, 2, 3, 4)], *options)
    assert not list(nnunet.iterdir())


def test_a_dry_run_says_the_same_and_writes_nothing(source, nnunet, call, capsys):
    file = source(a=[box(CELL, 1, 2, 3, 4), rectangle(VESSEL, 1, 2, 3, 4)], b=[])
    arguments = ("coco", file, "-d", 1, "--name", "X")
    assert call(import_annotations, *arguments, "--dry-run") == 0
    dry = capsys.readouterr().out
    assert not list(nnunet.iterdir()) and dry.endswith("Nothing was written (--dry-run).\n")
    assert call(import_annotations, *arguments) == 0
    assert capsys.readouterr().out.split("Written to")[0] == dry.replace("Nothing was written (--dry-run).\n", "")
    rows = {line.split()[0]: line.split()[1:] for line in dry.splitlines() if line.startswith("  ")}
    assert rows["class"] == ["images", "boxes", "regions"] and rows["cell"] == ["1", "1", "0"]
    assert rows["vessel"] == ["1", "0", "1"] and rows["nerve"] == ["0", "0", "0"]
    assert (
        "2 images (2D, 1 channel(s), .png): 1 with a mask or part of one, 0 with weak annotations only, 1 with nothing"
        in dry
    )


def test_the_next_commands_are_printed(source, nnunet, call, capsys):
    call(import_annotations, "coco", source(a=[box(CELL, 1, 2, 3, 4)]), "-d", 1)
    out = capsys.readouterr().out
    for command in (
        "check -d 001",
        "prepare -d 001",
        "nnUNetv2_plan_and_preprocess -d 001 -c 2d",
        "-tr nnUNetTrainerDSP",
    ):
        assert command in out
    assert (nnunet / "Dataset001_coco").is_dir()  # called like SRC


def test_contradictions_are_told_before_prepare_refuses_them(imported, capsys):
    imported([rectangle(VESSEL, 10, 10, 20, 20), {"category_id": CELL, "keypoints": [15, 15, 2]}])
    assert "1 contradiction(s), which `nnunet_dsp prepare` will refuse" in capsys.readouterr().err


def test_the_same_image_twice_is_refused(source, nnunet, call, tmp_path):
    file = source(a=[box(CELL, 1, 2, 3, 4)])
    shutil.copyfile(file, tmp_path / "source" / "second.json")
    with pytest.raises(AnnotationError, match=r"the image a\.png is annotated twice, also in coco\.json"):
        call(import_annotations, "coco", tmp_path / "source", "-d", 1)


def test_a_failure_halfway_leaves_nothing_and_the_old_dataset_as_it_was(
    imported, nnunet, source, contents, call, tmp_path
):
    written = imported([box(CELL, 1, 2, 3, 4)])
    before = contents(written.folder)
    (tmp_path / "source" / "b.png").write_bytes((tmp_path / "source" / "a.png").read_bytes()[:-30])  # cut off
    with pytest.raises(AnnotationError, match=r"b\.png"):
        imported({"a": [box(CELL, 1, 2, 3, 4)], "b": [box(CELL, 1, 2, 3, 4)]})
    assert contents(written.folder) == before and [p.name for p in nnunet.iterdir()] == ["Dataset001_X"]


def test_errors_are_one_message_and_exit_1(nnunet, source, capsys, tmp_path):
    file = source(a=[box(CELL, 100, 2, 3, 4)])
    assert main(["import", "coco", str(file), "-d", "1", "--num-processes", "1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("nnunet_dsp import: coco.json, a.png: annotations[0] (id 0): a box of 'cell'")
    assert main(["import", "coco", str(tmp_path / "none.json"), "-d", "1"]) == 1
    assert "There is no" in capsys.readouterr().err


# adding


def test_add_brings_new_cases_and_keeps_what_is_there(make_dataset, source, call, contents, capsys):
    folder, _ = make_dataset(101, labels={"background": 0, "vessel": 1, "cell": 2, "membrane": 3})
    before = contents(folder, without=("dataset.json",))
    file = source(a=[box(CELL, 1, 2, 3, 4), rectangle(VESSEL, 10, 10, 14, 14)], case_00=[])
    shutil.move(file.parent / "case_00.png", file.parent / "other.png")
    file.write_text(file.read_text().replace("case_00.png", "other.png"))
    assert call(import_annotations, "coco", file, "-d", 101, "--add") == 0
    after = contents(folder)
    assert all(after[name] == content for name, content in before.items())
    content = json.loads((folder / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "vessel": 1, "cell": 2, "membrane": 3, "ignore": 4}
    assert content["numTraining"] == 8
    mask = io.imread(folder / "labelsTr" / "a.png")
    assert mask[12, 12] == 1 and mask[0, 0] == 4
    assert read_annotations(folder / "annotationsTr" / "a.json").boxes[0].label == "cell"
    assert not (folder / "nnunet_dsp_record.json").exists()  # --overwrite must not take it for ours


def test_add_refuses_classes_the_dataset_does_not_have_by_name(make_dataset, source, call):
    make_dataset(101, labels={"background": 0, "vessels": 1})
    with pytest.raises(AnnotationError, match=r"(?s)'vessel' \(1 times.*Did you mean 'vessels'\?"):
        call(import_annotations, "coco", source(a=[box(VESSEL, 1, 2, 3, 4)]), "-d", 101, "--add")


def test_add_annotates_cases_that_the_dataset_has(make_dataset, nnunet, call, tmp_path, contents):
    folder, masks = make_dataset(101)
    table = tmp_path / "points.csv"
    table.write_text("image,x,y,class\ncase_01_0000.png,10,3,membrane\n")
    arguments = ("csv", table, "-d", 101, "--add", "--images", folder / "imagesTr")
    before = contents(folder)
    assert call(import_annotations, *arguments) == 0
    after = contents(folder)
    assert set(after) - set(before) == {"annotationsTr/case_01.json", "nnunet_dsp_imports.json"}
    assert all(after[name] == content for name, content in before.items() if name != "dataset.json")
    assert json.loads(after["dataset.json"]) == json.loads(before["dataset.json"])
    with pytest.raises(AnnotationError, match="'case_01' of the dataset has annotations already.*--overwrite"):
        call(import_annotations, *arguments)
    assert call(import_annotations, *arguments, "--overwrite") == 0


def test_add_takes_an_image_for_a_case_only_if_it_shows_the_same(make_dataset, call, tmp_path):
    folder, _ = make_dataset(101)
    source = tmp_path / "s"
    source.mkdir()
    shown = io.imread(folder / "imagesTr" / "case_01_0000.png")
    tifffile.imwrite(source / "case_01.tif", shown)  # the same voxels in another format
    save_picture(source / "case_02.png", 255 - shown)  # another image that happens to have the name
    (source / "t.csv").write_text("image,x,y,class\ncase_01.tif,1,2,membrane\ncase_02.png,3,4,membrane\n")
    assert call(import_annotations, "csv", source, "-d", 101, "--add") == 0
    assert sorted(p.name for p in (folder / "annotationsTr").iterdir()) == ["case_01.json", "case_02_2.json"]
    np.testing.assert_array_equal(io.imread(folder / "imagesTr" / "case_02_2_0000.png"), 255 - shown)
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 7


@pytest.mark.parametrize("history", [True, False])
def test_add_knows_images_again_whose_cases_had_to_be_called_otherwise(tmp_path, nnunet, call, history):
    names = ["cell 1.png", "sub/x.png", "sub2/x.png", "é?/x.png"]
    for number, name in enumerate(names):
        save_picture(tmp_path / "i" / name, painted()[0] + np.uint8(number))
    if history:
        names += ["_/x.png"]  # becomes x_2, beside the fourth, which becomes x
        save_picture(tmp_path / "i" / names[-1], painted()[0] + np.uint8(9))
    points = "".join(f"{name},5,6,cell\n" for name in names)
    boxes = "".join(f"{name},{number},3,9,10,cell\n" for number, name in enumerate(names))
    (tmp_path / "p.csv").write_text("image,x,y,label\n" + points)
    (tmp_path / "b.csv").write_text("image,xmin,ymin,xmax,ymax,label\n" + boxes)
    common = ("-d", 1, "--images", tmp_path / "i")
    assert call(import_annotations, "csv", tmp_path / "p.csv", *common, "--name", "X") == 0
    folder = nnunet / "Dataset001_X"
    before = {path.name: path.read_bytes() for path in (folder / "imagesTr").iterdir()}
    assert {"cell_1_0000.png", "sub_x_0000.png", "sub2_x_0000.png"} < set(before) and len(before) == len(names)
    if not history:
        (folder / "nnunet_dsp_imports.json").unlink()
    assert call(import_annotations, "csv", tmp_path / "b.csv", *common, "--add", "--overwrite") == 0
    assert {path.name: path.read_bytes() for path in (folder / "imagesTr").iterdir()} == before
    history = json.loads((folder / "nnunet_dsp_imports.json").read_text())["imports"][-1]["cases"]
    for case, said in history.items():
        name = os.path.relpath(said["image"], tmp_path / "i")
        assert before[f"{case}_0000.png"] == (tmp_path / "i" / name).read_bytes()
        assert read_annotations(folder / "annotationsTr" / f"{case}.json").boxes[0].start == (3, names.index(name))


def test_add_refuses_two_images_that_are_one_case(make_dataset, call, tmp_path):
    folder, _ = make_dataset(101, cases=2)
    for part in ("p", "q"):
        (tmp_path / "i" / part).mkdir(parents=True)
        shutil.copy(folder / "imagesTr" / "case_01_0000.png", tmp_path / "i" / part / "case_01.png")
    (tmp_path / "t.csv").write_text("image,x,y,label\np/case_01.png,5,6,synapse\nq/case_01.png,5,6,synapse\n")
    with pytest.raises(AnnotationError, match=r"q/case_01\.png and .*p/case_01\.png are both the case 'case_01'"):
        call(import_annotations, "csv", tmp_path / "t.csv", "-d", 101, "--images", tmp_path / "i", "--add")


def test_add_refuses_a_second_mask_and_another_kind_of_image(make_dataset, call, tmp_path):
    folder, masks = make_dataset(101)
    (tmp_path / "masks").mkdir()
    Image.fromarray(masks["case_01"]).save(tmp_path / "masks" / "case_01.png")
    arguments = ("labels", tmp_path / "masks", "-d", 101, "--add", "--images", folder / "imagesTr")
    with pytest.raises(AnnotationError, match="'case_01' of the dataset has a mask already"):
        call(import_annotations, *arguments)
    tifffile.imwrite(tmp_path / "v.tif", np.zeros((4, 5, 6), np.uint8), photometric="minisblack")
    (tmp_path / "t.csv").write_text("image,membrane\nv.tif,yes\n")
    with pytest.raises(AnnotationError, match=r"v\.tif \(3D, \.tif\) does not fit the dataset, which holds 2D images"):
        call(import_annotations, "csv", tmp_path / "t.csv", "-d", 101, "--add")


def test_an_id_that_is_taken_is_told_with_what_can_be_done(make_dataset, source, call):
    make_dataset(101)
    with pytest.raises(FileExistsError, match="exists already. Choose another id, pass --add .* or --overwrite"):
        call(import_annotations, "coco", source(a=[box(CELL, 1, 2, 3, 4)]), "-d", 101)


# names, images


def test_case_names_are_fit_unique_and_the_same_every_time(tmp_path):
    def images(*paths):
        return [SourceImage(tmp_path / p, os.path.splitext(os.path.basename(p))[0], (), "") for p in paths]

    found = images("a/1.png", "b/1.png", "c/2.png", "d/ß µ (3).png", "zell.png", "Zell.png", "e/1.tif", "(((.png")
    assert case_names(found, tmp_path) == ["a_1", "b_1", "2", "ß_µ_3", "zell", "Zell_2", "e_1", "image"]
    assert case_names(images("x/a_0000.png", "x/b_0000.png"), tmp_path) == ["a", "b"]
    assert case_names(images("x/a_0000.png", "x/a_0001.png"), tmp_path) == ["a_0000", "a_0001"]
    assert case_names(images("a.png"), tmp_path, taken=["A"]) == ["a_2"]
    assert len(case_names(images("n" * 240 + ".png"), tmp_path)[0]) == 100


def test_annotations_follow_an_image_that_is_turned_when_shown(tmp_path, nnunet, call):
    picture = painted()[0]
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = 6  # stored on its side: viewers show it 60 high, 40 wide
    (tmp_path / "s").mkdir()
    image.save(tmp_path / "s" / "a.jpg", exif=exif, quality=95)

    def run(x, y, *options, **size):
        images = [{"id": 0, "file_name": "a.jpg", **size}]
        annotations = [{"id": 0, "image_id": 0, **box(VESSEL, x, y, 1, 1)}]
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (tmp_path / "s" / "c.json").write_text(json.dumps(content))
        call(import_annotations, "coco", tmp_path / "s" / "c.json", "-d", 1, "--name", "X", "--overwrite", *options)
        folder = nnunet / "Dataset001_X"
        voxel = tuple(map(int, read_annotations(folder / "annotationsTr" / "a.json").boxes[0].start))
        return io.imread(folder / "imagesTr" / "a_0000.png")[voxel]

    vessel = pytest.approx(120, abs=12)  # at row 25, column 10 as stored; shown, at row 10, column 40 - 1 - 25
    assert run(10, 25, width=60, height=40) == vessel
    assert run(14, 10, width=40, height=60) == vessel
    assert run(14, 10, "--exif", "shown") == vessel and run(10, 25, "--exif", "stored") == vessel
    with pytest.raises(AnnotationError, match=r"a\.jpg carries an EXIF orientation \(6\).*--exif shown"):
        run(10, 25)


def save_turned(path):
    """The painted picture as a JPEG that viewers show turned: 60 high, 40 wide; the mask of the vessel as shown."""
    picture, masks = painted()
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif, quality=95)
    return np.rot90(masks["vessel"], -1)


def test_yolo_fractions_are_those_of_the_image_as_shown_or_as_stored(tmp_path, nnunet, call):
    shown = save_turned(tmp_path / "images" / "f.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("vessel\n")
    for option, mask in (("shown", shown), ("stored", painted()[1]["vessel"])):
        (y, x), (height, width) = np.argwhere(mask).min(0), mask.shape
        rows, columns = np.argwhere(mask).max(0) + 1 - (y, x)
        numbers = ((x + columns / 2) / width, (y + rows / 2) / height, columns / width, rows / height)
        (tmp_path / "labels" / "f.txt").write_text("0 " + " ".join(f"{v:.6f}" for v in numbers))
        arguments = ("yolo", tmp_path, "-d", 1, "--name", "X", "--overwrite", "--exif", option)
        assert call(import_annotations, *arguments) == 0
        (found,) = read_annotations(nnunet / "Dataset001_X" / "annotationsTr" / "f.json").boxes
        assert found.start == (y, x) and found.stop == (y + rows, x + columns)


@pytest.mark.parametrize("options", [(), ("--exif", "shown")])
def test_label_images_may_have_the_shape_that_viewers_show(tmp_path, nnunet, call, options):
    shown = save_turned(tmp_path / "images" / "f.jpg")
    save_picture(tmp_path / "masks" / "f.png", shown.astype(np.uint8))
    assert call(import_annotations, "labels", tmp_path, "-d", 1, "--name", "X", "--values", "1=vessel", *options) == 0
    folder = nnunet / "Dataset001_X"
    np.testing.assert_array_equal(io.imread(folder / "labelsTr" / "f.png"), shown)
    assert io.imread(folder / "imagesTr" / "f_0000.png")[shown].mean() == pytest.approx(120, abs=12)


def test_annotations_of_a_resized_or_turned_image_are_refused(source, nnunet, call):
    file = source(a=[box(CELL, 1, 2, 3, 4)])
    content = json.loads(file.read_text())
    for width, height, hint in ((30, 20, "before it was resized"), (40, 60, "Width and height are exchanged")):
        content["images"][0].update(width=width, height=height)
        file.write_text(json.dumps(content))
        with pytest.raises(AnnotationError, match=rf"a\.png has the shape \({height}, {width}\) .*{hint}"):
            call(import_annotations, "coco", file, "-d", 1)


def test_a_tiff_stack_asks_for_its_spacing_and_keeps_it(tmp_path, nnunet, call):
    volume = np.random.default_rng(0).integers(0, 255, (4, 20, 3)).astype(np.uint8)
    (tmp_path / "s").mkdir()
    tifffile.imwrite(tmp_path / "s" / "v.tif", volume, photometric="minisblack")
    (tmp_path / "s" / "t.csv").write_text("image,x,y,z,class\nv.tif,2,19,3,cell\n")
    arguments = ("csv", tmp_path / "s", "-d", 1)
    with pytest.raises(AnnotationError, match=r"v\.tif is a TIFF stack.*--spacing Z Y X"):
        call(import_annotations, *arguments)
    assert call(import_annotations, *arguments, "--spacing", 3, 1, 1) == 0
    from nnunet_dsp.dataset_conversion import raw_dataset

    dataset = raw_dataset.read_dataset(1)
    array, properties = dataset.reader_writer()().read_images([str(i) for i in dataset.cases["v"].images])
    np.testing.assert_array_equal(array[0], volume)
    assert list(properties["spacing"]) == [3, 1, 1]


def test_nnunet_verifies_an_imported_dataset_of_colour_pictures(tmp_path, nnunet, call):
    from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

    picture, masks = painted()
    save_picture(tmp_path / "s" / "a.png", np.dstack([picture, picture[::-1], 255 - picture]))
    save_picture(tmp_path / "s" / "b.png")  # grey
    annotations = [{"id": i, "image_id": i, **rectangle(CELL, 31, 5, 47, 12)} for i in range(2)]
    images = [{"id": i, "file_name": f"{n}.png"} for i, n in enumerate("ab")]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (tmp_path / "s" / "c.json").write_text(json.dumps(content))
    assert call(import_annotations, "coco", tmp_path / "s", "-d", 1, "--name", "X", "--mask-labels", "all") == 0
    folder = nnunet / "Dataset001_X"
    for case in "ab":  # what nnUNetv2_plan_and_preprocess --verify_dataset_integrity does, without its processes
        label = str(folder / "labelsTr" / f"{case}.png")
        assert check_cases([str(folder / "imagesTr" / f"{case}_0000.png")], label, 3, NaturalImage2DIO)
        assert verify_labels(label, NaturalImage2DIO, [0, 1, 2, 3])


def test_prepare_takes_what_import_writes(imported, nnunet, call):
    from nnunet_dsp.dataset_conversion import prepare

    written = imported(
        {"a": [rectangle(CELL, 31, 5, 47, 12, bbox=[31, 5, 16, 7])], "b": [box(VESSEL, 8, 20, 7, 13)], "c": []}
    )
    assert call(prepare, "-d", 1) == 0
    assert (io.imread(written.folder / "labelsTr" / "b.png") == 4).all()


def test_our_commands_read_imported_colour_pictures(tmp_path, nnunet, call):
    from nnunet_dsp.dataset_conversion import prepare, raw_dataset

    save_picture(tmp_path / "s" / "a.png", np.dstack([painted()[0]] * 2 + [255 - painted()[0]]))
    (tmp_path / "s" / "t.csv").write_text("image,x,y,class\na.png,35,8,cell\n")
    assert call(import_annotations, "csv", tmp_path / "s", "-d", 1, "--name", "X") == 0
    dataset = raw_dataset.read_dataset(1)  # three channels in one file
    annotations, problems, _ = prepare.check_dataset(dataset)
    assert not problems and annotations["a"].points[0].at == (8, 35)


def test_every_format_shows_an_example(capsys):
    from nnunet_dsp.dataset_conversion.importers import available_importers

    assert {"coco", "csv", "labels", "voc", "yolo"} <= set(available_importers())
    for name, module in available_importers().items():
        assert main(["import", name, "--help"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert " ".join(module.EXAMPLE.split()) in out and f"import {name}" in module.EXAMPLE
