"""AnnotationBatch: what the annotations of one batch say, as flat tensors.

The loader's workers fill it (data.py), the losses and the filter read it. Nothing here knows nnU-Net or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AnnotationBatch(NamedTuple):
    """Annotations of a batch of B patches with C classes, D spatial axes and V voxels each.

    A voxel is named by its *flat index* ``b * V + v``: item b of the batch, then the voxel in C order. Every object's
    entries stand together, so the tensors stay as small as the annotations are. All tensors are on one device.

    A *line* is one row, column or slice of one box along one of the box's own axes (so it stays what it was under
    rotation). A tight box promises its class at least once in each of its lines. Lines that the crop cut have no
    number: their voxels carry -1 on that axis.

    Attributes:
        tags: (B, C) int8; 1: the class is somewhere in this patch, 0: it is nowhere in it, -1: unknown.
        points: (P,) int64, flat index of each point's voxel.
        point_class: (P,) int64, in [0, C).
        box_item: (K,) int64, item of the batch each box lies in.
        box_class: (K,) int64, in [0, C).
        box_tight: (K,) bool; a loose box confines its object but promises nothing about its lines.
        box_voxels: (M,) int64, flat index of every voxel of every box (visible part), box after box.
        box_of_voxel: (M,) int64, ascending, in [0, K).
        box_line: (M, D) int64, number in [0, L) of the line the voxel belongs to along each axis, or -1.
        line_box: (L,) int64, the box of each line.
        complete_boxes: (B, C) bool; every object of the class in this item carries a box.
        listed: (B, C) bool; the classes the annotator of this item's mask drew; all True where the mask is ordinary.
        partial: (B, *S) bool, or (0,) for "none": voxels where the annotator drew nothing; they are background or any
            class that is not listed. The target holds the ignore label there.
        outside: (B, *S) bool, or (0,) for "none": voxels that show no part of the case (padding); they count for
            nothing.
    """

    tags: Tensor
    points: Tensor
    point_class: Tensor
    box_item: Tensor
    box_class: Tensor
    box_tight: Tensor
    box_voxels: Tensor
    box_of_voxel: Tensor
    box_line: Tensor
    line_box: Tensor
    complete_boxes: Tensor
    listed: Tensor
    partial: Tensor
    outside: Tensor

    @classmethod
    def empty(cls, batch_size: int, num_classes: int, dim: int, device: torch.device | str = "cpu") -> AnnotationBatch:
        """A batch about which nobody said anything."""

        def index(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        def flag(*shape: int, value: bool = False) -> Tensor:
            return torch.full(shape, value, dtype=torch.bool, device=device)

        return cls(
            tags=torch.full((batch_size, num_classes), -1, dtype=torch.int8, device=device),
            points=index(0),
            point_class=index(0),
            box_item=index(0),
            box_class=index(0),
            box_tight=flag(0),
            box_voxels=index(0),
            box_of_voxel=index(0),
            box_line=index(0, dim),
            line_box=index(0),
            complete_boxes=flag(batch_size, num_classes),
            listed=flag(batch_size, num_classes, value=True),
            partial=flag(0),
            outside=flag(0),
        )

    @classmethod
    def from_list(cls, tensors: Sequence[Tensor]) -> AnnotationBatch:
        """From the list of tensors that crosses process borders (nnU-Net's augmenter pins lists of tensors)."""
        return cls(*tensors)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> AnnotationBatch:
        return AnnotationBatch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))
