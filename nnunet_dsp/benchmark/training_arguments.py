"""The arguments of the benchmarks that train: what is held out, plans and schedule, how it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

Group = argparse._ArgumentGroup

HELD_OUT: dict[str, Any] = {
    "evaluate_on": "test",
    "test_cases": None,
    "test_fold": None,
    "test_share": None,
    "val_cases": None,
    "val_fold": None,
    "val_share": None,
    "split_seed": 0,
    "group": None,
}
TRAINING: dict[str, Any] = {
    "configuration": "2d",
    "planner": None,
    "plans": "nnunet",
    "patch": None,
    "batch_size": None,
    "features": None,
    "epochs": 1000,
    "iterations_per_epoch": 250,
    "val_iterations": 1,
    "optimizer": None,
    "lr": None,
    "precision": "float32",
}
RUNNING: dict[str, Any] = {"device": "cuda", "threads": None, "num_processes": None}


def add_place_arguments(parser: argparse.ArgumentParser, dataset: str) -> None:
    """-d and -o; `dataset` says what the dataset must be."""
    parser.add_argument("-d", dest="dataset", metavar="ID", help=f"id or name of a raw dataset with {dataset}")
    parser.add_argument("-o", dest="output", metavar="DIR", type=Path, required=True, help="folder for all it makes")


def add_held_out_arguments(data: Group, *, grouped: str = "are held out together") -> None:
    """The keys of HELD_OUT. `grouped` says what happens to cases of one group."""
    data.add_argument("--evaluate-on", choices=("test", "val"), help="val: to choose parameters by (default: test)")
    for part, help_text, first in (
        ("test", "where there is no imagesTs with labelsTs", "0"),
        ("val", "with --evaluate-on val", "the first that is not held out for test"),
    ):
        name = {"test": "test", "val": "validation"}[part]
        data.add_argument(
            f"--{part}-cases", metavar="CASE", nargs="+", help=f"training cases held out as {name} cases, {help_text}"
        )
        data.add_argument(
            f"--{part}-fold",
            metavar="K",
            type=int,
            help=f"or the validation cases of a fold of splits_final.json ({first})",
        )
        data.add_argument(f"--{part}-share", metavar="P", type=float, help="or a random share (default: 0.2)")
    data.add_argument("--split-seed", metavar="S", type=int, help="of that random share (default: 0)")
    data.add_argument("--group", metavar="REGEX", help=f"cases with the same match (say, of the patient) {grouped}")


def add_training_arguments(
    train: Group, *, configurations: str, optimizers: tuple[str, ...], optimizer: str, rate: str
) -> None:
    """The keys of TRAINING. `configurations` are examples, `optimizer` and `rate` what holds if none is given."""
    train.add_argument("-c", dest="configuration", help=f"{configurations} (default: 2d)")
    train.add_argument("--planner", metavar="NAME", help="nnU-Net's -pl, such as nnUNetPlannerResEncM")
    train.add_argument("--plans", choices=("nnunet", "small"), help="small: as `nnunet_dsp plans` derives (nnunet)")
    train.add_argument("--patch", metavar="N", type=int, nargs="+", help="with --plans small: patch size in voxels")
    train.add_argument("--batch-size", metavar="N", type=int, help="with --plans small (default: as planned)")
    what = "with --plans small: channels by stage (accuracy: three or more)"
    train.add_argument("--features", metavar="N", type=int, nargs="+", help=what)
    train.add_argument("--epochs", metavar="N", type=int, help="(default: 1000)")
    train.add_argument("--iterations-per-epoch", metavar="N", type=int, help="(default: 250)")
    train.add_argument("--val-iterations", metavar="N", type=int, help="of nnU-Net's online validation (default: 1)")
    train.add_argument("--optimizer", choices=optimizers, help=f"(default: {optimizer})")
    train.add_argument("--lr", type=float, help=f"initial learning rate (default: {rate})")
    train.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="on a CPU; bfloat16 halves the time where the CPU has it; on CUDA nnU-Net's own (default: float32)",
    )


def add_running_arguments(how: Group, processes: str, *, jobs: str = "1") -> None:
    """The keys of RUNNING, and what a call says about itself alone.

    Args:
        processes: what --num-processes are of.
        jobs: how many trainings run side by side if --jobs does not say.
    """
    how.add_argument("-device", "--device", choices=("cpu", "cuda", "mps"), help="(default: cuda)")
    how.add_argument("--jobs", metavar="N", type=int, help=f"trainings side by side (default: {jobs})")
    how.add_argument("--threads", metavar="N", type=int, help="of each training on a CPU (default: all cores)")
    how.add_argument("--num-processes", metavar="N", type=int, help=f"of {processes}")
    how.add_argument("--plan", action="store_true", help="say what would be done and how long it would take")
    how.add_argument("--time", action="store_true", help="with --plan: time a few iterations first (prepares the data)")
    how.add_argument("--report-only", action="store_true", help="report what has finished; train nothing")
