"""`nnunet_dsp instances` in this process: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from skimage.io import imsave

from nnunet_dsp import cli
from nnunet_dsp.instances import predict_command


@pytest.fixture
def folders(tmp_path):
    """Truth and a prediction that joins the two lower instances; ids above 255; the right half is not labelled."""
    for name in ("labelsTs", "out"):
        (tmp_path / name).mkdir()
    truth = np.zeros((20, 20), np.uint16)
    truth[:10, :10], truth[10:, :5], truth[10:, 5:10], truth[:, 10:] = 300, 2, 3, 301
    predicted = np.where(truth == 3, 2, truth)
    imsave(tmp_path / "labelsTs" / "a.png", truth, check_contrast=False)
    imsave(tmp_path / "out" / "a.png", predicted, check_contrast=False)
    labels = {"background": 0, "cell": list(range(1, 301)), "ignore": 301}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    return tmp_path


def evaluate(*words):
    return cli.main(["instances", "evaluate", *map(str, words)])


def test_the_ignore_label_is_found_beside_the_truth_and_json_holds_every_case(folders, capsys):
    assert evaluate(folders / "labelsTs", folders / "out") == 0
    said = capsys.readouterr().out
    assert "Ignored in the truth: label 301" in said
    assert said.splitlines()[0].split()[:3] == ["case", "arand", "voi_split"]
    summary = json.loads((folders / "out" / "instances_summary.json").read_text())
    assert summary["cases"]["a"]["num_truth"] == 3 and summary["cases"]["a"]["num_prediction"] == 2
    assert summary["cases"]["a"]["voi_merge"] == pytest.approx(0.5)
    assert summary["mean"] == summary["cases"]["a"]


@pytest.mark.parametrize(("value", "number"), [("none", 4), ("2", 3)])
def test_the_ignore_label_can_be_named(folders, value, number):
    assert evaluate(folders / "labelsTs" / "a.png", folders / "out" / "a.png", "--ignore", value) == 0
    summary = json.loads((folders / "out" / "instances_summary.json").read_text())
    assert summary["mean"]["num_truth"] == number


def test_missing_and_unfitting_files_are_named_and_end_with_1(folders, capsys):
    (folders / "out" / "a.png").rename(folders / "out" / "b.png")
    assert evaluate(folders / "labelsTs", folders / "out") == 1
    assert "lacks 1 of 1 label images" in capsys.readouterr().err
    imsave(folders / "out" / "a.png", np.eye(5, dtype=np.uint8), check_contrast=False)
    assert evaluate(folders / "labelsTs", folders / "out") == 1
    assert "shape (20, 20), but got (5, 5)" in capsys.readouterr().err
    assert evaluate(folders / "nowhere", folders / "out") == 1
    assert "nowhere" in capsys.readouterr().err


def test_predictions_without_truth_are_told_and_two_files_of_one_case_refused(folders, capsys):
    found = (folders / "out" / "a.png").read_bytes()
    (folders / "out" / "b.png").write_bytes(found)
    assert evaluate(folders / "labelsTs", folders / "out") == 0
    said = capsys.readouterr().out
    assert "1 prediction(s) have no truth" in said and "left out: b" in said
    for folder in ("out", "labelsTs"):
        np.save(folders / folder / "a.npy", np.ones((20, 20), int))
        assert evaluate(folders / "labelsTs", folders / "out") == 1
        assert "holds both a.npy and a.png" in capsys.readouterr().err
        (folders / folder / "a.npy").unlink()


def test_what_nobody_labelled_may_be_negative(tmp_path, capsys):
    truth = np.zeros((20, 20), np.int32)
    truth[:10], truth[10:, :10], truth[10:, 10:] = 7, 9, -1
    np.save(tmp_path / "truth.npy", truth)
    np.save(tmp_path / "found.npy", np.where(truth < 0, 5, truth))
    files = (tmp_path / "truth.npy", tmp_path / "found.npy")
    assert evaluate(*files) == 1
    assert "lowest is -1. If that is what nobody labelled, say --ignore -1" in capsys.readouterr().err
    assert evaluate(*files, "--ignore", "-1") == 0
    mean = json.loads((tmp_path / "instances_summary.json").read_text())["mean"]
    assert mean["arand"] == 0 and mean["ap"] == 1 and mean["num_truth"] == mean["num_prediction"] == 2


@pytest.mark.parametrize("content", ["[1]", '{"labels": ["a"]}', '{"labels": {"ignore": [3]}}', "{"])
def test_a_broken_dataset_json_beside_the_truth_is_named(folders, content, capsys):
    (folders / "dataset.json").write_text(content)
    assert evaluate(folders / "labelsTs", folders / "out") == 1
    said = capsys.readouterr().err
    assert "dataset.json" in said and "Traceback" not in said
    assert evaluate(folders / "labelsTs", folders / "out", "--ignore", "none") == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((4, 4), 1.5), "expected whole numbers"),
        (np.full((4, 4), np.nan), "expected whole numbers"),
        (np.array([["a", "b"]]), "expected whole numbers"),
        (np.ones((2, 2), complex), "expected whole numbers"),
        (np.array([[-3, 1]]), "ids of at least 0"),
    ],
)
def test_label_images_that_hold_no_ids_are_named(tmp_path, labels, message, capsys):
    for name, array in (("truth.npy", np.ones((4, 4), int)), ("found.npy", labels)):
        np.save(tmp_path / name, array)
    assert evaluate(tmp_path / "truth.npy", tmp_path / "found.npy") == 1
    said = capsys.readouterr().err
    assert "found.npy" in said and message in said


def test_images_without_instances_have_no_error_and_no_measure_fails(tmp_path):
    for name in ("truth.npy", "found.npy"):
        np.save(tmp_path / name, np.zeros((4, 4), int))
    assert evaluate(tmp_path / "truth.npy", tmp_path / "found.npy", "-o", tmp_path / "out.json") == 0
    mean = json.loads((tmp_path / "out.json").read_text())["mean"]
    assert mean["arand"] is None and mean["ap"] is None and mean["num_truth"] == 0
    assert evaluate(tmp_path / "truth.npy", tmp_path / "found.npy", "-o", tmp_path) == 1


def test_prediction_says_which_model_or_library_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    words = ["instances", "predict", "-i", str(tmp_path), "-o", str(tmp_path / "out"), "--decoder", "components"]
    assert cli.main(words) == 1
    assert "Give -d and -c" in capsys.readouterr().err
    assert cli.main([*words, "-d", "999", "-c", "2d"]) == 1
    assert "There is no dataset with id 999" in capsys.readouterr().err
    assert cli.main([*words, "-m", str(tmp_path)]) == 1
    assert "no trained model" in capsys.readouterr().err
    monkeypatch.setattr(predict_command, "available", lambda decoder: False)
    assert cli.main([*words[:-1], "mutex"]) == 1
    assert "pip install nnunet-dsp[instances]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_are_listed_by_case_and_a_missing_channel_is_told(tmp_path):
    for name in ("a_0000.png", "a_0001.png", "a_0002.png", "b_0000.png", "b_0001.png", "c_0000.png", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="b: the model reads 3 channel"):
        predict_command.list_cases(tmp_path, ".png", 3)
    (tmp_path / "b_0002.png").touch()
    found = predict_command.list_cases(tmp_path, ".png", 3)
    assert {case: len(files) for case, files in found.items()} == {"a": 3, "b": 3, "c": 1}, "c may be in colour"
    with pytest.raises(FileNotFoundError, match=r"CASE_0000\.nii\.gz"):
        predict_command.list_cases(tmp_path, ".nii.gz", 1)
