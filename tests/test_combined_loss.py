"""combined_loss.py: which voxels and items each part of the training loss sees."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from torch import nn

from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.combined_loss import TERMS, BatchKnowledge, CombinedLoss
from nnunet_dsp.set_losses import marginal_cross_entropy
from nnunet_dsp.settings import DSPSettings
from nnunet_dsp.trainers import nnUNetTrainerDSP_released

IGNORE = 3


class Recorder(nn.Module):
    """Stands for nnU-Net's loss: remembers what it was given."""

    def forward(self, output, target):
        self.seen = [o.shape[0] for o in output] if isinstance(output, list) else output.shape[0]
        first = output[0] if isinstance(output, list) else output
        return first.square().mean()


def batch(size=4, masked=2):
    torch.manual_seed(0)
    logits = torch.randn(size, 3, 8, 8, requires_grad=True)
    target = torch.full((size, 1, 8, 8), IGNORE)
    target[size - masked :] = 0
    target[size - masked :, :, 2:5, 2:5] = 1
    components = torch.zeros(size, 8, 8, dtype=torch.int32)
    for number in range(masked):
        components[size - masked + number] = 1 + 2 * number
        components[size - masked + number, 2:5, 2:5] = 2 + 2 * number
    return logits, target, components


def known(size=4, **changes):
    return AnnotationBatch.empty(size, 3, 2)._replace(**changes)


def test_without_annotations_it_is_nnunets_loss_and_nothing_else():
    logits, target, _ = batch()
    loss = CombinedLoss(Recorder(), DSPSettings(), IGNORE)
    torch.testing.assert_close(loss(logits, target), logits.square().mean())
    assert loss.mask_loss.seen == 4


def test_the_mask_loss_sees_the_masked_items_only_on_every_output():
    logits, target, components = batch(masked=1)
    loss = CombinedLoss(Recorder(), DSPSettings(), IGNORE)
    loss.knowledge = BatchKnowledge(known(), 1, components, 2)
    loss([logits, logits[..., ::2, ::2]], [target, target[..., ::2, ::2]])
    assert loss.mask_loss.seen == [1, 1]
    torch.testing.assert_close(loss.terms[0], logits[3:].square().mean().detach())


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_what_a_mask_of_some_classes_leaves_blank_is_told_apart_by_the_marginal_loss_alone(progress):
    logits, target, components = batch(masked=4)
    partial, listed = target[:, 0] == 0, torch.ones(4, 3, dtype=torch.bool)
    target[target == 0] = IGNORE
    listed[:, 2] = False
    annotations = known(partial=partial, listed=listed)
    loss = CombinedLoss(Recorder(), DSPSettings(dsp_weight=0.0), IGNORE)
    loss.set_progress(progress)
    loss.knowledge = BatchKnowledge(annotations, 4, components, 8)
    loss(logits, target)
    allowed = torch.ones(4, 3, 8, 8, dtype=torch.bool)
    allowed[:, 1] = False
    torch.testing.assert_close(loss.terms[6], marginal_cross_entropy(logits, allowed, partial).detach())
    assert loss.terms[5] == 0, "a pseudo-label would be the class not drawn, for ever"


def test_in_the_warm_up_only_blank_voxels_of_partial_masks_have_the_marginal_loss():
    logits, target, components = batch(masked=2)  # items 0 and 1 are weak
    partial = torch.zeros(4, 8, 8, dtype=torch.bool)
    partial[3] = target[3, 0] == 0
    target[3][target[3] == 0] = IGNORE
    listed = torch.ones(4, 3, dtype=torch.bool)
    listed[3, 2] = False
    annotations = known(partial=partial, listed=listed, tags=torch.tensor([[-1, 0, -1]] * 4, dtype=torch.int8))
    loss = CombinedLoss(Recorder(), DSPSettings(dsp_weight=0.0), IGNORE)
    loss.knowledge = BatchKnowledge(annotations, 2, components, 4)
    loss(logits, target)
    allowed = torch.ones(4, 3, 8, 8, dtype=torch.bool)
    allowed[:, 1] = False
    torch.testing.assert_close(loss.terms[6], marginal_cross_entropy(logits, allowed, partial).detach())


def test_a_batch_without_masked_item_still_calls_the_mask_loss_so_that_ddp_stays_in_step():
    logits, target, _ = batch(masked=0)
    loss = CombinedLoss(Recorder(), DSPSettings(), IGNORE)
    loss.knowledge = BatchKnowledge(known(), 0)
    assert torch.isfinite(loss(logits, target))
    assert loss.mask_loss.seen == 4


def test_the_weight_of_the_dsp_losses_falls_to_nothing_unless_it_is_constant():
    for schedule, weights in (("linear", [0.4, 0.3, 0.0]), ("constant", [0.4, 0.4, 0.4])):
        loss = CombinedLoss(Recorder(), DSPSettings(dsp_weight=0.4, dsp_schedule=schedule), IGNORE)
        found = []
        for progress in (0.0, 0.25, 1.0):
            loss.set_progress(progress)
            found.append(loss.dsp_weight)
        assert found == pytest.approx(weights)


def test_by_default_the_weight_falls_and_that_of_the_authors_variant_stays():
    for settings, at_the_end in ((DSPSettings(), 0.0), (nnUNetTrainerDSP_released.default_settings, 0.1)):
        loss = CombinedLoss(Recorder(), settings, IGNORE)
        loss.set_progress(1.0)
        assert loss.dsp_weight == pytest.approx(at_the_end)


def test_pseudo_labels_act_on_unmasked_voxels_that_show_the_image_and_nowhere_else():
    logits, target, _ = batch(masked=2)
    outside = torch.zeros(4, 8, 8, dtype=torch.bool)
    outside[0, :4] = True
    settings = DSPSettings(dsp_weight=0.0, pseudo_label_loss="cross_entropy")
    loss = CombinedLoss(nn.Identity(), settings, IGNORE)
    loss.mask_loss.forward = lambda output, target: output.sum() * 0
    loss.knowledge = BatchKnowledge(known(outside=outside), 2)
    loss.warmed_up = True
    total = loss(logits, target)
    (gradient,) = torch.autograd.grad(total, logits)
    touched = gradient.abs().sum(dim=1) > 0
    assert not touched[2:].any()
    assert not touched[0, :4].any()
    assert touched[0, 4:].all()
    assert touched[1].all()
    loss.warmed_up = False
    assert loss(logits, target) == 0


def test_a_partial_mask_pushes_the_listed_classes_out_of_its_background():
    logits, target, _ = batch(masked=1)
    partial = torch.zeros(4, 8, 8, dtype=torch.bool)
    partial[3] = target[3, 0] == 0
    target[3][target[3] == 0] = IGNORE
    listed = torch.ones(4, 3, dtype=torch.bool)
    listed[3, 2] = False
    loss = CombinedLoss(nn.Identity(), DSPSettings(dsp_weight=0.0, pseudo_label_weight=0.0), IGNORE)
    loss.mask_loss.forward = lambda output, target: output.sum() * 0
    loss.knowledge = BatchKnowledge(known(partial=partial, listed=listed), 1)
    loss.warmed_up = True
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    inside = gradient[3][:, partial[3]]
    assert (inside[1] > 0).all(), "class 1 is listed: where it was not drawn, it is not"
    assert (inside[0] < 0).all()
    assert (inside[2] < 0).all(), "class 2 was not looked for, so it may be there"
    assert (gradient[:3] == 0).all()


def boxed(items):
    """A complete loose box of class 2 in each of these items, on a corner of 4 x 4 voxels; class 1 has none."""
    voxels = (torch.arange(4)[:, None] * 8 + torch.arange(4)).flatten()
    complete = torch.zeros(4, 3, dtype=torch.bool)
    complete[items, 1:] = True
    return known(
        box_item=torch.tensor(items),
        box_class=torch.full((len(items),), 2),
        box_tight=torch.zeros(len(items), dtype=torch.bool),
        box_voxels=torch.cat([item * 64 + voxels for item in items]),
        box_of_voxel=torch.arange(len(items)).repeat_interleave(16),
        box_line=torch.full((16 * len(items), 2), -1),
        complete_boxes=complete,
    )


@pytest.mark.parametrize("pseudo_label_weight", [0.0, 1.0])
def test_in_the_warm_up_the_marginal_loss_is_left_to_batches_without_masks(pseudo_label_weight):
    settings = DSPSettings(dsp_weight=0.0, pseudo_label_weight=pseudo_label_weight, pseudo_label_warmup=0.5)
    for masked, progress, acts in ((2, 0.4, False), (0, 0.4, True), (2, 0.5, True)):
        logits, target, _ = batch(masked=masked)
        loss = CombinedLoss(Recorder(), settings, IGNORE)
        loss.knowledge = BatchKnowledge(boxed([0, 1]), masked)
        loss.set_progress(progress)
        loss(logits, target)
        assert (loss.terms[TERMS.index("marginal")] > 0) == acts


@pytest.mark.parametrize("pseudo_label_loss", ["nnunet", "cross_entropy"])
def test_the_marginal_loss_leaves_out_what_pseudo_labels_say(pseudo_label_loss):
    logits, target, _ = batch(masked=2)
    logits = logits.detach()
    logits[:, 1] += 3  # so that the marginal loss has something to say
    logits.requires_grad_()
    inside = torch.zeros(4, 8, 8, dtype=torch.bool)
    inside[0, :4, :4] = inside[1, :4, :4] = True
    p = logits.softmax(1)
    every = {}
    for weight in (1.0, 0.0):
        settings = DSPSettings(
            dsp_weight=0.0, pseudo_label_weight=weight, pseudo_label_loss=pseudo_label_loss, pseudo_label_warmup=0.0
        )
        loss = CombinedLoss(Recorder(), settings, IGNORE)
        loss.knowledge = BatchKnowledge(boxed([0, 1]), 2)
        loss.set_progress(0.0)
        loss(logits, target)
        every[weight] = loss.terms[TERMS.index("marginal")]
    # Inside the boxes class 1 is ruled out; a pseudo-label counts if it is 2. Outside, everything but background is.
    of_each = torch.where(inside, -(p[:, 0] + p[:, 2]).log(), -p[:, 0].log())[:2]
    counted = ~inside[:2] | (p[:2, 2] > p[:2, 0])
    assert counted[inside[:2]].any()
    assert not counted.all()
    torch.testing.assert_close(every[0.0], of_each.mean())
    torch.testing.assert_close(every[1.0], (of_each * ~counted).mean())


def test_a_weight_of_zero_switches_a_term_off_and_leaves_the_others():
    logits, target, components = batch()
    tags = torch.full((4, 3), -1, dtype=torch.int8)
    tags[0, 2] = 1
    everything = known(tags=tags, points=torch.tensor([5, 70]), point_class=torch.tensor([2, 1]))
    totals = {}
    for name in ("image", "point", "mask"):
        weights = {f"{kind}_weight": float(kind == name) for kind in ("image", "box", "point", "mask")}
        settings = DSPSettings(marginal_weight=0.0, **weights)
        loss = CombinedLoss(Recorder(), settings, IGNORE)
        loss.knowledge = BatchKnowledge(everything, 2, components, 4)
        total = loss(logits, target)
        terms = dict(zip(TERMS, loss.terms.tolist(), strict=True))
        totals[name] = total.item() - terms["mask_loss"]
        assert abs(totals[name] - settings.dsp_weight * terms[f"dsp_{name}"]) < 1e-5
    assert len({round(value, 5) for value in totals.values()}) == 3


def test_half_precision_outputs_give_finite_losses_and_gradients():
    logits, target, components = batch()
    half = (logits.detach() * 20000).clamp(-60000, 60000).half().requires_grad_()
    loss = CombinedLoss(Recorder(), DSPSettings(), IGNORE)
    loss.mask_loss.forward = lambda output, target: output.float().mean() * 0
    loss.warmed_up = True
    loss.knowledge = BatchKnowledge(known(), 2, components, 4)
    total = loss(half, target)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(half.grad).all()


class Targets(Recorder):
    """Also remembers the targets of every call."""

    def __init__(self):
        super().__init__()
        self.targets = []

    def forward(self, output, target):
        self.targets.append(target)
        return super().forward(output, target)


def test_items_without_mask_learn_from_their_pseudo_labels_by_nnunets_own_loss_on_every_output():
    logits, target, _ = batch(masked=1)
    outside = torch.zeros(4, 8, 8, dtype=torch.bool)
    outside[0, :4] = True
    in_box = torch.zeros(4, 8, 8, dtype=torch.bool)
    in_box[1, 2:6, 2:6] = True
    boxes = {
        "box_item": torch.tensor([1]),
        "box_class": torch.tensor([2]),
        "box_tight": torch.tensor([False]),
        "box_voxels": in_box.flatten().nonzero()[:, 0],
        "box_of_voxel": torch.zeros(16, dtype=torch.int64),
        "box_line": torch.full((16, 2), -1),
    }
    loss = CombinedLoss(Targets(), DSPSettings(dsp_weight=0.0, marginal_weight=0.0, pseudo_label_weight=3.0), IGNORE)
    loss.knowledge = BatchKnowledge(known(outside=outside, **boxes), 1)
    loss.warmed_up = True
    total = loss([logits, logits[..., ::2, ::2]], [target, target[..., ::2, ::2]])
    (masked, _), (full, half) = loss.mask_loss.targets
    assert masked.shape[0] == 1
    assert full.dtype == target.dtype
    expected = logits[:3].argmax(1)
    expected[outside[:3]] = IGNORE
    expected[in_box[:3] & (expected != 2)] = IGNORE
    assert (expected[1, 2:6, 2:6] == IGNORE).any()
    assert (expected[1, 2:6, 2:6] == 2).any()
    assert torch.equal(full[:, 0], expected)
    assert torch.equal(half[:, 0], expected[:, 1::2, 1::2]), "the nearest voxel, as nnU-Net shrinks its own"
    torch.testing.assert_close(total, logits[3:].square().mean() + 3 * logits[:3].square().mean())


def test_every_pseudo_label_counts_where_the_settings_say_so():
    logits, target, _ = batch(size=1, masked=0)
    boxes = {"box_item": torch.tensor([0]), "box_class": torch.tensor([2]), "box_tight": torch.tensor([False])}
    voxels = {"box_voxels": torch.arange(64), "box_of_voxel": torch.zeros(64, dtype=torch.int64)}
    for in_boxes, taught in (("all", 64), ("boxed", int((logits.argmax(1) == 2).sum()))):
        loss = CombinedLoss(Targets(), DSPSettings(dsp_weight=0.0, pseudo_labels_in_boxes=in_boxes), IGNORE)
        loss.knowledge = BatchKnowledge(known(1, **boxes, **voxels, box_line=torch.full((64, 2), -1)), 0)
        loss.warmed_up = True
        loss(logits, target)
        assert int((loss.mask_loss.targets[-1] != IGNORE).sum()) == taught


def test_voxels_that_a_mask_leaves_open_learn_by_cross_entropy():
    logits, target, _ = batch(size=2, masked=1)
    target[1, :, :4] = IGNORE
    loss = CombinedLoss(Recorder(), DSPSettings(dsp_weight=0.0, marginal_weight=0.0), IGNORE)
    loss.mask_loss.forward = lambda output, target: output.sum() * 0
    loss.knowledge = BatchKnowledge(known(2), 1)
    loss.warmed_up = True
    total = loss(logits, target)
    expected = nn.functional.cross_entropy(logits[1:, :, :4], logits[1:, :, :4].argmax(1))
    torch.testing.assert_close(total, expected)


def test_a_batch_without_weak_items_keeps_ddp_in_step_without_teaching(monkeypatch):
    logits, target, _ = batch(size=2, masked=2)
    target[:, :, :3] = IGNORE  # open, so there are pseudo-labels
    for distributed, calls in ((False, 1), (True, 2)):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda value=distributed: value)
        loss = CombinedLoss(Targets(), DSPSettings(dsp_weight=0.0), IGNORE)
        loss.knowledge = BatchKnowledge(known(2), 2)
        loss.warmed_up = True
        loss(logits, target)
        assert len(loss.mask_loss.targets) == calls
        assert not distributed or (loss.mask_loss.targets[1] == IGNORE).all()


@pytest.mark.parametrize("masked", [0, 1, 3, 4])
def test_a_dice_gathered_over_ranks_sees_the_whole_batch_and_comes_to_the_same(masked):
    logits, target, components = batch(masked=masked)
    target[:, :, ::3] = IGNORE
    values = []
    for gathers in (False, True):
        seen = []
        mask_loss = DC_and_CE_loss({"batch_dice": True, "ddp": False}, {}, ignore_label=IGNORE)
        mask_loss.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].shape[0]))
        loss = CombinedLoss(mask_loss, DSPSettings(dsp_weight=0.0, marginal_weight=0.0), IGNORE, gathers)
        loss.knowledge = BatchKnowledge(known(), masked, components, 2 * masked)
        loss.warmed_up = True
        total = loss(logits, target)
        values.append((total, *torch.autograd.grad(total, logits)))
    assert set(seen) == {4}
    torch.testing.assert_close(*values)
