"""Losses over the set of classes each voxel may still have: marginal cross entropy and pseudo-label cross entropy.

Pure torch. The sets come from pseudo_labels.allowed_classes(); the DSP losses stand in losses.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunet_dsp.blocks import row_blocks

_LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}
"""exp() of more than that leaves the type."""


class SetLosses(NamedTuple):
    """Two scalars, each a mean over the voxels asked for, attached to the logits' graph; 0 where there are none."""

    marginal: Tensor
    pseudo_label: Tensor


class _SetReductions(torch.autograd.Function):
    """Both losses' sums in one pass over the logits, and their gradient in another.

    Apart they would keep four tensors of the logits' size for the backward pass. Here three numbers a voxel are kept:
    the log of the whole mass, of the allowed classes' mass, and the likeliest allowed class.

    forward(logits (B, C, R, W), allowed (B, C, R, W) bool, where (B, 1, R, W) bool) returns the sums over `where` of
    lse - lse_allowed and of lse - (largest allowed logit), with lse the logarithm of the sum of the exponentials.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, allowed: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.empty_like(logits[:, :1])
        within = torch.empty_like(whole)
        label = torch.empty_like(whole, dtype=torch.uint8 if logits.shape[1] <= 256 else torch.int16)
        counted = torch.empty_like(where)
        marginal, pseudo = logits.new_zeros(()), logits.new_zeros(())
        smallest = torch.finfo(logits.dtype).tiny * 2**20
        for rows in row_blocks(logits):
            scores, possible = logits[:, :, rows], allowed[:, :, rows]
            top = scores.amax(1, keepdim=True)
            mass = (scores - top).exp_()
            log_whole = top + mass.sum(1, keepdim=True).log_()
            inner = mass.mul_(possible).sum(1, keepdim=True)
            best, index = torch.where(possible, scores, -torch.inf).max(1, keepdim=True)
            # Too small for the type: the largest alone is the mass, up to a factor of the number of classes.
            log_within = torch.where(inner > smallest, top + inner.log(), best)
            here = where[:, :, rows] & (best > -torch.inf)  # an empty set says nothing
            marginal += torch.where(here, log_whole - log_within, 0.0).sum()
            pseudo += torch.where(here, log_whole - best, 0.0).sum()
            whole[:, :, rows], within[:, :, rows], label[:, :, rows] = log_whole, log_within, index
            counted[:, :, rows] = here
        ctx.save_for_backward(logits, allowed, counted, whole, within, label)
        return marginal, pseudo

    @staticmethod
    def backward(ctx: Any, by_marginal: Tensor, by_pseudo: Tensor) -> tuple[Tensor | None, ...]:
        logits, allowed, counted, whole, within, label = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in row_blocks(logits):
            log_whole = whole[:, :, rows]
            # d marginal = p - p [allowed] / mass of the allowed; d pseudo = p - [is the label]
            missing = (log_whole - within[:, :, rows]).clamp_max_(_LARGEST_EXPONENT[logits.dtype])
            both = by_marginal + by_pseudo
            gradient = (logits[:, :, rows] - log_whole).exp_()
            gradient *= torch.where(allowed[:, :, rows], both - by_marginal * missing.exp_(), both)
            gradient.scatter_add_(1, label[:, :, rows].long(), (-by_pseudo).expand_as(log_whole))
            torch.mul(gradient, counted[:, :, rows], out=result[:, :, rows])
        return result, None, None


def set_losses(logits: Tensor, allowed: Tensor, where: Tensor) -> SetLosses:
    """Marginal cross entropy and the cross entropy against the pseudo-label, for the price of about one of them.

    With S(x) the classes allowed at x and p = softmax(logits), each a mean over the voxels asked for:

        marginal     = -log( sum over S(x) of p_c )          "one of these"
        pseudo-label = -log( max over S(x) of p_c )          "the likeliest of these"; the choice gets no gradient

    With one class allowed both are the ordinary cross entropy; with all of them the first is 0.

    Args:
        logits: (B, C, *S), floating; computed in float32 whatever the autocast (float64 for float64).
        allowed: (B, C, *S) bool; a voxel with none counts as 0 in both.
        where: (B, *S) bool.

    Returns:
        SetLosses, float32 (float64 for float64), each at least 0 up to rounding. Where the allowed classes' mass is
        below exp(-80) the marginal's gradient towards them is too small; it stays finite.
    """
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits if logits.dtype == torch.float64 else logits.float()
        rows = (*scores.shape[:2], -1, scores.shape[-1])
        marginal, pseudo = _SetReductions.apply(
            scores.contiguous().view(rows),
            allowed.contiguous().view(rows),
            where.reshape(scores.shape[0], 1, -1, scores.shape[-1]),
        )
        number = where.sum().clamp_min(1)
        return SetLosses(marginal / number, pseudo / number)


def marginal_cross_entropy(logits: Tensor, allowed: Tensor, where: Tensor) -> Tensor:
    """The first of set_losses() alone: what annotations rule out shares no probability."""
    return set_losses(logits, allowed, where).marginal


def pseudo_label_loss(logits: Tensor, allowed: Tensor, where: Tensor) -> Tensor:
    """The second of set_losses() alone."""
    return set_losses(logits, allowed, where).pseudo_label
