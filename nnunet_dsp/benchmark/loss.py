"""``nnunet_dsp benchmark loss``: the four DSP losses against a cross entropy on the same logits, both passes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from nnunet_dsp.benchmark.batches import RandomBatch, random_batch
from nnunet_dsp.benchmark.naive import naive_dsp_losses
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
from nnunet_dsp.losses import dsp_losses
from nnunet_dsp.pseudo_labels import allowed_classes
from nnunet_dsp.set_losses import SetLosses, set_losses

TIME_LIMIT, MEMORY_LIMIT, CLASSES_LIMIT, OBJECTS_LIMIT = 2.5, 1.5, 1.3, 1.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The batch: 5 items of 512 x 512, 11 classes, 2 of them masked, 50 boxes and 100 points in the others, tags on "
        "all. All figures are forward and backward. The losses include finding the classes that annotations allow."
    )
    add_timing_arguments(parser, repeats=15)
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS", help="side of an item (default: 512)")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive loop out; it takes seconds a run")


def run(args: argparse.Namespace) -> int:
    device = check_timing_arguments(args)
    if args.size < 64:
        raise ValueError(f"Expected --size of at least 64, but got {args.size}.")
    torch.manual_seed(args.seed)
    rows = [*_main_rows(args, device), *_growth_rows(args, device)]
    meta = metadata_of_run("loss", device, args, shape=[5, 11, args.size, args.size], dtype="float32")
    return report(meta, rows, args.json)


def _backward(batch: RandomBatch, loss: Callable[[], torch.Tensor]) -> Callable[[], Any]:
    def both() -> None:
        batch.logits.grad = None
        loss().backward()

    return both


def _cross_entropy(batch: RandomBatch) -> Callable[[], Any]:
    return _backward(batch, lambda: F.cross_entropy(batch.logits, batch.labels))


def _allowed(batch: RandomBatch) -> torch.Tensor:
    shape = batch.logits.shape
    return allowed_classes(batch.annotations, batch.target, shape[1], shape[2:], shape[1])


def _of_sets(batch: RandomBatch) -> SetLosses:
    return set_losses(batch.logits, _allowed(batch), batch.target == batch.logits.shape[1])


def _dsp(batch: RandomBatch) -> Callable[[], Any]:
    def loss() -> torch.Tensor:
        terms = dsp_losses(
            batch.logits,
            batch.annotations,
            target=batch.target,
            components=batch.components,
            num_components=batch.num_components,
            ignore_label=batch.logits.shape[1],
        )
        return torch.stack(tuple(terms)).sum()

    return _backward(batch, loss)


def _main_rows(args: argparse.Namespace, device: torch.device) -> list[Row]:
    batch = random_batch(
        5, 11, (args.size, args.size), num_boxes=50, num_points=100, sides=(args.size // 16, args.size // 5),
        num_masked=2, seed=args.seed, device=device,
    )
    candidates = {
        "cross entropy": _cross_entropy(batch),
        "four DSP losses": _dsp(batch),
        "marginal and pseudo-label loss": _backward(batch, lambda: torch.stack(_of_sets(batch)[:2]).sum()),
    }
    times = time_in_turn(candidates, device, warmup=args.warmup, repeats=args.repeats)
    peaks = {name: peak_bytes(candidate, device) for name, candidate in candidates.items()}
    base = "cross entropy"
    rows = []
    for name, timing in times.items():
        compared = {} if name == base else {"baseline": base, "ratio": median_ratio(timing, times[base])}
        limit = TIME_LIMIT if name == "four DSP losses" else None
        rows.append(Row(name, timing.median, timing.iqr, peaks[name], limit=limit, **compared))  # type: ignore[arg-type]
    peak = peaks["four DSP losses"]
    ratio = peak / peaks[base]
    rows.append(Row("four DSP losses, memory", None, None, peak, base, ratio, MEMORY_LIMIT, quantity="memory"))
    if not args.no_naive:
        def naive() -> torch.Tensor:
            terms = naive_dsp_losses(batch.logits, batch.annotations, batch.target, batch.components, _allowed(batch))
            return torch.stack(tuple(terms)).sum()

        slow = time_in_turn({"naive": _backward(batch, naive)}, device, warmup=0, repeats=2)["naive"]
        rows.append(Row("naive loop", slow.median, slow.iqr, None, base, slow.median / times[base].median))
    return rows


def _growth_rows(args: argparse.Namespace, device: torch.device) -> list[Row]:
    rows: list[Row] = []
    half = args.size // 2
    shapes: tuple[tuple[str, int, tuple[int, ...], tuple[int, int]], ...] = (
        ("2D", 5, (args.size, args.size), (6, 14)),
        ("3D", 2, (args.size // 8, half // 2, half // 2), (3, 8)),
    )
    for name, batch_size, shape, sides in shapes:
        by_classes = {
            f"{name}, {num_classes} classes": _dsp(
                random_batch(batch_size, num_classes, shape, num_boxes=50, num_points=100, sides=sides, num_masked=1,
                             seed=args.seed, device=device)
            )
            for num_classes in (5, 35)
        }
        few, many = by_classes
        times = time_in_turn(by_classes, device, warmup=args.warmup, repeats=args.repeats)
        ratio = median_ratio(times[many], times[few]) * 5 / 35
        rows.append(Row(few, times[few].median, times[few].iqr))
        rows.append(
            Row(many, times[many].median, times[many].iqr, None, few, ratio, CLASSES_LIMIT, quantity="time per class")
        )
        by_objects = {
            f"{name}, {number} boxes and points": _dsp(
                random_batch(batch_size, 11, shape, num_boxes=number, num_points=number, sides=sides, num_masked=1,
                             seed=args.seed, device=device)
            )
            for number in (10, 10_000)
        }
        few, many = by_objects
        times = time_in_turn(by_objects, device, warmup=args.warmup, repeats=args.repeats)
        ratio = median_ratio(times[many], times[few])
        rows.append(Row(few, times[few].median, times[few].iqr))
        rows.append(Row(many, times[many].median, times[many].iqr, None, few, ratio, OBJECTS_LIMIT))
    return rows
