"""CRACLoss: labelled edges teach both representations, and each is taught the rest by the other's trusted affinities.

Source: Liu et al., Learning Cross-Representation Affinity Consistency for Sparsely Supervised Biomedical Instance
Segmentation, ICCV 2023, re-implemented. What the released code does differently is listed in docs/instances.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_dsp.affinities import Offsets, edge_targets, unit_channels, valid_edges
from nnunet_dsp.filters import Chain, EntropyPercentile, ErrorPredictor, FilterContext, PseudoLabelFilter
from nnunet_dsp.instances.network import CRACOutput
from nnunet_dsp.instances.settings import CRACSettings
from nnunet_dsp.schedules import PolynomialDecay, WarmUp

TERMS = ("implicit", "explicit", "foreground", "implicit_consistency", "explicit_consistency", "error", "kept")
"""What CRACLoss.terms holds, unweighted; "kept" is no loss but the share of candidates that the filters keep."""

LEAST_SHARE, MOST_SHARE = 0.05, 0.99  # of edges inside instances, as far as the balance goes


def balance(same: Tensor, among: Tensor) -> Tensor:
    """Weights with which edges inside instances and edges between them count alike; 0 outside `among`.

    With f, the share of `same` among the edges: if f > 1/2, edges between instances weigh f / (1 - f), else those
    inside weigh (1 - f) / f; all others weigh 1. f is kept within [0.05, 0.99].

    Args:
        same, among: bool, same shape.

    Returns:
        That shape, float32.
    """
    count = among.sum()
    share = ((same & among).sum() / count.clamp_min(1)).clamp(LEAST_SHARE, MOST_SHARE)
    inside = torch.where(share > 0.5, 1.0, (1 - share) / share)
    between = torch.where(share > 0.5, share / (1 - share), 1.0)
    return torch.where(same, inside, between) * among


def weighted_square_error(prediction: Tensor, target: Tensor, weight: Tensor, channel_weight: Tensor) -> Tensor:
    """Mean squared error: per channel over the edges that count, then over the channels that have any.

    Taking the mean over the edges that count keeps the scale the same however sparse the labels are.

    Args:
        prediction, target: (B, K, *S).
        weight: (B, K, *S), at least 0; edges of weight 0 do not count.
        channel_weight: (K,).

    Returns:
        Scalar; 0, with a gradient of 0, where no edge counts.
    """
    axes = [0, *range(2, prediction.ndim)]
    error = (weight * (prediction - target).square()).sum(axes)
    count = (weight > 0).sum(axes)
    used = channel_weight * (count > 0)
    return (used * error / count.clamp_min(1)).sum() / used.sum().clamp_min(1e-12)


class Consistency(NamedTuple):
    """The two losses against pseudo-labels, and the share of candidates that was kept."""

    implicit: Tensor
    explicit: Tensor
    kept: Tensor


class CRACLoss(nn.Module):
    """The loss of nnUNetTrainerCRAC.

    Set `progress` before each step; after it, `terms` holds the terms by TERMS, detached.

    Args:
        offsets: those of the network.
        settings: weights, filters, switches.
        ignore_label: value of what nobody labelled, or None.
    """

    def __init__(self, offsets: Offsets, settings: CRACSettings, ignore_label: int | None) -> None:
        super().__init__()
        self.offsets = offsets
        self.settings = settings
        self.ignore_label = ignore_label
        self.progress = 0.0
        self.foreground_learnt = True
        self.terms = torch.zeros(len(TERMS))
        short = set(unit_channels(offsets))
        self._channel_weights = [settings.short_weight if k in short else 1.0 for k in range(len(offsets))]
        self._consistency_weight = WarmUp(settings.warmup, settings.consistency_weight)
        filters: list[PseudoLabelFilter] = []
        if settings.entropy_filter:
            filters.append(EntropyPercentile(PolynomialDecay(settings.entropy_share, settings.entropy_power)))
        if settings.error_filter:
            filters.append(ErrorPredictor(gate=max(settings.warmup, settings.error_gate)))
        self._trusted = Chain(filters)

    def forward(self, output: CRACOutput, target: Tensor) -> Tensor:
        """The weighted sum of the terms.

        Args:
            output: of the network in training mode.
            target: (B, 1, *S) instance ids, integer; 0 background.
        """
        settings = self.settings
        instances = target[:, 0].long()
        edges = edge_targets(
            instances,
            self.offsets,
            self.ignore_label,
            complete_instances=settings.complete_instances,
            background_known=settings.background_known,
        )
        implicit, explicit = output.implicit, output.explicit_logits.float().sigmoid()
        channel_weight = implicit.new_tensor(self._channel_weights)
        among = edges.known
        if settings.released:  # the share is taken over all edges, unlabelled ones counting as inside
            among = valid_edges(self.offsets, instances.shape[1:], implicit.device).expand_as(edges.known)
        weight = balance(edges.same | (among & ~edges.known), among) * edges.known
        same = edges.same.to(implicit.dtype)
        supervised = [weighted_square_error(p, same, weight, channel_weight) for p in (implicit, explicit)]
        foreground = self._foreground(output.foreground_logits, instances)
        nothing = implicit.new_zeros(())
        error = nothing
        judged = output.judged_implicit
        if output.implicit_error_logits is not None and output.explicit_error_logits is not None and judged is not None:
            error = self._error(output.implicit_error_logits, judged, edges.same, edges.known)
            error = error + self._error(output.explicit_error_logits, explicit, edges.same, edges.known)
        consistency = Consistency(nothing, nothing, nothing)
        consistency_weight = self._consistency_weight(self.progress)
        if consistency_weight > 0:
            consistency = self._consistency(output, explicit, edges.candidate, channel_weight)
        terms = [*supervised, foreground, consistency.implicit, consistency.explicit, error, consistency.kept]
        self.terms = torch.stack([term.detach() for term in terms])
        return (
            settings.supervised_weight * (supervised[0] + supervised[1])
            + settings.foreground_weight * foreground
            + consistency_weight * (consistency.implicit + consistency.explicit)
            + error
        )

    def _foreground(self, logits: Tensor, instances: Tensor) -> Tensor:
        """Binary cross entropy where something is labelled; foreground and background weigh alike."""
        logits = logits.float()
        labelled = torch.ones_like(instances, dtype=torch.bool)
        if self.ignore_label is not None:
            labelled = instances != self.ignore_label
        if not self.foreground_learnt:  # in the sum all the same: DistributedDataParallel wants every parameter used
            return 0.0 * logits.sum()
        inside = (instances > 0)[:, None].expand_as(logits)
        weight = balance(inside, labelled[:, None].expand_as(logits))
        total = functional.binary_cross_entropy_with_logits(logits, inside.to(logits.dtype), weight, reduction="sum")
        return total / (weight > 0).sum().clamp_min(1)

    def _consistency(
        self, output: CRACOutput, explicit: Tensor, candidates: Tensor, channel_weight: Tensor
    ) -> Consistency:
        settings = self.settings
        implicit = output.implicit.relu()
        trust_explicit = self._trusted(
            explicit, candidates, FilterContext(self.progress, output.explicit_error_logits)
        )
        trust_implicit = self._trusted(
            implicit, candidates, FilterContext(self.progress, output.implicit_error_logits)
        )
        from_explicit, from_implicit = self._pseudo_label(explicit), self._pseudo_label(implicit)
        twice = channel_weight.square() if settings.released else channel_weight
        kept = (trust_explicit.sum() + trust_implicit.sum()) / (2 * candidates.sum()).clamp_min(1)
        return Consistency(
            weighted_square_error(output.implicit, from_explicit, trust_explicit.float(), twice)
            * (twice.sum() / channel_weight.sum()),
            weighted_square_error(explicit, from_implicit, trust_implicit.float(), channel_weight),
            kept.to(implicit.dtype),
        )

    def _pseudo_label(self, probability: Tensor) -> Tensor:
        if not self.settings.released:
            probability = probability.detach()
        return (probability > 0.5).to(probability.dtype) if self.settings.pseudo_labels == "hard" else probability

    @staticmethod
    def _error(logits: Tensor, probability: Tensor, same: Tensor, known: Tensor) -> Tensor:
        """Cross entropy of the error predictor on labelled edges; the few wrong ones weigh as much as the others."""
        wrong = ((probability.detach() > 0.5) != same) & known
        num_wrong, num_known = wrong.sum(), known.sum()
        heavier = ((num_known - num_wrong) / num_wrong.clamp_min(1) + 1).clamp_max(100.0)
        weight = torch.where(wrong, heavier, 1.0) * known
        entropies = functional.binary_cross_entropy_with_logits(
            logits.float(), wrong.float(), weight, reduction="sum"
        )
        return entropies / num_known.clamp_min(1)


__all__ = ["TERMS", "CRACLoss", "balance", "weighted_square_error"]
