"""pseudo_labels.py: the sets against the oracle's, the filter's promises, and the loss on top."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import EVERY_KIND, SHAPES, to_annotations, to_logits, to_tensor

from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.pseudo_labels import (
    allowed_classes,
    filter_probabilities,
    pseudo_label,
    released_filter,
)


def allowed_of(batch: oracle.WeakBatch) -> torch.Tensor:
    target = to_tensor(batch.target, batch, torch.int16)
    return allowed_classes(to_annotations(batch), target, batch.num_classes, batch.shape, batch.num_classes)


any_batch = st.builds(
    oracle.random_batch,
    seed=st.integers(0, 10**6),
    shape=st.sampled_from(list(SHAPES.values())),
    num_classes=st.integers(1, 5),
    items=st.integers(1, 3),
    kinds=st.frozensets(st.sampled_from(EVERY_KIND)),
)


@settings(max_examples=80, deadline=None)
@given(batch=any_batch)
def test_the_allowed_sets_are_the_oracles(batch):
    allowed = allowed_of(batch)
    assert allowed.dtype == torch.bool
    assert tuple(allowed.shape) == (len(batch.logits), batch.num_classes, *batch.shape)
    for b in batch.items:
        for v in batch.voxels():
            ours = {c for c in batch.classes if allowed[(b, c, *v)]}
            assert ours == oracle.allowed_set(batch, b, v), (b, v)


@settings(max_examples=40, deadline=None)
@given(batch=any_batch)
def test_the_set_is_never_empty_and_keeps_every_annotated_voxel(batch):
    allowed = allowed_of(batch)
    assert allowed.any(1).all()
    drawn = set()
    for b in batch.items:
        for v, c in (batch.target[b] if batch.target is not None else {}).items():
            if c < batch.num_classes:
                drawn.add((b, v))
                assert allowed[(b, slice(None), *v)].nonzero().flatten().tolist() == [c]
    for b, c, v in batch.points:
        assert (b, v) in drawn or allowed[(b, c, *v)]


def test_what_each_kind_of_annotation_leaves():
    batch = oracle.random_batch(0, (2, 3), 3, items=1, kinds=frozenset())
    assert allowed_of(batch).all()
    batch.tags = [[-1, 0, 1]]
    assert allowed_of(batch)[0].all((1, 2)).tolist() == [True, False, True]
    batch.boxes, batch.complete = [oracle.Box(0, 2, (0, 0), (1, 2))], [[False, False, True]]
    assert allowed_of(batch)[0, 2].tolist() == [[True, True, False], [False, False, False]]
    batch.points = [(0, 2, (1, 2))]  # outside all boxes of a class whose boxes are complete, and yet it stands
    assert allowed_of(batch)[0, :, 1, 2].tolist() == [False, False, True]
    batch.partial, batch.listed = [{(1, 0)}], [[True, False, False]]
    batch.tags, batch.boxes, batch.complete = [[-1, -1, -1]], [], [[False] * 3]
    assert allowed_of(batch)[0, :, 1, 0].tolist() == [True, True, True]
    batch.listed = [[True, False, True]]
    assert allowed_of(batch)[0, :, 1, 0].tolist() == [True, True, False]
    batch.target = [dict.fromkeys(batch.voxels(), 3) | {(1, 2): 1}]
    assert allowed_of(batch)[0, :, 1, 2].tolist() == [False, True, False]


def test_where_annotations_contradict_each_other_every_class_is_left():
    batch = oracle.random_batch(0, (2, 3), 2, items=1, kinds=frozenset())
    batch.tags = [[0, 0]]
    assert allowed_of(batch).all()


def test_complete_boxes_of_one_item_or_class_say_nothing_about_another():
    batch = oracle.random_batch(0, (2, 3), 2, items=2, kinds=frozenset())
    batch.complete[0][1] = True
    allowed = allowed_of(batch)
    assert not allowed[0, 1].any()
    assert allowed[0, 0].all()
    assert allowed[1].all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_masks_of_any_type_with_or_without_channel_say_the_same(dtype):
    target = torch.tensor([[[0, 1, 2], [3, 3, 0]]]).to(dtype)
    expected = torch.tensor([[[[1, 0, 0], [1, 1, 1]], [[0, 1, 0], [1, 1, 0]], [[0, 0, 1], [1, 1, 0]]]]).bool()
    nothing = AnnotationBatch.empty(1, 3, 2)
    for mask in (target, target[:, None]):
        assert (allowed_classes(nothing, mask, 3, (2, 3), 3) == expected).all()
    # an ignore label may be any number, one of a class as well
    assert allowed_classes(nothing, target, 3, (2, 3), 0)[0, :, 0, 0].all()


@settings(max_examples=30, deadline=None)
@given(batch=any_batch)
def test_the_filter_is_the_softmax_within_the_set(batch):
    logits, allowed = to_logits(batch), allowed_of(batch)
    filtered = filter_probabilities(logits, allowed)
    assert not filtered.requires_grad
    plain = logits.detach().softmax(1) * allowed
    torch.testing.assert_close(filtered, plain / plain.sum(1, keepdim=True))
    label = pseudo_label(logits, allowed)
    assert label.dtype == torch.int64
    assert (label == filtered.argmax(1)).all()
    assert allowed.gather(1, label[:, None]).all()


def test_the_filter_computes_in_float32():
    logits = torch.tensor([[1e4, 0.0]], dtype=torch.float16).reshape(1, 2, 1, 1)
    filtered = filter_probabilities(logits, torch.tensor([[False, True]]).reshape(1, 2, 1, 1))
    assert filtered.dtype == torch.float32
    assert filtered.flatten().tolist() == [0, 1]


def test_the_released_filter_gives_nan_where_a_box_and_a_tag_exclude_everything():
    batch = oracle.random_batch(0, (2, 3), 2, items=1, kinds=frozenset())
    batch.tags, batch.boxes = [[0, 1]], [oracle.Box(0, 0, (0, 0), (1, 2))]
    filtered = released_filter(to_logits(batch), to_annotations(batch))
    assert filtered.isnan().any(1)[0].tolist() == [[True, True, False], [False, False, False]]
    assert (filtered[0, 1, 1] == 1).all()
    batch.points = [(0, 0, (0, 0)), (0, 1, (1, 1)), (0, 0, (1, 1))]  # the last point of a voxel counts
    filtered = released_filter(to_logits(batch), to_annotations(batch))
    assert filtered[0, :, 0, 0].tolist() == [1, 0]
    assert filtered[0, :, 1, 1].tolist() == [1, 0]
    target = torch.full((1, 2, 3), 255)
    target[0, 0, 1] = 1
    filtered = released_filter(to_logits(batch), to_annotations(batch), target, 255)
    assert filtered[0, :, 0, 1].tolist() == [0, 1]
