"""Which classes each voxel may still have, and the pseudo-labels within that set.

One idea carries all kinds of annotation: the set of classes an annotation leaves at a voxel. The losses
over that set stand in set_losses.py; nothing here knows nnU-Net.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.blocks import row_blocks, scores_within


def flat_class_index(voxels: Tensor, classes: Tensor, num_classes: int, num_voxels: int) -> Tensor:
    """Where (voxel, class) stands in a contiguous (B, C, V) tensor taken as one line.

    Args:
        voxels: int64, flat index ``b * V + v`` as in AnnotationBatch.
        classes: int64, in [0, C), broadcastable with `voxels`.
        num_classes: C.
        num_voxels: V.

    Returns:
        int64, shape of the two broadcast.
    """
    item = torch.div(voxels, num_voxels, rounding_mode="floor")
    return voxels + (item * (num_classes - 1) + classes) * num_voxels


def class_index_of_boxes(annotations: AnnotationBatch, num_classes: int, num_voxels: int) -> Tensor:
    """flat_class_index() of every box's voxels at the box's own class, (M,) int64; computed box by box, then added."""
    offset = (annotations.box_item * (num_classes - 1) + annotations.box_class) * num_voxels
    return annotations.box_voxels + offset.index_select(0, annotations.box_of_voxel)


def masked_classes(
    target: Tensor, batch_size: int, num_classes: int, ignore_label: int | None
) -> tuple[Tensor, Tensor]:
    """The class map without its channel axis, flat, and where it says something.

    Args:
        target: (B, *S) or (B, 1, *S), integer classes (floating whole numbers accepted).
        batch_size: B.
        num_classes: C.
        ignore_label: class that means "nobody drew here"; so does everything outside [0, C).

    Returns:
        classes (B, V), int64 or the integer type of `target`; known (B, V) bool.
    """
    classes = target.reshape(batch_size, -1)
    if classes.dtype.is_floating_point or classes.dtype == torch.uint8:
        classes = classes.to(torch.int16)  # room for -1 and for the arithmetic of indices
    known = (classes >= 0) & (classes < num_classes)
    if ignore_label is not None and 0 <= ignore_label < num_classes:
        known &= classes != ignore_label
    return classes, known


def allowed_classes(
    annotations: AnnotationBatch,
    target: Tensor | None,
    num_classes: int,
    spatial_shape: Sequence[int],
    ignore_label: int | None = None,
    *,
    box_index: Tensor | None = None,
) -> Tensor:
    """The classes each voxel may still have, given everything that was annotated.

    Removed are: a class tagged absent, everywhere in its item; a class whose boxes are complete in its item, outside
    all of them; where a mask with listed labels drew nothing, the listed classes except background. A point leaves its
    class alone, whatever tags, boxes and partial masks say, and a mask leaves its class alone, whatever anything else
    says. Where nothing would be left (contradictions are caught when annotations are read; augmentation may still
    produce some), every class is left, so the set is never empty.

    Args:
        annotations: of B items with C classes.
        target: (B, *S) or (B, 1, *S), integer class map, `ignore_label` where nobody drew; None: no mask at all.
        num_classes: C.
        spatial_shape: S.
        ignore_label: see `target`; values outside [0, C) count as unannotated, too.
        box_index: class_index_of_boxes() of these annotations, if it is at hand.

    Returns:
        (B, C, *S) bool, at least one True for each voxel.
    """
    batch_size = annotations.tags.shape[0]
    num_voxels = _product(spatial_shape)
    possible = annotations.tags != 0
    everywhere = possible & ~annotations.complete_boxes
    local = annotations.box_voxels.shape[0] > 0 or annotations.partial.numel() > 0
    if not local:
        everywhere |= ~everywhere.any(1, keepdim=True)
    allowed = everywhere[:, :, None].expand(-1, -1, num_voxels).contiguous()
    line = allowed.view(-1)
    if annotations.box_voxels.shape[0] > 0:
        # Boxes of classes that are not complete write what stands there already.
        index = class_index_of_boxes(annotations, num_classes, num_voxels) if box_index is None else box_index
        of_box = possible[annotations.box_item, annotations.box_class]
        line.scatter_(0, index, of_box.index_select(0, annotations.box_of_voxel))
    if annotations.partial.numel() > 0:
        undrawn = ~annotations.listed
        undrawn[:, :1] = True
        allowed &= undrawn[:, :, None] | ~annotations.partial.reshape(batch_size, 1, num_voxels)
    if annotations.points.shape[0] > 0:
        every_class = torch.arange(num_classes, device=allowed.device)
        index = flat_class_index(annotations.points[:, None], every_class, num_classes, num_voxels)
        line.index_fill_(0, index.view(-1), False)
        # Filled afterwards, so that two points of different classes at one voxel leave both.
        own = flat_class_index(annotations.points, annotations.point_class, num_classes, num_voxels)
        line.index_fill_(0, own, True)
    if local or target is not None:
        rows = (batch_size, -1, int(spatial_shape[-1]))
        known = code = None
        if target is not None:
            classes, known = masked_classes(target, batch_size, num_classes, ignore_label)
            # The smallest type that holds the classes: this comparison is the one pass over all of (B, C, V).
            code = torch.where(known, classes, -1).to(torch.int8 if num_classes < 128 else torch.int64).view(rows)
            known = known.view(rows)
        _fill_empty_and_masked(allowed.view(batch_size, num_classes, *rows[1:]), local, known, code)
    return allowed.view(batch_size, num_classes, *spatial_shape)


class BoxCover(NamedTuple):
    """Where there are boxes, and of which classes: what pseudo-labels inside boxes are held against.

    Attributes:
        voxels: (B, *S) bool, inside some box.
        classes: (B, C) bool, the classes that have a box in this item.
    """

    voxels: Tensor
    classes: Tensor


def box_cover(annotations: AnnotationBatch, num_classes: int, spatial_shape: Sequence[int]) -> BoxCover:
    """Which voxels of a batch lie in boxes, tight or loose, and which classes its items have boxes of.

    Args:
        annotations: of B items with C classes.
        num_classes: C.
        spatial_shape: S.
    """
    batch_size = annotations.tags.shape[0]
    device = annotations.tags.device
    voxels = torch.zeros(batch_size * _product(spatial_shape), dtype=torch.bool, device=device)
    voxels.index_fill_(0, annotations.box_voxels, True)
    classes = torch.zeros(batch_size * num_classes, dtype=torch.bool, device=device)
    classes.index_fill_(0, annotations.box_item * num_classes + annotations.box_class, True)
    return BoxCover(voxels.view(batch_size, *spatial_shape), classes.view(batch_size, num_classes))


def _fill_empty_and_masked(allowed: Tensor, local: bool, known: Tensor | None, code: Tensor | None) -> None:
    """Allow every class where none is left, then the mask's class alone where there is a mask; in place.

    Args:
        allowed: (B, C, R, W) bool.
        local: some voxels of an item may have no class left.
        known: (B, R, W) bool, where the mask says something; code: (B, R, W), its class there, -1 elsewhere.
    """
    num_classes = allowed.shape[1]
    for rows in row_blocks(allowed):
        block = allowed[:, :, rows]
        if local:  # amax() of bytes, for any() is a hundred times as slow across channels on a CPU
            block |= ~block.contiguous().view(torch.uint8).amax(1, keepdim=True).bool()
        if known is not None and code is not None:
            block &= ~known[:, None, rows]
            every_class = torch.arange(num_classes, device=code.device, dtype=code.dtype)
            block |= code[:, None, rows] == every_class[:, None, None]


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= int(size)
    return product


def _float32_or_64(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def filter_probabilities(logits: Tensor, allowed: Tensor) -> Tensor:
    """Softmax within the allowed set; 0 outside it.

    Args:
        logits: (B, C, *S), floating.
        allowed: (B, C, *S) bool, not empty at any voxel.

    Returns:
        (B, C, *S), float32 (float64 for float64), detached.
    """
    scores = _float32_or_64(logits.detach())
    shape = (*scores.shape[:2], -1, scores.shape[-1])
    scores, within = scores.reshape(shape), allowed.reshape(shape)
    result = torch.empty_like(scores)
    for rows in row_blocks(scores):
        result[:, :, rows] = scores_within(scores[:, :, rows], within[:, :, rows]).softmax(1)
    return result.view(logits.shape)


def pseudo_label(logits: Tensor, allowed: Tensor) -> Tensor:
    """The likeliest class within the allowed set.

    Args:
        logits: (B, C, *S), floating.
        allowed: (B, C, *S) bool, not empty at any voxel.

    Returns:
        (B, *S) int64, detached.
    """
    shape = (*logits.shape[:2], -1, logits.shape[-1])
    scores, within = logits.detach().reshape(shape), allowed.reshape(shape)
    result = torch.empty_like(scores[:, 0], dtype=torch.int64)
    for rows in row_blocks(scores):
        # max() rather than argmax(), which is several times as slow across channels on a CPU
        result[:, rows] = scores_within(scores[:, :, rows], within[:, :, rows]).max(1).indices
    return result.view(logits.shape[0], *logits.shape[2:])


def released_filter(
    logits: Tensor, annotations: AnnotationBatch, target: Tensor | None = None, ignore_label: int | None = None
) -> Tensor:
    """The filter as the authors' code computes it, contradictions included: NaN where no class is left.

    In this order, on the raw logits: classes outside the image-level label to -inf; where a box covers a voxel, the
    classes none of whose boxes cover it to -inf; at a point, its class to 1 and all others to -inf. Softmax. Then
    the mask's one-hot where there is one. For comparison with the authors' numbers; allowed_classes() and
    filter_probabilities() are what training uses.

    Args:
        logits: (B, C, *S), floating.
        annotations: an item has an image-level label if any of its tags is known; its classes are those tagged 1.
        target: (B, *S) or (B, 1, *S), or None; `ignore_label` and values outside [0, C) are unmasked.
        ignore_label: see `target`.

    Returns:
        (B, C, *S), float32 (float64 for float64), detached, NaN where tags and boxes exclude every class.

    Source: the released code of Reiss et al., CVPR 2023. Differs from it where tags and boxes exclude every class at a
    voxel that has a mask: the released NaN stays, here the mask counts. Of several points at one voxel the last counts.
    """
    batch_size, num_classes = logits.shape[:2]
    scores = _float32_or_64(logits.detach()).reshape(batch_size, num_classes, -1).clone()
    num_voxels = scores.shape[2]
    tagged = (annotations.tags >= 0).any(1, keepdim=True)
    excluded = (tagged & (annotations.tags != 1))[:, :, None].repeat(1, 1, num_voxels)

    covered = torch.zeros_like(excluded)
    box_class = annotations.box_class[annotations.box_of_voxel]
    covered.view(-1)[flat_class_index(annotations.box_voxels, box_class, num_classes, num_voxels)] = True
    excluded |= covered.any(1, keepdim=True) & ~covered
    scores.masked_fill_(excluded, -torch.inf)

    order = torch.arange(1, annotations.points.shape[0] + 1, device=scores.device)
    last = torch.zeros(batch_size * num_voxels, dtype=torch.int64, device=scores.device)
    last.scatter_reduce_(0, annotations.points, order, "amax")
    counts = last[annotations.points] == order
    points, point_class = annotations.points[counts], annotations.point_class[counts]
    every_class = torch.arange(num_classes, device=scores.device)
    line = scores.view(-1)
    line[flat_class_index(points[:, None], every_class, num_classes, num_voxels)] = -torch.inf
    line[flat_class_index(points, point_class, num_classes, num_voxels)] = 1.0

    probability = scores.softmax(1)
    if target is not None:
        classes, known = masked_classes(target, batch_size, num_classes, ignore_label)
        one_hot = (classes[:, None] == every_class[:, None]).to(probability.dtype)
        probability = torch.where(known[:, None], one_hot, probability)
    return probability.view_as(logits)
