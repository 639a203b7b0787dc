"""Tags, points, boxes and strokes are true to the mask they were drawn from."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from nnunet_dsp.annotations import LabelNames, find_contradictions
from nnunet_dsp.dataset_conversion.weak_labels import WeakOptions, annotate, box_coverage, scribble

LABELS = {"background": 0, "net": 1, "blob": 2, "rare": 3}
FOREGROUND = ("net", "blob", "rare")
KINDS = ("tags", "points", "boxes")
OPTIONS = WeakOptions(
    tag_classes=FOREGROUND, point_classes=FOREGROUND, box_classes=FOREGROUND, scribble_classes=tuple(LABELS)
)
NAMES = LabelNames.from_dataset_json({"labels": LABELS})


def components(mask, value):
    """Connected components as sets of voxels: a flood fill that knows nothing of the library."""
    steps = [s for s in product((-1, 0, 1), repeat=mask.ndim) if any(s)]
    left = {tuple(int(i) for i in v) for v in np.argwhere(mask == value)}
    found = []
    while left:
        edge = [left.pop()]
        component = set(edge)
        while edge:
            at = edge.pop()
            for step in steps:
                neighbour = tuple(a + s for a, s in zip(at, step, strict=True))
                if neighbour in left:
                    left.remove(neighbour)
                    component.add(neighbour)
                    edge.append(neighbour)
        found.append(component)
    return found


def random_mask(dim, seed):
    """Salt and blobs: many components, specks and corners that touch among them."""
    random = np.random.default_rng(seed)
    shape = (23, 31) if dim == 2 else (6, 13, 15)
    mask = np.where(random.random(shape) < 0.06, random.integers(1, 3, shape), 0)
    grid = np.indices(shape)
    for value in (1, 2, 2):
        center = [random.integers(0, s) for s in shape]
        mask[sum((g - c) ** 2 for g, c in zip(grid, center, strict=True)) < random.uniform(4, 20)] = value
    return mask.astype(np.int16)


def as_corners(component):
    voxels = np.array(sorted(component))
    return tuple(map(float, voxels.min(0))), tuple(map(float, voxels.max(0) + 1))


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_there_is_one_tight_box_for_each_object_and_no_other(dim, seed):
    mask = random_mask(dim, seed)
    boxes = annotate(mask, LABELS, KINDS, OPTIONS, (seed,)).boxes
    expected = {(n, *as_corners(c)) for n in FOREGROUND for c in components(mask, LABELS[n])}
    assert {(b.label, b.start, b.stop) for b in boxes} == expected
    assert len(boxes) == sum(len(components(mask, LABELS[n])) for n in FOREGROUND)
    assert all(b.tight for b in boxes)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("number", [1, 3])
def test_each_object_has_its_points_and_they_lie_in_it(dim, number):
    mask = random_mask(dim, 7)
    options = replace(OPTIONS, points_per_object=number)
    left = [(p.label, p.at) for p in annotate(mask, LABELS, KINDS, options, (0,)).points]
    assert len(left) == len(set(left)), "a voxel is pointed at twice"
    for name in FOREGROUND:
        for component in components(mask, LABELS[name]):
            inside = [p for p in left if p[0] == name and p[1] in component]
            assert len(inside) == min(number, len(component))
            left = [p for p in left if p not in inside]
    assert not left


@pytest.mark.parametrize("number", [1, 3])
def test_points_of_a_net_lie_anywhere_on_its_class_and_are_as_many_as_its_pieces_ask_for(number):
    mask = np.zeros((64, 64), np.int16)
    mask[::8] = mask[:, ::8] = 1  # a grid of lines ...
    mask[3::8, 3::8] = 1  # ... with a speck in each of its 64 meshes
    mask[20:23, 20:23] = 2
    assert len(components(mask, 1)) == 65
    options = replace(OPTIONS, points_per_object=number)
    found = [annotate(mask, LABELS, KINDS, options, (seed,)) for seed in range(10)]
    points = [p for said in found for p in said.points if p.label == "net"]
    assert len(points) == 10 * 65 * number
    assert all(mask[tuple(map(int, p.at))] == 1 for p in points)
    on_specks = np.mean([p.at[0] % 8 != 0 and p.at[1] % 8 != 0 for p in points])
    assert on_specks < 0.15, "specks are 64 of 65 pieces and 7 % of the voxels"
    assert len(set(points)) > 300, "other images, other places"
    for said in found:
        assert len({p.at for p in said.points}) == len(said.points), "a voxel is pointed at twice"
        assert sum(p.label == "blob" for p in said.points) == number, "other classes have theirs object by object"
        assert said.complete_points == ("blob", "rare"), "not every piece of the net has a point"
        assert said.complete_boxes == FOREGROUND


def test_a_large_solid_object_is_no_net():
    mask = np.zeros((32, 32), np.int16)
    mask[1:31, 1:31] = 1
    said = annotate(mask, LABELS, ("points",), OPTIONS, (0,))
    assert "net" in said.complete_points
    edge = [annotate(mask, LABELS, ("points",), OPTIONS, (s,)).points[0].at for s in range(20)]
    assert all(min(*a, *(31 - x for x in a)) > 2 for a in edge)


@pytest.mark.parametrize("change", [{"share": 0.2}, {"points_per_object": 1}], ids=["share", "points per object"])
def test_fewer_points_of_a_net_are_some_of_more_and_lie_on_all_of_it(change):
    mask = np.zeros((64, 64), np.int16)
    mask[::8] = mask[:, ::8] = 1
    mask[3::8, 3::8] = 1
    every = replace(OPTIONS, points_per_object=2)
    for seed in range(10):  # with a share of 0.2 the net itself is left out of most of these images
        many, few = (
            set(annotate(mask, LABELS, ("points",), options, (seed,)).points)
            for options in (every, replace(every, **change))
        )
        assert len(many) == 2 * 65
        assert few < many
        assert sum(p.at[0] % 8 == 0 or p.at[1] % 8 == 0 for p in few) > len(few) / 2


def test_points_keep_away_from_the_border():
    mask = np.zeros((41, 41), np.int16)
    mask[5:36, 5:36] = 2
    points = annotate(mask, LABELS, ("points",), replace(OPTIONS, points_per_object=200), (0,)).points
    to_border = [min(*(c - 4 for c in p.at), *(36 - c for c in p.at)) for p in points]
    uniform = np.mean([min(y - 4, x - 4, 36 - y, 36 - x) for y in range(5, 36) for x in range(5, 36)])
    assert np.mean(to_border) > 1.3 * uniform


def test_the_distance_to_the_border_is_measured_in_real_lengths():
    mask = np.zeros((3, 31, 31), np.int16)
    mask[:, 5:26, 5:26] = 2
    options = replace(OPTIONS, points_per_object=300)
    middle = [
        np.mean([p.at[0] == 1 for p in annotate(mask, LABELS, ("points",), options, (0,), spacing).points])
        for spacing in ((1.0, 1.0, 1.0), (20.0, 1.0, 1.0))
    ]
    assert middle[0] > 0.45 > middle[1]  # thick slices: the voxels above and below are as far inside


def test_tags_say_what_the_image_shows_and_what_not():
    said = annotate(random_mask(2, 0), LABELS, KINDS, OPTIONS, (0,))
    assert said.present == ("net", "blob")
    assert said.absent == ("rare",)
    assert annotate(random_mask(2, 0), LABELS, KINDS, replace(OPTIONS, tags_absent=False), (0,)).absent == ()


def test_only_the_kinds_and_classes_asked_for_are_annotated():
    mask = random_mask(2, 1)
    assert annotate(mask, LABELS, (), OPTIONS, (0,)).is_empty
    points = annotate(mask, LABELS, ("points",), replace(OPTIONS, point_classes=("blob",)), (0,))
    assert {p.label for p in points.points} == {"blob"}
    assert not points.boxes and not points.present and points.complete_points == ("blob",)


def test_complete_is_said_only_where_every_object_is_annotated():
    mask = np.zeros((20, 20), np.int16)
    mask[2, 2] = 1
    mask[5:9, 5:9] = 2
    mask[12:15, 3:9] = 3
    assert annotate(mask, LABELS, KINDS, OPTIONS, (0,)).complete_boxes == FOREGROUND
    assert annotate(mask, LABELS, KINDS, replace(OPTIONS, share=0.99), (0,)).complete_boxes == ()
    assert annotate(mask, LABELS, KINDS, replace(OPTIONS, complete=False), (0,)).complete_points == ()
    overlooked = annotate(mask, LABELS, KINDS, replace(OPTIONS, min_size=2), (0,))
    assert overlooked.complete_boxes == ("blob", "rare")
    assert "net" not in overlooked.present + overlooked.absent, "what was overlooked is neither seen nor ruled out"
    assert {b.label for b in overlooked.boxes} == {"blob", "rare"}


def test_loose_boxes_hold_the_tight_ones_and_stay_in_the_image():
    mask = random_mask(2, 3)
    tight = annotate(mask, LABELS, KINDS, OPTIONS, (0,)).boxes
    loose = annotate(mask, LABELS, KINDS, replace(OPTIONS, loosen=4), (0,)).boxes
    margins = []
    for a, b in zip(tight, loose, strict=True):
        assert a.label == b.label and not b.tight
        assert all(0 <= s <= t for s, t in zip(b.start, a.start, strict=True))
        assert all(t <= s <= size for s, t, size in zip(b.stop, a.stop, mask.shape, strict=True))
        margins += [t - s for s, t in zip(b.start, a.start, strict=True)]
    assert max(margins) == 4


def test_a_larger_share_keeps_what_a_smaller_one_has():
    mask = random_mask(2, 5)
    some, more, everything = (
        {(b.label, b.start) for b in annotate(mask, LABELS, KINDS, replace(OPTIONS, share=s), (0,)).boxes}
        for s in (0.3, 0.6, 1.0)
    )
    assert some < more < everything
    assert 0.1 < len(some) / len(everything) < 0.5


def test_points_and_boxes_belong_to_the_same_objects():
    mask = random_mask(2, 5)
    said = annotate(mask, LABELS, KINDS, replace(OPTIONS, share=0.5), (0,))
    assert len(said.points) == len(said.boxes)
    for point, box in zip(said.points, said.boxes, strict=True):
        assert all(a <= p < b for a, p, b in zip(box.start, point.at, box.stop, strict=True))


def test_other_kinds_and_classes_do_not_move_the_points():
    mask = random_mask(2, 6)
    options = replace(OPTIONS, share=0.7, point_classes=("blob",))
    alone = annotate(mask, LABELS, ("points",), options, (3,)).points
    assert alone and alone == annotate(mask, LABELS, KINDS, options, (3,)).points
    assert alone != annotate(mask, LABELS, ("points",), options, (4,)).points


@pytest.mark.parametrize("dim", [2, 3])
def test_strokes_are_true_thin_and_on_every_component(dim):
    mask = random_mask(dim, 2)
    strokes = scribble(mask, LABELS, 4, OPTIONS, (0,))
    assert np.array_equal(strokes[strokes != 4], mask[strokes != 4])
    for mask_slice, stroke in zip(np.atleast_3d(mask.T).T, np.atleast_3d(strokes.T).T, strict=True):
        for value in LABELS.values():
            for component in components(mask_slice, value):
                assert any(stroke[v] == value for v in component)


def test_strokes_leave_most_of_a_large_object_open():
    mask = np.zeros((120, 120), np.int16)
    mask[10:110, 20:100] = 2
    strokes = scribble(mask, LABELS, 4, replace(OPTIONS, stroke_length=30), (0,))
    assert 10 < (strokes == 2).sum() < 0.03 * (mask == 2).sum()
    assert (strokes == 0).sum() < 0.05 * (mask == 0).sum()


def test_what_is_simulated_does_not_contradict_its_mask():
    for dim, seed in product((2, 3), range(3)):
        mask = random_mask(dim, seed)
        said = annotate(mask, LABELS, KINDS, replace(OPTIONS, loosen=seed), (seed,))
        assert find_contradictions(said, mask, source="x", labels=NAMES, ignore_label=None) == []


def test_box_coverage_counts_a_voxel_once():
    mask = np.zeros((10, 10), np.int16)
    mask[0, :] = mask[:, 0] = 1  # its box is the whole image
    mask[2, 2:8] = mask[2:8, 7] = 2  # two hooks whose boxes, 6 x 6 each, share 4 x 4 voxels
    mask[9, 4:10] = mask[4:9, 4] = 2
    assert box_coverage(annotate(mask, LABELS, KINDS, OPTIONS, (0,))) == {"net": 1.0, "blob": (36 + 36 - 16) / 100}
