"""``nnunet_dsp benchmark startup``: what the command and the start of a training cost before anything is computed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_dsp.benchmark.timing import (
    Row,
    Timing,
    add_timing_arguments,
    check_timing_arguments,
    metadata_of_run,
    report,
    time_in_turn,
)

HELP_LIMIT, ANNOTATIONS_LIMIT = 0.3, 10.0
LABELS = {"background": 0, "cell": 1, "nucleus": 2, "ignore": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Two things: `nnunet_dsp --help` beside `python -c pass`, and validating and mapping the annotations of a "
        "dataset (50 points and 50 boxes in each of 1000 cases of 1024 x 1024) at the start of a training, for the "
        "first time and again."
    )
    add_timing_arguments(parser, repeats=7)
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="cases (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    device = check_timing_arguments(args)
    if args.cases < 1:
        raise ValueError(f"Expected --cases of at least 1, but got {args.cases}.")
    rows = [*_command_rows(args, device), *_annotation_rows(args)]
    return report(metadata_of_run("startup", device, args, cases=args.cases, objects=100), rows, args.json)


def _command_rows(args: argparse.Namespace, device: torch.device) -> list[Row]:
    def start(*command: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)

    base, ours = "python -c pass", "nnunet_dsp --help"
    candidates = {base: start("-c", "pass"), ours: start("-m", "nnunet_dsp.cli", "--help")}
    times = time_in_turn(candidates, device, warmup=args.warmup, repeats=args.repeats)
    more = float(np.median(np.subtract(times[ours].seconds, times[base].seconds)))
    return [
        Row(base, times[base].median, times[base].iqr),
        Row(ours, times[ours].median, times[ours].iqr),
        Row("--help beyond python", more, times[ours].iqr, baseline=base, limit=HELP_LIMIT, quantity="seconds"),
    ]


def _annotation_rows(args: argparse.Namespace) -> list[Row]:
    from nnunet_dsp.annotations import LabelNames
    from nnunet_dsp.training_set import load_case_annotations

    with tempfile.TemporaryDirectory(prefix="nnunet_dsp_startup_") as name:
        folder = Path(name)
        cases = _write_dataset(folder, args.cases, np.random.default_rng(args.seed))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            found = load_case_annotations(
                folder / "annotationsTr",
                folder / "preprocessed",
                cases,
                cases,
                lambda case: (1, 1024, 1024),
                LabelNames.from_dataset_json({"labels": LABELS}),
                (0, 1, 2),
                lambda case: None,
                cache_file=folder / "cache" / "annotations.npz",
            )
            seconds.append(time.perf_counter() - start)
            if len(found) != args.cases:
                raise RuntimeError(f"Expected the annotations of {args.cases} cases, but got {len(found)}.")
    first, again = Timing(tuple(seconds[:1])), Timing(tuple(seconds[1:]))
    limit = ANNOTATIONS_LIMIT if args.cases == 1000 else None
    of = f"annotations of {args.cases} cases"
    return [
        Row(f"{of}, first start", first.median, None, limit=limit, quantity="seconds"),
        Row(f"{of}, next start", again.median, again.iqr, None, f"{of}, first start", again.median / first.median),
    ]


def _write_dataset(folder: Path, number: int, rng: np.random.Generator) -> list[str]:
    from batchgenerators.utilities.file_and_folder_operations import save_pickle

    (folder / "annotationsTr").mkdir()
    (folder / "preprocessed").mkdir()
    properties = {
        "shape_before_cropping": (1, 1024, 1024),
        "shape_after_cropping_and_before_resampling": (1, 1024, 1024),
        "bbox_used_for_cropping": [[0, 1], [0, 1024], [0, 1024]],
        "class_locations": {1: np.zeros((0, 4), np.int64)},
    }
    cases = [f"case_{i:04d}" for i in range(number)]
    for case in cases:
        at = rng.integers(0, 1000, (50, 2)).tolist()
        low = rng.integers(0, 1000, (50, 2)).tolist()
        content = {
            "format": "nnunet_dsp.annotations",
            "version": 1,
            "shape": [1024, 1024],
            "image_level": {"present": ["cell", "nucleus"]},
            "points": [{"label": ("cell", "nucleus")[i % 2], "at": at[i]} for i in range(50)],
            "boxes": [
                {"label": ("cell", "nucleus")[i % 2], "start": y_x, "stop": [y_x[0] + 20, y_x[1] + 24]}
                for i, y_x in enumerate(low)
            ],
        }
        (folder / "annotationsTr" / f"{case}.json").write_text(json.dumps(content), encoding="utf-8")
        save_pickle(properties, str(folder / "preprocessed" / f"{case}.pkl"))
    return cases
