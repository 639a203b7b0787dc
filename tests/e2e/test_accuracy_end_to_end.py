"""`nnunet_dsp benchmark accuracy` with nnU-Net's real commands, on a dataset and a network that take a minute."""

from __future__ import annotations

import csv
import json

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_the_benchmark_trains_predicts_evaluates_and_reports(workspace):
    out = workspace.root / "accuracy"
    command = ("nnunet_dsp", "benchmark", "accuracy", "-o", out)
    small = ("--plans", "small", "--patch", 32, "--batch-size", 2, "--features", 4, 6, 8)
    short = ("--epochs", 2, "--iterations-per-epoch", 3, "--device", "cpu", "--threads", 1)
    workspace(*command, "-d", 1, "--masks", 3, "--seeds", 1, "--arms", "dsp", *small, *short)
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
    (log,) = (out / "nnUNet_results").rglob("training_log_*.txt")
    assert "Epoch 1" in log.read_text() and "Epoch 2" not in log.read_text()
    assert (out / "cases_mixed_m3_w5.png").is_file()
    said = workspace(*command)
    assert "1 runs, 1 of them finished, 0 to do" in said and "All 1 runs have finished" in said
