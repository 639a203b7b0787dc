"""``nnunet_dsp benchmark filter``: the pseudo-label filter against a softmax over the same logits."""

from __future__ import annotations

import argparse

import torch

from nnunet_dsp.benchmark.batches import random_batch
from nnunet_dsp.benchmark.timing import (
    Row,
    add_timing_arguments,
    check_timing_arguments,
    median_ratio,
    metadata_of_run,
    peak_bytes,
    report,
    time_in_turn,
)
from nnunet_dsp.pseudo_labels import allowed_classes, filter_probabilities, pseudo_label

LIMIT, OBJECTS_LIMIT = 1.0, 1.5
SHAPES = {"2D": (5, (512, 512), (6, 14)), "3D": (2, (64, 128, 128), (3, 8))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "11 classes; 2D: 5 items of 512 x 512, 3D: 2 of 64 x 128 x 128; one item is masked, the others carry "
        "boxes and points. "
        "The filter reads the annotations (which classes may each voxel still have) and takes the softmax within. "
        "Its limit is one plain softmax plus that one reading."
    )
    add_timing_arguments(parser, repeats=15)


def run(args: argparse.Namespace) -> int:
    device = check_timing_arguments(args)
    rows: list[Row] = []
    for name, (batch_size, shape, sides) in SHAPES.items():
        for number in (50, 10_000):
            rows += _rows(f"{name}, {number} boxes and points", batch_size, shape, sides, number, args, device)
        few, many = (row for row in rows if row.name.startswith(name) and row.name.endswith("points: filter"))
        ratio = (many.median_s or 0) / (few.median_s or 1)
        rows.append(Row(f"{name}, growth", many.median_s, many.iqr_s, None, few.name, ratio, OBJECTS_LIMIT))
    meta = metadata_of_run("filter", device, args, classes=11, dtype="float32")
    return report(meta, rows, args.json)


def _rows(
    name: str,
    batch_size: int,
    shape: tuple[int, ...],
    sides: tuple[int, int],
    number: int,
    args: argparse.Namespace,
    device: torch.device,
) -> list[Row]:
    numbers = {"num_boxes": number, "num_points": number, "num_masked": 1, "seed": args.seed}
    batch = random_batch(batch_size, 11, shape, sides=sides, device=device, **numbers)
    logits = batch.logits.detach()

    def read() -> torch.Tensor:
        return allowed_classes(batch.annotations, batch.target, 11, shape, 11)

    def softmax_and_read() -> torch.Tensor:
        read()
        return logits.softmax(1)

    base, ours = f"{name}: softmax, annotations read", f"{name}: filter"
    candidates = {
        f"{name}: softmax": lambda: logits.softmax(1),
        base: softmax_and_read,
        ours: lambda: filter_probabilities(logits, read()),
        f"{name}: hard pseudo-label": lambda: pseudo_label(logits, read()),
    }
    times = time_in_turn(candidates, device, warmup=args.warmup, repeats=args.repeats)
    rows = []
    for key, timing in times.items():
        compared = key not in (base, f"{name}: softmax")
        ratio = median_ratio(timing, times[base]) if compared else None
        limit = LIMIT if key == ours else None
        peak = peak_bytes(candidates[key], device)
        rows.append(Row(key, timing.median, timing.iqr, peak, base if compared else None, ratio, limit))
    return rows
