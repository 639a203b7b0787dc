"""What the benchmarks refuse before anything is made or trained."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import re
from collections.abc import Mapping, Sequence

from nnunet_dsp.benchmark.accuracy.arms import DSP, VANILLA, Grid
from nnunet_dsp.benchmark.accuracy.command_lines import Options, flag_of, shown_value
from nnunet_dsp.benchmark.accuracy.training import resolved_options
from nnunet_dsp.benchmark.accuracy.workplace import Workplace


def check_training(values: Options, seeds: Sequence[int], args: argparse.Namespace) -> None:
    """Refuse what cannot be meant of the options that every benchmark of trainings has; see training_arguments.py.

    Args:
        values: by name, those of TRAINING, HELD_OUT and RUNNING, given or remembered.
        seeds: of the trainings.
        args: the command line, for what is not remembered.

    Raises:
        ValueError: names the option.
    """
    least = {"epochs": 1, "iterations_per_epoch": 1, "val_iterations": 1, "split_seed": 0, "batch_size": 1}
    check_least(values, {**least, "threads": 1, "num_processes": 1})
    check_least(vars(args), {"jobs": 1})
    if values["lr"] is not None and not 0 < values["lr"] < math.inf:
        raise ValueError(f"--lr: expected a number above 0, but got {values['lr']}.")
    for name in ("patch", "batch_size", "features"):
        if values["plans"] != "small" and values[name] is not None:
            raise ValueError(f"{flag_of(name)} goes with --plans small.")
    check_least_of_all(values, ("patch", "features"))
    for name in ("val_cases", "val_fold", "val_share"):
        if getattr(args, name) is not None and values["evaluate_on"] != "val":
            raise ValueError(f"{flag_of(name)} goes with --evaluate-on val.")
    if values["group"] is not None:
        try:
            re.compile(values["group"])
        except re.error as error:
            raise ValueError(f"--group: {values['group']!r} is no regular expression: {error}.") from error
    if any(seed < 0 for seed in seeds):
        raise ValueError("--seeds: expected whole numbers of 0 or more.")
    if args.time and not args.plan:
        raise ValueError("--time goes with --plan.")
    if args.report_only and args.plan:
        raise ValueError("--report-only does not go with --plan.")


def check_least(values: Options, least: Mapping[str, float]) -> None:
    """Refuse numbers below the least that an option can be, and what is no finite number; ValueError."""
    for name, lowest in least.items():
        if values[name] is not None and not lowest <= values[name] < math.inf:
            raise ValueError(f"{flag_of(name)}: expected {lowest} or more, but got {values[name]}.")


def check_least_of_all(values: Options, names: Sequence[str]) -> None:
    """Refuse lists with a number below 1; ValueError."""
    for name in names:
        if values[name] is not None and min(values[name]) < 1:
            raise ValueError(f"{flag_of(name)}: expected numbers of 1 or more, but got {shown_value(values[name])}.")


def check_numbers(fixed: Options, selection: Options, how: Options, args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be meant, and options of `benchmark accuracy` that do not go together.

    Args:
        fixed, selection, how: what is given or remembered; see FIXED, SELECTION and HOW.
        args: the command line, for what is not remembered.

    Raises:
        ValueError: names the option.
    """
    check_training({**fixed, **how}, selection["seeds"], args)
    check_least(fixed, {"points_per_object": 1, "min_size": 1, "pretrain_epochs": 1, "loosen": 0, "point_radius": 0})
    check_least(fixed, {"tolerance": 0})
    check_least_of_all(fixed, ("rectangle",))
    if min(selection["masks"]) < 0:
        raise ValueError(f"--masks: expected numbers of 0 or more, but got {shown_value(selection['masks'])}.")
    if not 0 <= fixed["share"] <= 1:
        raise ValueError(f"--share: expected a number from 0 to 1, but got {fixed['share']}.")
    if not 0 < fixed["step_size"] <= 1:
        raise ValueError(f"--step-size: expected a number above 0, at most 1, but got {fixed['step_size']}.")
    if fixed["features"] is not None and len(fixed["features"]) < 3:
        raise ValueError(
            f"--features: expected three numbers or more, but got {shown_value(fixed['features'])}. nnU-Net's deep "
            "supervision leaves out the lowest output: in a network of two stages none is left, and the loss is nan."
        )
    if fixed["pretrain_epochs"] is not None and fixed["pretrain"] is None:
        raise ValueError("--pretrain-epochs goes with --pretrain.")
    if args.run and (args.plan or args.commands):
        raise ValueError("--run goes with neither --plan nor --commands.")
    if args.report_only and args.commands:
        raise ValueError("--report-only does not go with --commands.")


def refuse_unplanned(
    args: argparse.Namespace,
    selection: Options,
    rows: Sequence[Options],
    columns: Mapping[str, str],
) -> None:
    """Refuse a report of what DIR was never asked to train.

    Args:
        args: the command line.
        selection: what DIR was last asked for.
        rows: all that it was asked for so far.
        columns: what an option's values are called in a row.

    Raises:
        ValueError: an option names something that is in neither.
    """
    for name, column in columns.items():
        known = ["rest", *selection.get(name, ()), *(row[column] for row in rows)]  # rows have the number for it
        new = [value for value in getattr(args, name) or () if value not in known]
        if new:
            raise ValueError(
                f"--report-only reports what {args.output} was asked for, and that is not {flag_of(name)} "
                f"{shown_value(new)}. Leave it out, or train it first, without --report-only."
            )


def refuse_missing_gpu(device: str) -> None:
    """
    Raises:
        ValueError: this machine has no such device; nnU-Net would say so after the data has been prepared.
    """
    if device == "cpu":
        return
    import torch

    there = torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()
    if not there:
        raise ValueError(f"--device {device}: PyTorch finds no such device here. Train with --device cpu?")


def refuse_unknown_trainers(grid: Grid) -> None:
    """
    Raises:
        ValueError: nnU-Net finds no trainer of an arm's. DIR/trainers would hold a module that cannot be imported, and
            nnU-Net imports all that lie there, whichever it looks for.
    """
    for trainer in dict.fromkeys(run.trainer for run in grid.runs.values()):
        if trainer in (VANILLA, DSP):  # without importing torch
            continue
        import nnunet_dsp.trainers

        if trainer in nnunet_dsp.trainers.__all__:
            continue
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it tells where it looks
                recursive_find_trainer_class_by_name(trainer)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"--arm: nnU-Net finds no trainer {trainer}. Is the name right, and its folder in nnUNet_extTrainer?"
            ) from error


def refuse_changed_defaults(place: Workplace, grid: Grid) -> None:
    """
    Raises:
        ValueError: a finished run was trained with other defaults than nnunet_dsp has now.
    """
    changed = []
    for run in grid.runs.values():
        record = place.record(run.id)
        if record is not None:
            before, options = record["options"], resolved_options(run)
            changed += [
                f"{run.id}: {key} {before[key]} there, {options[key]} now"
                for key in options
                if key in before and before[key] != options[key]
            ]
    if changed:
        raise ValueError(
            "Finished runs were trained with other defaults of nnunet_dsp:\n"
            + "\n".join(f"  {line}" for line in changed[:20])
            + f"\nRemove their folders from {place.runs} to train them anew, choose a new folder with -o, or define an "
            "arm with these values (--arm)."
        )
