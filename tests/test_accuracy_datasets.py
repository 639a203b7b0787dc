"""Datasets of benchmark accuracy: who is masked, who is held out, what weak labels become in a mask."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_dsp.annotations import Annotations, Box, Point
from nnunet_dsp.benchmark.accuracy import FIXED
from nnunet_dsp.benchmark.accuracy.annotators import count, deal, order_of_masks, order_of_weak, rasterise
from nnunet_dsp.benchmark.accuracy.arms import Data
from nnunet_dsp.benchmark.accuracy.source import choose_cases, group_cases

SHOWN = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.sets(st.sampled_from(["x", "y", "z"])), min_size=2, max_size=9
)


# --- who is masked


@given(SHOWN, st.integers(0, 5))
def test_the_first_masks_show_as_many_classes_as_any_choice_by_turns_can(shown, seed):
    order = order_of_masks(shown, seed)
    assert sorted(order) == sorted(shown)
    seen: set[str] = set()
    everything = set().union(*shown.values())
    for position, case in enumerate(order):
        if seen == everything:
            break
        gain = len(shown[case] - seen)
        assert gain == max(len(shown[other] - seen) for other in order[position:])
        seen |= shown[case]


@pytest.mark.parametrize("seed", range(10))
def test_a_class_that_is_shown_already_does_not_count_again(seed):
    shown = {"a": {"x", "y"}, "b": {"x", "y"}, "c": {"z"}, "d": {"x", "y"}}
    assert "c" in order_of_masks(shown, seed)[:2]


@given(SHOWN, st.integers(0, 3), st.data())
def test_smaller_counts_are_part_of_larger_ones(shown, seed, data):
    larger = data.draw(st.integers(1, len(shown)))
    smaller = data.draw(st.integers(0, larger))
    masked = [
        {case for case, kinds in deal(Data("masks", number, seed=seed), shown).items() if "mask" in kinds}
        for number in (smaller, larger)
    ]
    assert masked[0] <= masked[1]
    assert [len(cases) for cases in masked] == [smaller, larger]


def test_seeds_choose_different_cases():
    shown = {f"case_{i}": {"x"} for i in range(20)}
    assert len({tuple(order_of_masks(shown, seed)[:3]) for seed in range(5)}) == 5
    assert order_of_masks(shown, 1) == order_of_masks(dict(reversed(shown.items())), 1)


def test_a_group_gets_its_masks_one_after_the_other():
    shown = {f"patient{p}_frame{f}": {"x"} for p in range(6) for f in (0, 1)}
    groups = group_cases(shown, r"patient\d")
    for seed in range(5):
        order = order_of_masks(shown, seed, groups)
        assert sorted(order) == sorted(shown)
        assert all(groups[a] == groups[b] for a, b in zip(order[::2], order[1::2], strict=True))
    masked = {case for case, kinds in deal(Data("masks", 4, seed=1), shown, groups).items() if kinds}
    assert len(masked) == 4
    assert len({groups[case] for case in masked}) == 2


def test_the_best_of_a_group_comes_first_and_the_rest_counts_as_shown():
    shown = {"a0": {"x"}, "a1": {"x", "y"}, "b0": {"z"}, "b1": {"x"}}
    assert order_of_masks(shown, 0, group_cases(shown, "[ab]"))[:3] == ["a1", "a0", "b0"]


def test_cases_without_a_group_are_on_their_own():
    shown = {name: {"x"} for name in ("a0", "a1", *(f"b{number}" for number in range(6)))}
    orders = [order_of_masks(shown, seed, {"a0": "a", "a1": "a"}) for seed in range(20)]
    assert all(abs(order.index("a0") - order.index("a1")) == 1 for order in orders)
    assert len({tuple(name for name in order if name[0] == "b") for order in orders}) > 6, "in any order"


@given(SHOWN, st.integers(0, 3), st.data())
def test_every_weak_case_carries_all_kinds_and_no_masked_case_any(shown, seed, data):
    masks = data.draw(st.integers(0, len(shown)))
    weak = data.draw(st.integers(0, len(shown) - masks))
    dealt = deal(Data("weak", masks, weak, seed, ("tags", "boxes")), shown)
    kinds = list(dealt.values())
    assert kinds.count(("mask",)) == masks
    assert kinds.count(("tags", "boxes")) == weak
    assert len(dealt) == masks + weak
    if weak:
        fewer = deal(Data("weak", masks, weak - 1, seed, ("tags", "boxes")), shown)
        assert set(fewer) < set(dealt)


def test_a_dealt_setting_gives_each_case_one_kind_and_evenly():
    shown = {f"case_{i}": {"x"} for i in range(10)}
    kinds = ("tags", "points", "boxes")
    dealt = deal(Data("weak", 2, 8, 0, kinds, kinds), shown)
    assert sorted(dealt.values()) == sorted([("mask",)] * 2 + [("tags",)] * 3 + [("points",)] * 3 + [("boxes",)] * 2)
    points = deal(Data("weak", 2, 8, 0, ("points",), kinds), shown)
    assert points == {case: given if given in (("mask",), ("points",)) else () for case, given in dealt.items()}


def test_weak_cases_come_in_an_order_of_their_own():
    cases = [f"case_{i}" for i in range(20)]
    assert order_of_weak(cases, 0) != order_of_masks(dict.fromkeys(cases, ()), 0)
    assert sorted(order_of_weak(cases, 0)) == sorted(cases)


# --- who is held out


def source_of(tmp_path, cases=10, own_test=False, splits=None):
    names = [f"p{i // 2}_{i % 2}" for i in range(cases)]
    if own_test:
        for file in (tmp_path / "imagesTs" / "t_0000.png", tmp_path / "labelsTs" / "t.png"):
            file.parent.mkdir()
            file.touch()
    if splits is not None:
        (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    return SimpleNamespace(folder=tmp_path, cases=dict.fromkeys(names))


def test_the_test_cases_are_the_datasets_own_where_it_has_some(tmp_path):
    split = choose_cases(source_of(tmp_path, own_test=True), FIXED)
    assert split.evaluation is None
    assert len(split.training) == 10


@pytest.mark.parametrize("part", ["imagesTs", "labelsTs"])
def test_an_empty_folder_is_no_test_set(tmp_path, part):
    source = source_of(tmp_path, own_test=True)
    for file in (tmp_path / part).iterdir():
        file.unlink()
    assert len(choose_cases(source, FIXED).evaluation) == 2


def test_test_cases_are_held_out_where_the_dataset_has_none_and_patients_stay_together(tmp_path):
    source = source_of(tmp_path)
    split = choose_cases(source, {**FIXED, "group": r"^p\d+"})
    assert len(split.evaluation) == 2
    assert len({case.split("_")[0] for case in split.evaluation}) == 1
    assert {*split.training, *split.evaluation} == set(source.cases)
    other = {choose_cases(source, {**FIXED, "split_seed": seed}).evaluation for seed in range(5)}
    assert len(other) > 1


def test_a_fold_of_the_datasets_own_split_is_held_out_and_cases_in_neither_part_stay_out(tmp_path):
    splits = [{"train": ["p0_0", "p0_1"], "val": ["p2_0"]}, {"train": ["p2_0"], "val": ["p0_0", "p0_1"]}]
    source = source_of(tmp_path, splits=splits)
    assert choose_cases(source, FIXED)[:2] == (("p0_0", "p0_1"), ("p2_0",))
    assert choose_cases(source, {**FIXED, "test_fold": 1})[:2] == (("p2_0",), ("p0_0", "p0_1"))
    with pytest.raises(ValueError, match="--test-fold: expected 0 to 1"):
        choose_cases(source, {**FIXED, "test_fold": 2})


def test_validation_cases_are_held_out_of_training_and_are_no_test_cases(tmp_path):
    source = source_of(tmp_path)
    test = choose_cases(source, {**FIXED, "test_cases": ["p0_0", "p0_1"]})
    validation = choose_cases(
        source, {**FIXED, "test_cases": ["p0_0", "p0_1"], "evaluate_on": "val", "val_share": 0.25}
    )
    assert len(validation.evaluation) == 2
    assert not {*validation.evaluation, *validation.training} & set(test.evaluation)
    assert set(validation.training) == set(test.training) - set(validation.evaluation)


def test_with_its_own_test_cases_only_validation_cases_are_held_out(tmp_path):
    split = choose_cases(source_of(tmp_path, own_test=True), {**FIXED, "evaluate_on": "val", "val_cases": ["p1_1"]})
    assert split.evaluation == ("p1_1",)
    assert "p1_1" not in split.training
    assert len(split.training) == 9


def test_the_default_validation_fold_is_the_first_that_the_test_cases_leave(tmp_path):
    folds = [["p0_0", "p0_1"], ["p1_0", "p1_1"], ["p2_0", "p2_1", "p3_0", "p3_1", "p4_0", "p4_1"]]
    everyone = {case for fold in folds for case in fold}
    source = source_of(tmp_path, splits=[{"train": sorted(everyone - {*fold}), "val": fold} for fold in folds])
    split = choose_cases(source, {**FIXED, "evaluate_on": "val"})
    assert (split.evaluation, split.training) == (tuple(folds[1]), tuple(folds[2]))
    split = choose_cases(source, {**FIXED, "evaluate_on": "val", "test_fold": 1})
    assert (split.evaluation, split.training) == (tuple(folds[0]), tuple(folds[2]))
    with pytest.raises(ValueError, match="0 to evaluate on"):
        choose_cases(source, {**FIXED, "evaluate_on": "val", "val_fold": 0})


def test_with_test_cases_of_its_own_the_default_validation_fold_is_the_first(tmp_path):
    folds = [["p0_0"], ["p1_0"]]
    source = source_of(tmp_path, own_test=True, splits=[{"train": ["p2_0"], "val": fold} for fold in folds])
    assert choose_cases(source, {**FIXED, "evaluate_on": "val"})[:2] == (("p2_0",), ("p0_0",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_cases": ["p9_9"]}, "no training case p9_9"),
        ({"test_share": 1.5}, "between 0 and 1"),
        ({"test_share": 0.5, "test_fold": 0}, "Give one of"),
        ({"test_fold": 0}, "there is no .*splits_final.json"),
        ({"test_share": 0.99}, "0 would be left to train on"),
        ({"group": "patient"}, "finds nothing in the case name"),
    ],
)
def test_a_split_that_cannot_be_made_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        choose_cases(source_of(tmp_path), {**FIXED, **changes})


# --- painting weak labels

LABELS = {"background": 0, "cell": 1, "nucleus": 2}
IGNORE = 3


def painted_by_loops(said, shape, radius, strokes):
    result = np.full(shape, IGNORE)
    for at in np.ndindex(*shape):
        in_a_box = any(all(a <= v < b for a, v, b in zip(x.start, at, x.stop, strict=True)) for x in said.boxes)
        if set(said.complete_boxes) >= {"cell", "nucleus"} and not in_a_box:
            result[at] = 0
        if strokes is not None and strokes[at] != IGNORE:
            result[at] = strokes[at]
        for point in said.points:
            if sum((a - b) ** 2 for a, b in zip(point.at, at, strict=True)) <= radius**2:
                result[at] = LABELS[point.label]
    return result


@st.composite
def scenes(draw):
    shape = draw(st.sampled_from([(7, 9), (4, 5, 6)]))
    at = st.tuples(*(st.integers(0, n - 1) for n in shape))
    points = draw(st.lists(st.builds(Point, st.sampled_from(list(LABELS)), at), max_size=3))
    boxes = []
    for _ in range(draw(st.integers(0, 2))):
        start = draw(at)
        stop = tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
        boxes.append(Box(draw(st.sampled_from(["cell", "nucleus"])), start, stop))
    complete = draw(st.sampled_from([(), ("cell",), ("cell", "nucleus")]))
    strokes = None
    if draw(st.booleans()):
        strokes = np.full(shape, IGNORE)
        strokes[draw(at)] = draw(st.sampled_from([0, 1, 2]))
    said = Annotations(shape=shape, points=tuple(points), boxes=tuple(boxes), complete_boxes=complete)
    return said, shape, draw(st.sampled_from([0, 1, 1.5, 2])), strokes


@given(scenes())
def test_weak_labels_are_painted_as_far_as_they_are_certain(scene):
    said, shape, radius, strokes = scene
    painted = rasterise(said, shape, LABELS, IGNORE, radius=radius, strokes=strokes)
    np.testing.assert_array_equal(painted, painted_by_loops(said, shape, radius, strokes))


def test_boxes_of_some_classes_only_exclude_nothing():
    said = Annotations(boxes=(Box("cell", (1, 1), (3, 3)),), complete_boxes=("cell",))
    assert (rasterise(said, (5, 5), LABELS, IGNORE) == IGNORE).all()


def test_annotations_are_counted_by_image_class_and_object():
    said = Annotations(
        present=("cell",),
        absent=("nucleus",),
        points=(Point("cell", (1, 1)), Point("cell", (3, 3))),
        boxes=(Box("nucleus", (0, 0), (2, 2)),),
    )
    strokes = np.full((2, 6, 6), IGNORE)
    strokes[0, 0, 0:3] = 1
    strokes[0, 3, 0:3] = 1
    strokes[1, 5, 5] = 0
    part = np.full((6, 6), IGNORE)
    part[2:5, 2:5] = 0
    part[2, 2] = part[4, 4] = 2
    counts = count(said, strokes, part, LABELS)
    assert (counts.rectangle_images, counts.rectangle_classes, counts.rectangle_objects) == (1, 1, 2)
    assert (counts.tag_images, counts.tags) == (1, 2)
    assert (counts.point_images, counts.point_classes, counts.points) == (1, 1, 2)
    assert (counts.box_images, counts.box_classes, counts.boxes) == (1, 1, 1)
    assert (counts.scribble_images, counts.scribble_classes, counts.scribbles) == (1, 2, 3)
    assert counts.mask_images == 0
