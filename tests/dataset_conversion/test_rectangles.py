"""`nnunet_dsp simulate --rectangle` and `--instances`."""

import json

import numpy as np
import pytest

from nnunet_dsp.dataset_conversion import simulate
from nnunet_dsp.dataset_conversion.raw_dataset import RECORD
from nnunet_dsp.dataset_conversion.weak_labels import LOOKS, rectangle

IGNORE = 4


def bounds(known):
    where = np.argwhere(known)
    return where.min(0), where.max(0) + 1


@pytest.mark.parametrize(
    ("dim", "size", "expected"),
    [(2, [16], (16, 16)), (2, [8, 20], (8, 20)), (3, [6], (6, 6, 6)), (3, [1, 12, 10], (1, 12, 10)),
     (2, [100], (40, 48))],
)  # fmt: skip
def test_each_image_keeps_one_rectangle_of_its_mask(make_dataset, nnunet, call, read, dim, size, expected):
    _, masks = make_dataset(101, dim=dim)
    assert call(simulate, "-d", 101, "-o", 102, "--rectangle", *size) == 0
    target = nnunet / "Dataset102_FullWeak"
    ending = ".png" if dim == 2 else ".nii.gz"
    places = set()
    for case, mask in masks.items():
        label = read(target / "labelsTr" / f"{case}{ending}")
        known = label != IGNORE
        low, high = bounds(known)
        assert tuple(high - low) == expected and known.sum() == np.prod(expected)
        assert np.array_equal(label[known], mask[known])
        places.add(tuple(low))
    assert len(places) > 1 or size == [100], "the same place in every image"
    assert not list((target / "annotationsTr").iterdir())
    assert json.loads((target / "dataset.json").read_text())["labels"]["ignore"] == IGNORE
    splits = json.loads((target / "splits_final.json").read_text())
    assert {case for fold in splits for case in fold["val"]} == set(masks), "rectangles are validated on"
    assert json.loads((target / RECORD).read_text())["summary"]["rectangles"] == {"cases": 6}


def test_same_seed_same_rectangle_whatever_else_is_asked_for(make_dataset, nnunet, call, read):
    _, masks = make_dataset(101)
    rest = {103: ["--points", "rest"], 105: ["--scribbles", "rest"]}
    variants = {102: [], 104: ["--seed", 1], 106: ["--masks", 2], **rest}
    labels = {}
    for number, more in variants.items():
        assert call(simulate, "-d", 101, "-o", number, "--name", "R", "--rectangle", 12, *more) == 0
        folder = nnunet / f"Dataset{number}_R" / "labelsTr"
        labels[number] = {case: read(folder / f"{case}.png") for case in masks}
    assert all(np.array_equal(labels[102][c], labels[103][c]) for c in masks)
    assert any(not np.array_equal(labels[102][c], labels[104][c]) for c in masks)
    for case, mask in masks.items():
        alone, with_strokes = labels[102][case], labels[105][case]
        assert np.array_equal(with_strokes[alone != IGNORE], mask[alone != IGNORE])
        assert (with_strokes != IGNORE).sum() > (alone != IGNORE).sum()
        assert np.array_equal(with_strokes[with_strokes != IGNORE], mask[with_strokes != IGNORE])
    whole = [c for c in masks if not (labels[106][c] == IGNORE).any()]
    assert len(whole) == 2
    assert all(np.array_equal(labels[106][c], labels[102][c]) for c in masks if c not in whole)
    splits = json.loads((nnunet / "Dataset106_R" / "splits_final.json").read_text())
    assert {case for fold in splits for case in fold["val"]} == set(whole), "whole masks are better to validate on"


def test_a_rectangle_shows_more_than_one_class_where_it_can():
    mask = np.zeros((60, 60), np.uint8)
    mask[20:40, 20:40] = 1  # a quarter of the places see the square's border
    alone = 0
    for seed in range(100):
        label, where = rectangle(mask, 9, (10,), (seed,))
        assert np.array_equal(label[where], mask[where]) and (label != 9).sum() == 100
        alone += len(np.unique(mask[where])) == 1
    assert alone <= 1, f"an annotator looks at up to {LOOKS} places"
    assert (rectangle(np.zeros((20, 20), np.uint8), 9, (5,), (0,))[0] != 9).sum() == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rectangle", 0], "--rectangle: expected sizes of 1 or more, but got 0"),
        (["--rectangle", 1, 8, 8], r"--rectangle: expected one number or 2, one for each axis of the images \(2D\)"),
        (["--rectangle", 8, "--masks", 2, "--masks-only"], "nothing to give tags"),
        (["--instances", 0.1], "declares no instances"),
        (["--instances", 0.1, "--rectangle", 8], "--instances makes a dataset of its own kind"),
        (["--keep-background"], "--keep-background belongs to --instances"),
    ],
)
def test_arguments_that_do_not_go_together_are_explained(make_dataset, nnunet, call, arguments, message):
    make_dataset(101)
    with pytest.raises(ValueError, match=message):
        call(simulate, "-d", 101, "-o", 102, *arguments)
    assert [p.name for p in nnunet.iterdir()] == ["Dataset101_Full"]


def test_a_share_of_the_instances_is_kept(make_dataset, nnunet, call, read, capsys):
    folder, masks = make_dataset(101)
    content = json.loads((folder / "dataset.json").read_text())
    content |= {"labels": {"background": 0, "cell": [1, 2, 3]}, "regions_class_order": [1], "instance_labels": True}
    (folder / "dataset.json").write_text(json.dumps(content))
    assert call(simulate, "-d", 101, "-o", 102, "--instances", 0.34) == 0
    for case, mask in masks.items():
        label = read(nnunet / "Dataset102_FullWeak" / "labelsTr" / f"{case}.png")
        kept = sorted(set(np.unique(label).tolist()) - {0, IGNORE})
        assert len(kept) == 1
        assert np.array_equal(label == kept[0], mask == kept[0]) or (label == 1).sum() in [
            (mask == v).sum() for v in (1, 2, 3)
        ], "an instance is whole"
    assert "instances labelled" in capsys.readouterr().out
