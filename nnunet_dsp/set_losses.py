"""Losses over the set of classes each voxel may still have: marginal cross entropy and pseudo-label cross entropy.

Pure torch. The sets come from pseudo_labels.allowed_classes(); the DSP losses stand in losses.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunet_dsp.blocks import as_numbers, row_blocks, scores_within
from nnunet_dsp.pseudo_labels import BoxCover

_LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}
"""exp() of more than that leaves the type."""


class SetLosses(NamedTuple):
    """What set_losses() gives.

    Attributes:
        marginal, pseudo_label: scalars, attached to the logits' graph; 0 where no voxel was asked for.
        label: (B, *S), uint8 or int16: the likeliest allowed class.
        counts: (B, *S) bool: the voxels asked for whose pseudo-label counts.
    """

    marginal: Tensor
    pseudo_label: Tensor
    label: Tensor
    counts: Tensor


class _SetReductions(torch.autograd.Function):
    """Both losses' sums in one pass over the logits, and their gradient in another.

    Apart they would keep four tensors of the logits' size for the backward pass. Here three numbers a voxel are kept:
    the log of the whole mass, of the allowed classes' mass, and the likeliest allowed class.

    forward(logits (B, C, R, W), allowed (B, C, R, W) bool, where (B, 1, R, W) bool, in_box (B, 1, R, W) bool or None,
    boxed (B, C) bool or None, partial (B, 1, R, W) bool or None, first, apart) returns the sum over `where` of
    lse - lse_allowed, with `apart` without the voxels whose pseudo-label counts; the sum of lse - (largest allowed
    logit) over the latter from item `first` on; the number of these; the pseudo-labels and where they count, both
    (B, 1, R, W). lse is the logarithm of the sum of the exponentials.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        allowed: Tensor,
        where: Tensor,
        in_box: Tensor | None,
        boxed: Tensor | None,
        partial: Tensor | None,
        first: int,
        apart: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        whole = torch.empty_like(logits[:, :1])
        within = torch.empty_like(whole)
        label = torch.empty_like(whole, dtype=torch.uint8 if logits.shape[1] <= 256 else torch.int16)
        counted = torch.empty_like(where)
        some = in_box is not None or partial is not None
        labelled = torch.empty_like(where) if some else counted
        marginal, pseudo, number = logits.new_zeros(()), logits.new_zeros(()), logits.new_zeros(())
        smallest = torch.finfo(logits.dtype).tiny * 2**20
        lowest = torch.finfo(logits.dtype).min / 2
        for rows in row_blocks(logits):
            scores, possible = logits[:, :, rows], allowed[:, :, rows]
            top = scores.amax(1, keepdim=True)
            mass = (scores - top).exp_()
            log_whole = top + mass.sum(1, keepdim=True).log_()
            inner = mass.mul_(as_numbers(possible, scores.dtype)).sum(1, keepdim=True)
            best, index = scores_within(scores, possible).max(1, keepdim=True)
            # Too small for the type: the largest alone is the mass, up to a factor of the number of classes.
            log_within = torch.where(inner > smallest, top + inner.log(), best)
            asked = here = where[:, :, rows] & (best > lowest)  # an empty set says nothing
            whole[:, :, rows], within[:, :, rows], label[:, :, rows] = log_whole, log_within, index
            counted[:, :, rows] = here
            if in_box is not None and boxed is not None:
                of_a_box = boxed.gather(1, index.flatten(1)).view_as(index)
                here = here & (of_a_box | ~in_box[:, :, rows])
            if partial is not None:
                here = here & ~partial[:, :, rows]
            if some:
                labelled[:, :, rows] = here
            open_ones = asked & ~here if apart else asked
            marginal += torch.where(open_ones, log_whole - log_within, 0.0).sum()
            pseudo += torch.where(here, log_whole - best, 0.0)[first:].sum()
            number += here[first:].sum()
        ctx.mark_non_differentiable(number, label, labelled)
        ctx.some, ctx.first, ctx.apart = some, first, apart
        ctx.save_for_backward(logits, allowed, counted, labelled, whole, within, label)
        return marginal, pseudo, number, label, labelled

    @staticmethod
    def backward(ctx: Any, by_marginal: Tensor, by_pseudo: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, allowed, counted, labelled, whole, within, label = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in row_blocks(logits):
            log_whole = whole[:, :, rows]
            # d marginal = p - p [allowed] / mass of the allowed; d pseudo = p - [is the label]
            missing = (log_whole - within[:, :, rows]).clamp_max_(_LARGEST_EXPONENT[logits.dtype])
            of_set, of_label = by_marginal, by_pseudo
            if ctx.some or ctx.first:
                of_label = by_pseudo * labelled[:, :, rows]
                of_label[: ctx.first] = 0
            if ctx.apart:
                of_set = by_marginal * ~labelled[:, :, rows]
            both = of_set + of_label
            gradient = (logits[:, :, rows] - log_whole).exp_()
            less = as_numbers(allowed[:, :, rows], gradient.dtype).mul_(missing.exp_().mul_(of_set))
            gradient.mul_(less.neg_().add_(both))
            gradient.scatter_add_(1, label[:, :, rows].long(), (-of_label).expand_as(log_whole))
            torch.mul(gradient, as_numbers(counted[:, :, rows], gradient.dtype), out=result[:, :, rows])
        return result, None, None, None, None, None, None, None


def set_losses(
    logits: Tensor,
    allowed: Tensor,
    where: Tensor,
    boxes: BoxCover | None = None,
    first: int = 0,
    *,
    apart: bool = False,
    partial: Tensor | None = None,
) -> SetLosses:
    """Marginal cross entropy and the cross entropy against the pseudo-label, for the price of about one of them.

    With S(x) the classes allowed at x and p = softmax(logits), each a mean over the voxels asked for:

        marginal     = -log( sum over S(x) of p_c )          "one of these"
        pseudo-label = -log( max over S(x) of p_c )          "the likeliest of these"; the choice gets no gradient

    With `boxes`, a pseudo-label inside a box counts only if it is of a boxed class. A box says that an object is there;
    a network that does not see all of it yet calls the rest background, and taught that, sees less of it the next time.

    With one class allowed both are the ordinary cross entropy; with all of them the first is 0.

    Args:
        logits: (B, C, *S), floating; computed in float32 whatever the autocast (float64 for float64).
        allowed: (B, C, *S) bool; a voxel with none counts as 0 in both.
        where: (B, *S) bool.
        boxes: box_cover() of the batch's annotations; None: every pseudo-label counts.
        first: the pseudo-label loss leaves out the items before this one.
        apart: the marginal loss leaves out the voxels whose pseudo-label counts (they stay in its mean, as 0). That
            label says the same and more; both together would say twice that it is background outside complete boxes.
        partial: (B, *S) bool, where no pseudo-label counts; None: nowhere. What a mask of some classes leaves blank is
            background or a class that was not drawn. Of these the likeliest is the latter as long as every mask leaves
            its background open, and taught that, it stays so; the marginal losses of masks of different classes
            together say which it is.

    Returns:
        SetLosses, float32 (float64 for float64), each at least 0 up to rounding. Where the allowed classes' mass is
        below exp(-80) the marginal's gradient towards them is too small; it stays finite.
    """
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits if logits.dtype == torch.float64 else logits.float()
        rows = (*scores.shape[:2], -1, scores.shape[-1])
        flat = (scores.shape[0], 1, -1, scores.shape[-1])
        marginal, pseudo, labelled, label, counts = _SetReductions.apply(
            scores.contiguous().view(rows),
            allowed.contiguous().view(rows),
            where.reshape(flat),
            None if boxes is None else boxes.voxels.reshape(flat),
            None if boxes is None else boxes.classes,
            None if partial is None else partial.reshape(flat),
            first,
            apart,
        )
        number = where.sum().clamp_min(1)
        return SetLosses(
            marginal / number,
            pseudo / (number if boxes is None and partial is None and first == 0 else labelled.clamp_min(1)),
            label.view(where.shape),
            counts.view(where.shape),
        )


def marginal_cross_entropy(logits: Tensor, allowed: Tensor, where: Tensor) -> Tensor:
    """The first of set_losses() alone: what annotations rule out shares no probability."""
    return set_losses(logits, allowed, where).marginal


def pseudo_label_loss(logits: Tensor, allowed: Tensor, where: Tensor, boxes: BoxCover | None = None) -> Tensor:
    """The second of set_losses() alone."""
    return set_losses(logits, allowed, where, boxes).pseudo_label
