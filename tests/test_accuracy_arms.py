"""benchmark/accuracy/arms.py and cost.py: names, what is trained, what is shared, what it costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_dsp.benchmark.accuracy.arms import (
    DSP,
    KINDS,
    VANILLA,
    WITHOUT,
    Arm,
    Data,
    Facts,
    Run,
    make_grid,
    parse_arm,
    parse_custom_arm,
    parse_setting,
)
from nnunet_dsp.benchmark.accuracy.cost import DEFAULT, Counts, minutes, parse_prices, total
from nnunet_dsp.settings import DSPSettings

FACTS = Facts(cases=10)


def grid_of(arms, settings=("mixed",), masks=(3,), weak=("rest",), seeds=(0,), facts=FACTS, custom=None):
    return make_grid(
        [parse_arm(a, custom) for a in arms], [parse_setting(s) for s in settings], masks, weak, seeds, facts
    )


# --- names


@pytest.mark.parametrize(
    ("name", "source", "trainer", "kinds", "options"),
    [
        ("masks", "masks", VANILLA, None, {}),
        ("full", "full", VANILLA, None, {}),
        ("ignore", "ignore", VANILLA, None, {}),
        ("selftrain", "pseudo", VANILLA, None, {}),
        ("dsp", "weak", DSP, None, {}),
        ("dsp:points", "weak", DSP, ("points",), {}),
        ("dsp:boxes+points", "weak", DSP, ("points", "boxes"), {}),
        ("dsp:unlabelled", "weak", DSP, (), {}),
        ("dsp:released", "weak", f"{DSP}_released", None, {}),
        ("dsp-loss", "weak", DSP, None, {"dsp_weight": 0.0}),
        ("dsp:tags-pseudo-head", "weak", DSP, ("tags",), {"pseudo_label_weight": 0.0, "head": "standard"}),
        ("masks:pretrained", "masks", VANILLA, None, {}),
        ("dsp:points-head:pretrained", "weak", DSP, ("points",), {"head": "standard"}),
        ("prompt:oneshot:pretrained", "oneshot", "nnUNetTrainerPromptOneShot", None, {}),
        ("ignore:second", "ignore", VANILLA, None, {}),
        ("prompt:partial:pretrained:second", "ignore", "nnUNetTrainerPrompt", ("rectangles",), {}),
    ],
)
def test_an_arm_is_what_its_name_says(name, source, trainer, kinds, options):
    arm = parse_arm(name)
    assert (arm.name, arm.source, arm.trainer, arm.kinds, dict(arm.options)) == (name, source, trainer, kinds, options)
    assert (arm.pretrained, arm.second) == (":pretrained" in name, ":second" in name)


@pytest.mark.parametrize("part", WITHOUT)
def test_every_part_that_can_be_left_out_is_a_setting_of_the_trainer(part):
    changed = DSPSettings(**dict(parse_arm(f"dsp-{part}").options))
    assert changed != DSPSettings(head="prototype")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mask", "no arm 'mask'. Did you mean masks"),
        ("dsp:point", r"but got 'point'\. Did you mean points"),
        ("dsp:", "expected kinds"),
        ("dsp-looss", "'looss' that could be left out. Did you mean loss"),
        ("prompt:sometimes", "no arm 'prompt:sometimes'"),
        ("mask:pretrained", "no arm 'mask'. Did you mean masks"),
        ("masks:second", "masks has no partly annotated images. `selftrain` is the masks arm with a second network"),
        ("prompt:oneshot:second", "prompt:oneshot has no partly annotated images.$"),
        ("selftrain:second", "selftrain is one already"),
        ("ignore:second:pretrained", "starts anew. ignore:pretrained:second pre-trains the first"),
        ("dsp:pretrained:pretrained", "stands there twice"),
    ],
)
def test_an_unknown_arm_is_refused_with_the_nearest_one(name, message):
    with pytest.raises(ValueError, match=message):
        parse_arm(name)


def test_a_trainer_of_the_users_own_is_an_arm():
    arm = parse_custom_arm("low=nnUNetTrainerDSP@points+boxes:dsp_weight=0.03,head=standard,seed=null")
    assert arm == Arm(
        "low", "weak", DSP, ("points", "boxes"), (("dsp_weight", 0.03), ("head", "standard"), ("seed", None))
    )
    assert parse_custom_arm("a=T").source == "weak"
    assert parse_custom_arm("a=T@full").source == "full"
    assert parse_custom_arm("a=T@oneshot:temperature=0.2").source == "oneshot"
    assert parse_custom_arm("a=T@unlabelled").kinds == ()
    assert dict(parse_custom_arm("a=T:list=[1,2],b=3").options) == {"list": [1, 2], "b": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "expected NAME=TRAINER"),
        ("dsp=T", "belongs to one of the benchmark's own"),
        ("masks=T", "belongs to one of the benchmark's own"),
        ("a=T@dots", "Did you mean|Known: tags"),
        ("a=T:key", "expected key=value"),
    ],
)
def test_a_custom_arm_of_another_form_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_custom_arm(text)


@pytest.mark.parametrize(
    ("name", "kinds", "dealt"),
    [
        ("mixed", ("tags", "points", "boxes"), False),
        ("dealt", ("tags", "points", "boxes"), True),
        ("dealt:boxes+points", ("points", "boxes"), True),
        ("dealt:points", ("points",), False),
        ("masks+scribbles", ("scribbles",), False),
        ("masks+boxes+tags", ("tags", "boxes"), False),
        ("masks+unlabelled", (), False),
    ],
)
def test_a_setting_is_what_its_name_says(name, kinds, dealt):
    assert parse_setting(name) == (name, kinds, dealt)


@pytest.mark.parametrize("name", ["mxed", "masks", "masks+", "points", "dealt:"])
def test_an_unknown_setting_is_refused(name):
    with pytest.raises(ValueError, match="Did you mean|Known|expected kinds"):
        parse_setting(name)


# --- what is trained, and what is shared


def runs_by_arm(grid):
    return {(row.arm, row.setting, row.seed): row.run for row in grid.rows}


def test_arms_that_come_to_the_same_training_are_one_run():
    grid = grid_of(["masks", "full", "selftrain", "dsp", "dsp:points"], ["mixed", "masks+points"])
    run = runs_by_arm(grid)
    for arm in ("masks", "full", "selftrain"):
        assert run[arm, "mixed", 0] == run[arm, "masks+points", 0]
    assert run["dsp", "masks+points", 0] == run["dsp:points", "mixed", 0] == run["dsp:points", "masks+points", 0]
    assert run["dsp", "mixed", 0] != run["dsp", "masks+points", 0]
    assert len(grid.runs) == 5


def test_the_ceiling_is_trained_once_a_seed_whatever_the_counts():
    grid = grid_of(["full"], ["mixed", "masks+tags"], masks=(1, 3), weak=(2, "rest"), seeds=(0, 1))
    assert len(grid.runs) == 2
    assert {run.data for run in grid.runs.values()} == {Data("full")}


def test_with_every_case_masked_all_arms_of_a_trainer_are_the_ceiling():
    grid = grid_of(["masks", "full", "ignore", "selftrain", "dsp", "dsp:points"], masks=(10,))
    run = runs_by_arm(grid)
    assert len({run[arm, "mixed", 0] for arm in ("masks", "full", "ignore", "selftrain")}) == 1
    assert run["dsp", "mixed", 0] == run["dsp:points", "mixed", 0] != run["full", "mixed", 0]


def test_self_training_needs_the_masks_arm_which_is_trained_even_if_nobody_asked():
    grid = grid_of(["selftrain"])
    first, second = grid.runs.values()
    assert (first.data.source, first.needs) == ("masks", None)
    assert (second.data.source, second.needs) == ("pseudo", first.id)
    assert [row.arm for row in grid.rows] == ["selftrain"]


@pytest.mark.parametrize(
    ("setting", "boxes_exclude", "source", "kinds"),
    [
        ("masks+tags", True, "masks", ()),
        ("masks+boxes", False, "masks", ()),
        ("masks+boxes", True, "ignore", ("boxes",)),
        ("mixed", False, "ignore", ("points",)),
        ("mixed", True, "ignore", ("points", "boxes")),
        ("masks+scribbles", False, "ignore", ("scribbles",)),
        ("masks+rectangles+tags", False, "ignore", ("rectangles",)),
        ("masks+unlabelled", True, "masks", ()),
    ],
)
def test_the_ignore_arm_gets_what_can_be_painted_and_is_the_masks_arm_where_nothing_can(
    setting, boxes_exclude, source, kinds
):
    grid = grid_of(["ignore"], [setting], facts=Facts(10, boxes_exclude))
    (run,) = grid.runs.values()
    assert (run.data.source, run.data.kinds, run.trainer) == (source, kinds, VANILLA)


def test_the_partial_prompt_sees_what_the_ignore_arm_sees_of_rectangles():
    grid = grid_of(["ignore", "prompt:partial", "prompt:oneshot"], ["masks+rectangles", "masks+points"])
    run = {(row.arm, row.setting): grid.runs[row.run] for row in grid.rows}
    partial = run["prompt:partial", "masks+rectangles"]
    assert partial.data == run["ignore", "masks+rectangles"].data
    assert partial.trainer == "nnUNetTrainerPrompt"
    assert ("prompt:partial", "masks+points") not in run


def test_one_shot_trains_on_the_first_masked_case_whatever_the_counts():
    grid = grid_of(["prompt:oneshot"], ["masks+rectangles", "masks+points"], masks=(0, 1, 3, 10), weak=(0,))
    data = {(row.setting, row.masks): grid.runs[row.run].data for row in grid.rows}
    two = Data("masks", 2, prompt_from="mask")
    for setting in ("masks+rectangles", "masks+points"):
        assert [data[setting, masks] for masks in (1, 3, 10)] == [Data("masks", 1), two, two]
    assert len(grid.left_out) == 2, "without a mask there is nothing to train on"
    (run,) = grid_of(["prompt:oneshot"], ["masks+rectangles"], masks=(1, 3)).runs.values()
    assert run.data == Data("ignore", 1, 1, kinds=("rectangles",), prompt_from="rectangle")


def test_pre_training_is_done_once_for_all_arms_counts_and_seeds_that_start_from_it():
    names = ["masks", "full", "ignore", "dsp", "dsp-loss", "prompt:oneshot", "prompt:partial"]
    arms = [*names, *(f"{name}:pretrained" for name in names)]
    grid = grid_of(arms, ["masks+rectangles"], masks=(1, 3), seeds=(0, 1))
    before = {run.id: run for run in grid.runs.values() if run.is_pretraining}
    assert {run.trainer for run in before.values()} == {VANILLA, "nnUNetTrainerPrompt"} and len(before) == 2
    for row in grid.rows:
        run = grid.runs[row.run]
        if row.arm.endswith(":pretrained"):
            wanted = "nnUNetTrainerPrompt" if row.arm.startswith("prompt") else VANILLA
            assert before[run.pretrained].trainer == wanted
            assert (grid.depth(run), grid.depth(before[run.pretrained])) == (1, 0)
        else:
            assert run.pretrained is None
    ids = list(grid.runs)
    assert all(ids.index(run.pretrained) < ids.index(run.id) for run in grid.runs.values() if run.pretrained)


def test_pre_training_has_the_options_that_shape_a_prompt_network_but_names_no_case():
    custom = {"a": parse_custom_arm("a=nnUNetTrainerPromptOneShot@masks:embedding_channels=8,one_shot_case=x")}
    first, second = grid_of(["a:pretrained"], custom=custom).runs.values()
    assert (first.trainer, dict(first.options)) == ("nnUNetTrainerPrompt", {"embedding_channels": 8})
    assert dict(second.options) == {"embedding_channels": 8, "one_shot_case": "x"}


def test_a_second_network_learns_what_the_first_predicts():
    grid = grid_of(["prompt:partial:pretrained:second", "ignore:second"], ["masks+rectangles"], masks=(0,))
    run = {row.arm: grid.runs[row.run] for row in grid.rows}
    for arm, trainer in (("prompt:partial:pretrained:second", "nnUNetTrainerPrompt"), ("ignore:second", VANILLA)):
        first = grid.runs[run[arm].needs]
        assert (first.trainer, first.data) == (trainer, Data("ignore", 0, 10, kinds=("rectangles",)))
        assert (run[arm].trainer, run[arm].data.source, run[arm].pretrained) == (VANILLA, "second", None)
    assert run["ignore:second"].data.name != run["prompt:partial:pretrained:second"].data.name
    assert grid.depth(run["prompt:partial:pretrained:second"]) == 2
    assert grid_of(["ignore:second"], ["masks+tags"]).left_out == {
        "ignore:second in masks+tags with 3 masks": "no image is left to predict"
    }


def test_second_networks_of_one_trainer_on_painted_and_on_weak_labels_are_two_runs():
    custom = {"painted": parse_custom_arm(f"painted={DSP}@ignore"), "weak": parse_custom_arm(f"weak={VANILLA}@weak")}
    arms = ["dsp:points", "painted", "weak", "ignore"]
    grid = grid_of([f"{arm}:second" for arm in arms], ["masks+points"], custom=custom)
    run = {row.arm: grid.runs[row.run] for row in grid.rows}
    for arm, source in zip(arms, ("weak", "ignore", "weak", "ignore"), strict=True):
        assert grid.runs[run[f"{arm}:second"].needs].data.source == source
    assert len({each.data.name for each in run.values()}) == 4


def test_second_networks_keep_the_names_that_folders_have():
    arms = ["dsp", "ignore", "prompt:partial", "dsp:points-loss", "ignore:pretrained", "dsp:pretrained"]
    grid = grid_of([f"{arm}:second" for arm in arms], ["masks+points+rectangles"])
    names = [row.run.partition("_second_")[2] for row in grid.rows]
    assert names[:3] == [
        "points-rectangles_nnUNetTrainerDSP__nnUNetTrainer",
        "points-rectangles_nnUNetTrainer__nnUNetTrainer",
        "rectangles_nnUNetTrainerPrompt__nnUNetTrainer",
    ]
    assert names[3:] == [
        "points_484c2f19__nnUNetTrainer",
        "points-rectangles_nnUNetTrainer__pretrained__nnUNetTrainer",
        "points-rectangles_nnUNetTrainerDSP__pretrained__nnUNetTrainer",
    ]


def test_self_training_from_pre_trained_weights_has_pseudo_labels_of_its_own():
    grid = grid_of(["selftrain", "selftrain:pretrained"])
    plain, pretrained = (grid.runs[row.run] for row in grid.rows)
    assert plain.data == Data("pseudo", 3, 7), "the folders of earlier versions keep their names"
    assert pretrained.data.name != plain.data.name
    assert grid.runs[pretrained.needs].pretrained == pretrained.pretrained is not None
    custom = {"a": parse_custom_arm("a=T@pseudo")}
    other = grid_of(["a"], custom=custom)
    assert other.runs[other.rows[0].run].data.name != plain.data.name, "another trainer predicts something else"


def test_an_arm_without_its_kind_in_the_setting_is_left_out_and_said_so():
    grid = grid_of(["dsp:boxes+points"], ["masks+points"])
    assert not grid.runs
    assert not grid.rows
    assert grid.left_out == {"dsp:boxes+points in masks+points with 3 masks": "the setting has no boxes"}


def test_without_masks_the_arms_that_need_some_are_left_out():
    grid = grid_of(["masks", "selftrain", "ignore", "dsp", "full"], ["masks+scribbles"], masks=(0,))
    assert [row.arm for row in grid.rows] == ["ignore", "dsp", "full"]
    assert set(grid.left_out.values()) == {"there is no mask"}


def test_a_dealt_setting_keeps_who_got_what_when_a_kind_is_taken_alone():
    grid = grid_of(["dsp", "dsp:points", "dsp:unlabelled"], ["dealt"])
    everything, points, nothing = (run.data for run in grid.runs.values())
    assert (points.kinds, points.dealt) == (("points",), everything.dealt)
    assert nothing.dealt == (), "unlabelled cases are the same, however the rest was dealt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"masks": (11,)}, "--masks: expected 0 to 10"), ({"weak": (8,)}, "--weak: expected 0 to 7 with 3 of 10")],
)
def test_counts_beyond_the_cases_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        grid_of(["dsp"], **changes)


DATA = st.builds(
    Data,
    st.sampled_from(["full", "masks", "weak", "ignore", "pseudo", "second", "pretrain"]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 2),
    st.lists(st.sampled_from(KINDS), unique=True, max_size=2).map(tuple),
    st.sampled_from([(), ("tags", "points")]),
    st.sampled_from(["", "mask"]),
    st.sampled_from(["", "m1__A", "m1__A__pretrained", "m1__B__b=0.5"]),
)
OPTIONS = st.dictionaries(st.sampled_from("ab"), st.sampled_from([0.5, 1, "x y", None]), max_size=2)
RUNS = st.builds(
    Run,
    DATA,
    st.sampled_from(["A", "B"]),
    OPTIONS.map(lambda d: tuple(sorted(d.items()))),
    st.integers(0, 2),
    pretrained=st.sampled_from([None, "pretrain__A"]),
)


def sees(run):
    """All that tells two runs apart: of a source only what it uses, and the seed of its cases is that of its run."""
    data = run.data
    parts = [data.source, run.trainer, repr(run.options), run.pretrained]
    if data.source == "full":
        return (*parts, run.seed)
    if data.source == "pretrain":
        return parts
    parts += [data.masks, data.seed]
    if data.source != "masks":
        parts.append(data.weak)
    if data.source in ("weak", "ignore", "second"):
        parts.append(data.kinds)
    return (*parts, data.dealt, data.prompt_from, data.made_by)


@given(RUNS, RUNS)
def test_two_runs_have_the_same_name_only_if_they_are_the_same(a, b):
    assert (a.id == b.id) == (sees(a) == sees(b))
    assert "/" not in a.id and "\\" not in a.id and len(a.id) < 200


# --- cost


def test_the_default_prices_give_the_times_that_bearman_et_al_report_per_image():
    # 20 classes of which 1.5 are shown, 2.8 objects; ten images, so that the counts are whole
    tags = Counts(tag_images=10, tags=200)
    assert minutes(tags, DEFAULT) * 60 / 10 == pytest.approx(20.0)
    absent = Counts(tag_images=10, tags=185)
    one_point = absent + Counts(point_images=10, point_classes=15, points=15)
    assert minutes(one_point, DEFAULT) * 60 / 10 == pytest.approx(22.1)
    masks = absent + Counts(mask_images=10, mask_classes=15, mask_objects=28)
    assert minutes(masks, DEFAULT) * 60 / 10 == pytest.approx(239.7)


def test_scribbles_cost_by_class_and_further_points_less_than_first_ones():
    assert minutes(Counts(scribble_images=1, scribble_classes=3, scribbles=8), DEFAULT) * 60 == pytest.approx(32.7)
    assert minutes(Counts(point_images=1, point_classes=2, points=5), DEFAULT) * 60 == pytest.approx(4.8 + 2.7)


def test_prices_can_be_set_by_image_class_and_object():
    counts = total(
        [Counts(mask_images=1, mask_classes=2, mask_objects=7), Counts(box_images=2, box_classes=3, boxes=9)]
    )
    assert minutes(counts, parse_prices(["mask=20min/image", "box=1min/object"])) == pytest.approx(20 + 9)
    assert minutes(counts, parse_prices(["mask=30s/class", "box=0.5h/image"])) == pytest.approx(1 + 60)


def test_a_price_of_points_holds_for_all_of_them_unless_further_ones_are_priced():
    counts = Counts(point_images=1, point_classes=1, points=5)
    assert minutes(counts, parse_prices(["point=6s/object"])) == pytest.approx(0.5)
    assert minutes(counts, parse_prices(["point=6s/object", "next-point=0s/object"])) == pytest.approx(0.1)
    assert minutes(counts, parse_prices(["point=3min/image"])) == pytest.approx(3)


@pytest.mark.parametrize("text", ["mask=20", "mask=-3s/image", "maks=3s/image", "box=3s/pixel", "next-point=1s/image"])
def test_a_price_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="--cost"):
        parse_prices([text])
