"""``nnunet_dsp benchmark step``: a whole training step of nnUNetTrainerDSP against nnUNetTrainer's, same plans."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

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

TIME_LIMIT, MEMORY_LIMIT = 1.08, 1.1
LABELS = {"background": 0, "cell": 1, "nucleus": 2, "vessel": 3, "fibre": 4, "ignore": 5}
IGNORE = 5


class Plans(NamedTuple):
    """The size of a configuration."""

    patch: tuple[int, ...]
    batch_size: int
    features: tuple[int, ...]


SMALL = {"2D": Plans((192, 192), 4, (16, 32, 64, 128, 192)), "3D": Plans((64, 64, 64), 2, (12, 24, 48, 96))}
WIDE = {
    "2D": Plans((192, 192), 2, (32, 64, 128, 256, 512, 512)),
    "3D": Plans((48, 48, 48), 2, (32, 64, 128, 256)),
}
FULL = {
    "2D": Plans((512, 512), 12, (32, 64, 128, 256, 512, 512, 512, 512)),
    "3D": Plans((128, 128, 128), 2, (32, 64, 128, 256, 320, 320)),
}
SIZES = {"small": SMALL, "wide": WIDE, "full": FULL}
TRAINERS = ("nnUNetTrainer", "nnUNetTrainerDSP", "nnUNetTrainerDSP_standardHead", "nnUNetTrainerDSP_noDSPLoss")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "A step is forward, loss, backward and optimiser on a batch at hand; loading is `benchmark loader`'s. Half of "
        "each batch is masked, the other half carries tags, 20 points and 20 boxes a patch. Small plans on a CPU "
        "(2D: 4 patches of 192 squared, 3D: 2 of 64 cubed; wide: nnU-Net's usual channels on patches that a CPU can "
        "take), nnU-Net's usual ones on CUDA (12 of 512 squared, 2 of 128 cubed), where AMP is on as in training, and "
        "torch.compile as nnUNet_compile says."
    )
    add_timing_arguments(parser, repeats=15)
    parser.add_argument("--only", choices=("2D", "3D"), help="measure this configuration alone (default: both)")
    parser.add_argument("--plans", choices=SIZES, help="default: small on a CPU, full on CUDA")


def run(args: argparse.Namespace) -> int:
    device = check_timing_arguments(args)
    size = args.plans or ("full" if device.type == "cuda" else "small")
    sizes = SIZES[size]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="nnunet_dsp_step_") as folder, _nnunet_folders(Path(folder)):
        for name in sizes if args.only is None else [args.only]:
            rows += _rows(name, sizes[name], args, device)
    from nnunet_dsp.settings import DSPSettings

    meta = metadata_of_run(
        "step", device, args, plans={k: p._asdict() for k, p in sizes.items()}, settings=asdict(DSPSettings()),
        amp=device.type == "cuda", compiled=os.environ.get("nnUNet_compile", "default"),
    )
    return report(meta, rows, args.json)


@contextlib.contextmanager
def _nnunet_folders(folder: Path) -> Iterator[None]:
    """nnU-Net's trainers make their output folders as they are built; let it be in a temporary one."""
    before = {name: os.environ.get(name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    try:
        for name in before:
            os.environ[name] = str(folder / name)
            (folder / name).mkdir()
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _plans(name: str, sizes: Plans) -> dict[str, Any]:
    """Plans as nnU-Net's planner writes them, for one configuration."""
    dim = len(sizes.patch)
    stages = len(sizes.features)
    architecture = {
        "n_stages": stages,
        "features_per_stage": list(sizes.features),
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": [[3] * dim] * stages,
        "strides": [[1] * dim, *[[2] * dim] * (stages - 1)],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    network = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    configuration = {
        "data_identifier": f"made_up_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": sizes.batch_size,
        "patch_size": list(sizes.patch),
        "spacing": [1.0] * dim,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": True,
        "architecture": {
            "network_class_name": network,
            "arch_kwargs": architecture,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {
        "dataset_name": "Dataset999_MadeUp",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "configurations": {name: configuration},
        "foreground_intensity_properties_per_channel": {},
        "continue_training": False,
    }


def _trainer(trainer: str, name: str, sizes: Plans, device: torch.device) -> Any:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_dsp import trainers

    dataset = {"channel_names": {"0": "em"}, "labels": LABELS, "file_ending": ".nii.gz", "numTraining": 1}
    made = nnUNetTrainer if trainer == "nnUNetTrainer" else getattr(trainers, trainer)
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        built = made(_plans(name, sizes), name, 0, dataset, device)
        built.initialize()
    built.set_deep_supervision_enabled(True)
    built.network.train()
    built._step, built.current_epoch = 0, built.num_epochs // 2  # past the warm-up of the pseudo-labels
    return built


def _batches(sizes: Plans, scales: list[list[float]], number: int, seed: int) -> list[dict[str, Any]]:
    """Batches as the annotation loader hands them over."""
    from nnunet_dsp.benchmark.batches import random_batch

    batches = []
    half = sizes.batch_size // 2
    side = sizes.patch[0]
    for n in range(number):
        made = random_batch(
            sizes.batch_size, IGNORE, sizes.patch, num_boxes=20 * half, num_points=20 * half,
            sides=(max(3, side // 16), max(5, side // 8)), num_masked=half, seed=seed + n, device=torch.device("cpu"),
        )
        # in the loader's batches weak items come first: put the items in that order
        order = torch.arange(sizes.batch_size).roll(-half)
        voxels = int(np.prod(sizes.patch))
        annotations = made.annotations

        def renumbered(flat: torch.Tensor) -> torch.Tensor:
            return flat - half * voxels  # noqa: B023

        annotations = annotations._replace(
            tags=annotations.tags[order],
            complete_boxes=annotations.complete_boxes[order],
            points=renumbered(annotations.points),
            box_voxels=renumbered(annotations.box_voxels),
            box_item=annotations.box_item - half,
        )
        target = made.target[order][:, None]
        generator = torch.Generator().manual_seed(seed + n)
        batches.append(
            {
                "data": torch.randn(sizes.batch_size, 1, *sizes.patch, generator=generator),
                "target": [
                    F.interpolate(target.float(), scale_factor=tuple(scale), mode="nearest").to(torch.int16)
                    for scale in scales
                ],
                "annotations": list(annotations),
                "num_masked": half,
                "components": made.components[order],
                "num_components": made.num_components,
            }
        )
    return batches


def _rows(name: str, sizes: Plans, args: argparse.Namespace, device: torch.device) -> list[Row]:
    torch.manual_seed(args.seed)
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / "Dataset999_MadeUp" / f"made_up_{name}"
    preprocessed.mkdir(parents=True)
    (preprocessed / "case.b2nd").touch()  # nnU-Net looks which kind of files there are
    made = {trainer: _trainer(trainer, name, sizes, device) for trainer in TRAINERS}
    batches = _batches(sizes, made["nnUNetTrainer"]._get_deep_supervision_scales(), 4, args.seed)

    def step(trainer: Any) -> Callable[[], Any]:
        drawn = cycle(batches)
        return lambda: trainer.train_step(next(drawn))

    candidates = {f"{name}: {trainer}": step(built) for trainer, built in made.items()}
    times = time_in_turn(candidates, device, warmup=max(1, args.warmup), repeats=args.repeats)
    base, ours = f"{name}: nnUNetTrainer", f"{name}: nnUNetTrainerDSP"
    peaks = {key: peak_bytes(candidate, device) for key, candidate in candidates.items()}
    rows = []
    for key, timing in times.items():
        ratio = None if key == base else median_ratio(timing, times[base])
        limit = TIME_LIMIT if key == ours else None
        rows.append(Row(key, timing.median, timing.iqr, peaks[key], None if key == base else base, ratio, limit))
    memory = peaks[ours] / peaks[base]
    rows.append(Row(f"{ours}, memory", None, None, peaks[ours], base, memory, MEMORY_LIMIT, quantity="memory"))
    return rows
