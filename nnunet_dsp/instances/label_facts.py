"""What the training cases of an instance dataset tell: what is labelled in them, how small objects are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nnunet_dsp.dataset_conversion.instance_labels import LEAST_BACKGROUND

DEFAULT_MIN_SIZE = 10  # where no instance is labelled, or none completely
SMALLEST_SHARE = 0.05  # of the labelled instances that may be smaller than what prediction keeps
MEDIAN_SHARE = 0.25  # of their median size that is kept at any rate: half an instance of half that size


class LabelFacts(NamedTuple):
    """
    Attributes:
        background_labelled: enough background is labelled to learn from.
        min_size: voxels; the size that all but 5 % of the labelled instances reach, and at most a quarter of their
            median. Where all are about alike, 5 % below is hardly smaller than the median: what is found correctly but
            for some voxels at its border must not be left out.
        partly_labelled: how many cases hold voxels that nobody labelled.
    """

    background_labelled: bool
    min_size: int
    partly_labelled: int


def label_facts(
    segmentations: Iterable[npt.NDArray[np.integer[Any]]],
    ignore_label: int | None,
    *,
    slicewise: bool = False,
    complete_instances: bool = True,
) -> LabelFacts:
    """Look at every label image once.

    Args:
        segmentations: (1, z, y, x) ids of preprocessed cases, 0 background. So is -1, as in the loader: nnU-Net writes
            it over the 0 of labels where the image is 0, too, outside of what it shows.
        ignore_label: value of what nobody labelled, or None.
        slicewise: instances are those of a slice, as a 2D network sees them.
        complete_instances: labelled instances are labelled completely; if not, their sizes say nothing.
    """
    background = labelled = partly = 0
    sizes: list[npt.NDArray[np.int64]] = []
    for segmentation in segmentations:
        known = np.ones(segmentation.shape, np.bool_) if ignore_label is None else segmentation != ignore_label
        inside = known & (segmentation > 0)
        background += int((known & ~inside).sum())
        labelled += int(known.sum())
        partly += not known.all()
        ids = np.where(inside, segmentation, 0)[0]
        for part in ids if slicewise else [ids]:
            of_part = np.bincount(part.ravel())[1:]
            sizes.append(of_part[of_part > 0])
    found = np.concatenate(sizes) if sizes else np.empty(0)
    min_size = DEFAULT_MIN_SIZE
    if complete_instances and len(found):
        reached = min(np.percentile(found, 100 * SMALLEST_SHARE), MEDIAN_SHARE * np.median(found))
        min_size = max(1, int(reached))
    return LabelFacts(background > LEAST_BACKGROUND * labelled, min_size, partly)


__all__ = ["DEFAULT_MIN_SIZE", "LabelFacts", "label_facts"]
