"""Who gets which annotations, and who is trained on and validated on."""

import pytest

from nnunet_dsp.dataset_conversion.mixture import assign
from nnunet_dsp.dataset_conversion.splits import read_splits, split_by_group, split_masked

CASES = {f"c{i}": {"a", "b"} if i else {"a", "b", "rare"} for i in range(20)}


def with_kind(kinds_of, kind):
    return {name for name, kinds in kinds_of.items() if kind in kinds}


def test_rest_goes_to_every_case_that_is_neither_masked_nor_unlabelled():
    kinds_of = assign(CASES, masks=3, kinds={"tags": "rest", "points": "rest"}, unlabelled=4)
    assert len(with_kind(kinds_of, "mask")) == 3
    assert with_kind(kinds_of, "tags") == with_kind(kinds_of, "points")
    assert len(with_kind(kinds_of, "tags")) == 13
    assert sum(not kinds for kinds in kinds_of.values()) == 4
    assert all(kinds == ("mask",) for kinds in kinds_of.values() if "mask" in kinds)


def test_numbered_kinds_go_to_different_cases_as_far_as_they_reach():
    kinds_of = assign(CASES, masks=2, kinds={"points": 8, "boxes": 10, "tags": "rest"})
    assert len(with_kind(kinds_of, "points")) == 8 and len(with_kind(kinds_of, "boxes")) == 10
    assert not with_kind(kinds_of, "points") & with_kind(kinds_of, "boxes")
    assert len(with_kind(kinds_of, "tags")) == 18
    overlapping = assign(CASES, masks=2, kinds={"points": 12, "boxes": 12})
    assert len(with_kind(overlapping, "points") & with_kind(overlapping, "boxes")) == 6
    together = assign(CASES, masks=2, kinds={"points": 8, "boxes": 5}, same_cases=True)
    assert with_kind(together, "boxes") < with_kind(together, "points")


def test_masked_cases_show_every_class_unless_drawn_blindly():
    assert all("c0" in with_kind(assign(CASES, masks=2, kinds={}, seed=s), "mask") for s in range(10))
    blind = [with_kind(assign(CASES, masks=2, kinds={}, seed=s, cover=False), "mask") for s in range(10)]
    assert any("c0" not in masked for masked in blind)


def test_the_seed_decides():
    first, again, other = (assign(CASES, masks=5, kinds={"boxes": 6}, seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_named_cases_are_masked():
    assert with_kind(assign(CASES, masks=0, kinds={}, masked_cases=["c4", "c7"]), "mask") == {"c4", "c7"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masks": 21}, r"--masks: expected 0 to 20, .* but got 21"),
        ({"masks": 15, "unlabelled": 6}, r"--unlabelled: expected 0 to 5, .* but got 6"),
        ({"masks": 15, "kinds": {"boxes": 6}}, r"--boxes: expected 0 to 5, .* but got 6"),
        ({"masks": 0, "masked_cases": ["c1", "nobody"]}, "the source dataset has no case nobody"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        assign(CASES, **{"kinds": {}, **arguments})


def test_groups_are_validated_whole_and_their_neighbours_are_left_out_of_training():
    groups = {n: [f"s{n}_a", f"s{n}_b"] for n in range(9)}
    splits = split_by_group(groups, folds=5, gap=1)
    assert sorted(c for s in splits for c in s["val"]) == sorted(c for cs in groups.values() for c in cs)
    for split in splits:
        validated = {int(c[1]) for c in split["val"]}
        trained = {int(c[1]) for c in split["train"]}
        assert validated == set(range(min(validated), max(validated) + 1)), "validation sections are not consecutive"
        assert min(abs(t - v) for t in trained for v in validated) == 2
    assert split_by_group({1: ["a"]}) == []


def test_weak_cases_train_in_every_fold_and_validate_in_none():
    splits = split_masked(["m1", "m2", "m3"], ["w1", "w2"])
    assert [s["val"] for s in splits] == [["m1"], ["m2"], ["m3"]]
    assert all({"w1", "w2"} < set(s["train"]) and not set(s["train"]) & set(s["val"]) for s in splits)
    assert len(split_masked([f"m{i}" for i in range(12)], [])) == 5
    assert split_masked(["m"], ["w"]) == [{"train": ["m", "w"], "val": ["m"]}]
    assert split_masked([], ["w"]) == []


def test_the_split_of_the_source_is_followed_where_it_can_be():
    source = [{"train": ["m2", "w1"], "val": ["m1", "w2"]}, {"train": ["m1", "w2"], "val": ["m2", "w1"]}]
    assert split_masked(["m1", "m2"], ["w1", "w2"], source) == [
        {"train": ["m2", "w1", "w2"], "val": ["m1"]},
        {"train": ["m1", "w1", "w2"], "val": ["m2"]},
    ]
    lopsided = [{"train": ["w1"], "val": ["m1", "m2"]}, {"train": ["m1", "m2"], "val": ["w1"]}]
    assert [s["val"] for s in split_masked(["m1", "m2"], ["w1"], lopsided)] == [["m1"], ["m2"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{]", "not valid JSON"),
        ('{"train": [], "val": []}', "expected a list of"),
        ('[{"train": ["c1"]}]', "expected a list of"),
        ('[{"train": ["c1"], "val": ["ghost"]}]', r"1 case\(s\) that do not exist: ghost"),
    ],
)
def test_a_splits_file_of_another_form_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "splits_final.json").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_splits(tmp_path / "splits_final.json", ["c1"])
    assert "splits_final.json" in str(raised.value)
