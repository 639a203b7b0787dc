"""How well instance labels agree with the truth: adapted Rand error, variation of information, AP, PQ. No files here.

Voxels that the truth does not label (`ignore`) count nowhere. The truth's background (0) is left out of the Rand error
and of the variation of information, as the CREMI challenge has it. A predicted 0 inside a true instance is there a
segment like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse import csgraph
from skimage.metrics import adapted_rand_error, variation_of_information

IntArray = npt.NDArray[np.integer[Any]]
THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""Intersections over union at which AP is taken: 0.5, 0.55, ..., 0.95."""


def consecutive(labels: IntArray) -> npt.NDArray[np.int64]:
    """The same partition with ids 1..n; 0 stays 0."""
    values, inverse = np.unique(labels, return_inverse=True)
    inverse = inverse.reshape(labels.shape)
    return np.asarray(inverse if values.size and values[0] == 0 else inverse + 1, dtype=np.int64)


def overlap_table(truth: IntArray, prediction: IntArray) -> sparse.csr_array:
    """Voxels that true instance i and predicted instance j share, (n_truth + 1, n_prediction + 1); 0 is background."""
    shape = int(truth.max(initial=0)) + 1, int(prediction.max(initial=0)) + 1
    ones = np.ones(truth.size, np.int64)
    return sparse.coo_array((ones, (truth.ravel(), prediction.ravel())), shape=shape).tocsr()


def measure(truth: IntArray, prediction: IntArray, ignore_label: int | None = None) -> dict[str, float | int | None]:
    """All measures of one case.

    Args:
        truth, prediction: same shape, integer ids from 0 on, 0 is background.
        ignore_label: value in the truth of what nobody labelled. A predicted instance that lies there with more than
            half of its voxels is neither right nor wrong; of the others the part outside counts.

    Returns:
        arand (0 is perfect); voi_split, voi_merge, voi (bits, 0 is perfect); ap_50 to
        ap_95 and their mean ap (each TP / (TP + FP + FN)); pq, sq, rq; num_truth, num_prediction. None where a measure
        means nothing: without true instances there is no Rand error, and without any instance on either side no AP.

    Raises:
        ValueError: shapes differ, or labels are no whole numbers of at least 0.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"Expected a prediction of the truth's shape {truth.shape}, but got {prediction.shape}.")
    for name, labels in (("truth", truth), ("prediction", prediction)):
        if not np.issubdtype(labels.dtype, np.integer) or (labels.size and labels.min() < 0):
            raise ValueError(f"Expected `{name}` to hold whole numbers of at least 0, but got {labels.dtype}.")
    numbered = consecutive(prediction)
    annotated = np.ones(truth.shape, np.bool_) if ignore_label is None else truth != ignore_label
    sizes = np.bincount(numbered.ravel(), minlength=1)
    outside = np.bincount(numbered[~annotated], minlength=sizes.size)
    undecided = 2 * outside > sizes
    undecided[0] = False
    true, predicted = consecutive(truth[annotated]), consecutive(numbered[annotated])
    decided = consecutive(np.where(undecided[numbered], 0, numbered)[annotated])
    # the Rand error and the variation of information are about voxels: they see every predicted instance
    return {**_partition_measures(true, predicted), **_matching_measures(true, decided)}


def _partition_measures(truth: npt.NDArray[np.int64], prediction: npt.NDArray[np.int64]) -> dict[str, float | None]:
    inside = truth > 0
    names = ("arand", "voi_split", "voi_merge", "voi")
    if not inside.any():
        return dict.fromkeys(names)
    truth, prediction = truth[inside], prediction[inside]
    with np.errstate(invalid="ignore", divide="ignore"):
        error = float(adapted_rand_error(truth, prediction, ignore_labels=(0,))[0])
    split, merge = (max(0.0, float(v)) for v in variation_of_information(truth, prediction, ignore_labels=(0,)))
    if not np.isfinite(error):  # no two voxels belong together, neither in truth nor in prediction: they agree
        error = 0.0
    return dict(zip(names, [error, split, merge, split + merge], strict=True))


def _matching_measures(
    truth: npt.NDArray[np.int64], prediction: npt.NDArray[np.int64]
) -> dict[str, float | int | None]:
    table = overlap_table(truth, prediction)
    true_sizes, predicted_sizes = table.sum(1), table.sum(0)
    num_true, num_predicted = table.shape[0] - 1, table.shape[1] - 1
    pairs = table[1:, 1:].tocoo()
    union = true_sizes[1:][pairs.row] + predicted_sizes[1:][pairs.col] - pairs.data
    iou = pairs.data / union
    result: dict[str, float | int | None] = {}
    total: list[float] = []
    for threshold in THRESHOLDS:
        matched = _num_matches(pairs.row, pairs.col, iou >= threshold, (num_true, num_predicted))
        denominator = num_true + num_predicted - matched
        value = matched / denominator if denominator else None
        result[f"ap_{round(100 * threshold)}"] = value
        total += [] if value is None else [value]
    result["ap"] = float(np.mean(total)) if total else None
    hits = iou[iou > 0.5]  # above one half there is at most one partner
    instances = num_true + num_predicted
    result["rq"] = 2 * hits.size / instances if instances else None
    result["sq"] = float(hits.mean()) if hits.size else (0.0 if instances else None)
    result["pq"] = 2 * float(hits.sum()) / instances if instances else None
    return {**result, "num_truth": num_true, "num_prediction": num_predicted}


def _num_matches(
    rows: npt.NDArray[Any], columns: npt.NDArray[Any], good: npt.NDArray[np.bool_], shape: tuple[int, int]
) -> int:
    """Most pairs that can be matched one to one; only at exactly one half is there a choice."""
    if not good.any():
        return 0
    graph = sparse.csr_array((np.ones(int(good.sum()), np.int8), (rows[good], columns[good])), shape=shape)
    return int((csgraph.maximum_bipartite_matching(sparse.csr_matrix(graph), perm_type="column") >= 0).sum())


def average(cases: Sequence[Mapping[str, float | int | None]]) -> dict[str, float | None]:
    """Mean of each measure over the cases that have it."""
    names = list(dict.fromkeys(name for case in cases for name in case))
    result: dict[str, float | None] = {}
    for name in names:
        values = [float(v) for case in cases if (v := case.get(name)) is not None]
        result[name] = float(np.mean(values)) if values else None
    return result


__all__ = ["THRESHOLDS", "average", "consecutive", "measure", "overlap_table"]
