"""`nnunet_dsp benchmark accuracy` with nnU-Net's real commands, on a dataset and a network that take a minute."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from skimage.io import imread

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def command(workspace):
    """The command that goes on with a benchmark in which the arm dsp has run."""
    command = ("nnunet_dsp", "benchmark", "accuracy", "-o", workspace.root / "accuracy")
    small = ("--plans", "small", "--patch", 32, "--batch-size", 2, "--features", 4, 6, 8, "--rectangle", 24)
    short = ("--epochs", 2, "--iterations-per-epoch", 3, "--device", "cpu", "--threads", 1)
    workspace(*command, "-d", 1, "--masks", 3, "--seeds", 1, "--arms", "dsp", *small, *short)
    return command


def test_the_benchmark_trains_predicts_evaluates_and_reports(workspace, command):
    out = workspace.root / "accuracy"
    run = "m3_w5_s1_weak_tags-points-boxes__nnUNetTrainerDSP"
    record = json.loads((out / "runs" / run / "record.json").read_text())
    assert len(record["per_case"]) == 2
    with (out / "per_case.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((out / "runs" / run / "predictions" / "summary.json").read_text())
    dice = {
        (entry["prediction_file"].rsplit("/", 1)[1][:-4], value): metrics["Dice"]
        for entry in summary["metric_per_case"]
        for value, metrics in entry["metrics"].items()
    }
    names = json.loads((workspace.dataset("raw", 1) / "dataset.json").read_text())["labels"]
    assert len(rows) == len(dice) == 2 * (len(names) - 1)
    for row in rows:
        expected = dice[row["case"], str(names[row["class"]])]
        assert (row["Dice"] == "") if expected != expected else float(row["Dice"]) == pytest.approx(expected)
    plans = json.loads((out / "nnUNet_preprocessed" / record["dataset"] / f"{record['plans']}.json").read_text())
    assert plans["configurations"]["2d"]["patch_size"] == [32, 32]
    (log,) = (out / "nnUNet_results" / record["dataset"]).rglob("training_log_*.txt")
    assert "Epoch 1" in log.read_text() and "Epoch 2" not in log.read_text()
    assert (out / "cases_mixed_m3_w5.png").is_file()
    said = workspace(*command, "--arms", "dsp")
    assert "1 runs, 1 of them finished, 0 to do" in said and "All 1 runs have finished" in said


def test_weights_of_another_dataset_and_a_second_network_on_what_the_first_predicts(workspace, command):
    """Pre-training on dataset 2, rectangles, pseudo-labels, and nnU-Net on these: nnU-Net's commands and our own."""
    out, raw = workspace.root / "accuracy", workspace.root / "accuracy" / "nnUNet_raw"
    what = ("--settings", "masks+rectangles", "--masks", 0, "--weak", 2, "--pretrain", 2, "--pretrain-epochs", 1)
    said = workspace(*command, *what, "--arms", "prompt:partial:pretrained:second")
    assert "3 runs, 0 of them finished, 3 to do" in said
    partial = "m0_w2_s1_ignore_rectangles__nnUNetTrainerPrompt__pretrained"
    log = (out / "runs" / partial / "log.txt").read_text()
    assert "Loading pretrained weights from file" in log and "_pretrain/nnUNetTrainerPrompt_benchmark__" in log
    second = f"m0_w2_s1_second_rectangles_{partial.partition('__')[2]}"
    record = json.loads((out / "runs" / f"{second}__nnUNetTrainer" / "record.json").read_text())
    assert record["needs"] == partial and len(record["per_case"]) == 2
    (before,), (after,) = (list(raw.glob(f"*_{name}")) for name in (partial.partition("__")[0], second))
    ignore = json.loads((before / "dataset.json").read_text())["labels"]["ignore"]
    for case in record["cases"]:
        drawn, label = (imread(folder / "labelsTr" / f"{case}.png") for folder in (before, after))
        known = drawn != ignore
        assert known.sum() == 24 * 24 and (label < ignore).all()
        np.testing.assert_array_equal(label[known], drawn[known])
