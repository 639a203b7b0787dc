"""Shrinking images and label maps by whole factors."""

import numpy as np


def _blocks(array: np.ndarray, factor: int) -> np.ndarray:
    """View of shape (Y, X, factor * factor); rows and columns at the end that fill no block are cut off."""
    y, x = array.shape[0] // factor, array.shape[1] // factor
    cut = array[: y * factor, : x * factor].reshape(y, factor, x, factor)
    return cut.transpose(0, 2, 1, 3).reshape(y, x, factor * factor)


def block_mean(image: np.ndarray, factor: int) -> np.ndarray:
    """Mean of each block of `factor` x `factor` pixels of an image (y, x), in its dtype (rounded if integer)."""
    if factor == 1:
        return image
    mean = _blocks(image, factor).mean(-1)
    return (np.rint(mean) if np.issubdtype(image.dtype, np.integer) else mean).astype(image.dtype)


def block_majority(labels: np.ndarray, factor: int, num_classes: int) -> np.ndarray:
    """The most frequent label of each block of `factor` x `factor` pixels of a label map (y, x).

    Labels are below `num_classes`. Of equally frequent labels the highest wins, so that thin structures do not lose to
    the background around them.
    """
    if factor == 1:
        return labels
    blocks = _blocks(labels, factor)
    counts = np.stack([(blocks == c).sum(-1) for c in range(num_classes)])
    return (num_classes - 1 - counts[::-1].argmax(0)).astype(labels.dtype)
