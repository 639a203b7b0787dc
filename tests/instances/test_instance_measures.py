"""Measures against scikit-image, and against a second implementation by sets and loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from skimage.metrics import adapted_rand_error, variation_of_information

from nnunet_dsp.instances.measures import THRESHOLDS, average, consecutive, measure


def random_pair(seed, shape=(12, 13), ids=6):
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.repeat(rng.integers(0, ids, (4, 5)), 3, 0), 3, 1)[: shape[0], : shape[1]]
    prediction = np.where(rng.random(truth.shape) < 0.25, rng.integers(0, ids, truth.shape), truth)
    return truth, prediction * 3


def rand_error(truth, prediction):
    """By pairs of voxels, in the truth's foreground."""
    voxels = [(t, p) for t, p in zip(truth.ravel(), prediction.ravel(), strict=True) if t > 0]
    both = in_truth = in_prediction = 0
    for (t1, p1), (t2, p2) in itertools.combinations(voxels, 2):
        both += t1 == t2 and p1 == p2
        in_truth += t1 == t2
        in_prediction += p1 == p2
    return 1 - 2 * both / (in_truth + in_prediction)


def information(truth, prediction):
    """(split, merge): H(prediction | truth) and H(truth | prediction), bits."""
    voxels = [(int(t), int(p)) for t, p in zip(truth.ravel(), prediction.ravel(), strict=True) if t > 0]
    split = merge = 0.0
    for pair in set(voxels):
        joint = voxels.count(pair) / len(voxels)
        split -= joint * math.log2(joint * len(voxels) / sum(t == pair[0] for t, _ in voxels))
        merge -= joint * math.log2(joint * len(voxels) / sum(p == pair[1] for _, p in voxels))
    return split, merge


def matches(truth, prediction, threshold):
    """Most one-to-one pairs of at least this intersection over union, by trying; and the values of those above it."""
    true = {i: set(np.flatnonzero(truth == i)) for i in np.unique(truth) if i}
    found = {i: set(np.flatnonzero(prediction == i)) for i in np.unique(prediction) if i}
    iou = {(i, j): len(a & b) / len(a | b) for i, a in true.items() for j, b in found.items()}
    good = [pair for pair, value in iou.items() if value >= threshold]

    def most(left):
        if not left:
            return 0
        (i, j), rest = left[0], left[1:]
        return max(most(rest), 1 + most([(a, b) for a, b in rest if a != i and b != j]))

    return most(good), [value for value in iou.values() if value > threshold], len(true), len(found)


@pytest.mark.parametrize("seed", range(5))
def test_measures_agree_with_a_second_implementation_and_with_scikit_image(seed):
    truth, prediction = random_pair(seed)
    found = measure(truth, prediction)
    assert found["arand"] == pytest.approx(rand_error(truth, prediction))
    split, merge = information(truth, prediction)
    assert found["voi_split"] == pytest.approx(split)
    assert found["voi_merge"] == pytest.approx(merge)
    assert found["voi"] == pytest.approx(split + merge)
    assert found["arand"] == pytest.approx(adapted_rand_error(truth, prediction, ignore_labels=(0,))[0])
    theirs = variation_of_information(truth, prediction, ignore_labels=(0,))
    assert found["voi"] == pytest.approx(theirs.sum())
    precisions = []
    for threshold in THRESHOLDS:
        number, _, num_true, num_found = matches(truth, prediction, threshold)
        precisions.append(number / (num_true + num_found - number))
        assert found[f"ap_{round(100 * threshold)}"] == pytest.approx(precisions[-1]), threshold
    assert found["ap"] == pytest.approx(np.mean(precisions))
    _, values, num_true, num_found = matches(truth, prediction, 0.5)
    assert found["pq"] == pytest.approx(2 * sum(values) / (num_true + num_found))
    assert (found["num_truth"], found["num_prediction"]) == (num_true, num_found)


def test_a_merge_raises_voi_merge_only_and_a_split_voi_split_only():
    truth = np.repeat([1, 2, 3, 4], 25).reshape(10, 10)
    merged = np.where(truth == 2, 1, truth)
    assert measure(truth, merged)["voi_split"] == pytest.approx(0)
    assert measure(truth, merged)["voi_merge"] == pytest.approx(0.5)
    assert measure(merged, truth)["voi_split"] == pytest.approx(0.5)
    assert measure(merged, truth)["voi_merge"] == pytest.approx(0)


def test_a_perfect_prediction_under_other_ids_is_perfect():
    truth, _ = random_pair(0)
    other = np.array([0, 40, 7, 2**40, 9, 3])[truth]
    found = measure(truth, other)
    assert found["arand"] == 0
    assert found["voi"] == pytest.approx(0, abs=1e-12)
    assert all(found[name] == 1 for name in ("ap", "ap_50", "ap_95", "pq", "sq", "rq"))


def test_what_the_truth_does_not_label_counts_nowhere():
    truth = np.zeros((10, 10), int)
    truth[:, :5] = 1
    truth[:, 5:] = 99
    prediction = np.where(truth == 1, 1, 2)
    prediction[:3, 5:] = 3  # two instances where nobody labelled anything
    assert measure(truth, prediction, 99)["pq"] == 1
    assert measure(truth, prediction, 99)["num_prediction"] == 1
    assert measure(truth, prediction)["pq"] < 1
    prediction[0, 4] = 3  # mostly where nobody labelled anything, so neither right nor wrong
    assert measure(truth, prediction, 99)["num_prediction"] == 1
    straddling = np.where(truth == 1, 1, 0)
    straddling[0, :] = 2  # half of it on labelled ground: there it is wrong
    assert measure(truth, straddling, 99)["num_prediction"] == 2
    assert measure(truth, straddling, 99)["arand"] > 0


def test_empty_images_give_none_or_zero_never_nan():
    empty, some = np.zeros((4, 4), int), np.eye(4, dtype=int)
    both = measure(empty, empty)
    assert both["arand"] is None and both["ap"] is None and both["pq"] is None
    assert measure(empty, some)["ap"] == 0 and measure(empty, some)["arand"] is None
    assert measure(some, empty)["pq"] == 0
    assert average([both, measure(some, some)])["pq"] == 1
    assert average([both])["pq"] is None


def test_instances_of_one_voxel_each_that_are_found_have_no_error():
    truth = np.array([[1, 0, 2], [0, 0, 0], [3, 0, 4]])
    assert measure(truth, truth * 5)["arand"] == 0 == measure(np.array([[1]]), np.array([[1]]))["arand"]
    assert measure(truth, np.minimum(truth, 1))["arand"] == 1, "all four in one"
    assert measure(truth, np.zeros_like(truth))["arand"] == 1, "what is not found is one segment"


def test_labels_that_are_no_labels_are_refused():
    with pytest.raises(ValueError, match="shape"):
        measure(np.zeros((3, 3), int), np.zeros((3, 4), int))
    with pytest.raises(ValueError, match="at least 0"):
        measure(np.full((2, 2), -1), np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="whole numbers"):
        measure(np.zeros((2, 2)), np.zeros((2, 2), int))
    assert consecutive(np.array([[7, 0], [7, 2]])).tolist() == [[2, 0], [2, 1]]
    assert consecutive(np.array([[7, 3]])).tolist() == [[2, 1]]
