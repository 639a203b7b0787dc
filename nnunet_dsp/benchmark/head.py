"""``nnunet_dsp benchmark head``: the prototype head against its own two convolutions with BatchNorm and LeakyReLU."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from nnunet_dsp.head import PrototypeHead

TIME_LIMIT, MEMORY_LIMIT = 1.3, 1.3
SHAPES = {"2D": (5, (512, 512)), "3D": (2, (64, 96, 96))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "64 features, 11 classes, 5 prototypes a class; 2D: 5 items of 512 x 512, 3D: 2 of 64 x 96 x 96. "
        "All figures are forward and backward."
    )
    add_timing_arguments(parser, repeats=9)
    parser.add_argument("--features", type=int, default=64, metavar="N", help="channels (default: 64)")


def run(args: argparse.Namespace) -> int:
    device = check_timing_arguments(args)
    if args.features < 1:
        raise ValueError(f"Expected --features of at least 1, but got {args.features}.")
    rows: list[Row] = []
    for name, (batch_size, shape) in SHAPES.items():
        rows += _rows(name, batch_size, shape, args, device)
    meta = metadata_of_run("head", device, args, features=args.features, classes=11, prototypes=5, dtype="float32")
    return report(meta, rows, args.json)


class _EverySimilarity(nn.Module):
    """The head as one writes it down first: normalise, all similarities to all prototypes, then their mean."""

    def __init__(self, head: PrototypeHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        embeddings = F.normalize(self.head.transform(features), dim=1)
        prototypes = F.normalize(self.head.prototypes, dim=-1)
        similarity = torch.einsum("be...,cpe->bcp...", embeddings, prototypes)
        return similarity.mean(2) / self.head.temperature


def _rows(
    name: str, batch_size: int, shape: tuple[int, ...], args: argparse.Namespace, device: torch.device
) -> list[Row]:
    torch.manual_seed(args.seed)
    head = PrototypeHead(args.features, 11, dim=len(shape), embedding_channels=args.features).to(device)
    features = torch.randn(batch_size, args.features, *shape, device=device, requires_grad=True)
    with torch.no_grad():
        by_logits = torch.randn(batch_size, 11, *shape, device=device)
        by_embeddings = torch.randn(batch_size, args.features, *shape, device=device)

    def both(module: Callable[[Tensor], Tensor], gradient: Tensor) -> Callable[[], Any]:
        def step() -> None:
            features.grad = None
            head.zero_grad(set_to_none=True)
            module(features).backward(gradient)

        return step

    convolutions, ours = f"{name}, its convolutions alone", f"{name}, prototype head"
    last_layer = (nn.Conv2d if len(shape) == 2 else nn.Conv3d)(args.features, 11, 1).to(device)
    candidates = {
        convolutions: both(head.transform, by_embeddings),
        ours: both(head, by_logits),
        f"{name}, nnU-Net's last layer": both(last_layer, by_logits),
    }
    times = time_in_turn(candidates, device, warmup=args.warmup, repeats=args.repeats)
    every = f"{name}, every similarity formed"
    times |= time_in_turn({every: both(_EverySimilarity(head), by_logits)}, device, warmup=1, repeats=3)
    peaks = {key: peak_bytes(candidate, device) for key, candidate in candidates.items()}
    rows = []
    for key, timing in times.items():
        ratio = None
        if key in candidates and key != convolutions:
            ratio = median_ratio(timing, times[convolutions])
        elif key == every:
            ratio = timing.median / times[convolutions].median
        limit = TIME_LIMIT if key == ours else None
        base = None if ratio is None else convolutions
        rows.append(Row(key, timing.median, timing.iqr, peaks.get(key), base, ratio, limit))
    ratio = peaks[ours] / peaks[convolutions]
    rows.append(
        Row(f"{ours}, memory", None, None, peaks[ours], convolutions, ratio, MEMORY_LIMIT, quantity="memory")
    )
    return rows
