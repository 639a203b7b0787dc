"""COCO's run lengths: runs of 0, 1, 0, ... down the columns of a mask, as a list or packed into characters.

Source: cocodataset/cocoapi, common/maskApi.c and maskApi.h, whose format this is. Own code: pycocotools needs a
compiler on some systems, for what is twenty lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_dsp.dataset_conversion.imported import fail

MAX_RUN = 2**40


def runs_of(counts: Any, size: int, source: str, entry: str) -> tuple[int, ...]:
    """The runs of a mask of `size` pixels, checked.

    Args:
        counts: a list of whole numbers, or COCO's characters: groups of five bits, lowest first, each plus 48, 32 more
            where another follows; from the third run on the difference to the run two before.
        size: height times width, which the runs must add up to.
        source, entry: for messages.

    Raises:
        AnnotationError: anything else.
    """
    if isinstance(counts, str):
        runs = _unpacked(counts, source, entry)
    elif isinstance(counts, list):
        runs = []
        for index, run in enumerate(counts):
            if isinstance(run, bool) or not isinstance(run, int) or not 0 <= run <= MAX_RUN:
                fail(source, f"{entry}.counts[{index}]", f"expected a whole number from 0, but got {str(run)[:40]!r}")
            runs.append(run)
    else:
        fail(source, f"{entry}.counts", f"expected a list or a text, but got {type(counts).__name__}")
    if sum(runs) != size:
        fail(source, entry, f"the runs of its mask add up to {sum(runs)} pixels, but its size says {size}")
    return tuple(runs)


def _unpacked(text: str, source: str, entry: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for position, character in enumerate(text):
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            fail(source, f"{entry}.counts", f"character {position} ({character!r}) belongs to no run length")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # negative
                value -= 1 << shift
            if len(runs) > 2:
                value += runs[-2]
            if not 0 <= value <= MAX_RUN:
                fail(source, f"{entry}.counts", f"the run that ends at character {position} is {value} pixels long")
            runs.append(value)
            value = shift = 0
    if shift:
        fail(source, f"{entry}.counts", "the last run is cut off", "Export the file again.")
    return runs


def decode(runs: Sequence[int], height: int, width: int) -> npt.NDArray[np.bool_]:
    """The mask of runs that add up to height times width: shape (height, width), bool."""
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def encode(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Runs of a mask (y, x), as COCO writes them uncompressed; the first is of 0 and may be empty."""
    flat = mask.T.ravel()
    if flat.size == 0:
        return []
    ends = np.concatenate([np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    runs = np.diff(ends, prepend=0).tolist()
    return [0, *runs] if flat[0] else runs
