"""The losses over the allowed classes, against their formulas with loops."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from test_losses import SHAPES, NoLookAtData, to_annotations, to_logits
from test_pseudo_labels import allowed_of

from nnunet_dsp import blocks
from nnunet_dsp.pseudo_labels import box_cover, pseudo_label
from nnunet_dsp.set_losses import marginal_cross_entropy, pseudo_label_loss, set_losses


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_marginal_cross_entropy_is_the_formula(shape):
    batch = oracle.random_batch(4, shape, 3)
    logits = to_logits(batch)
    where = torch.rand(2, *shape) < 0.6
    allowed = torch.rand(2, 3, *shape) < 0.5
    allowed[:, 0] |= ~allowed.any(1)
    p, total = logits.softmax(1), 0.0
    for index in where.nonzero().tolist():
        b, *v = index
        total -= math.log(sum(p[(b, c, *v)].item() for c in range(3) if allowed[(b, c, *v)]))
    loss = marginal_cross_entropy(logits, allowed, where)
    assert loss.item() == pytest.approx(total / len(where.nonzero()), rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: marginal_cross_entropy(x, allowed, where), (logits,))


def test_marginal_cross_entropy_is_finite_for_empty_sets_nowhere_and_extreme_logits():
    logits = (torch.randn(1, 3, 2, 2) * 1e4).requires_grad_()
    empty = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    one = empty.clone()
    one[:, 1] = True
    for allowed in (empty, one, ~empty):
        for where in (torch.zeros(1, 2, 2, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.bool)):
            loss = marginal_cross_entropy(logits, allowed, where)
            (gradient,) = torch.autograd.grad(loss, logits)
            assert torch.isfinite(loss)
            assert torch.isfinite(gradient).all()
            if not where.any() or allowed is not one:
                assert loss.item() == 0
    target = torch.randint(3, (1, 2, 2))
    exact = F.one_hot(target, 3).movedim(-1, 1).bool()
    where = torch.ones(1, 2, 2, dtype=torch.bool)
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(marginal_cross_entropy(logits, exact, where), expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_pseudo_label_loss_is_cross_entropy_against_the_pseudo_label(shape):
    batch = oracle.random_batch(3, shape, 4)
    logits, allowed = to_logits(batch), allowed_of(batch)
    where = torch.rand(2, *shape) < 0.5
    loss = pseudo_label_loss(logits, allowed, where)
    label = pseudo_label(logits, allowed)
    total = 0.0
    for b, *v in where.nonzero().tolist():
        scores = logits[(b, slice(None), *v)].tolist()
        total += math.log(sum(math.exp(score) for score in scores)) - scores[int(label[(b, *v)])]
    assert loss.item() == pytest.approx(total / int(where.sum()), rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad((F.cross_entropy(logits, label, reduction="none") * where).sum(), logits)
    torch.testing.assert_close(gradient, expected / where.sum())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("block", [2**20, 24], ids=["in one piece", "in blocks"])
def test_inside_a_box_only_pseudo_labels_of_boxed_classes_count(shape, block, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK", block)
    batch = oracle.random_batch(3, shape, 4)
    logits, allowed = to_logits(batch), allowed_of(batch)
    where = torch.rand(2, *shape) < 0.8
    boxes = box_cover(to_annotations(batch), 4, shape)
    label = pseudo_label(logits, allowed)
    boxed = {(box.item, box.label) for box in batch.boxes}
    inside = {(box.item, voxel) for box in batch.boxes for voxel in box.voxels()}
    number, total, counts = 0, 0.0, torch.zeros_like(where)
    for b, *v in where.nonzero().tolist():
        if (b, tuple(v)) in inside and (b, int(label[(b, *v)])) not in boxed:
            continue
        scores = logits[(b, slice(None), *v)].tolist()
        total += math.log(sum(math.exp(score) for score in scores)) - scores[int(label[(b, *v)])]
        number, counts[(b, *v)] = number + 1, True
    assert 0 < number < int(where.sum()), "both kinds of voxels are there"
    loss = pseudo_label_loss(logits, allowed, where, boxes)
    assert loss.item() == pytest.approx(total / number, rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad((F.cross_entropy(logits, label, reduction="none") * counts).sum(), logits)
    torch.testing.assert_close(gradient, expected / number)
    both, alone = set_losses(logits, allowed, where, boxes), set_losses(logits, allowed, where)
    torch.testing.assert_close(both.marginal, alone.marginal)
    (gradient,), (expected,) = (torch.autograd.grad(x.marginal, logits, retain_graph=True) for x in (both, alone))
    torch.testing.assert_close(gradient, expected)


def test_the_pseudo_label_loss_leaves_the_first_items_out_and_the_marginal_does_not():
    batch = oracle.random_batch(5, (4, 5), 3)
    logits, where = to_logits(batch), torch.rand(2, 4, 5) < 0.7
    allowed = torch.rand(2, 3, 4, 5) < 0.7
    allowed[:, 1] |= ~allowed.any(1)
    ours, second = set_losses(logits, allowed, where, first=1), set_losses(logits[1:], allowed[1:], where[1:])
    torch.testing.assert_close(ours.pseudo_label, second.pseudo_label)
    torch.testing.assert_close(ours.marginal, set_losses(logits, allowed, where).marginal)
    assert torch.equal(ours.counts, where), "they are labelled all the same"
    gradients = [torch.autograd.grad(x.pseudo_label, logits)[0] for x in (ours, second)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][0].any()


@pytest.mark.parametrize("block", [2**20, 24], ids=["in one piece", "in blocks"])
@pytest.mark.parametrize("with_boxes", [False, True])
def test_where_masks_are_partial_no_pseudo_label_counts_and_the_marginal_loss_stays(with_boxes, block, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK", block)
    batch = oracle.random_batch(6, (5, 6), 4)
    logits, allowed = to_logits(batch), allowed_of(batch)
    where, partial = (torch.rand(2, 5, 6) < 0.8 for _ in range(2))
    boxes = box_cover(to_annotations(batch), 4, (5, 6)) if with_boxes else None
    plain = set_losses(logits, allowed, where, boxes)
    ours = set_losses(logits, allowed, where, boxes, apart=True, partial=partial)
    assert torch.equal(ours.counts, plain.counts & ~partial)
    logits_of = F.cross_entropy(logits, ours.label.long(), reduction="none")
    expected = (logits_of * ours.counts).sum() / ours.counts.sum()
    torch.testing.assert_close(ours.pseudo_label, expected)
    open_ones = where & ~ours.counts
    marginal = marginal_cross_entropy(logits, allowed, open_ones) * open_ones.sum() / where.sum()
    torch.testing.assert_close(ours.marginal, marginal)
    for one, other in ((ours.pseudo_label, expected), (ours.marginal, marginal)):
        gradients = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (one, other))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("with_boxes", [False, True])
@pytest.mark.parametrize("block", [2**20, 24], ids=["in one piece", "in blocks"])
def test_apart_the_marginal_loss_leaves_out_the_voxels_whose_pseudo_label_counts(first, with_boxes, block, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK", block)
    batch = oracle.random_batch(6, (5, 6), 4)  # 18 voxels in boxes whose pseudo-label does not count
    logits, allowed = to_logits(batch), allowed_of(batch)
    where = torch.rand(2, 5, 6) < 0.8
    boxes = box_cover(to_annotations(batch), 4, (5, 6)) if with_boxes else None
    both = set_losses(logits, allowed, where, boxes, first)
    apart = set_losses(logits, allowed, where, boxes, first, apart=True)
    torch.testing.assert_close(apart.pseudo_label, both.pseudo_label)
    assert torch.equal(apart.counts, both.counts)
    rest = where & ~both.counts
    assert bool(rest.any()) == with_boxes
    expected = marginal_cross_entropy(logits, allowed, rest) * rest.sum() / where.sum()
    torch.testing.assert_close(apart.marginal, expected)
    (gradient,), (by_hand,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (apart.marginal, expected))
    torch.testing.assert_close(gradient, by_hand)
    ours, alone = (torch.autograd.grad(x, logits) for x in (apart.marginal + 3 * apart.pseudo_label, both.pseudo_label))
    torch.testing.assert_close(ours[0], by_hand + 3 * alone[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_pseudo_label_loss_is_finite_for_extreme_logits_and_nowhere(dtype):
    logits = (torch.randn(1, 3, 2, 2) * 1e4).to(dtype).requires_grad_()
    allowed = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    allowed[:, 1] = True
    for where in (torch.zeros(1, 2, 2, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.bool)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = pseudo_label_loss(logits, allowed, where)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
        if not where.any():
            assert loss.item() == 0
            assert (gradient == 0).all()


def test_both_losses_are_the_same_in_blocks_and_in_one_piece(monkeypatch):
    batch = oracle.random_batch(5, (7, 6), 3)
    logits, allowed = to_logits(batch), torch.rand(2, 3, 7, 6) < 0.6
    where = torch.rand(2, 7, 6) < 0.7

    def value_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        losses = set_losses(logits, allowed, where)
        total = losses.marginal + 3 * losses.pseudo_label
        return total, torch.autograd.grad(total, logits)[0]

    whole = value_and_gradient()
    monkeypatch.setattr(blocks, "_BLOCK", 2 * 3 * 6 * 2)
    assert len(blocks.row_blocks(logits)) == 4
    for ours, expected in zip(value_and_gradient(), whole, strict=True):
        torch.testing.assert_close(ours, expected)


def test_each_loss_has_its_own_gradient():
    batch = oracle.random_batch(6, (4, 5), 3)
    logits = to_logits(batch)
    allowed = torch.rand(2, 3, 4, 5) < 0.7
    allowed[:, 1] |= ~allowed.any(1)
    where = torch.ones(2, 4, 5, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: set_losses(x, allowed, where)[:2], (logits,))


def test_the_gradient_towards_a_nearly_excluded_class_does_not_vanish():
    logits = torch.tensor([70.0, 0.0]).reshape(1, 2, 1, 1).requires_grad_()
    allowed = torch.tensor([False, True]).reshape(1, 2, 1, 1)
    loss = marginal_cross_entropy(logits, allowed, torch.ones(1, 1, 1, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(70.0)
    assert gradient.flatten().tolist() == pytest.approx([1.0, -1.0])


def test_the_losses_never_look_at_the_data_from_the_host():
    batch = oracle.random_batch(1, (4, 5), 3)
    logits, allowed = to_logits(batch), torch.rand(2, 3, 4, 5) < 0.5
    where = torch.rand(2, 4, 5) < 0.5
    boxes = box_cover(to_annotations(batch), 3, (4, 5))
    with NoLookAtData():
        sum(set_losses(logits, allowed, where, boxes, 1, apart=True)[:2]).backward()
