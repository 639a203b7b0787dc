"""Instances drawn over an image: each in a colour of its own, borders in black, what nobody labelled hatched. Arrays
only."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

TINT = 0.5
GOLDEN = 0.618034  # steps of the golden ratio round the circle of hues keep ids that follow each other apart


def colour_of(ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
    """(..., 3) in [0, 1]: a colour for each id; the same id has the same colour in every picture."""
    ids = np.asarray(ids, dtype=np.int64)
    hue, saturation, value = (ids * GOLDEN) % 1, 0.55 + 0.225 * (ids % 3), 0.75 + 0.25 * (ids % 2)
    channels = []
    for shift in (5, 3, 1):  # from hue, saturation and value to red, green and blue
        k = (shift + 6 * hue) % 6
        channels.append(value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1)))
    return np.asarray(np.stack(channels, -1))


def instance_overlay(
    image: npt.NDArray[Any], labels: npt.NDArray[Any] | None, ignore_label: int | None = None
) -> npt.NDArray[np.uint8]:
    """A grey image with its instances tinted and outlined.

    Args:
        image: (y, x), any numbers; stretched between its 1st and 99th percentile.
        labels: (y, x) ids, 0 for background; or None for the image alone. `ignore_label` is darkened and hatched.

    Returns:
        (y, x, 3) uint8.
    """
    low, high = np.percentile(image, (1, 99))
    grey = np.clip((image.astype(np.float64) - low) / max(float(high - low), 1e-6), 0, 1)
    colour = np.repeat(grey[..., None], 3, axis=-1)
    if labels is not None:
        unlabelled = np.zeros(labels.shape, np.bool_) if ignore_label is None else labels == ignore_label
        inside = (labels > 0) & ~unlabelled
        colour[inside] = (1 - TINT) * colour[inside] + TINT * colour_of(labels[inside])
        stripes = (np.add(*np.indices(labels.shape)) // 3) % 3 == 0
        colour[unlabelled] *= 0.7
        colour[unlabelled & stripes] *= 0.5
        border = np.zeros(labels.shape, np.bool_)
        border[1:] |= labels[1:] != labels[:-1]
        border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
        colour[border] = 0
    return np.asarray(np.round(colour * 255), dtype=np.uint8)


__all__ = ["colour_of", "instance_overlay"]
