"""`nnunet_dsp benchmark parity` on recordings of the oracle's making, and on the authors' where they are at hand."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F

from nnunet_dsp import benchmark
from nnunet_dsp.benchmark import parity
from nnunet_dsp.benchmark.parity import HEAD_FILE, LOSS_FILE, compare_heads, compare_losses_and_filter

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
QUANTITIES = [
    *(f"{kind} loss" for kind in ("image", "box", "point", "mask")),
    *(f"{kind} gradient" for kind in ("image", "box", "point", "mask")),
    "filter",
    "head embeddings",
    "head, evaluation",
    "head, training",
]


def record_outputs(record: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add what the oracle computes, under the recordings' names."""
    shape = record["in/logits"].shape
    losses, gradients = oracle.released_losses(record), oracle.released_gradients(record)
    for kind in losses:
        record[f"out/{kind}_loss"] = np.float64(losses[kind])
        record[f"out/grad_{kind}_loss"] = np.array(gradients[kind], dtype=np.float32).reshape(shape)
    record["out/filtered"] = np.array(oracle.released_filter(record), dtype=np.float32).reshape(shape)
    return record


def random_record(seed: int, shape: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    """Inputs of a recording with everything that may be in one: boxes that leave the image, overlap, are unordered or
    empty; points on one pixel, on invalid ones and in masks of another class; absent and empty keys."""
    r = np.random.default_rng(seed)
    items, num_classes, height, width = shape
    record = {
        "in/logits": r.normal(0, 2, shape).astype(np.float32),
        "in/class_mask": np.full((items, height, width), 255, np.uint8),
        "in/components": np.zeros((items, height, width), np.int32),
        "in/valid": np.ones((items, height, width), np.uint8),
    }
    for b in range(items):
        if r.random() < 0.6:
            record["in/valid"][b, :, int(r.integers(width // 2, width)) :] = 0
        if r.random() < 0.7:
            # stripes; ids start at 0 and repeat from item to item
            stripes = np.sort(r.integers(0, 3, height))
            record["in/components"][b] = stripes[:, None]
            record["in/class_mask"][b] = r.integers(0, num_classes, 3)[stripes][:, None]
        if r.random() < 0.7:
            record[f"in/tags_{b}"] = np.flatnonzero(r.random(num_classes) < 0.5).astype(np.int32)
        if r.random() < 0.7:
            n = int(r.integers(1, 5))
            x, y = r.integers(-2, width + 3, (2, n)), r.integers(-2, height + 3, (2, n))
            boxes = np.stack([np.arange(n), r.integers(0, num_classes, n), x[0], y[0], x[1], y[1]], 1)
            record[f"in/boxes_{b}"] = boxes.astype(np.int32)
        if r.random() < 0.7:
            n = int(r.integers(1, 5))
            points = [np.arange(n), r.integers(0, num_classes, n), r.integers(0, height, n), r.integers(0, width, n)]
            record[f"in/points_{b}"] = np.stack(points, 1).astype(np.int32)
    return record


def random_head(seed: int, dim: int, prototypes: int = 3) -> dict[str, np.ndarray]:
    r = np.random.default_rng(seed)
    channels, classes, temperature = 6, 4, 0.07
    kernel = (1,) * dim
    parameters = {
        "prototypes": r.normal(size=(classes, prototypes, channels)),
        "pixelwise_transform/0/weight": r.normal(size=channels),
        "pixelwise_transform/0/bias": r.normal(size=channels),
        "pixelwise_transform/0/running_mean": r.normal(size=channels),
        "pixelwise_transform/0/running_var": r.uniform(0.5, 2, channels),
        "pixelwise_transform/0/num_batches_tracked": np.int64(0),
        "pixelwise_transform/1/weight": r.normal(size=(channels, channels, *kernel)),
        "pixelwise_transform/1/bias": r.normal(size=channels),
        "pixelwise_transform/3/weight": r.normal(size=(channels, channels, *kernel)),
        "pixelwise_transform/3/bias": r.normal(size=channels),
    }
    x = r.normal(size=(2, channels, *(5, 4, 3)[:dim]))
    record = {"x": x, "temperature": np.float64(temperature)} | {f"param/{k}": v for k, v in parameters.items()}

    p = {k.removeprefix("pixelwise_transform/"): torch.from_numpy(np.asarray(v)) for k, v in parameters.items()}
    for mode in ("eval", "train"):
        y = torch.from_numpy(x).movedim(1, -1)
        axes = tuple(range(dim + 1))
        mean, variance = (p["0/running_mean"], p["0/running_var"])
        if mode == "train":
            mean, variance = y.mean(axes), y.var(axes, unbiased=False)
        y = (y - mean) / (variance + 1e-5).sqrt() * p["0/weight"] + p["0/bias"]
        y = F.leaky_relu(y @ p["1/weight"].flatten(1).T + p["1/bias"], 0.1)
        y = y @ p["3/weight"].flatten(1).T + p["3/bias"]
        y = y / y.norm(dim=-1, keepdim=True)
        similarity = torch.einsum("...e,cpe->...cp", y, F.normalize(p["prototypes"], dim=-1)).mean(-1) / temperature
        if mode == "eval":
            record["eval_embeddings"] = y.movedim(-1, 1).numpy()
        record[f"{mode}_logits"] = similarity.movedim(-1, 1).numpy()
    return record


def save(folder: Path, batches: list[dict[str, np.ndarray]], heads: list[dict[str, np.ndarray]]) -> None:
    for name, records in ((LOSS_FILE, batches), (HEAD_FILE, heads)):
        np.savez(folder / name, **{f"{i:02}/{key}": v for i, record in enumerate(records) for key, v in record.items()})


def parity_command(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    return benchmark.run(parser.parse_args(["parity", *map(str, arguments)]))


@pytest.fixture(scope="module")
def batches():
    shapes = [(1, 2, 5, 4), (2, 3, 4, 6), (2, 4, 3, 5), (3, 1, 4, 4)]
    return [record_outputs(random_record(seed, shape)) for seed, shape in enumerate(shapes)]


@pytest.fixture
def recordings(tmp_path, batches):
    save(tmp_path, [dict(record) for record in batches], [random_head(0, 2), random_head(1, 3, prototypes=1)])
    return tmp_path


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the recordings of the released code are not beside the repository")
def test_the_numbers_are_those_of_the_released_code(capsys):
    assert parity_command(REFERENCE) == 0
    printed = capsys.readouterr().out
    assert "Everything is within its limit." in printed
    assert all(quantity in printed for quantity in QUANTITIES)


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the recordings of the released code are not beside the repository")
def test_the_oracle_computes_what_the_released_code_computes():
    records = parity.read_batches(REFERENCE / LOSS_FILE)
    for name, record in [*list(records.items())[::4], ("21", records["21"])]:  # 21: boxes of one class overlap
        for kind, loss in oracle.released_losses(record).items():
            assert loss == pytest.approx(record[f"out/{kind}_loss"].item(), rel=1e-5), (name, kind)
        filtered = np.array(oracle.released_filter(record)).reshape(record["out/filtered"].shape)
        finite = np.isfinite(record["out/filtered"])  # the released NaN survives under a mask, the oracle's does not
        np.testing.assert_allclose(filtered[finite], record["out/filtered"][finite], rtol=1e-5, atol=1e-6)


def test_other_recordings_of_the_same_form_hold(recordings, capsys):
    assert parity_command(recordings, "--json", recordings / "parity.json") == 0
    assert "FAILED" not in capsys.readouterr().out
    report = json.loads((recordings / "parity.json").read_text())
    assert [row["quantity"] for row in report["rows"]] == QUANTITIES
    assert all(row["holds"] and row["compared"] > 0 and row["worst"] <= row["limit"] for row in report["rows"])
    assert {"torch", "python", "device"} <= set(report["meta"])


@pytest.mark.parametrize("seed", range(12))
def test_values_hold_on_many_odd_recordings(seed):
    record = random_record(100 + seed, (3, 3, 5, 6))
    batch = parity.to_annotation_batch(record)
    losses = parity.dsp_losses(
        batch.logits,
        batch.annotations,
        target=batch.target,
        components=batch.components,
        ignore_label=255,
        variant="released",
    )
    for kind, expected in oracle.released_losses(record).items():
        assert getattr(losses, kind).item() == pytest.approx(expected, rel=1e-5, abs=1e-5), kind
    ours = parity.released_filter(batch.logits, batch.annotations, batch.target, 255).numpy()
    expected = np.array(oracle.released_filter(record)).reshape(ours.shape)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_recording_without_any_annotation_or_with_empty_arrays_holds(tmp_path):
    bare = {key: value for key, value in random_record(0, (2, 3, 4, 4)).items() if key[-1] not in "01"}
    bare["in/class_mask"] = np.full_like(bare["in/class_mask"], 255)
    empty = dict(bare) | {"in/tags_0": np.zeros(0, np.int32), "in/points_1": np.zeros((0, 4), np.int32)}
    empty |= {"in/boxes_1": np.zeros((0, 6), np.int32)}
    save(tmp_path, [record_outputs(bare), record_outputs(empty)], [random_head(0, 2)])
    assert parity_command(tmp_path) == 0


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_deviation_just_above_the_limit_is_found_and_named(quantity, batches, tmp_path, capsys):
    records, head = [dict(record) for record in batches], random_head(0, 2)
    kind = quantity.split()[0]
    if quantity.endswith("loss"):
        records[1][f"out/{kind}_loss"] = records[1][f"out/{kind}_loss"] * (1 + 2e-5) + 2e-5
    elif quantity.endswith("gradient"):
        key = f"out/grad_{kind}_loss"
        records[1][key] = records[1][key].copy()
        records[1][key].flat[3] += 3e-4 * max(np.abs(records[1][key]).max(), 1e-3)
    elif quantity == "filter":
        records[1]["out/filtered"] = np.where(np.isfinite(records[1]["out/filtered"]), 0.5, np.nan)
    else:
        key = {"embeddings": "eval_embeddings", "evaluation": "eval_logits", "training": "train_logits"}
        head[key[quantity.split()[-1]]][0, 0, 0, 0] += 3e-4
    save(tmp_path, records, [head])
    assert parity_command(tmp_path) == 1
    printed = capsys.readouterr().out
    assert f"Above its limit: {quantity}\n" in printed


def test_numbers_that_are_not_finite_where_the_recorded_ones_are_count_as_deviations():
    worst = parity._Worst("loss", 1e-5)
    worst.add("a", np.array([1.0, 5.0]), np.array([1.0, np.nan]), 1.0)
    assert worst.result().holds
    assert (worst.result().compared, worst.result().skipped) == (1, 1)
    worst.add("b", np.array([np.nan]), np.array([1.0]), 1.0)
    assert not worst.result().holds
    assert worst.result().where == "b"
    report = parity._report([worst.result()])
    assert report["rows"][0]["worst"] is None
    json.dumps(report, allow_nan=False)


def test_what_is_missing_or_odd_is_one_clear_error(recordings, batches):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist. DIR is the folder"):
        parity_command(recordings / "nowhere")
    np.savez(recordings / LOSS_FILE, **{"00/in/logits": np.array([object()], dtype=object)})
    with pytest.raises(ValueError, match="not a readable .npz file of plain arrays"):
        compare_losses_and_filter(recordings / LOSS_FILE)
    (recordings / LOSS_FILE).write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="not a readable .npz file of plain arrays"):
        compare_losses_and_filter(recordings / LOSS_FILE)
    np.savez(recordings / LOSS_FILE)
    with pytest.raises(ValueError, match="holds no recording"):
        compare_losses_and_filter(recordings / LOSS_FILE)

    def changed(**changes: np.ndarray | None) -> Path:
        record = dict(batches[1]) | {f"in/{key}": value for key, value in changes.items()}
        save(recordings, [{k: v for k, v in record.items() if v is not None}], [random_head(0, 2)])
        return recordings / LOSS_FILE

    for changes, message in (
        ({"valid": None}, "00: expected an array `in/valid`"),
        ({"valid": np.ones((2, 9, 9))}, r"expected valid of shape \(2, 4, 6\), but got \(2, 9, 9\)"),
        ({"logits": np.ones((3, 4))}, r"expected logits of shape \(B, C, H, W\)"),
        ({"tags_0": np.array([7])}, r"expected classes from 0 to 2 in `in/tags_0`, but got \[7\]"),
        ({"tags_9": np.array([1])}, "annotations of items 0 to 1, but got `in/tags_9`"),
        ({"boxes_0": np.ones((1, 5))}, r"expected `in/boxes_0` of shape \(n, 6\), but got \(1, 5\)"),
        ({"points_0": np.array([[0, 0, 4, 0]])}, "inside the image of shape .* got row 4, column 0"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_losses_and_filter(changed(**changes))
    head = random_head(0, 2)
    head["param/prototypes"] = np.ones((4, 3, 9))
    save(recordings, batches, [head])
    with pytest.raises(ValueError, match=r"`prototypes` to be of shape \(4, 3, 6\)"):
        compare_heads(recordings / HEAD_FILE)
    del head["param/prototypes"]
    save(recordings, batches, [head])
    with pytest.raises(ValueError, match="expected an array `prototypes`"):
        compare_heads(recordings / HEAD_FILE)


def test_the_help_lists_the_benchmarks_without_importing_torch():
    code = (
        "import argparse, sys; from nnunet_dsp import benchmark; p = argparse.ArgumentParser();"
        "benchmark.add_arguments(p); print(p.format_help()); print('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert "parity" in result.stdout
    assert result.stdout.split()[-1] == "False"
