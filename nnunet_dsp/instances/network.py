"""CRACNetwork: two networks in one module, one for an embedding, one for affinities and foreground."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunet_dsp.affinities import Offsets, edge_slices, implicit_affinities, unit_channels
from nnunet_dsp.filters import entropy

SOURCES = ("implicit", "explicit", "average")
"""Whose affinities instances are made of."""

EMBEDDING_DROPOUT = 0.1  # of channels, for the error predictor's lessons only: a good network makes too few errors


class CRACOutput(NamedTuple):
    """What a training step needs of the networks.

    Attributes:
        implicit: (B, K, *S) cosines of the embedding, in [-1, 1], float32.
        explicit_logits: (B, K, *S).
        foreground_logits: (B, F, *S).
        implicit_error_logits, explicit_error_logits: (B, K, *S), the error predictor's opinion; None without one.
        judged_implicit: (B, K, *S) in [0, 1], the implicit affinities that the error predictor saw: in training some
            channels of the embedding are dropped first.
    """

    implicit: Tensor
    explicit_logits: Tensor
    foreground_logits: Tensor
    implicit_error_logits: Tensor | None = None
    explicit_error_logits: Tensor | None = None
    judged_implicit: Tensor | None = None


class CRACNetwork(nn.Module):
    """An embedding network and an affinity network that see the same image and teach each other.

    In training mode the output is a CRACOutput. In evaluation mode it depends on `output`:

    - "foreground" (the default, what nnU-Net's own prediction gets): logits, (B, F, *S). Where no background was ever
      labelled the foreground cannot be learnt; then it is where a voxel belongs to one of its neighbours.
    - "instances": (B, K + 1, *S), affinities of `source` in [0, 1] and the foreground's probability (1 everywhere where
      it was not learnt), for the instance predictor.
    - "training": the CRACOutput, for validation.

    Args:
        embedding: a network with any number of output channels.
        affinity: one with K + F output channels: affinities first, then foreground.
        offsets: the K offsets.
        error: a network from C_in + 2 K channels to K, or None.
    """

    foreground_learnt: Tensor

    def __init__(
        self, embedding: nn.Module, affinity: nn.Module, offsets: Offsets, error: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.affinity = affinity
        self.error = error
        self.offsets = offsets
        self.output = "foreground"
        self.source = "average"
        self.register_buffer("foreground_learnt", torch.tensor(True))

    def forward(self, image: Tensor) -> CRACOutput | Tensor:
        if self.training or self.output == "training":
            return self._forward_training(image)
        if self.output == "instances":
            return self._forward_instances(image)
        affinity_logits, foreground_logits = self._affinity(image)
        fallback = self._foreground_of_affinities(affinity_logits).expand_as(foreground_logits)
        return torch.where(self.foreground_learnt, foreground_logits, fallback)

    def _affinity(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.affinity(image)
        count = len(self.offsets)
        return logits[:, :count], logits[:, count:]

    def _forward_training(self, image: Tensor) -> CRACOutput:
        embedding = self.embedding(image)
        implicit = implicit_affinities(embedding, self.offsets)
        explicit_logits, foreground_logits = self._affinity(image)
        if self.error is None:
            return CRACOutput(implicit, explicit_logits, foreground_logits)
        flawed = implicit.detach()
        if self.training:
            spatial = (nn.functional.dropout2d, nn.functional.dropout3d)[image.ndim - 4]
            flawed = implicit_affinities(spatial(embedding.detach(), EMBEDDING_DROPOUT, True), self.offsets)
        return CRACOutput(
            implicit,
            explicit_logits,
            foreground_logits,
            self._errors(image, flawed.relu()),
            self._errors(image, explicit_logits.detach().float().sigmoid()),
            flawed.relu(),
        )

    def _errors(self, image: Tensor, probability: Tensor) -> Tensor:
        if self.error is None:
            raise RuntimeError("There is no error predictor.")
        seen = probability.detach()
        errors: Tensor = self.error(torch.cat([image, entropy(seen).to(image.dtype), seen.to(image.dtype)], 1))
        return errors

    def _forward_instances(self, image: Tensor) -> Tensor:
        parts = []
        affinity_logits, foreground_logits = self._affinity(image)
        if self.source in ("explicit", "average"):
            parts.append(affinity_logits.float().sigmoid())
        if self.source in ("implicit", "average"):
            parts.append(implicit_affinities(self.embedding(image), self.offsets).relu())
        affinities = torch.stack(parts).mean(0)
        foreground = foreground_logits.float().sigmoid().amax(1, keepdim=True)
        foreground = torch.where(self.foreground_learnt, foreground, torch.ones_like(foreground))
        return torch.cat([affinities, foreground], 1)

    def _foreground_of_affinities(self, logits: Tensor) -> Tensor:
        """(B, 1, *S): the highest logit of an edge to a direct neighbour, on either side of the voxel."""
        shape = logits.shape[2:]
        best = torch.full_like(logits[:, :1], -20)
        for channel in unit_channels(self.offsets):
            here, there = (
                (slice(None), slice(None), *part) for part in edge_slices(self.offsets[channel], shape)
            )
            edge = logits[:, channel : channel + 1][here]
            best[here] = torch.maximum(best[here], edge)
            best[there] = torch.maximum(best[there], edge)
        return best


__all__ = ["SOURCES", "CRACNetwork", "CRACOutput"]
