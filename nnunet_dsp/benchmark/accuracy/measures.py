"""Measures beside nnU-Net's own Dice and IoU, and what is made of them: surfaces, gap, spread, paired tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage, stats

METRICS = ("Dice", "IoU", "NSD", "HD95")
HIGHER_IS_BETTER = {"Dice": True, "IoU": True, "NSD": True, "HD95": False}


class SurfaceMeasures(NamedTuple):
    """Normalised surface Dice, 0 to 1, and 95th percentile of the surface distance, in the unit of the spacing."""

    nsd: float
    hd95: float


def surface_measures(
    reference: npt.NDArray[np.bool_],
    prediction: npt.NDArray[np.bool_],
    spacing: Sequence[float],
    tolerance: float,
) -> SurfaceMeasures:
    """Agreement of two masks' surfaces.

    The surface of a mask is its voxels with a face neighbour outside it (outside the image counts as outside); the
    distance of two voxels is that of their centres.

    - NSD: share of both surfaces' voxels that lie within `tolerance` of the other surface (Nikolov et al.,
      arXiv:1809.04430, there with surface elements instead of voxels).
    - HD95: the larger of the two 95th percentiles of the distances from one surface to the other.

    Where both masks are empty there is nothing to measure (NaN). Where one is, NSD is 0 and HD95 the image's diagonal.

    Args:
        reference, prediction: same shape, any number of axes.
        spacing: voxel size along each axis.
        tolerance: in the same unit.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"Expected masks of the same shape, but got {reference.shape} and {prediction.shape}.")
    if not reference.any() and not prediction.any():
        return SurfaceMeasures(math.nan, math.nan)
    if not reference.any() or not prediction.any():
        diagonal = math.sqrt(sum((size * step) ** 2 for size, step in zip(reference.shape, spacing, strict=True)))
        return SurfaceMeasures(0.0, diagonal)
    (box,) = ndimage.find_objects((reference | prediction).astype(np.uint8))
    reference, prediction = reference[box], prediction[box]
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (reference, prediction)]
    to_other = [
        ndimage.distance_transform_edt(~surfaces[1 - side], sampling=spacing)[surfaces[side]] for side in (0, 1)
    ]
    near = sum(int((distance <= tolerance).sum()) for distance in to_other)
    hd95 = max(float(np.percentile(distance, 95)) for distance in to_other)
    return SurfaceMeasures(near / sum(distance.size for distance in to_other), hd95)


class SurfaceJob(NamedTuple):
    """One case to measure; see measure_case()."""

    case: str
    reference: Path
    prediction: Path
    reader_writer: Any
    labels: dict[str, int]
    ignore: int | None
    tolerance: float | None


def measure_case(job: SurfaceJob) -> tuple[str, dict[str, SurfaceMeasures]]:
    """Surface measures by foreground class. Without a tolerance it is twice the smallest voxel size."""
    reference, properties = job.reader_writer().read_seg(str(job.reference))
    prediction, _ = job.reader_writer().read_seg(str(job.prediction))
    reference, prediction = reference[0], prediction[0]
    spacing = [float(step) for step in properties["spacing"]]
    if reference.shape[0] == 1:  # a 2D image; nnU-Net gives it a made-up third axis
        reference, prediction, spacing = reference[0], prediction[0], spacing[1:]
    known = np.ones(reference.shape, bool) if job.ignore is None else reference != job.ignore
    tolerance = 2 * min(spacing) if job.tolerance is None else job.tolerance
    return job.case, {
        name: surface_measures((reference == value) & known, (prediction == value) & known, spacing, tolerance)
        for name, value in job.labels.items()
        if value != 0
    }


# --- over cases, classes and seeds


def number(value: Any) -> float:
    """A value of a record, where null stands for what is not a number."""
    return math.nan if value is None else float(value)


def mean(values: Sequence[float]) -> float:
    """Mean of those that are numbers; NaN where none is."""
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1); NaN with fewer than two."""
    finite = [value for value in values if not math.isnan(value)]
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan


def class_means(per_case: Mapping[str, Mapping[str, Mapping[str, Any]]], metric: str) -> dict[str, float]:
    """By class the mean over the cases in which it can be measured, as nnU-Net has it."""
    classes = list(dict.fromkeys(name for case in per_case.values() for name in case))
    return {
        name: mean([number(case[name].get(metric)) for case in per_case.values() if name in case]) for name in classes
    }


def case_means(per_case: Mapping[str, Mapping[str, Mapping[str, Any]]], metric: str) -> dict[str, float]:
    """By case the mean over the classes that can be measured in it."""
    return {
        case: mean([number(values.get(metric)) for values in classes.values()]) for case, classes in per_case.items()
    }


def gap_closed(arm: float, masks: float, full: float) -> float:
    """(arm - masks) / (full - masks): 0 where the arm is no better than the masks alone, 1 where it reaches them all.

    NaN where there is no gap to close: `full` is not above `masks`.
    """
    return (arm - masks) / (full - masks) if full > masks else math.nan


class PairedTest(NamedTuple):
    """Two arms on the same cases: mean difference (first - second), number of cases, two-sided p."""

    difference: float
    cases: int
    p: float


def paired_test(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> PairedTest:
    """Wilcoxon's signed-rank test over cases.

    Seeds are averaged within a case first: runs on the same case are no independent observations.

    Args:
        first, second: by case the values of the runs, one a seed, in the same order of seeds.

    Returns:
        p is NaN with no case in common and 1 where all differences are zero.
    """
    differences = []
    for case in first:
        if case in second:
            pairs = [a - b for a, b in zip(first[case], second[case], strict=True)]
            value = mean(pairs)
            if not math.isnan(value):
                differences.append(value)
    if not differences:
        return PairedTest(math.nan, 0, math.nan)
    difference = sum(differences) / len(differences)
    if not any(differences):
        return PairedTest(difference, len(differences), 1.0)
    return PairedTest(difference, len(differences), float(stats.wilcoxon(differences).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several tests; NaN stays and does not count."""
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = list(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[index] = largest
    return corrected
