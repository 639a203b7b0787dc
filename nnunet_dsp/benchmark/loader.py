"""``nnunet_dsp benchmark loader``: batches a second of the annotation loader against nnU-Net's own."""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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

LIMITS = {"plain": 0.95, "2D": 0.9, "3D": 0.8}
POINTS_LIMIT = 0.9
LABELS = {"background": 0, "cell": 1, "nucleus": 2, "ignore": 3}
IGNORE = 3


class Setting(NamedTuple):
    """One configuration: patch shape, what nnU-Net crops before it rotates, case shape, batch size."""

    patch: tuple[int, ...]
    case: tuple[int, int, int]
    batch_size: int


SETTINGS = {
    "2D": Setting((512, 512), (1, 768, 768), 4),
    "3D": Setting((128, 128, 128), (160, 160, 160), 2),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "A made-up dataset, nnU-Net's full training augmentation, batches made in this process. 2D: 4 patches of "
        "512 x 512, 3D: 2 of 128 cubed. Both loaders draw the same augmentations in each round. Half of the cases are "
        "masked; the others carry tags, 20 points and 20 boxes. Rates are compared over all rounds together."
    )
    add_timing_arguments(parser, repeats=20)
    parser.add_argument(
        "--only", choices=list(SETTINGS), help="measure this configuration alone (default: both; 3D takes minutes)"
    )


def run(args: argparse.Namespace) -> int:
    device = check_timing_arguments(args)
    rows: list[Row] = []
    for name in SETTINGS if args.only is None else [args.only]:
        with tempfile.TemporaryDirectory(prefix="nnunet_dsp_loader_") as folder:
            rows += _rows(name, SETTINGS[name], Path(folder), args, device)
    meta = metadata_of_run("loader", device, args, settings={k: s._asdict() for k, s in SETTINGS.items()})
    return report(meta, rows, args.json)


class _SameAugmentation:
    """nnU-Net's transforms, seeded anew for each sample, so that both loaders augment alike."""

    def __init__(self, transforms: Any) -> None:
        self.transforms = transforms
        self.sample = 0

    def __call__(self, **sample: Any) -> Any:
        self.sample += 1
        _seed(self.sample)
        return self.transforms(**sample)


def _seed(number: int) -> None:
    np.random.seed(number)
    torch.manual_seed(number)
    random.seed(number)


def _make_cases(folder: Path, setting: Setting, rng: np.random.Generator) -> list[str]:
    """Two masked and two weak cases on disk, in nnU-Net's own format; returns the weak ones."""
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    image = rng.normal(size=(1, *setting.case)).astype(np.float32)
    drawn = np.zeros((1, *setting.case), np.int16)
    z, y, x = setting.case
    drawn[:, : max(1, z // 2), y // 8 : y // 2, x // 8 : x // 2] = 1
    drawn[:, : max(1, z // 4), y // 4 : y // 3, x // 4 : x // 3] = 2
    weak = ["weak_0", "weak_1"]
    patch = (1,) * (3 - len(setting.patch)) + setting.patch
    blocks, chunks = comp_blosc2_params((1, *setting.case), patch)
    for name in ("masked_0", "masked_1", *weak):
        mask = np.full_like(drawn, IGNORE) if name in weak else drawn
        places: dict[Any, Any] = {label: np.argwhere(mask == label)[:10_000] for label in (1, 2)}
        places[(-1, 0, 1, 2)] = [] if name in weak else np.argwhere(mask != IGNORE)[:10_000]
        nnUNetDatasetBlosc2.save_case(
            image, mask, {"class_locations": places}, str(folder / name), chunks=chunks, blocks=blocks
        )
    return weak


def _annotations(setting: Setting, num_points: int, num_boxes: int, rng: np.random.Generator) -> Any:
    from nnunet_dsp.annotations import Annotations, Box, LabelNames, Point
    from nnunet_dsp.geometry import CaseFrame
    from nnunet_dsp.patch_annotations import map_case

    axes = len(setting.patch)
    shape = np.asarray(setting.case[3 - axes :])
    names = ("cell", "nucleus")
    side = shape // 16
    positions = rng.random((num_points, axes)) * (shape - 1)
    starts = (rng.random((num_boxes, axes)) * (shape - side)).astype(int)
    said = Annotations(
        shape=tuple(int(size) for size in shape),
        present=("cell",),
        points=tuple(
            Point(names[i % 2], tuple(float(v) for v in at)) for i, at in enumerate(positions)
        ),
        boxes=tuple(
            Box(names[i % 2], tuple(float(v) for v in start), tuple(float(v) for v in start + side))
            for i, start in enumerate(starts)
        ),
        complete_boxes=names if num_boxes else (),
    )
    frame = CaseFrame((0, 1, 2), np.zeros(3), np.ones(3), np.asarray(setting.case))
    return map_case(said, LabelNames.from_dataset_json({"labels": LABELS}), frame)


def _rows(
    name: str, setting: Setting, folder: Path, args: argparse.Namespace, device: torch.device
) -> list[Row]:
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    from nnunet_dsp.data import DSPDataLoader

    rng = np.random.default_rng(args.seed)
    weak = _make_cases(folder, setting, rng)
    dataset = nnUNetDatasetBlosc2(str(folder))
    masked_only = nnUNetDatasetBlosc2(str(folder), ["masked_0", "masked_1"])
    axes = len(setting.patch)
    angle = np.pi if axes == 2 else 30 / 180 * np.pi
    crop = get_patch_size(setting.patch, *[(-angle, angle)] * 3, (0.7, 1.4))
    scales = [[1.0] * axes, [0.5] * axes, [0.25] * axes]

    def transforms() -> _SameAugmentation:
        made = nnUNetTrainer.get_training_transforms(
            setting.patch, (-angle, angle), scales, tuple(range(axes)), False, ignore_label=IGNORE
        )
        return _SameAugmentation(made)

    def common(cases: Any) -> tuple[Any, ...]:
        return cases, setting.batch_size, crop, setting.patch, LabelManager(LABELS, None)

    def theirs(cases: Any) -> Callable[[], Any]:
        loader = nnUNetDataLoader(*common(cases), oversample_foreground_percent=0.33, transforms=transforms())
        return lambda: next(loader)

    def ours(cases: Any, weak_cases: list[str], num_points: int = 0, num_boxes: int = 0) -> Callable[[], Any]:
        drawn = np.random.default_rng(args.seed)
        annotations = {
            case: _annotations(setting, num_points, num_boxes, drawn) for case in weak_cases if num_points or num_boxes
        }
        loader = DSPDataLoader(
            *common(cases),
            oversample_foreground_percent=0.33,
            transforms=transforms(),
            annotations=annotations,
            weak_cases=weak_cases,
            masked_fraction=0.5,
            num_classes=3,
            ignore_label=IGNORE,
            with_components=bool(weak_cases),
        )
        return lambda: next(loader)

    base, plain = f"{name}: nnUNetDataLoader", f"{name}: ours, no weak annotations"
    weakly, ten = f"{name}: ours, tags, points and boxes", f"{name}: ours, 10 points a case"
    many = f"{name}: ours, 10000 points a case"
    candidates = {
        base: theirs(masked_only),
        plain: ours(masked_only, []),
        weakly: ours(dataset, weak, 20, 20),
        ten: ours(dataset, weak, 10),
        many: ours(dataset, weak, 10_000),
    }
    _seed(args.seed)
    times = time_in_turn(candidates, device, warmup=1, repeats=args.repeats)

    def rate(of: str, against: str) -> float:
        return sum(times[against].seconds) / sum(times[of].seconds)

    def row(key: str, against: str | None, limit: float | None) -> Row:
        timing: Timing = times[key]
        ratio = None if against is None else rate(key, against)
        return Row(key, timing.median, timing.iqr, None, against, ratio, limit, at_least=True, quantity="rate")

    return [
        row(base, None, None),
        row(plain, base, LIMITS["plain"]),
        row(weakly, base, LIMITS[name]),
        row(ten, base, None),
        row(many, ten, POINTS_LIMIT),
    ]
