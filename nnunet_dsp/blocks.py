"""What the custom gradients share: cutting large tensors into blocks of rows, and staying out of autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_BLOCK = 2**20
"""Entries of a block on a CPU (4 MiB): its temporaries stay small and in memory that is mapped already."""


def row_blocks(tensor: Tensor) -> list[slice]:
    """Cut the rows of (B, C, R, W) into blocks; by shape alone, so nothing here grows with the annotations.

    On a CPU, what is made anew of a whole batch's logits costs as much to map as to compute. Elsewhere launching
    kernels costs more: one block.
    """
    items, channels, rows, width = tensor.shape
    step = max(1, _BLOCK // max(1, items * channels * width)) if tensor.device.type == "cpu" else max(1, rows)
    return [slice(start, start + step) for start in range(0, rows, step)]


def as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 and 1 of a bool tensor; by way of its bytes, which a CPU converts several times as fast as bools."""
    return mask.view(torch.uint8).to(dtype)


def scores_within(scores: Tensor, mask: Tensor) -> Tensor:
    """`scores` where `mask` holds, elsewhere the type's lowest number: exp() of it is 0, and any other is larger.

    On a CPU torch.where() over bools goes number by number; the same by arithmetic is vectorised.

    Args:
        scores: floating, finite.
        mask: bool, the same shape.
    """
    lowest = torch.finfo(scores.dtype).min
    if scores.device.type != "cpu":
        return torch.where(mask, scores, lowest)
    return torch.add(scores, as_numbers(~mask, scores.dtype), alpha=lowest)


def first_order_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of a custom function: differentiable once, and computed in the types it was written for.

    A loss may be differentiated under autocast (torch advises against it, but it is allowed); the matrix products of a
    backward pass would then return a lower type than what they are added to. torch.amp.custom_bwd would instead restore
    the forward's autocast.
    """

    @functools.wraps(backward)
    def without_autocast(ctx: Any, *gradients: Any) -> Any:
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return backward(ctx, *gradients)

    return torch.autograd.function.once_differentiable(without_autocast)
