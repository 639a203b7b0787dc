"""The DSP losses as the authors' released code computes them, oddities included; for comparison with its numbers.

What training uses by default is in losses.py. Here a loop over classes says it more clearly, so there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.pseudo_labels import masked_classes


def released_losses(
    logits: Tensor,
    annotations: AnnotationBatch,
    *,
    target: Tensor | None = None,
    components: Tensor | None = None,
    ignore_label: int | None = None,
    eps: float = 1e-7,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, box, point and mask loss, as the authors' code has them.

    Its oddities: one is added to each sum of log evidence; the counters of items run on over the classes, so class 0
    weighs C times as much as the last one; each kind of annotation overwrites the negatives that the kinds before it
    made for that item; boxes and components subtract one (once, however many overlap) in voxels that count for
    nothing, too, which leaves -1 there; a mask's component is a positive only where it holds a point, then once for
    each point.

    The negatives of class c are the same for every other class, so two maps (B, V) stand for them, and their sum
    over classes needs no more than p_c.

    Args:
        logits: (B, C, *S), float32 or float64.
        annotations: an item has an image-level label if any of its tags is known (0 or 1), and then those tagged 1 are
            present. A box with fewer than two voxels is no positive. Whether boxes are tight or complete is ignored.
        target: (B, *S) or (B, 1, *S), integer classes; an item's mask contains c where any voxel is c. None: no masks.
        components: like `target`, ids unique within the batch, 0 for none. None: no component holds a point.
        ignore_label: class in `target` that means "nobody drew here".
        eps: added inside each logarithm.

    Returns:
        Four scalars, attached to the graph. A sum of negatives below 0 (NaN in the released code) is taken as 0.

    Source: the released code of Reiss et al., CVPR 2023, as far as its numbers show it.
    """
    batch_size, num_classes = logits.shape[:2]
    probability = logits.softmax(1).reshape(batch_size, num_classes, -1)
    num_voxels = probability.shape[2]
    like = probability[:, 0].detach()
    valid = torch.ones_like(like)
    if annotations.outside.numel() > 0:
        valid = (~annotations.outside.reshape(batch_size, num_voxels)).to(like.dtype)

    item_of_point = torch.div(annotations.points, num_voxels, rounding_mode="floor")
    nobody = torch.zeros(batch_size, dtype=torch.bool, device=like.device)
    has_tags = (annotations.tags >= 0).any(1)
    has_boxes = nobody.index_fill(0, annotations.box_item, True)
    has_points = nobody.index_fill(0, item_of_point, True)
    is_point = torch.zeros_like(like, dtype=torch.bool).view(-1).index_fill(0, annotations.points, True).view_as(like)

    num_boxes = annotations.box_class.shape[0]
    box_size = torch.zeros_like(annotations.box_class).index_add(
        0, annotations.box_of_voxel, torch.ones_like(annotations.box_of_voxel)
    )
    box_counts = box_size > 1
    lines = like.new_zeros(num_boxes).index_add(0, annotations.line_box, torch.ones_like(annotations.line_box).to(like))

    ids: Tensor | None = None
    if target is not None:
        classes, known = masked_classes(target, batch_size, num_classes, ignore_label)
        ids = (torch.zeros_like(target) if components is None else components).reshape(batch_size, num_voxels).long()
        num_ids = int(ids.max()) + 1 if ids.numel() > 0 else 1

    totals = [probability.sum() * 0.0 for _ in range(4)]
    carriers = (has_tags.sum(), has_boxes.sum(), has_points.sum(), torch.full_like(has_tags.sum(), batch_size))
    for c in range(num_classes):
        p = probability[:, c]
        point_is_c = annotations.point_class == c

        # Weight of p_c and of every other class's p in the negatives.
        own = torch.zeros_like(valid)
        others = valid
        without = has_tags & (annotations.tags[:, c] != 1)
        own = torch.where(without[:, None], valid, own)
        of_class = box_counts & (annotations.box_class == c)
        in_box = annotations.box_voxels[of_class[annotations.box_of_voxel]]
        covered = torch.zeros_like(is_point).view(-1).index_fill(0, in_box, True).view_as(is_point)
        own = torch.where(has_boxes[:, None], valid - covered.to(like.dtype), own)
        others = torch.where(is_point, 1.0, others)
        own = torch.where(is_point, 1.0, own)
        own = own.reshape(-1).index_fill(0, annotations.points[point_is_c], 0.0).view_as(own)
        if ids is not None:
            has_mask = (known & (classes == c)).any(1)
            held = torch.zeros(num_ids, dtype=torch.bool, device=like.device)
            held = held.index_fill(0, ids.view(-1)[annotations.points[point_is_c]], True)
            held[0] = False
            own = torch.where(has_mask[:, None], valid - held[ids].to(valid.dtype), own)
            others = torch.where(has_mask[:, None], valid, others)
        log_negatives = ((others * (1 - p) + own * p).sum().clamp_min(0) + eps).log()

        # Positives: one log each.
        present = annotations.tags[:, c] == 1
        mean = (p * valid).sum(1) / valid.sum(1).clamp_min(1)
        image = (mean[present] + eps).log()

        at_box = p.reshape(-1).index_select(0, annotations.box_voxels)
        line = annotations.box_line.masked_fill(annotations.box_line < 0, annotations.line_box.shape[0])
        maxima = at_box.new_zeros(annotations.line_box.shape[0] + 1)
        maxima = maxima.scatter_reduce(0, line.view(-1), at_box[:, None].expand_as(line).reshape(-1), "amax")[:-1]
        total = like.new_zeros(num_boxes).index_add(0, annotations.line_box, maxima)
        box = (total[of_class] / lines[of_class].clamp_min(1) + eps).log()

        at_point = p.reshape(-1)[annotations.points[point_is_c]]
        point = (at_point + eps).log()

        mask = point[:0]
        if ids is not None:
            size = like.new_zeros(num_ids).index_add(0, ids.view(-1), torch.ones_like(p).view(-1))
            total = like.new_zeros(num_ids).index_add(0, ids.view(-1), p.reshape(-1))
            point_id = ids.view(-1)[annotations.points] * has_mask[item_of_point]
            point_id = point_id[point_is_c]
            point_id = point_id[point_id > 0]
            mask = (total[point_id] / size[point_id].clamp_min(1) + eps).log()

        for kind, (logs, carrying) in enumerate(zip((image, box, point, mask), carriers, strict=True)):
            if logs.numel() > 0:
                term = (log_negatives - (1 + logs.sum()) / logs.numel()) / ((c + 1) * carrying)
                totals[kind] = totals[kind] + term
    return totals[0], totals[1], totals[2], totals[3]
