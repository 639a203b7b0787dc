"""Similarity of embeddings to reference vectors: the pieces that the prototype head and the prompt head share.

Pure torch. References are prototypes (learnt) or keys (embeddings of labelled voxels); what pools the similarities of
one class is the mean (prototypes, head.py) or the log of the sum of exponentials (keys, here).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_dsp.blocks import first_order_backward

SMALLEST_NORM = 1e-6
"""Embeddings shorter than this are divided by this instead: their direction is noise and its gradient unbounded."""

SAFE_EXPONENT = 60.0
"""exp() of anything up to this, summed over billions, stays within float32; beyond, maxima are taken off first."""

_BLOCK_ON_CPU = 2**18
_BLOCK_ELSEWHERE = 2**25
"""Elements of the one block of the attention matrix that exists at a time: 1 MiB fits a core's cache."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """float64 stays; everything shorter becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def unit_length(vectors: Tensor, dim: int) -> Tensor:
    """L2-normalised along `dim`, in at least float32; vectors shorter than SMALLEST_NORM are divided by that."""
    return F.normalize(at_least_float32(vectors), dim=dim, eps=SMALLEST_NORM)


@dataclass(frozen=True)
class KeyGroup:
    """Some of the keys, sorted by class.

    Attributes:
        index: (M,) int64, which keys.
        counts: keys of each class, in the order of the classes; at least 1 each.
        log_weights: for each class the log of how many of its keys one key here stands for.
    """

    index: Tensor
    counts: tuple[int, ...]
    log_weights: tuple[float, ...]


def deal_keys(
    key_class: Tensor, num_classes: int, *, max_keys: int, groups: int = 1, shuffle: bool = True
) -> tuple[list[int], list[KeyGroup]]:
    """Draws keys, evenly over the classes as far as they reach, and deals them out to groups.

    A class with fewer keys than its share leaves the rest to the others. Weights make up for what is not drawn, so
    that sums over the drawn keys estimate sums over all keys: classes keep their frequency among the keys.

    Args:
        key_class: (M,) int64, classes of all keys, on the CPU.
        num_classes: classes there may be.
        max_keys: keys drawn in total, at least; every class that has a key keeps one.
        groups: how many groups; a class with fewer keys than groups has all of them in each.
        shuffle: draw at random (torch's generator); else evenly spaced in the order given.

    Returns:
        classes: those that have keys, ascending.
        The groups; their counts and weights follow `classes`.

    Raises:
        ValueError: there is no key, or `max_keys` or `groups` is below 1.
    """
    for name, value in (("max_keys", max_keys), ("groups", groups)):
        if value < 1:
            raise ValueError(f"Expected argument `{name}` to be at least 1, but got {value}.")
    members = [torch.nonzero(key_class == c).flatten() for c in range(num_classes)]
    classes = [c for c in range(num_classes) if len(members[c])]
    if not classes:
        raise ValueError("Expected at least one key, but got none.")
    shares = fair_shares([len(members[c]) for c in classes], max_keys)
    drawn: list[Tensor] = []
    for c, share in zip(classes, shares, strict=True):
        everyone = members[c]
        if shuffle:
            drawn.append(everyone[torch.randperm(len(everyone))[:share]])
        else:  # evenly spaced, and shuffled no further: the same keys at every prediction
            drawn.append(everyone[torch.div(torch.arange(share) * len(everyone), share, rounding_mode="floor")])
    result = []
    for group in range(groups):
        parts = [chosen if len(chosen) < groups else chosen[group::groups] for chosen in drawn]
        result.append(
            KeyGroup(
                torch.cat(parts),
                tuple(len(part) for part in parts),
                tuple(math.log(len(members[c]) / len(part)) for c, part in zip(classes, parts, strict=True)),
            )
        )
    return classes, result


def fair_shares(available: Sequence[int], total: int) -> list[int]:
    """How many of each to take so that the total is met and the shares are as equal as what is there allows.

    Each share is at least 1, even where that exceeds the total.
    """
    shares = [0] * len(available)
    left, open_ones = total, sorted(range(len(available)), key=lambda i: available[i])
    while open_ones:
        first = open_ones.pop(0)
        shares[first] = max(1, min(available[first], left // (len(open_ones) + 1)))
        left -= shares[first]
    return shares


def class_log_sums(
    queries: Tensor, keys: Tensor, groups: Sequence[KeyGroup], *, temperature: float = 1.0, cosine: bool = False
) -> Tensor:
    """For each query and class the log of the sum, over the class's keys, of exp(similarity / temperature).

    Softmax over the classes of what is returned is the attention-weighted vote of the keys:
    ``softmax_c(LSE_c) == softmax_j(s_j) @ one_hot(class of j)``, s_j = similarity to key j / temperature.

    The matrix of all similarities never exists: blocks of it are formed, reduced, and formed anew in the backward pass.
    With several groups, blocks of queries take turns at them, so that each query sees one group.

    Args:
        queries: (B, D, N), float32 or float64.
        keys: (M, D), the same type; for the cosine of unit length.
        groups: from deal_keys().
        temperature: positive.
        cosine: similarity is the cosine, and queries are divided by their length here, block by block (a normalised
            copy of all of them would cost as much as the rest); else the dot product.

    Returns:
        (B, C, N), C the number of classes of the groups, in their order.
    """
    result: Tensor = _ClassLogSums.apply(queries, keys, tuple(groups), float(temperature), bool(cosine))
    return result


class _ClassLogSums(torch.autograd.Function):
    """The forward keeps its arguments and its result; the backward recomputes the blocks.

    With q the scaled query, L the result, P = exp(k . q - L) within each class, and g the incoming gradient:
    dq_p = sum_j g_p,c(j) P_jp k_j and dk_j = sum_p g_p,c(j) P_jp q_p. For the cosine q = f / (|f| t), and
    df = (dq - u (u . dq)) / (|f| t) with u = f / |f|.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, groups: tuple[KeyGroup, ...], temperature: float, cosine: bool
    ) -> Tensor:
        batch, _, number = queries.shape
        result = queries.new_empty((batch, len(groups[0].counts), number))
        # a cosine is at most 1, with a little to spare for rounding
        shift = not cosine or 1.001 / temperature > SAFE_EXPONENT
        sorted_keys = [keys[group.index] for group in groups]
        for item, first, last, turn in _blocks(queries, groups):
            scaled, _ = _scale(queries[item, :, first:last], temperature, cosine)
            row = 0
            for c, count in enumerate(groups[turn].counts):
                similarity = sorted_keys[turn][row : row + count] @ scaled
                row += count
                log_sum = torch.logsumexp(similarity, 0) if shift else similarity.exp_().sum(0).log_()
                torch.add(log_sum, groups[turn].log_weights[c], out=result[item, c, first:last])
        ctx.save_for_backward(queries, keys, result)
        ctx.groups, ctx.temperature, ctx.cosine = groups, temperature, cosine
        return result

    @staticmethod
    @first_order_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        queries, keys, result = ctx.saved_tensors
        groups: tuple[KeyGroup, ...] = ctx.groups
        sorted_keys = [keys[group.index] for group in groups]
        # a row of ones among the keys' components takes each query's own log sum off within the matrix product
        with_ones = [torch.cat([k, k.new_ones((len(k), 1))], dim=1) for k in sorted_keys]
        to_queries = torch.empty_like(queries) if ctx.needs_input_grad[0] else None
        to_keys = [torch.zeros_like(k) for k in sorted_keys]
        dim = queries.shape[1]
        for item, first, last, turn in _blocks(queries, groups):
            block = queries[item, :, first:last]
            extended = queries.new_empty((dim + 1, last - first))
            extended[:dim], factor = _scale(block, ctx.temperature, ctx.cosine)
            scaled = extended[:dim]
            to_scaled: Tensor | None = None
            row = 0
            for c, count in enumerate(groups[turn].counts):
                rows = slice(row, row + count)
                row += count
                torch.sub(groups[turn].log_weights[c], result[item, c, first:last], out=extended[dim])
                share = (with_ones[turn][rows] @ extended).exp_()
                weight = gradient[item, c, first:last]
                if to_queries is not None:
                    part = (sorted_keys[turn][rows].T @ share).mul_(weight)
                    to_scaled = part if to_scaled is None else to_scaled.add_(part)
                if ctx.needs_input_grad[1]:
                    to_keys[turn][rows].addmm_(share, (scaled * weight).T)
            if to_queries is not None and to_scaled is not None:
                if isinstance(factor, Tensor):
                    along = (to_scaled * scaled).sum(0).mul_(ctx.temperature**2)
                    # a vector shorter than SMALLEST_NORM is not divided by its own length, so nothing is taken off
                    along.mul_(factor * ctx.temperature < 0.999 / SMALLEST_NORM)
                    to_scaled.addcmul_(scaled, along, value=-1)
                torch.mul(to_scaled, factor, out=to_queries[item, :, first:last])
        key_gradient = None
        if ctx.needs_input_grad[1]:
            key_gradient = torch.zeros_like(keys)
            for group, part in zip(groups, to_keys, strict=True):
                key_gradient.index_add_(0, group.index, part)
        return to_queries, key_gradient, None, None, None


def _scale(block: Tensor, temperature: float, cosine: bool) -> tuple[Tensor, Tensor | float]:
    """Queries (D, n) divided by temperature and, for the cosine, length; and the factor, (n,) or a number."""
    if not cosine:
        return block / temperature, 1 / temperature
    factor = (block * block).sum(0).sqrt_().clamp_min_(SMALLEST_NORM).mul_(temperature).reciprocal_()
    return block * factor, factor


def _blocks(queries: Tensor, groups: Sequence[KeyGroup]) -> Any:
    """(item, first, last, group): the blocks of queries, groups taking turns. The same for forward and backward."""
    batch, _, number = queries.shape
    elements = _BLOCK_ON_CPU if queries.device.type == "cpu" else _BLOCK_ELSEWHERE
    size = max(64, elements // max(len(group.index) for group in groups))
    if len(groups) > 1:  # small enough that every group has its turn in every item
        size = max(1, min(size, -(-number // len(groups))))
    turn = 0
    for item in range(batch):
        for first in range(0, number, size):
            yield item, first, min(first + size, number), turn % len(groups)
            turn += 1


def class_means(embeddings: Tensor, labels: Tensor, num_classes: int, per_class: int) -> tuple[Tensor, Tensor]:
    """Reference vectors for each class from labelled embeddings, for instance DSP's prototypes from a prompt.

    The embeddings of a class are dealt out in turn to `per_class` subsets, and each subset's mean direction is one
    vector: all close to the class's mean, but not the same, so that they can part in training.

    Args:
        embeddings: (N, D), floating; their directions count.
        labels: (N,) int64; values outside 0..num_classes-1 are passed over.
        per_class: vectors for each class, at least 1.

    Returns:
        (num_classes, per_class, D), of unit length, and (num_classes,) bool: whether the class has any embedding. The
        vectors of a class without are zero.
    """
    directions = unit_length(embeddings, dim=1)
    vectors = directions.new_zeros((num_classes, per_class, directions.shape[1]))
    found = torch.zeros(num_classes, dtype=torch.bool, device=labels.device)
    for c in range(num_classes):
        mine = directions[labels == c]
        if len(mine):
            found[c] = True
            for part in range(per_class):
                subset = mine[part::per_class]
                vectors[c, part] = unit_length((subset if len(subset) else mine).mean(0), dim=0)
    return vectors, found
