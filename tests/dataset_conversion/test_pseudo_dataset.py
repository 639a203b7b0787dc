"""`nnunet_dsp pseudo-dataset`: whose label a voxel gets, and what lies on disk afterwards or after a failure."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK
from skimage import io

from nnunet_dsp.dataset_conversion import pseudo_dataset, simulate
from nnunet_dsp.dataset_conversion.raw_dataset import RECORD

IGNORE = 4


@pytest.fixture
def partial(make_dataset, nnunet, call, read):
    """Dataset 102: a rectangle in each image of 101; returns a maker, for 2D or 3D, of (folder, predictions, masks)."""

    def make(dim=2):
        _, masks = make_dataset(101, dim=dim)
        assert call(simulate, "-d", 101, "-o", 102, "--name", "Part", "--rectangle", 8) == 0
        folder = nnunet / "Dataset102_Part"
        predictions = nnunet.parent / "predictions"
        predictions.mkdir()
        predicted = {}
        for number, file in enumerate(sorted((folder / "labelsTr").iterdir())):
            case = file.name.split(".")[0]
            predicted[case] = np.random.default_rng(number).integers(0, 4, read(file).shape).astype(np.uint8)
            write(predicted[case], predictions / file.name)
        return folder, predictions, masks, predicted

    return make


def write(array, file):
    if file.suffix == ".png":
        io.imsave(file, array, check_contrast=False)
    else:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(file))


def pad(file, size=9000):
    """What follows a PNG's end is not read."""
    file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    assert file.stat().st_size == size


def write_probabilities(predictions, predicted, seed=0):
    """Confidence of each voxel, by case; the predicted class has it, the rest is shared."""
    random = np.random.default_rng(seed)
    confidence = {}
    for case, label in predicted.items():
        label = label[None] if label.ndim == 2 else label
        sure = random.uniform(0.4, 1, label.shape).astype(np.float32)
        probabilities = np.repeat(((1 - sure) / 3)[None], 4, axis=0)
        np.put_along_axis(probabilities, label[None].astype(int), sure[None], axis=0)
        np.savez_compressed(predictions / f"{case}.npz", probabilities=probabilities.astype(np.float16))
        confidence[case] = probabilities.astype(np.float16).max(0).squeeze()
    return confidence


@pytest.mark.parametrize("dim", [2, 3])
def test_annotated_voxels_win_and_all_others_are_predicted(partial, nnunet, call, read, capsys, dim):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    folder, predictions, masks, predicted = partial(dim)
    assert call(pseudo_dataset, "-d", 102, "-i", predictions, "-o", 103) == 0
    target = nnunet / "Dataset103_PartPseudo"
    ending = ".png" if dim == 2 else ".nii.gz"
    annotated = 0
    for case, mask in masks.items():
        before = read(folder / "labelsTr" / f"{case}{ending}")
        after = read(target / "labelsTr" / f"{case}{ending}")
        known = before != IGNORE
        assert known.sum() == 8**dim
        annotated += known.sum()
        assert np.array_equal(after[known], mask[known])
        assert np.array_equal(after[~known], predicted[case][~known])
        assert (target / "imagesTr" / f"{case}_0000{ending}").samefile(folder / "imagesTr" / f"{case}_0000{ending}")
        evaluation = target / "labelsTr_evaluation" / f"{case}{ending}"
        assert np.array_equal(read(evaluation), mask)
    content = json.loads((target / "dataset.json").read_text())
    assert "ignore" not in content["labels"], "no voxel is ignored"
    record = json.loads((target / RECORD).read_text())
    assert record["voxels"]["annotated"] == annotated and record["voxels"]["unsure"] == 0
    assert (target / "splits_final.json").read_text() == (folder / "splits_final.json").read_text()
    assert sorted(p.name for p in (target / "labelsTr").iterdir()) == [f"{c}{ending}" for c in sorted(masks)]
    assert sorted(p.name for p in nnunet.iterdir()) == ["Dataset101_Full", "Dataset102_Part", "Dataset103_PartPseudo"]
    assert "voxel is 'ignore'" in capsys.readouterr().out
    if dim == 3:
        verify_dataset_integrity(str(target), 1)
        image = SimpleITK.ReadImage(str(target / "imagesTr" / "case_00_0000.nii.gz"))
        label = SimpleITK.ReadImage(str(target / "labelsTr" / "case_00.nii.gz"))
        assert np.allclose(image.GetSpacing(), label.GetSpacing()) and np.allclose(image.GetOrigin(), label.GetOrigin())


def test_unsure_voxels_are_ignored_unless_annotated(partial, nnunet, call, read):
    folder, predictions, masks, predicted = partial()
    confidence = write_probabilities(predictions, predicted)
    assert call(pseudo_dataset, "-d", 102, "-i", predictions, "-o", 103, "--threshold", 0.7) == 0
    target = nnunet / "Dataset103_PartPseudo"
    seen = set()
    for case, mask in masks.items():
        before, after = read(folder / "labelsTr" / f"{case}.png"), read(target / "labelsTr" / f"{case}.png")
        for index in np.ndindex(mask.shape):
            if before[index] != IGNORE:
                expected, kind = mask[index], "annotated"
            elif confidence[case][index] >= 0.7:
                expected, kind = predicted[case][index], "predicted"
            else:
                expected, kind = IGNORE, "unsure"
            assert after[index] == expected, (case, index, kind)
            seen.add(kind)
    assert seen == {"annotated", "predicted", "unsure"}
    assert json.loads((target / "dataset.json").read_text())["labels"]["ignore"] == IGNORE


def test_points_are_annotated_voxels_and_partial_masks_background_is_not(partial, nnunet, call, read):
    folder, predictions, masks, predicted = partial()
    case = "case_02"
    label = read(folder / "labelsTr" / f"{case}.png")
    y, x = (int(v) for v in np.argwhere((label == IGNORE) & (predicted[case] != 2))[5])
    said = {"format": "nnunet_dsp.annotations", "version": 1, "mask_labels": ["membrane"],
            "points": [{"label": "mitochondrion", "at": [y + 0.3, x - 0.4]}]}  # fmt: skip
    (folder / "annotationsTr" / f"{case}.json").write_text(json.dumps(said))
    assert call(pseudo_dataset, "-d", 102, "-i", predictions, "-o", 103) == 0
    after = read(nnunet / "Dataset103_PartPseudo" / "labelsTr" / f"{case}.png")
    assert after[y, x] == 2
    drawn = (label != IGNORE) & (label != 0)
    assert np.array_equal(after[drawn], label[drawn])
    open_background = label == 0
    assert open_background.any() and np.array_equal(after[open_background], predicted[case][open_background])


def test_an_interrupted_run_is_taken_up_where_it_stopped(partial, nnunet, call, read, monkeypatch, capsys):
    folder, predictions, _, _ = partial()
    arguments = ["-d", 102, "-i", predictions, "-o", 103]
    make = pseudo_dataset._make_label
    made = []

    def interrupted(job):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(job.case.name)
        return make(job)

    monkeypatch.setattr(pseudo_dataset, "_make_label", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(pseudo_dataset, *arguments)
    assert not (nnunet / "Dataset103_PartPseudo").exists()
    assert not [p for p in nnunet.glob("Dataset*") if "103" in p.name], "nnU-Net would list it"
    again = []
    monkeypatch.setattr(pseudo_dataset, "_make_label", lambda job: (again.append(job.case.name), make(job))[1])
    assert call(pseudo_dataset, *arguments) == 0
    assert len(again) == 3 and not set(again) & set(made)
    assert "3 of 6 cases are done" in capsys.readouterr().out
    whole = {p.name: p.read_bytes() for p in (nnunet / "Dataset103_PartPseudo" / "labelsTr").iterdir()}
    totals = json.loads((nnunet / "Dataset103_PartPseudo" / RECORD).read_text())["voxels"]
    assert call(pseudo_dataset, *arguments, "--overwrite") == 0
    assert len(again) == 9, "a finished run is not taken up"
    assert {p.name: p.read_bytes() for p in (nnunet / "Dataset103_PartPseudo" / "labelsTr").iterdir()} == whole
    assert json.loads((nnunet / "Dataset103_PartPseudo" / RECORD).read_text())["voxels"] == totals


def test_a_run_is_begun_anew_where_a_prediction_has_changed(partial, nnunet, call, read, monkeypatch):
    folder, predictions, _, predicted = partial()
    for file in predictions.iterdir():
        pad(file)
    make = pseudo_dataset._make_label
    counted = []

    def interrupted(job):
        counted.append(job.case.name)
        if len(counted) == 4:
            raise KeyboardInterrupt
        return make(job)

    monkeypatch.setattr(pseudo_dataset, "_make_label", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(pseudo_dataset, "-d", 102, "-i", predictions, "-o", 103)
    changed = counted[0]
    write((predicted[changed] + 1) % 4, predictions / f"{changed}.png")
    pad(predictions / f"{changed}.png")  # of the same size as before
    monkeypatch.setattr(pseudo_dataset, "_make_label", make)
    assert call(pseudo_dataset, "-d", 102, "-i", predictions, "-o", 103) == 0
    before = read(folder / "labelsTr" / f"{changed}.png")
    after = read(nnunet / "Dataset103_PartPseudo" / "labelsTr" / f"{changed}.png")
    assert np.array_equal(after[before == IGNORE], ((predicted[changed] + 1) % 4)[before == IGNORE])


def test_cases_annotated_completely_need_no_prediction(make_dataset, nnunet, call, read):
    _, masks = make_dataset(101)
    assert call(simulate, "-d", 101, "-o", 102, "--name", "Part", "--masks", 2, "--rectangle", 6, 9) == 0
    folder, predictions = nnunet / "Dataset102_Part", nnunet.parent / "predictions"
    predictions.mkdir()
    whole = [c for c in masks if not (read(folder / "labelsTr" / f"{c}.png") == IGNORE).any()]
    assert len(whole) == 2
    for case, mask in masks.items():
        if case not in whole:
            write(np.zeros_like(mask), predictions / f"{case}.png")
    said = {"format": "nnunet_dsp.annotations", "version": 1, "image_level": {"absent": ["synapse"]}}
    (folder / "annotationsTr" / f"{whole[0]}.json").write_text(json.dumps(said))  # says more, takes nothing back
    assert call(pseudo_dataset, "-d", 102, "-i", predictions, "-o", 103) == 0
    for case in whole:
        assert np.array_equal(read(nnunet / "Dataset103_PartPseudo" / "labelsTr" / f"{case}.png"), masks[case])


def test_a_mask_of_some_classes_needs_a_prediction_without_an_ignore_label_too(make_dataset, nnunet, call, read):
    folder, masks = make_dataset(101)
    predictions = nnunet.parent / "predictions"
    predictions.mkdir()
    for case, mask in masks.items():
        write(np.full_like(mask, 2), predictions / f"{case}.png")
    (predictions / "case_02.png").unlink()
    (folder / "annotationsTr").mkdir()
    said = {"format": "nnunet_dsp.annotations", "version": 1, "mask_labels": ["membrane"]}
    for case in ("case_02", "case_03"):
        (folder / "annotationsTr" / f"{case}.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"1 case\(s\) \(case_02\) not annotated completely and without a prediction"):
        call(pseudo_dataset, "-d", 101, "-i", predictions, "-o", 103)
    (folder / "annotationsTr" / "case_02.json").unlink()
    assert call(pseudo_dataset, "-d", 101, "-i", predictions, "-o", 103) == 0
    labels = nnunet / "Dataset103_FullPseudo" / "labelsTr"
    assert np.array_equal(read(labels / "case_02.png"), masks["case_02"])
    assert np.array_equal(read(labels / "case_03.png"), np.where(masks["case_03"] == 0, 2, masks["case_03"]))


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda p: (p / "case_03.png").unlink(), [], r"1 case\(s\) \(case_03\) not annotated completely and without a"),
        (lambda p: write(np.full((40, 48), 9, np.uint8), p / "case_03.png"), [],
         r"case_03\.png: value\(s\) \[9\] are no label"),
        (lambda p: write(np.zeros((40, 40), np.uint8), p / "case_03.png"), [], r"expected the shape .*\(1, 40, 48\)"),
        (lambda p: (p / "case_03.png").write_bytes(b"no"), [], r"case_03\.png cannot be read"),
        (lambda p: None, ["--threshold", 0.5], r"--threshold needs probabilities, but there is no CASE\.npz for 6"),
        (lambda p: None, ["--threshold", 1.5], "--threshold: expected a number from 0 to 1, but got 1.5"),
        (lambda p: shutil.rmtree(p), [], "there is no folder"),
        (lambda p: None, ["-o", 102, "--name", "Part", "--overwrite"], "-d and -o are the same dataset"),
        (lambda p: None, ["-o", "x"], "expected an id such as 502"),
    ],
)  # fmt: skip
def test_predictions_that_do_not_fit_are_explained(partial, nnunet, call, spoil, arguments, message):
    _, predictions, _, _ = partial()
    spoil(predictions)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(pseudo_dataset, "-d", 102, "-i", predictions, "-o", 103, *arguments)
    assert sorted(p.name for p in nnunet.glob("Dataset*")) == ["Dataset101_Full", "Dataset102_Part"]


def test_probabilities_that_are_something_else_are_refused(partial, call, tmp_path):
    _, predictions, masks, predicted = partial()
    write_probabilities(predictions, predicted)
    np.savez(predictions / "case_01.npz", probabilities=np.array([{"a": 1}], dtype=object))  # needs pickle
    with pytest.raises(ValueError, match=r"case_01\.npz cannot be read as nnU-Net's probabilities.*allow_pickle"):
        call(pseudo_dataset, "-d", 102, "-i", predictions, "-o", 103, "--threshold", 0.5)
    np.savez(predictions / "case_01.npz", probabilities=np.zeros((4, 1, 40, 40), np.float32))
    with pytest.raises(ValueError, match=r"expected floating probabilities of shape \(classes, 1, 40, 48\)"):
        call(pseudo_dataset, "-d", 102, "-i", predictions, "-o", 103, "--threshold", 0.5)


def test_nan_is_never_sure():
    label, counts = pseudo_dataset.merge(
        np.full((1, 1, 3), 9), np.zeros((1, 1, 3), bool), np.array([[[1, 2, 3]]]),
        np.array([[[np.nan, 0.5, 0.4]]]), ignore=9, threshold=0.5,
    )  # fmt: skip
    assert label.tolist() == [[[9, 2, 9]]] and counts == (0, 1, 2)
