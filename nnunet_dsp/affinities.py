"""Affinities: does this voxel belong to the same object as the one an offset away? Offsets, targets, what is known.

An edge (p, p + o) is stored at p, in the channel of its offset o. 1 means the same object, 0 another one. Nothing here
knows a network, a loss or nnU-Net.

Source: the representation of Liu et al., Learning Cross-Representation Affinity Consistency for Sparsely Supervised
Biomedical Instance Segmentation, ICCV 2023, re-implemented.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Offset = tuple[int, ...]
Offsets = tuple[Offset, ...]

ANISOTROPIC = 3.0
"""Ratio of spacings from which an axis counts as coarse; nnU-Net draws its own line at the same place."""

REACHES = (1, 3, 9, 27)  # voxels; the short ones say where borders are, the long ones keep wide objects apart
COARSE_REACHES = (1, 2, 3, 4)  # along the coarse axis, where a step is as long as several in the plane


def default_offsets(patch_size: Sequence[int], spacing: Sequence[float]) -> Offsets:
    """The offsets for a configuration: steps of 1, 3, 9 and 27 voxels along every axis, shorter along a coarse one.

    An offset of half the patch or more is left out: too few edges of a patch would have it, and the tiles of a
    sliding window at half steps could miss some of the image's.

    Args:
        patch_size: voxels per axis, (y, x) or (z, y, x), nnU-Net's axis order.
        spacing: per axis, same order, any unit.

    Returns:
        Offsets with one negative entry each, the unit steps of all axes first.

    Raises:
        ValueError: not two or three axes, or a patch of fewer than three voxels along an axis.
    """
    dim = len(patch_size)
    if dim not in (2, 3) or len(spacing) != dim:
        raise ValueError(f"Expected a patch and a spacing of two or three axes, but got {patch_size} and {spacing}.")
    if min(patch_size) < 3:
        raise ValueError(f"Expected at least three voxels along every axis of the patch, but got {list(patch_size)}.")
    fine = min(spacing)
    reaches = [COARSE_REACHES if value / fine > ANISOTROPIC else REACHES for value in spacing]
    offsets = []
    for step in range(len(REACHES)):
        for axis in range(dim):
            reach = reaches[axis][step]
            if 2 * reach < patch_size[axis]:
                offsets.append(tuple(-reach if a == axis else 0 for a in range(dim)))
    return tuple(offsets)


def check_offsets(offsets: Sequence[Sequence[int]], dim: int) -> Offsets:
    """The offsets as tuples.

    Raises:
        ValueError: one has another number of axes or does not move, one is there twice, or the unit step of an axis is
            missing (without it, neighbours along that axis are never compared).
    """
    checked = tuple(tuple(int(v) for v in offset) for offset in offsets)
    for offset in checked:
        if len(offset) != dim or not any(offset):
            raise ValueError(f"Expected every offset to have {dim} entries, not all of them 0, but got {list(offset)}.")
    if len(set(checked)) != len(checked):
        raise ValueError(f"Expected every offset once, but got {[list(o) for o in checked]}.")
    if len(unit_channels(checked)) != dim:
        raise ValueError(
            f"Expected a step of one voxel along each of the {dim} axes among the offsets, but got "
            f"{[list(o) for o in checked]}."
        )
    return checked


def unit_channels(offsets: Offsets) -> list[int]:
    """The channels of the steps of one voxel along one axis, one for each axis that has one, in the axes' order."""
    found: dict[int, int] = {}
    for channel, offset in enumerate(offsets):
        moved = [axis for axis, value in enumerate(offset) if value]
        if len(moved) == 1 and abs(offset[moved[0]]) == 1:
            found.setdefault(moved[0], channel)
    return [found[axis] for axis in sorted(found)]


def edge_slices(offset: Offset, shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the voxels p whose partner p + offset lies inside, and of those partners, in the same order."""
    here, there = [], []
    for value, size in zip(offset, shape, strict=True):
        low, high = max(0, -value), max(size - max(0, value), 0)
        low = min(low, high)
        here.append(slice(low, high))
        there.append(slice(low + value if high > low else 0, high + value if high > low else 0))
    return tuple(here), tuple(there)


def valid_edges(offsets: Offsets, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Where an edge's other end lies inside: (K, *shape) bool."""
    valid = torch.zeros((len(offsets), *shape), dtype=torch.bool, device=device)
    for channel, offset in enumerate(offsets):
        here, _ = edge_slices(offset, shape)
        where: Any = (channel, *here)
        valid[where] = True
    return valid


def implicit_affinities(embedding: Tensor, offsets: Offsets) -> Tensor:
    """Affinities that an embedding implies: the cosine between a voxel's vector and that of the voxel an offset away.

    Args:
        embedding: (B, D, *S), floating; computed in float32 (float64 stays), under autocast too.

    Returns:
        (B, K, *S), in [-1, 1], with gradient. 0 where the edge leaves the patch: see valid_edges().
    """
    wide = embedding if embedding.dtype == torch.float64 else embedding.float()
    unit = functional.normalize(wide, dim=1, eps=1e-6)
    shape = embedding.shape[2:]
    channels = []
    for offset in offsets:
        here, there = edge_slices(offset, shape)
        ends: tuple[Any, Any] = ((slice(None), slice(None), *here), (slice(None), slice(None), *there))
        cosine = (unit[ends[0]] * unit[ends[1]]).sum(1)
        margins = [m for h, size in zip(reversed(here), reversed(shape), strict=True) for m in (h.start, size - h.stop)]
        channels.append(functional.pad(cosine, margins))
    return torch.stack(channels, 1).clamp(-1, 1)


class EdgeTargets(NamedTuple):
    """What instance labels say about the edges of a batch; all (B, K, *S), bool.

    Attributes:
        same: both ends lie in the same instance; means something where `known`.
        known: the labels decide the edge.
        candidate: they do not, and the edge may matter: where pseudo-labels may speak.
    """

    same: Tensor
    known: Tensor
    candidate: Tensor


def edge_targets(
    instances: Tensor,
    offsets: Offsets,
    ignore_label: int | None,
    *,
    complete_instances: bool = True,
    background_known: bool = False,
) -> EdgeTargets:
    """Affinity targets, and for which edges they are known.

    A labelled instance is labelled completely, so every edge that touches one is known: to itself 1, to anything else
    0, be it background, another instance or what nobody labelled. An edge between two background voxels is left out,
    since background is no object: neither "same" nor "different" helps. Edges that leave the patch are unknown.

    Args:
        instances: (B, *S) integer ids; 0 is background, `ignore_label` what nobody labelled. Compared as integers:
            float32 would join ids above 2^24.
        ignore_label: None where everything is labelled.
        complete_instances: False for strokes and other parts of instances: an edge is known only if both ends are
            labelled.
        background_known: take edges between background voxels as known, with target 0, for data with much true
            background.

    Source: Liu et al., ICCV 2023. Differs from the released code, which compares every z offset with the slice just
    below, invents targets beyond the border by reflection, and cannot tell background from unlabelled.
    """
    shape = instances.shape[1:]
    size = (instances.shape[0], len(offsets), *shape)
    unlabelled = torch.zeros_like(instances, dtype=torch.bool) if ignore_label is None else instances == ignore_label
    positive = (instances > 0) & ~unlabelled
    same, known, candidate = (torch.zeros(size, dtype=torch.bool, device=instances.device) for _ in range(3))
    for channel, offset in enumerate(offsets):
        here, there = ((slice(None), *part) for part in edge_slices(offset, shape))
        where: Any = (slice(None), channel, *here[1:])
        first, second = positive[here], positive[there]
        both_background = ~(first | second | unlabelled[here] | unlabelled[there])
        decided = first | second
        if not complete_instances:
            decided = decided & ~(unlabelled[here] | unlabelled[there])
        same[where] = (instances[here] == instances[there]) & first
        candidate[where] = ~(decided | both_background)
        known[where] = decided | both_background if background_known else decided
    return EdgeTargets(same, known, candidate)


__all__ = [
    "EdgeTargets",
    "Offset",
    "Offsets",
    "check_offsets",
    "default_offsets",
    "edge_slices",
    "edge_targets",
    "implicit_affinities",
    "unit_channels",
    "valid_edges",
]
