"""The timing benchmarks: what they report, not how fast this machine is."""

from __future__ import annotations

import json

import pytest
import torch

from nnunet_dsp import cli
from nnunet_dsp.benchmark.batches import random_batch
from nnunet_dsp.benchmark.naive import naive_dsp_losses
from nnunet_dsp.benchmark.timing import Row, Timing, format_table, median_ratio, peak_bytes, time_in_turn
from nnunet_dsp.losses import dsp_losses
from nnunet_dsp.pseudo_labels import allowed_classes

CPU = torch.device("cpu")
FEW = ["--repeats", "1", "--warmup", "0"]


@pytest.mark.parametrize("shape", [(24, 32), (12, 16, 16)])
def test_the_naive_loop_computes_what_training_does(shape):
    batch = random_batch(3, 4, shape, num_boxes=9, num_points=7, sides=(2, 6), num_masked=1, seed=0, device=CPU)
    logits = batch.logits.double().detach().requires_grad_()
    allowed = allowed_classes(batch.annotations, batch.target, 4, shape, 4)
    naive = naive_dsp_losses(logits, batch.annotations, batch.target, batch.components, allowed)
    ours = dsp_losses(logits, batch.annotations, target=batch.target, components=batch.components, ignore_label=4)
    for kind, value in naive._asdict().items():
        assert value != 0, kind
        torch.testing.assert_close(getattr(ours, kind), value)


def test_candidates_take_turns_and_warm_up_does_not_count():
    calls = []
    times = time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, warmup=2, repeats=3)
    assert calls[:4] == ["a", "a", "b", "b"]
    assert calls[4:] == ["a", "b", "b", "a", "a", "b"], "who goes first changes from round to round"
    assert [len(t.seconds) for t in times.values()] == [3, 3]


def test_ratios_are_taken_round_by_round():
    assert median_ratio(Timing((2.0, 20.0, 6.0)), Timing((1.0, 10.0, 2.0))) == 2


def test_peak_memory_counts_what_is_alive_at_once():
    def run():
        first = torch.ones(1000)
        del first
        second, third = torch.ones(2000), torch.ones(3000)
        return second.sum() + third.sum()

    assert 20_000 <= peak_bytes(run, CPU) < 21_000


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("x", 1.0, 0.1, None, "base", 1.3, 1.2), False),
        (Row("x", 1.0, 0.1, None, "base", 1.2, 1.2), True),
        (Row("x", 1.0, 0.1, None, "base", 0.8, 0.9, at_least=True), False),
        (Row("x", 1.0, 0.1, None, "base", 0.9, 0.9, at_least=True), True),
        (Row("x", 0.2, 0.1, limit=0.3, quantity="seconds"), True),
        (Row("x", 0.4, 0.1, limit=0.3, quantity="seconds"), False),
        (Row("x", 1.0, 0.1, None, "base", 5.0), None),
    ],
)
def test_a_limit_holds_or_does_not(row, verdict):
    assert row.within_limit is verdict
    assert ("MISSED" in format_table([row])) is (verdict is False)


@pytest.mark.parametrize(
    ("command", "options", "rows"),
    [
        ("loss", ["--size", "64"], {"four DSP losses": 2.5, "naive loop": None, "2D, 35 classes": 1.3}),
        ("startup", ["--cases", "3"], {"--help beyond python": 0.3}),
        ("loader", ["--only", "2D"], {"2D: ours, tags, points and boxes": 0.9, "2D: ours, no weak annotations": 0.95}),
        ("step", ["--only", "2D"], {"2D: nnUNetTrainerDSP": 1.08, "2D: nnUNetTrainerDSP, memory": 1.1}),
    ],
)
def test_a_benchmark_writes_a_table_and_json(command, options, rows, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert cli.main(["benchmark", command, *FEW, *options, "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    result = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    assert set(result) == {"meta", "rows"}
    assert torch.__version__.startswith(result["meta"]["versions"]["torch"])
    assert result["meta"]["seed"] == 0
    found = {row["name"]: row for row in result["rows"]}
    for name, limit in rows.items():
        assert found[name]["limit"] == limit
        assert name in shown
    for row in result["rows"]:
        assert {"name", "median_s", "iqr_s", "peak_bytes", "baseline", "ratio", "limit"} <= set(row)
        assert row["baseline"] is None or row["baseline"] in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss", "--repeats", "0"], "--repeats of at least 1"),
        (["filter", "--device", "tpu!"], "--device to be cpu or cuda"),
        (["head", "--features", "0"], "--features of at least 1"),
        (["startup", "--cases", "0"], "--cases of at least 1"),
    ],
)
def test_impossible_options_are_named(options, message, capsys):
    assert cli.main(["benchmark", *options]) == 1
    assert message in capsys.readouterr().err
