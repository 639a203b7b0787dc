"""``nnunet_dsp benchmark parity DIR``: our numbers beside recordings of the authors' released code.

DIR holds dsp_loss_and_filter.npz and dsp_head.npz. What is compared are the functions that training uses, in float32;
the head in float64, in which it was recorded. The form of the recordings stands in `read_batches` and `read_heads`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.head import PrototypeHead
from nnunet_dsp.losses import DSPLosses, dsp_losses
from nnunet_dsp.pseudo_labels import released_filter

LOSS_FILE = "dsp_loss_and_filter.npz"
HEAD_FILE = "dsp_head.npz"
NO_MASK = 255
RELATIVE_LIMIT = 1e-5
"""Losses, filter and head: deviation relative to the recorded value, or to 1 where that is smaller (the losses are
differences of logarithms of the order of 10, so float32 leaves them an absolute error, not a relative one)."""
GRADIENT_LIMIT = 1e-4
"""Gradients: deviation relative to the largest entry of the recorded gradient."""

KINDS = DSPLosses._fields


class RecordedBatch(NamedTuple):
    """One recorded batch as our functions take it."""

    logits: Tensor
    annotations: AnnotationBatch
    target: Tensor
    components: Tensor


class Deviation(NamedTuple):
    """The worst deviation of one quantity over all recordings."""

    quantity: str
    worst: float
    limit: float
    compared: int
    skipped: int
    where: str

    @property
    def holds(self) -> bool:
        return self.worst <= self.limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help=f"folder with {LOSS_FILE} and {HEAD_FILE}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON, too")


def run(args: argparse.Namespace) -> int:
    """Print the table; 0 if everything holds, 1 if not.

    Raises:
        FileNotFoundError, ValueError: a recording is missing or is not of the form expected.
    """
    deviations = compare_losses_and_filter(args.dir / LOSS_FILE) + compare_heads(args.dir / HEAD_FILE)
    print(_table(deviations))
    if args.json is not None:
        args.json.write_text(json.dumps(_report(deviations), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    failed = [deviation.quantity for deviation in deviations if not deviation.holds]
    if failed:
        print(f"\nAbove its limit: {', '.join(failed)}")
        return 1
    print("\nEverything is within its limit.")
    return 0


def _table(deviations: list[Deviation]) -> str:
    lines = [f"{'quantity':<24}{'worst':>11}{'limit':>10}{'compared':>10}{'skipped':>9}  worst in"]
    for d in deviations:
        verdict = "" if d.holds else "  FAILED"
        lines.append(
            f"{d.quantity:<24}{d.worst:>11.2e}{d.limit:>10.0e}{d.compared:>10}{d.skipped:>9}  {d.where}{verdict}"
        )
    return "\n".join(lines)


def _report(deviations: list[Deviation]) -> dict[str, Any]:
    """Strict JSON: a deviation that is not a number becomes null."""
    rows = []
    for d in deviations:
        row: dict[str, Any] = dict(d._asdict(), holds=d.holds)
        row["worst"] = d.worst if math.isfinite(d.worst) else None
        rows.append(row)
    meta = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(), "device": "cpu"}
    return {"meta": meta, "rows": rows}


class _Worst:
    """Collects the deviations of one quantity."""

    def __init__(self, quantity: str, limit: float) -> None:
        self.quantity, self.limit = quantity, limit
        self.worst, self.where, self.compared, self.skipped = 0.0, "-", 0, 0

    def add(self, where: str, ours: np.ndarray, recorded: np.ndarray, scale: np.ndarray | float) -> None:
        """Compare where the recording is finite; ours must then be finite, too. `skipped` counts numbers left out."""
        if ours.shape != recorded.shape:
            raise ValueError(f"{where}: expected {self.quantity} of shape {ours.shape}, but got {recorded.shape}.")
        finite = np.isfinite(recorded)
        self.compared += int(finite.sum())
        self.skipped += int(finite.size - finite.sum())
        if not finite.any():
            return
        deviation = np.abs(ours.astype(np.float64) - recorded.astype(np.float64)) / scale
        worst = float(np.max(np.where(np.isnan(deviation), np.inf, deviation)[finite]))
        if worst > self.worst:
            self.worst, self.where = worst, where

    def result(self) -> Deviation:
        return Deviation(self.quantity, self.worst, self.limit, self.compared, self.skipped, self.where)


def compare_losses_and_filter(path: Path) -> list[Deviation]:
    """The four losses, their gradients and the filter over every recorded batch."""
    losses = {kind: _Worst(f"{kind} loss", RELATIVE_LIMIT) for kind in KINDS}
    gradients = {kind: _Worst(f"{kind} gradient", GRADIENT_LIMIT) for kind in KINDS}
    filtered = _Worst("filter", RELATIVE_LIMIT)
    for name, arrays in read_batches(path).items():
        where = f"{path.name}: {name}"
        batch = to_annotation_batch(arrays, where=where)
        logits = batch.logits.requires_grad_()
        terms = dsp_losses(
            logits,
            batch.annotations,
            target=batch.target,
            components=batch.components,
            ignore_label=NO_MASK,
            variant="released",
        )
        for kind, term in zip(KINDS, terms, strict=True):
            recorded = _get(arrays, f"out/{kind}_loss", where)
            losses[kind].add(name, term.detach().numpy(), recorded, np.maximum(np.abs(recorded), 1.0))
            recorded = _get(arrays, f"out/grad_{kind}_loss", where)
            (gradient,) = torch.autograd.grad(term, logits, retain_graph=True)
            largest = float(np.abs(recorded[np.isfinite(recorded)]).max(initial=0.0))
            gradients[kind].add(name, gradient.numpy(), recorded, largest if largest > 0 else 1.0)
        recorded = _get(arrays, "out/filtered", where)
        ours = released_filter(logits, batch.annotations, batch.target, NO_MASK).numpy()
        filtered.add(name, ours, recorded, np.maximum(np.abs(recorded), 1.0))
    return [worst.result() for worst in (*losses.values(), *gradients.values(), filtered)]


def compare_heads(path: Path) -> list[Deviation]:
    """Every recorded head, in evaluation and in training mode, in float64."""
    embeddings = _Worst("head embeddings", RELATIVE_LIMIT)
    evaluation = _Worst("head, evaluation", RELATIVE_LIMIT)
    training = _Worst("head, training", RELATIVE_LIMIT)
    for name, arrays in read_heads(path).items():
        where = f"{path.name}: {name}"
        parameters = {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}
        head = released_head_from_arrays(parameters, float(_get(arrays, "temperature", where)), where=where)
        features = torch.from_numpy(_get(arrays, "x", where).astype(np.float64))
        with torch.no_grad():
            head.eval()
            # The training pass changes the running statistics, so it comes last.
            if "eval_embeddings" in arrays:
                _add_relative(embeddings, name, head.embed(features), arrays["eval_embeddings"])
            _add_relative(evaluation, name, head(features), _get(arrays, "eval_logits", where))
            head.train()
            _add_relative(training, name, head(features), _get(arrays, "train_logits", where))
    return [worst.result() for worst in (embeddings, evaluation, training)]


def _add_relative(worst: _Worst, name: str, ours: Tensor, recorded: np.ndarray) -> None:
    worst.add(name, ours.numpy(), recorded, np.maximum(np.abs(recorded), 1.0))


def released_head_from_arrays(
    arrays: Mapping[str, np.ndarray], temperature: float, *, where: str = "released head"
) -> PrototypeHead:
    """A PrototypeHead with the released head's parameters, in float64.

    Args:
        arrays: by released name (`/` or `.` between the parts): prototypes (C, P, E); pixelwise_transform/0 the
            BatchNorm, /1 and /3 the convolutions.
        temperature: of the recording.
        where: what error messages call it.

    Raises:
        ValueError: a parameter is missing or does not fit.
    """
    arrays = {key.replace(".", "/"): value for key, value in arrays.items()}
    prototypes = _get(arrays, "prototypes", where)
    first = _get(arrays, "pixelwise_transform/1/weight", where)
    if prototypes.ndim != 3 or first.ndim not in (4, 5):
        raise ValueError(
            f"{where}: expected prototypes of shape (C, P, E) and convolutions of 2 or 3 spatial axes, but got "
            f"{prototypes.shape} and {first.shape}."
        )
    head = PrototypeHead(
        first.shape[1],
        prototypes.shape[0],
        dim=first.ndim - 2,
        num_prototypes=prototypes.shape[1],
        embedding_channels=first.shape[0],
        temperature=temperature,
    ).double()
    state = {}
    for name, tensor in head.state_dict().items():
        released = name.replace("transform.", "pixelwise_transform.").replace(".", "/")
        if released.endswith("num_batches_tracked") and released not in arrays:
            state[name] = tensor
            continue
        array = _get(arrays, released, where)
        if array.shape != tuple(tensor.shape):
            raise ValueError(
                f"{where}: expected parameter `{released}` to be of shape {tuple(tensor.shape)}, but got {array.shape}."
            )
        state[name] = torch.from_numpy(np.asarray(array)).to(tensor.dtype)
    head.load_state_dict(state)
    return head


def read_batches(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The recorded batches, by name: keys NAME/in/... and NAME/out/... of an .npz file.

    in/logits (B, C, H, W) floating; in/class_mask (B, H, W), 255 where nobody drew; in/components (B, H, W), ids
    within each item; in/valid (B, H, W), 0 for pixels that count for nothing; in/tags_b (n,), the classes present in
    item b; in/boxes_b (n, 6): instance, class, x, y, x2, y2 (x: column; corners in any order; half-open); in/points_b
    (n, 4): instance, class, row, column. An item without such a key carries nothing of the kind.
    """
    return _read(path, ("in/logits", "in/class_mask", "in/components", "in/valid"))


def read_heads(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The recorded heads, by name: keys NAME/x, NAME/param/..., NAME/temperature, NAME/eval_logits, NAME/train_logits
    and perhaps NAME/eval_embeddings."""
    return _read(path, ("x", "temperature"))


def _read(path: Path, required: tuple[str, ...]) -> dict[str, dict[str, np.ndarray]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. DIR is the folder that holds the recordings {LOSS_FILE} and {HEAD_FILE}."
        )
    records: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                name, _, rest = key.partition("/")
                records.setdefault(name, {})[rest] = file[key]
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npz file of plain arrays: {error}") from error
    if not records:
        raise ValueError(f"{path} holds no recording.")
    for name, arrays in records.items():
        for key in required:
            _get(arrays, key, f"{path.name}: {name}")
    return records


def _get(arrays: Mapping[str, np.ndarray], key: str, where: str) -> np.ndarray:
    if key not in arrays:
        raise ValueError(f"{where}: expected an array `{key}`, but there is none.")
    return arrays[key]


def to_annotation_batch(arrays: Mapping[str, np.ndarray], *, where: str = "recording") -> RecordedBatch:
    """A recorded batch as our functions take it; `read_batches` states the form.

    Boxes are cut to the image. A box without a pixel stays an entry without voxels: its item carries boxes all
    the same. Component ids become unique within the batch and start at 1 wherever the item has a mask (an id of 0 is
    a component there like any other).

    Raises:
        ValueError: an array's shape, a class or a point does not fit.
    """
    logits = torch.from_numpy(np.ascontiguousarray(_get(arrays, "in/logits", where), dtype=np.float32))
    if logits.ndim != 4 or 0 in logits.shape:
        raise ValueError(f"{where}: expected logits of shape (B, C, H, W), but got {tuple(logits.shape)}.")
    batch_size, num_classes, height, width = logits.shape
    num_voxels = height * width
    maps = {}
    for key in ("class_mask", "components", "valid"):
        maps[key] = np.asarray(_get(arrays, f"in/{key}", where)).astype(np.int64)
        if maps[key].shape != (batch_size, height, width):
            raise ValueError(
                f"{where}: expected {key} of shape {(batch_size, height, width)}, but got {maps[key].shape}."
            )
    for key in arrays:
        match = re.fullmatch(r"in/(?:tags|boxes|points)_(\d+)", key)
        if match and int(match[1]) >= batch_size:
            raise ValueError(f"{where}: expected annotations of items 0 to {batch_size - 1}, but got `{key}`.")

    def rows(key: str, columns: int) -> np.ndarray:
        values = np.asarray(arrays[key]).astype(np.int64)
        if values.size == 0:
            return values.reshape(0, columns)
        if values.ndim != 2 or values.shape[1] != columns:
            raise ValueError(f"{where}: expected `{key}` of shape (n, {columns}), but got {values.shape}.")
        return values

    def check_classes(key: str, classes: np.ndarray) -> None:
        if classes.size and not (0 <= classes.min() and classes.max() < num_classes):
            raise ValueError(f"{where}: expected classes from 0 to {num_classes - 1} in `{key}`, but got {classes}.")

    tags = np.full((batch_size, num_classes), -1, dtype=np.int8)
    points: list[int] = []
    point_class: list[int] = []
    boxes: list[tuple[int, int]] = []
    box_voxels: list[np.ndarray] = []
    box_line: list[np.ndarray] = []
    line_box: list[int] = []
    for item in range(batch_size):
        key = f"in/tags_{item}"
        if key in arrays:
            present = np.asarray(arrays[key]).astype(np.int64).reshape(-1)
            check_classes(key, present)
            tags[item] = 0
            tags[item, present] = 1
        key = f"in/points_{item}"
        if key in arrays:
            found = rows(key, 4)
            check_classes(key, found[:, 1])
            for _, point_of, row, column in found.tolist():
                if not (0 <= row < height and 0 <= column < width):
                    raise ValueError(
                        f"{where}: expected the points of `{key}` inside the image of shape {(height, width)}, but got "
                        f"row {row}, column {column}."
                    )
                points.append(item * num_voxels + row * width + column)
                point_class.append(point_of)
        key = f"in/boxes_{item}"
        if key in arrays:
            found = rows(key, 6)
            check_classes(key, found[:, 1])
            for _, box_of, x, y, x2, y2 in found.tolist():
                left, right = (min(max(edge, 0), width) for edge in sorted((x, x2)))
                top, bottom = (min(max(edge, 0), height) for edge in sorted((y, y2)))
                row_grid, column_grid = np.mgrid[top:bottom, left:right].reshape(2, -1)
                box_voxels.append(item * num_voxels + row_grid * width + column_grid)
                first = len(line_box)
                if row_grid.size:
                    box_line.append(np.stack([first + row_grid - top, first + bottom - top + column_grid - left], 1))
                    line_box += [len(boxes)] * (bottom - top + right - left)
                boxes.append((item, box_of))

    target = maps["class_mask"]
    components = np.zeros_like(target)
    next_id = 1
    for item in range(batch_size):
        drawn = target[item] != NO_MASK
        ids, inverse = np.unique(maps["components"][item][drawn], return_inverse=True)
        components[item][drawn] = next_id + inverse.reshape(-1)
        next_id += len(ids)

    def index(values: Any, *shape: int) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64).reshape(shape))

    box_of_voxel = np.repeat(np.arange(len(boxes)), np.array([len(voxels) for voxels in box_voxels], dtype=np.int64))
    annotations = AnnotationBatch.empty(batch_size, num_classes, 2)._replace(
        tags=torch.from_numpy(tags),
        points=index(points, -1),
        point_class=index(point_class, -1),
        box_item=index([item for item, _ in boxes], -1),
        box_class=index([box_of for _, box_of in boxes], -1),
        box_tight=torch.ones(len(boxes), dtype=torch.bool),
        box_voxels=index(np.concatenate(box_voxels) if box_voxels else [], -1),
        box_of_voxel=index(box_of_voxel, -1),
        box_line=index(np.concatenate(box_line) if box_line else [], -1, 2),
        line_box=index(line_box, -1),
        outside=torch.from_numpy(maps["valid"] == 0),
    )
    return RecordedBatch(logits, annotations, torch.from_numpy(target), torch.from_numpy(components))
