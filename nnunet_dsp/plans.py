"""`nnunet_dsp plans`: a second plans file with a smaller network, for machines without a GPU; nnU-Net's -p takes it.

nnU-Net plans for GPUs of 8 GB and more. On two CPU cores its networks train for weeks; this derives plans of the same
kind (same preprocessing, so the preprocessed data serves both) that take a fraction of a second a step.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def shrink_plans(
    plans: dict[str, Any],
    name: str,
    *,
    patch: int | Sequence[int] | None = None,
    features: Sequence[int] = (16, 32, 64, 128, 192),
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Plans with the first stages of nnU-Net's network only, narrower, on smaller patches.

    Args:
        plans: nnU-Net's plans; not changed.
        name: the new plans' name.
        patch: patch size in voxels, one number for all axes or one an axis (z, y, x, of which 2D configurations take
            the last two; given y, x only, 3D ones keep theirs). Each axis is cut to the planned patch and rounded
            down to what the remaining strides divide. None keeps the planned patch.
        features: channels of each stage; at most as many stages as planned are kept.
        batch_size: None keeps the planned one.

    Returns:
        The new plans. Configurations that inherit from another one keep inheriting.

    Raises:
        ValueError: a size, a number of channels or the batch is below 1, or there are not one to three patch sizes.
    """
    sizes = [patch] if patch is None or isinstance(patch, int) else patch
    for option, values in (("--patch", sizes), ("--features", features), ("--batch-size", [batch_size])):
        if any(value is not None and value < 1 for value in values):
            raise ValueError(f"{option}: expected 1 or more, but got {' '.join(map(str, values))}.")
    result = copy.deepcopy(plans)
    result["plans_name"] = name
    for configuration in result["configurations"].values():
        if "architecture" in configuration:
            _shrink(configuration, patch, tuple(features), batch_size)
    return result


def _shrink(
    configuration: dict[str, Any],
    patch: int | Sequence[int] | None,
    features: tuple[int, ...],
    batch_size: int | None,
) -> None:
    arguments = configuration["architecture"]["arch_kwargs"]
    stages = min(len(features), int(arguments["n_stages"]))
    arguments["n_stages"] = stages
    arguments["features_per_stage"] = list(features[:stages])
    for key in ("kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage"):
        if isinstance(arguments.get(key), list):
            arguments[key] = arguments[key][:stages]
    if isinstance(arguments.get("n_conv_per_stage_decoder"), list):
        arguments["n_conv_per_stage_decoder"] = arguments["n_conv_per_stage_decoder"][: stages - 1]
    if batch_size is not None:
        configuration["batch_size"] = batch_size
    planned = configuration["patch_size"]
    if patch is not None and not isinstance(patch, int) and len(patch) not in (2, 3):
        raise ValueError(f"Expected one patch size, or two (y x), or three (z y x), but got {len(patch)}.")
    if patch is not None:
        wanted = [patch] * len(planned) if isinstance(patch, int) else list(patch)[-len(planned) :]
        if len(wanted) != len(planned):
            return  # given for 2D; this configuration is 3D and keeps its patch
        strides = [1] * len(planned)
        for stride in arguments["strides"]:
            strides = [a * b for a, b in zip(strides, stride, strict=True)]
        smaller = [min(a, b) for a, b in zip(wanted, planned, strict=True)]
        configuration["patch_size"] = [max(s, size // s * s) for size, s in zip(smaller, strides, strict=True)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or name, planned by nnU-Net before")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans to start from (default: %(default)s)")
    parser.add_argument("-o", dest="output", default="nnUNetPlansSmall", help="new plans' name (default: %(default)s)")
    parser.add_argument("--patch", type=int, nargs="+", help="patch size in voxels: one number, or y x, or z y x")
    parser.add_argument(
        "--features",
        type=int,
        nargs="+",
        default=[16, 32, 64, 128, 192],
        help="channels of each stage; nnUNetTrainer and nnUNetTrainerDSP need three or more",
    )
    parser.add_argument("--batch-size", type=int, help="patches a batch (default: as planned)")


def run(args: argparse.Namespace) -> int:
    from nnunet_dsp.dataset_conversion.raw_dataset import dataset_name, environment_folder

    base = environment_folder("nnUNet_preprocessed")
    try:
        folder = base / dataset_name(args.dataset, "nnUNet_preprocessed")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Run nnUNetv2_plan_and_preprocess -d {args.dataset} first.") from None
    if not args.output or Path(args.output).name != args.output:
        raise ValueError(f"-o: expected a name for the plans, such as nnUNetPlansSmall, but got {args.output!r}.")
    source, target = folder / f"{args.plans}.json", folder / f"{args.output}.json"
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist. Run nnUNetv2_plan_and_preprocess -d {args.dataset} first.")
    if source == target:
        raise ValueError(f"Expected -o to name other plans than -p, but both are {args.plans}.")
    patch = args.patch[0] if args.patch and len(args.patch) == 1 else args.patch
    plans = shrink_plans(
        json.loads(source.read_text()), args.output, patch=patch, features=args.features, batch_size=args.batch_size
    )
    temporary = target.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(plans, indent=4))
    os.replace(temporary, target)
    for key, configuration in plans["configurations"].items():
        if "architecture" in configuration:
            print(f"{key}: patch {configuration['patch_size']}, batch {configuration['batch_size']}, "
                  f"features {configuration['architecture']['arch_kwargs']['features_per_stage']}")
    print(f"Written: {target}\nTrain with: nnUNetv2_train {args.dataset} CONFIGURATION FOLD -p {args.output}")
    return 0
