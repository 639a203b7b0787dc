"""Which pseudo-labels to trust: filters with one interface, `filter(probability, candidates, context) -> keep`.

A filter never adds a candidate. None of them carries gradients, and none knows what the probabilities are of: edges
(binary, one probability each) or classes (give `class_axis`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

EPSILON = 1e-6  # entropies are taken of probabilities in [EPSILON, 1 - EPSILON]: a cosine may exceed 1 by rounding


class FilterContext(NamedTuple):
    """What a filter may look at beside the probabilities.

    Attributes:
        progress: share of the training that is done, in [0, 1].
        error_logits: for each candidate's place the logit of its being wrong, from an error predictor; or None.
    """

    progress: float = 1.0
    error_logits: Tensor | None = None


class PseudoLabelFilter(Protocol):
    """Called with probabilities, candidates (bool) and the context; returns the candidates to keep (bool)."""

    def __call__(self, probability: Tensor, candidates: Tensor, context: FilterContext) -> Tensor: ...


def entropy(probability: Tensor, class_axis: int | None = None) -> Tensor:
    """Entropy in nats, finite for probabilities of 0, of 1 and a rounding error beyond; float32 (float64 stays).

    Args:
        probability: of "yes" in a yes-no question, any shape; with `class_axis`, over classes along that axis.

    Returns:
        The shape of `probability`, without `class_axis`.
    """
    wide = probability if probability.dtype == torch.float64 else probability.float()
    p = wide.clamp(EPSILON, 1 - EPSILON)
    if class_axis is not None:
        return -(p * p.log()).sum(class_axis)
    return -(p * p.log() + (1 - p) * (1 - p).log())


class EntropyPercentile:
    """Keeps the most certain candidates of a batch: all but a share that a schedule gives.

    The percentile is taken among the candidates only, so neither labelled edges nor those that leave the patch shift
    it. Candidates with the same entropy as the last one kept are kept as well.

    Args:
        share: of the candidates to drop, a function of the progress, e.g. PolynomialDecay(0.2).

    Source: Liu et al., ICCV 2023. Differs from the released code, which takes the percentile over labelled and
    invalid edges too, and from NaN on keeps nothing.
    """

    def __init__(self, share: Callable[[float], float], class_axis: int | None = None) -> None:
        self._share = share
        self._class_axis = class_axis

    @torch.no_grad()
    def __call__(self, probability: Tensor, candidates: Tensor, context: FilterContext) -> Tensor:
        share = self._share(context.progress)
        uncertainty = entropy(probability.detach(), self._class_axis)
        among = uncertainty[candidates]
        if share <= 0 or among.numel() == 0:
            return candidates.clone()
        keep = math.ceil((1 - share) * among.numel())
        if keep < 1:
            return torch.zeros_like(candidates)
        return candidates & (uncertainty <= among.kthvalue(keep).values)


class ErrorPredictor:
    """Keeps the candidates that an error predictor takes to be right; from `gate` on, before that all of them.

    Args:
        gate: progress at which the predictor has learnt enough to be asked.
        threshold: probability of an error below which a candidate is kept.
    """

    def __init__(self, gate: float = 0.0, threshold: float = 0.5) -> None:
        self._gate = gate
        self._threshold = threshold

    @torch.no_grad()
    def __call__(self, probability: Tensor, candidates: Tensor, context: FilterContext) -> Tensor:
        if context.progress < self._gate:
            return candidates.clone()
        if context.error_logits is None:
            raise ValueError("Expected `context.error_logits`, the error predictor's output, but got None.")
        return candidates & (context.error_logits.detach().float().sigmoid() < self._threshold)


class ConfidenceThreshold:
    """Keeps the candidates whose likelier answer has at least this probability."""

    def __init__(self, least: float, class_axis: int | None = None) -> None:
        if not 0 <= least <= 1:
            raise ValueError(f"Expected argument `least` to lie in [0, 1], but got {least}.")
        self._least = least
        self._class_axis = class_axis

    @torch.no_grad()
    def __call__(self, probability: Tensor, candidates: Tensor, context: FilterContext) -> Tensor:
        p = probability.detach()
        confidence = torch.maximum(p, 1 - p) if self._class_axis is None else p.amax(self._class_axis)
        return candidates & (confidence >= self._least)


class Chain:
    """Several filters: a candidate is kept that every one of them keeps, each judging all the candidates."""

    def __init__(self, filters: Sequence[PseudoLabelFilter]) -> None:
        self._filters = tuple(filters)

    def __call__(self, probability: Tensor, candidates: Tensor, context: FilterContext) -> Tensor:
        keep = candidates.clone()
        for judge in self._filters:
            keep &= judge(probability, candidates, context)
        return keep


__all__ = [
    "Chain",
    "ConfidenceThreshold",
    "EntropyPercentile",
    "ErrorPredictor",
    "FilterContext",
    "PseudoLabelFilter",
    "entropy",
]
