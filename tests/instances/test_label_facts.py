"""instances/label_facts.py: what the labels of the training cases tell."""

from __future__ import annotations

import numpy as np
import pytest
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnunet_dsp.instances.decoders import relabel
from nnunet_dsp.instances.label_facts import DEFAULT_MIN_SIZE, label_facts
from nnunet_dsp.instances.measures import measure

IGNORE = 99


def image(sizes, depth=1):
    """(1, depth, 1, n): one instance of each size in every slice, ids 1, 2, ..., between voxels nobody labelled."""
    row = [np.full(size, number) for number, size in enumerate(sizes, 1)]
    return np.broadcast_to(np.concatenate([*row, [IGNORE] * 5]), (1, depth, 1, sum(sizes) + 5)).astype(np.int16)


def test_all_but_five_percent_of_the_labelled_instances_reach_the_size_that_is_kept():
    sizes = list(range(100, 0, -1))
    assert sum(size < label_facts([image(sizes)], IGNORE).min_size for size in sizes) == 5
    assert label_facts([image(sizes[:50]), image(sizes[50:])], IGNORE).min_size == 5, "of all cases together"


@pytest.mark.parametrize(("slicewise", "expected"), [(True, 5), (False, 15)])
def test_instances_of_a_volume_are_those_of_the_slices_for_a_2d_network(slicewise, expected):
    assert label_facts([image([20, 20], depth=3)], IGNORE, slicewise=slicewise).min_size == expected


def test_where_instances_are_about_alike_those_found_nearly_whole_are_kept():
    rows, columns = np.mgrid[:120, :120]
    truth = np.zeros((120, 120), np.int16)
    for number in range(9):
        y, x = 20 + 40 * (number // 3), 20 + 40 * (number % 3)
        truth[(rows - y) ** 2 + (columns - x) ** 2 < 144] = number + 1
    found = truth.copy()
    for number in range(1, 10):
        found[tuple(np.argwhere(truth == number)[0])] = 0
    min_size = label_facts([truth[None, None]], None, slicewise=True).min_size
    assert measure(truth, relabel(found, min_size))["ap_50"] == 1
    assert min_size == (truth == 1).sum() // 4, "and specks are left out"


@pytest.mark.parametrize(("small", "expected"), [([44] * 7, 44), ([44, 44], 100)])
def test_the_quarter_of_the_median_matters_only_where_sizes_hardly_differ(small, expected):
    sizes = [*small, *[400] * 60, *[900] * 20]
    assert bool(np.percentile(sizes, 5) > 100) is (len(small) == 2)
    assert label_facts([image(sizes)], IGNORE).min_size == expected


@pytest.mark.parametrize("value", [IGNORE, 0, -1])
def test_without_an_instance_there_is_a_default(value):
    assert label_facts([np.full((1, 1, 4, 4), value)], IGNORE).min_size == DEFAULT_MIN_SIZE
    assert label_facts([], IGNORE) == (False, DEFAULT_MIN_SIZE, 0)


def test_strokes_say_nothing_about_sizes():
    assert label_facts([image([3, 3])], IGNORE, complete_instances=False).min_size == DEFAULT_MIN_SIZE


@pytest.mark.parametrize(("background", "expected"), [(0, False), (1, False), (30, True)])
def test_background_counts_when_there_is_more_than_a_few_voxels_of_it(background, expected):
    labels = image([1000])
    labels[..., :background] = 0
    assert label_facts([labels], IGNORE).background_labelled is expected
    black = np.where(labels == 0, -1, labels)
    assert label_facts([black], IGNORE).background_labelled is expected, "labelled 0 where the image is 0, says nnU-Net"


def test_background_labelled_where_the_image_is_black_is_background():
    """nnU-Net's own preprocessing makes the labels."""
    shape = (1, 1, 40, 40)
    labels = np.zeros(shape, np.int16)
    labels[..., 2:10, 2:10], labels[..., 30:38, 30:38], labels[..., 30:38, 2:10] = 1, 2, IGNORE
    _, cropped, _ = crop_to_nonzero(np.where(np.isin(labels, (1, 2)), 1, 0).astype(np.float32), labels.copy())
    assert set(np.unique(cropped)) == {-1, 1, 2, IGNORE}
    assert label_facts([cropped], IGNORE).background_labelled
    labels[labels == 0] = IGNORE
    _, cropped, _ = crop_to_nonzero(np.where(np.isin(labels, (1, 2)), 1, 0).astype(np.float32), labels.copy())
    assert not label_facts([cropped], IGNORE).background_labelled
