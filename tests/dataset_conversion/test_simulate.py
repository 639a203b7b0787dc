"""`nnunet_dsp simulate`, judged by what lies on disk afterwards and by nnU-Net's own check."""

import json
import os

import numpy as np
import pytest
import SimpleITK

from nnunet_dsp.annotations import LabelNames, read_folder
from nnunet_dsp.dataset_conversion import prepare, simulate
from nnunet_dsp.dataset_conversion.raw_dataset import RECORD


def said(folder):
    labels = LabelNames.from_dataset_json(json.loads((folder / "dataset.json").read_text()))
    return read_folder(folder / "annotationsTr", labels=labels)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_mixture_is_as_asked_for_and_true(make_dataset, nnunet, call, read, capsys, dim):
    source, masks = make_dataset(101, dim=dim)
    arguments = ["-d", 101, "-o", 102, "--masks", 2, "--tags", "--points", 2, "--boxes", "rest", "--unlabelled", 1]
    assert call(simulate, *arguments, "--min-size", 1) == 0
    target = nnunet / "Dataset102_FullWeak"
    ending = ".png" if dim == 2 else ".nii.gz"

    labels = {c: read(target / "labelsTr" / f"{c}{ending}") for c in masks}
    masked = [c for c in masks if (labels[c] != 4).any()]
    assert len(masked) == 2
    assert all(np.array_equal(labels[c], masks[c]) for c in masked)
    assert all((labels[c] == 4).all() for c in masks if c not in masked), "a weak case is ignore all over"

    annotations = said(target)
    assert len(annotations) == 3 and not set(annotations) & set(masked), "six cases: two masks, one with nothing"
    assert sum(bool(a.points) for a in annotations.values()) == 2
    assert all(a.present and a.complete_boxes == ("mitochondrion", "synapse") for a in annotations.values())
    for case, annotation in annotations.items():
        mask = masks[case]
        assert annotation.shape == mask.shape
        values = {"membrane": 1, "mitochondrion": 2, "synapse": 3}
        assert {n for n, v in values.items() if (mask == v).any()} == set(annotation.present)
        assert set(values) - set(annotation.present) == set(annotation.absent)
        assert all(mask[tuple(int(v) for v in p.at)] == values[p.label] for p in annotation.points)
        for box in annotation.boxes:
            inside = mask[tuple(slice(int(a), int(b)) for a, b in zip(box.start, box.stop, strict=True))]
            for axis in range(dim):
                others = tuple(a for a in range(dim) if a != axis)
                assert (inside == values[box.label]).any(others).all(), "a tight box has an empty row"
        for name in ("mitochondrion", "synapse"):
            boxed = np.zeros(mask.shape, bool)
            for box in annotation.boxes:
                if box.label == name:
                    boxed[tuple(slice(int(a), int(b)) for a, b in zip(box.start, box.stop, strict=True))] = True
            assert boxed[mask == values[name]].all(), "complete, but a voxel lies in no box"

    image = target / "imagesTr" / f"case_00_0000{ending}"
    assert image.is_symlink() and image.samefile(source / "imagesTr" / image.name)
    evaluation = target / "labelsTr_evaluation"
    assert {p.name for p in evaluation.iterdir()} == {f"{c}{ending}" for c in masks}
    assert (evaluation / f"case_00{ending}").samefile(source / "labelsTr" / f"case_00{ending}")
    assert (target / "labelsTs" / f"case_06{ending}").exists() and (
        target / "imagesTs" / f"case_06_0000{ending}"
    ).exists()

    content = json.loads((target / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "membrane": 1, "mitochondrion": 2, "synapse": 3, "ignore": 4}
    record = json.loads((target / RECORD).read_text())
    assert record["summary"]["masks"] == {"cases": 2} and record["source"] == "Dataset101_Full"
    assert sorted(c for c, kinds in record["assignment"].items() if kinds == ["mask"]) == sorted(masked)
    out = capsys.readouterr().out
    assert "membrane is not boxed" in out and "nnunet_dsp prepare -d 102" in out


def test_nnunet_accepts_what_is_written_and_keeps_its_geometry(make_dataset, nnunet, call):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    make_dataset(101, dim=3, cases=3)
    assert call(simulate, "-d", 101, "-o", 102, "--masks", 1, "--boxes", 1, "--scribbles", "rest") == 0
    target = nnunet / "Dataset102_FullWeak"
    verify_dataset_integrity(str(target), 1)
    for case in range(3):
        image = SimpleITK.ReadImage(str(target / "imagesTr" / f"case_{case:02d}_0000.nii.gz"))
        label = SimpleITK.ReadImage(str(target / "labelsTr" / f"case_{case:02d}.nii.gz"))
        for geometry in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
            assert np.allclose(getattr(image, geometry)(), getattr(label, geometry)())
        assert label.GetPixelIDTypeAsString() == "8-bit unsigned integer"
    assert call(prepare, "-d", 102, "--dry-run") == 0


def test_scribbles_are_a_true_part_of_the_mask(make_dataset, nnunet, call, read):
    _, masks = make_dataset(101)
    assert call(simulate, "-d", 101, "-o", 102, "--masks", 1, "--scribbles") == 0
    target = nnunet / "Dataset102_FullWeak"
    drawn = {c: read(target / "labelsTr" / f"{c}.png") for c in masks}
    partial = [c for c in masks if (drawn[c] == 4).any()]
    assert len(partial) == 5
    for case in partial:
        known = drawn[case] != 4
        assert np.array_equal(drawn[case][known], masks[case][known])
        assert set(np.unique(drawn[case])) == {*np.unique(masks[case]), 4}
    assert not list((target / "annotationsTr").iterdir()), "strokes are masks; there is nothing more to say"


def test_same_seed_same_dataset(make_dataset, nnunet, call, contents):
    make_dataset(101)
    arguments = ["-d", 101, "--masks", 2, "--tags", "--points", "--boxes", 2, "--share", 0.7, "--scribbles", 1]
    for number, seed in ((102, 5), (103, 5), (104, 6)):
        assert call(simulate, *arguments, "-o", number, "--name", "W", "--seed", seed) == 0
    first, again, other = (contents(nnunet / f"Dataset{n}_W", without=(RECORD,)) for n in (102, 103, 104))
    assert first == again
    assert first.keys() ^ other.keys() or first != other
    assert any(first[f] != other.get(f) for f in first if f.startswith("annotationsTr"))


def test_another_seed_clicks_elsewhere_in_the_same_cases(make_dataset, nnunet, call):
    make_dataset(101)
    for seed in (0, 1):
        assert call(simulate, "-d", 101, "-o", 102 + seed, "--name", "W", "--points", "--seed", seed) == 0
    first, other = (said(nnunet / f"Dataset{n}_W") for n in (102, 103))
    assert first.keys() == other.keys()
    assert all(len(first[c].points) == len(other[c].points) and first[c].points != other[c].points for c in first)


def test_weak_cases_validate_in_no_fold(make_dataset, nnunet, call):
    make_dataset(101)
    assert call(simulate, "-d", 101, "-o", 102, "--masks", 3, "--boxes") == 0
    folder = nnunet / "Dataset102_FullWeak"
    splits = json.loads((folder / "splits_final.json").read_text())
    weak = set(said(folder))
    assert len(splits) == 3
    for fold in splits:
        assert fold["val"] and not weak & set(fold["val"])
        assert weak < set(fold["train"])
        assert sorted(fold["train"] + fold["val"]) == [f"case_{i:02d}" for i in range(6)]


def test_masks_of_some_classes_say_so(make_dataset, nnunet, call, read):
    _, masks = make_dataset(101)
    assert call(simulate, "-d", 101, "-o", 102, "--masks", 6, "--mask-classes", "mitochondrion") == 0
    target = nnunet / "Dataset102_FullWeak"
    for case, mask in masks.items():
        assert np.array_equal(read(target / "labelsTr" / f"{case}.png"), np.where(mask == 2, 2, 0))
        assert said(target)[case].mask_labels == ("mitochondrion",)


def test_a_net_like_class_is_boxed_only_on_request(make_dataset, nnunet, call):
    make_dataset(101)
    assert call(simulate, "-d", 101, "-o", 102, "--boxes", "--box-classes", "membrane") == 0
    boxes = [b for a in said(nnunet / "Dataset102_FullWeak").values() for b in a.boxes]
    assert {b.label for b in boxes} == {"membrane"}
    assert ((0, 0), (40, 48)) in {(b.start, b.stop) for b in boxes}


def test_classes_limit_every_weak_kind(make_dataset, nnunet, call):
    make_dataset(101)
    assert call(simulate, "-d", 101, "-o", 102, "--tags", "--points", "--boxes", "--classes", "synapse") == 0
    for annotation in said(nnunet / "Dataset102_FullWeak").values():
        assert {*annotation.present, *annotation.absent} == {"synapse"}
        assert {p.label for p in annotation.points} | {b.label for b in annotation.boxes} <= {"synapse"}


def test_nothing_is_left_behind_by_a_failure(make_dataset, nnunet, call, monkeypatch):
    make_dataset(101)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(simulate, "write_annotations", fail)
    with pytest.raises(OSError, match="disk full"):
        call(simulate, "-d", 101, "-o", 102, "--boxes")
    assert os.listdir(nnunet) == ["Dataset101_Full"]


def test_the_source_is_never_changed(make_dataset, nnunet, call, contents):
    source, _ = make_dataset(101)
    before = contents(source)
    assert call(simulate, "-d", 101, "-o", "Dataset102_New", "--masks", 3, "--tags") == 0
    for label in (nnunet / "Dataset102_New" / "labelsTr").iterdir():
        label.write_bytes(b"edited")
    assert contents(source) == before
    with pytest.raises(FileExistsError, match="was not made by nnunet_dsp"):
        call(simulate, "-d", 102, "-o", "Dataset101_Full", "--overwrite")
    with pytest.raises(ValueError, match="-d and -o are the same dataset"):
        call(simulate, "-d", 102, "-o", "Dataset102_New", "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--box-classes", "mitocondrion"], "--box-classes: unknown class.*mitocondrion.*The dataset has background"),
        (["--share", 1.5], "--share: expected a number from 0 to 1, but got 1.5"),
        (["--points-per-object", 0], "--points-per-object: expected 1 or more"),
        (["--masks", 99], "--masks: expected 0 to 6"),
        (["--name", "No/Go"], "letters, digits"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(make_dataset, nnunet, call, arguments, message):
    make_dataset(101)
    with pytest.raises(ValueError, match=message):
        call(simulate, "-d", 101, "-o", 102, *arguments)
    assert os.listdir(nnunet) == ["Dataset101_Full"]


def test_a_count_that_is_no_count_is_a_usage_error(make_dataset, call, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(simulate, "-d", 101, "-o", 102, "--points", "some")
    assert stopped.value.code == 2
    assert "expected a number of cases or 'rest', but got 'some'" in capsys.readouterr().err


def test_masks_that_cannot_give_annotations_are_refused(make_dataset, nnunet, call, read):
    from skimage import io

    source, masks = make_dataset(
        101, labels={"background": 0, "membrane": 1, "mitochondrion": 2, "synapse": 3, "ignore": 4}
    )
    mask = masks["case_03"].copy()
    mask[:5] = 4
    io.imsave(source / "labelsTr" / "case_03.png", mask, check_contrast=False)
    with pytest.raises(ValueError, match="1 cases have voxels labelled 'ignore'.*case_03"):
        call(simulate, "-d", 101, "-o", 102, "--boxes")
    assert call(simulate, "-d", 101, "-o", 102, "--boxes", "--masked-cases", "case_03") == 0
    assert np.array_equal(read(nnunet / "Dataset102_FullWeak" / "labelsTr" / "case_03.png"), mask)
    (source / "labelsTr" / "case_05.png").unlink()
    with pytest.raises(ValueError, match="1 have none: case_05"):
        call(simulate, "-d", 101, "-o", 103, "--boxes")
    mask[:] = 9
    io.imsave(source / "labelsTr" / "case_05.png", mask, check_contrast=False)
    with pytest.raises(ValueError, match=r"case_05\.png: value\(s\) \[9\] are no label"):
        call(simulate, "-d", 101, "-o", 103, "--boxes")


def test_masks_only_leaves_the_same_masked_cases_and_neither_the_others_nor_an_ignore_label(
    make_dataset, nnunet, call, read, capsys
):
    source, masks = make_dataset(101)
    names = sorted(masks)
    splits = [{"train": names[:4], "val": names[4:]}, {"train": names[2:], "val": names[:2]}]
    (source / "splits_final.json").write_text(json.dumps(splits))
    assert call(simulate, "-d", 101, "-o", 102, "--masks", 2, "--tags", "--seed", 5) == 0
    assert call(simulate, "-d", 101, "-o", 103, "--name", "Masks", "--masks", 2, "--seed", 5, "--masks-only") == 0
    weak, only = nnunet / "Dataset102_FullWeak", nnunet / "Dataset103_Masks"
    masked = sorted(p.name for p in (weak / "labelsTr").iterdir() if (read(p) != 4).any())
    assert sorted(p.name for p in (only / "labelsTr").iterdir()) == masked
    assert len(list((only / "imagesTr").iterdir())) == 2
    dataset_json = json.loads((only / "dataset.json").read_text())
    assert "ignore" not in dataset_json["labels"]
    assert dataset_json["numTraining"] == 2
    assert not list((only / "annotationsTr").iterdir())
    left = {case for split in json.loads((only / "splits_final.json").read_text()) for case in split["train"]}
    assert left <= {name.split(".")[0] for name in masked}


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--masks", 2, "--points"], "nothing to give tags"), ([], "no case would be left")],
)
def test_masks_only_without_masks_or_with_weak_labels_is_refused(make_dataset, call, options, message):
    make_dataset(101)
    with pytest.raises(ValueError, match=message):
        call(simulate, "-d", 101, "-o", 102, "--masks-only", *options)
