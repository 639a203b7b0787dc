"""`nnunet_dsp prepare`: what it mends, what it refuses, what it says, and what it leaves alone."""

import json
import shutil

import numpy as np
import pytest

from nnunet_dsp.annotations import Annotations, Box, LabelNames, Point, case_file, write_annotations
from nnunet_dsp.dataset_conversion import prepare

NAMES = LabelNames.from_dataset_json({"labels": {"background": 0, "membrane": 1, "mitochondrion": 2, "synapse": 3}})


@pytest.fixture
def own_data(make_dataset):
    """A user's folder: four images, masks for two, a note about the third, and a dataset.json that knows of two."""
    folder, masks = make_dataset(101, cases=4)
    for case in ("case_02", "case_03"):
        (folder / "labelsTr" / f"{case}.png").unlink()
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | {"numTraining": 2}))
    (folder / "annotationsTr").mkdir()
    note = Annotations(shape=(40, 48), present=("synapse",), points=(Point("synapse", (5.0, 6.0)),))
    write_annotations(case_file(folder / "annotationsTr", "case_02"), note, NAMES)
    return folder


@pytest.fixture
def no_fingerprint(monkeypatch):
    """nnU-Net's extraction takes seconds and is tested elsewhere."""
    monkeypatch.setattr(prepare, "write_fingerprint", lambda *_, **__: ("masks", True))


def preprocessed(folder):
    return folder.parents[1] / "nnUNet_preprocessed" / folder.name


@pytest.mark.slow
def test_a_users_own_data_is_ready_after_prepare(own_data, call, read, capsys):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    assert call(prepare, "-d", 101) == 0
    out = capsys.readouterr().out
    assert "4 cases: 2 with a mask or part of one, 1 with weak annotations only, 1 with nothing" in out
    assert '"ignore": 4' in out and "numTraining changed from 2 to 4" in out and "2 label files written" in out
    assert "foreground intensities are those of the masked voxels" in out
    assert "nnUNetv2_plan_and_preprocess -d 101" in out
    for case in ("case_02", "case_03"):
        label = read(own_data / "labelsTr" / f"{case}.png")
        assert label.dtype == np.uint8 and label.shape == (40, 48) and (label == 4).all()
    verify_dataset_integrity(str(own_data), 1)
    assert sorted(p.name for p in own_data.iterdir()) == sorted(
        ["annotationsTr", "dataset.json", "imagesTr", "imagesTs", "labelsTr", "labelsTs"]
    )
    assert len(list((own_data / "labelsTr").iterdir())) == 4, "something else is left in labelsTr"
    assert (preprocessed(own_data) / "annotationsTr" / "case_02.json").is_file()
    fingerprint = json.loads((preprocessed(own_data) / "dataset_fingerprint.json").read_text())
    assert fingerprint["nnunet_dsp"]["ignore_excluded"]

    before = (own_data / "dataset.json").stat().st_mtime_ns
    assert call(prepare, "-d", 101) == 0
    out = capsys.readouterr().out
    assert "Fingerprint up to date" in out and "0 annotation file(s)" in out and "written" not in out
    assert (own_data / "dataset.json").stat().st_mtime_ns == before


@pytest.mark.usefixtures("no_fingerprint")
def test_labels_written_for_volumes_have_the_geometry_of_the_image(make_dataset, call):
    import SimpleITK

    folder, _ = make_dataset(101, dim=3, cases=2)
    (folder / "labelsTr" / "case_01.nii.gz").unlink()
    assert call(prepare, "-d", 101) == 0
    image = SimpleITK.ReadImage(str(folder / "imagesTr" / "case_01_0000.nii.gz"))
    label = SimpleITK.ReadImage(str(folder / "labelsTr" / "case_01.nii.gz"))
    for geometry in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
        assert np.allclose(getattr(image, geometry)(), getattr(label, geometry)())


@pytest.mark.parametrize("file", ["labelsTr/case_01.nii.gz", "imagesTr/case_01_0000.nii.gz"])
def test_a_volume_that_is_cut_off_is_refused_not_filled_up(make_dataset, call, contents, file):
    folder, _ = make_dataset(101, dim=3, cases=2)
    (folder / file).write_bytes((folder / file).read_bytes()[: (folder / file).stat().st_size // 2])
    before = contents(folder)
    with pytest.raises(ValueError, match=rf"{file} cannot be read.*truncated.*but ends after [1-9]"):
        call(prepare, "-d", 101)
    assert contents(folder) == before


def test_a_dry_run_changes_nothing(own_data, call, contents, capsys):
    before = contents(own_data.parents[1])
    assert call(prepare, "-d", 101, "--dry-run") == 0
    assert contents(own_data.parents[1]) == before
    out = capsys.readouterr().out
    assert "2 label files would be written" in out and "would be changed from 2 to 4" in out


def test_every_problem_is_reported_worst_first_and_nothing_is_changed(own_data, call, contents, capsys, read):
    notes = own_data / "annotationsTr"
    mask = read(own_data / "labelsTr" / "case_00.png")
    y, x = (int(v) for v in np.argwhere(mask == 2)[0])
    wrong_class = Annotations(points=(Point("synapse", (float(y), float(x))),))
    write_annotations(case_file(notes, "case_00"), wrong_class, NAMES)
    outside = Annotations(boxes=(Box("synapse", (30.0, 30.0), (35.0, 60.0)),))
    write_annotations(case_file(notes, "case_01"), outside, NAMES)
    write_annotations(case_file(notes, "case_99"), Annotations(present=("synapse",)), NAMES)
    case_file(notes, "case_03").write_text('{"format": "nnunet_dsp.annotations", "version": 1, "pionts": []}')
    before = contents(own_data.parents[1])
    assert call(prepare, "-d", 101) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("  ")]
    assert "4 problem(s) in annotationsTr, worst first; nothing was changed" in error
    assert [next(c for c in range(100) if f"case_{c:02d} (" in line) for line in lines] == [99, 3, 1, 0]
    assert "there is no case 'case_99'" in lines[0] and "pionts" in lines[1]
    assert contents(own_data.parents[1]) == before


def test_only_the_worst_problems_are_printed_unless_all_are_wanted(own_data, call, capsys):
    for number in range(50, 80):
        case_file(own_data / "annotationsTr", f"case_{number}").write_text("{}")
    assert call(prepare, "-d", 101) == 1
    error = capsys.readouterr().err
    assert "30 problem(s)" in error and "case_69" in error and "case_70" not in error and "and 10 more" in error
    assert call(prepare, "-d", 101, "--all-problems") == 1
    assert "case_79" in capsys.readouterr().err


def test_files_with_another_spelling_of_json_are_not_passed_over(own_data, call, capsys):
    case_file(own_data / "annotationsTr", "case_02").rename(own_data / "annotationsTr" / "case_02.JSON")
    assert call(prepare, "-d", 101) == 1
    assert "Rename it to case_02.json" in capsys.readouterr().err


@pytest.mark.usefixtures("no_fingerprint")
def test_splits_are_copied_once_and_checked(own_data, call, capsys):
    raw, copy = own_data / "splits_final.json", preprocessed(own_data) / "splits_final.json"
    raw.write_text(json.dumps([{"train": ["case_00"], "val": ["case_77"]}]))
    with pytest.raises(ValueError, match=r"1 case\(s\) that do not exist: case_77"):
        call(prepare, "-d", 101)
    splits = [{"train": ["case_00", "case_02", "case_03"], "val": ["case_01"]}]
    raw.write_text(json.dumps(splits))
    assert call(prepare, "-d", 101) == 0
    assert json.loads(copy.read_text()) == splits
    copy.write_text("[]")
    capsys.readouterr()
    assert call(prepare, "-d", 101) == 0
    assert copy.read_text() == "[]", "a split that training uses is never replaced"
    assert "is kept" in capsys.readouterr().out


def test_several_datasets_are_found_before_any_is_changed(own_data, call, contents):
    before = contents(own_data.parents[1])
    with pytest.raises(FileNotFoundError, match="no dataset with id 102"):
        call(prepare, "-d", 101, 102)
    assert contents(own_data.parents[1]) == before


@pytest.mark.usefixtures("no_fingerprint")
def test_plans_from_a_contaminated_fingerprint_are_pointed_out(own_data, call, capsys):
    preprocessed(own_data).mkdir()
    plans = {"configurations": {"2d": {"normalization_schemes": ["CTNormalization"]}}}
    (preprocessed(own_data) / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert call(prepare, "-d", 101) == 0
    assert "nnUNetPlans.json was made from another fingerprint" in capsys.readouterr().out


def test_annotations_that_were_deleted_with_their_folder_are_not_kept(own_data, call, capsys):
    assert call(prepare, "-d", 101) == 0
    copies = preprocessed(own_data) / "annotationsTr"
    number = len(list(copies.iterdir()))
    shutil.rmtree(own_data / "annotationsTr")
    capsys.readouterr()
    assert number and call(prepare, "-d", 101) == 0 and not list(copies.iterdir())
    assert f"{number} annotation file(s) brought up to date" in capsys.readouterr().out


def test_annotations_are_kept_in_step(tmp_path):
    raw, copy = tmp_path / "raw", tmp_path / "preprocessed"
    assert prepare.sync_annotations(raw, copy) == 0 and not copy.exists(), "only nnUNet_preprocessed may be here"
    (raw / "annotationsTr").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (raw / "annotationsTr" / f"{name}.json").write_text(name)
    assert prepare.sync_annotations(raw, copy) == 3
    assert prepare.sync_annotations(raw, copy) == 0
    (raw / "annotationsTr" / "a.json").write_text("A")
    (raw / "annotationsTr" / "b.json").unlink()
    (raw / "annotationsTr" / "d.json").write_text("d")
    (copy / "annotationsTr" / "notes.txt").write_text("kept")
    assert prepare.sync_annotations(raw, copy) == 3
    assert {p.name: p.read_text() for p in (copy / "annotationsTr").iterdir()} == {
        "a.json": "A",
        "c.json": "c",
        "d.json": "d",
        "notes.txt": "kept",
    }
    (raw / "annotationsTr").rename(raw / "elsewhere")
    assert prepare.sync_annotations(raw, copy) == 0
    assert (copy / "annotationsTr" / "a.json").exists(), "without the originals the copies stay"


@pytest.fixture
def instances(make_dataset):
    """Four images of instances, ids up to 300; two of them without a label file, and a dataset.json that says two."""
    folder, _ = make_dataset(102, cases=4)
    for case in ("case_02", "case_03"):
        (folder / "labelsTr" / f"{case}.png").unlink()
    content = json.loads((folder / "dataset.json").read_text()) | {"numTraining": 2}
    content |= {"labels": {"background": 0, "cell": list(range(1, 301)), "ignore": 301}, "regions_class_order": [1]}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.usefixtures("no_fingerprint")
def test_an_instance_dataset_gets_the_label_files_it_lacks(instances, call, read, capsys):
    assert call(prepare, "-d", 102) == 0
    out = capsys.readouterr().out
    assert "4 cases with instances for labels: 2 with some labelled, 2 with nothing" in out
    assert "nnUNetTrainerCRAC" in out and "numTraining changed from 2 to 4" in out
    for case in ("case_02", "case_03"):
        assert (read(instances / "labelsTr" / f"{case}.png") == 301).all(), "an ignore label beyond 8 bits"
    assert json.loads((instances / "dataset.json").read_text())["labels"]["ignore"] == 301


@pytest.mark.usefixtures("no_fingerprint")
def test_an_instance_dataset_without_ignore_gets_the_next_number(instances, call):
    content = json.loads((instances / "dataset.json").read_text())
    del content["labels"]["ignore"]
    (instances / "dataset.json").write_text(json.dumps(content))
    assert call(prepare, "-d", 102) == 0
    assert json.loads((instances / "dataset.json").read_text())["labels"]["ignore"] == 301


def test_points_and_boxes_in_an_instance_dataset_are_refused_and_nothing_is_changed(instances, call, capsys):
    (instances / "annotationsTr").mkdir()
    note = Annotations(shape=(40, 48), points=(Point("synapse", (5.0, 6.0)),))
    write_annotations(case_file(instances / "annotationsTr", "case_02"), note, NAMES)
    before = (instances / "dataset.json").read_text()
    assert call(prepare, "-d", 102) == 1
    assert "annotated in label images only: nnUNetTrainerCRAC reads no points" in capsys.readouterr().err
    assert (instances / "dataset.json").read_text() == before
    assert not (instances / "labelsTr" / "case_02.png").exists()
