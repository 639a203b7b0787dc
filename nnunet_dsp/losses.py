"""The four DSP losses (image-level labels, boxes, points, masks), one pure function.

Pure torch: no nnU-Net, no files. The authors' code with its oddities is in released.py; the filter is in
pseudo_labels.py, the losses over what it allows are in set_losses.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.blocks import as_numbers, row_blocks
from nnunet_dsp.pseudo_labels import allowed_classes, class_index_of_boxes, flat_class_index, masked_classes
from nnunet_dsp.released import released_losses

VARIANTS = ("default", "released")


class DSPLosses(NamedTuple):
    """The four terms, each a scalar attached to the logits' graph, 0 where the batch holds no positive of its kind."""

    image: Tensor
    box: Tensor
    point: Tensor
    mask: Tensor


def dsp_losses(
    logits: Tensor,
    annotations: AnnotationBatch,
    *,
    target: Tensor | None = None,
    components: Tensor | None = None,
    allowed: Tensor | None = None,
    ignore_label: int | None = None,
    variant: str = "default",
    eps: float = 1e-7,
    num_components: int | None = None,
) -> DSPLosses:
    """The four DSP losses of a batch.

    With ``p = softmax(logits)``, V the voxels that are not outside, and allowed_c(x) the voxels that may be of class c:

        D_c    = log( sum over batch and V of (1 - p_c allowed_c) + eps )
        L_kind = mean over classes with a positive of that kind of ( D_c - mean of the log evidence for c )

    The log evidence, one for each positive:

    - image: a class tagged present in an item: log( mean of p_c over the item's V + eps );
    - box: a tight box of which at least one line is whole: log( mean over those lines of the maximum of p_c + eps );
    - point: log p_c at its voxel, from the log-softmax, so exact however small;
    - mask: a connected component of class c: log( mean of p_c over it + eps ).

    Voxels outside V count for nothing, whichever kind names them. `eps` keeps the logarithms of an evidence of 0 and
    of an empty D_c finite (a gradient of at most 1 / eps times a probability that vanishes with it).

    Args:
        logits: (B, C, *S), floating, 2 or 3 spatial axes; computed in float32, whatever the autocast (float64 for
            float64).
        annotations: of the same batch, on the same device.
        target: (B, *S) or (B, 1, *S), integer class map, `ignore_label` where nobody drew; None: no masks.
        components: (B, *S) or (B, 1, *S), integer, ids of the masks' connected components, unique within the batch,
            0 for none; its class is the target's. None: no mask positives.
        allowed: (B, C, *S) bool, from allowed_classes(), which makes it if None.
        ignore_label: see `target`.
        variant: "default", or "released" for the authors' code with its oddities (`allowed` is of no use there).
        eps: see above.
        num_components: the highest id in `components`; saves work and memory. None: ids number no more than voxels.

    Returns:
        DSPLosses, float32 (float64 for float64). Each is finite and differentiable for every batch.

    Raises:
        ValueError: the shapes do not belong together, or the variant is unknown.

    Source: Reiss et al., CVPR 2023. Differs from the released code: classes and positives weigh evenly, the
    negatives are where the class is not known to be absent rather than overwritten annotation by annotation, the
    logarithms are not offset by one, and every component of a mask is a positive, whether it holds a point or not.
    """
    _check_arguments(logits, annotations, target, components, allowed, variant)
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if variant == "released":
            terms = released_losses(
                scores, annotations, target=target, components=components, ignore_label=ignore_label, eps=eps
            )
            return DSPLosses(*terms)
        classes, shape = logits.shape[1], logits.shape[2:]
        box_index = class_index_of_boxes(annotations, classes, logits[0, 0].numel())
        if allowed is None:
            allowed = allowed_classes(annotations, target, classes, shape, ignore_label, box_index=box_index)
        return _default_losses(
            scores, annotations, target, components, allowed, ignore_label, eps, num_components, box_index
        )


def _check_arguments(
    logits: Tensor,
    annotations: AnnotationBatch,
    target: Tensor | None,
    components: Tensor | None,
    allowed: Tensor | None,
    variant: str,
) -> None:
    """From shapes only: values would need the device."""
    if variant not in VARIANTS:
        raise ValueError(f"Expected argument `variant` to be one of {', '.join(VARIANTS)}, but got {variant!r}.")
    shape = tuple(logits.shape)
    if len(shape) not in (4, 5):
        raise ValueError(f"Expected argument `logits` to be of shape (B, C, *S) in 2D or 3D, but got {shape}.")
    if tuple(annotations.tags.shape) != shape[:2]:
        raise ValueError(
            f"Expected argument `annotations` to be of {shape[0]} items and {shape[1]} classes as the logits are, but "
            f"got tags of shape {tuple(annotations.tags.shape)}."
        )
    for name, tensor in (("target", target), ("components", components)):
        if tensor is not None and tuple(tensor.shape) not in (shape[:1] + shape[2:], (*shape[:1], 1, *shape[2:])):
            raise ValueError(
                f"Expected argument `{name}` to be of shape {shape[:1] + shape[2:]}, with or without a channel axis, "
                f"but got {tuple(tensor.shape)}."
            )
    if components is not None and target is None:
        raise ValueError("Expected argument `target` to be given with `components`, but got None.")
    if allowed is not None and tuple(allowed.shape) != shape:
        raise ValueError(f"Expected argument `allowed` to be of shape {shape}, but got {tuple(allowed.shape)}.")


class _Reductions(torch.autograd.Function):
    """Everything the losses need of the logits, in one go: a softmax, two sums, and a few gathered values.

    Autograd would keep a tensor of the logits' size for each use of the probabilities and add their gradients up one
    by one. Here all uses share one softmax and one gradient, so the four losses cost a few passes over the logits and
    two tensors of their size, the probabilities and the gradient.

    forward(logits (B, C, R, W), allowed (B, C, R, W) bool, valid (B, 1, R, W) bool or None, box_index (M,) int64,
    line (M, D) int64 in [0, L], num_lines = L, point_index (P * C,) int64, component_class (B, 1, R, W) int64 or None)
    returns

    - negatives (B, C): sum over V of 1 - p allowed;
    - mass (B, C): sum over V of p;
    - line_maximum (L,): the largest p, among those at `box_index` (an index into the flat logits), of each line; -1 for
      a line that has none. Of several equal ones the last takes the gradient;
    - point_logits (P * C,): the logits at `point_index`;
    - component_probability (B, 1, R, W): p of `component_class`, or an empty tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        allowed: Tensor,
        valid: Tensor | None,
        box_index: Tensor,
        line: Tensor,
        num_lines: int,
        point_index: Tensor,
        component_class: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        probability = logits.softmax(1)
        mass = logits.new_zeros(logits.shape[:2])
        negatives = torch.zeros_like(mass)
        for rows in row_blocks(logits):
            inside = probability[:, :, rows]
            length: Tensor | int = logits.shape[3]
            if valid is not None:
                inside = inside * as_numbers(valid[:, :, rows], inside.dtype)
                length = valid[:, :, rows].sum(3)
            mass += inside.sum((2, 3))
            # Row by row: the difference to a row's length is exact enough to add up, that of a whole volume is not.
            kept = as_numbers(allowed[:, :, rows], inside.dtype).mul_(inside).sum(3)
            negatives += (length - kept).clamp_min_(0).sum(2)
        line_maximum, line_index = _largest_of_each_line(probability.view(-1), box_index, line, num_lines)
        point_logits = logits.reshape(-1).index_select(0, point_index)
        if component_class is None:
            component_probability = logits.new_zeros(0)
        else:
            component_probability = probability.gather(1, component_class)
        ctx.save_for_backward(
            probability, allowed, valid, line_maximum, line_index, point_index, component_class
        )
        ctx.set_materialize_grads(False)
        return negatives, mass, line_maximum, point_logits, component_probability

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        probability, allowed, valid, line_maximum, line_index, point_index, component_class = ctx.saved_tensors
        by_negatives, by_mass, by_line, by_point, by_component = gradients
        nothing = probability.new_zeros(probability.shape[:2])
        by_mass = (nothing if by_mass is None else by_mass)[:, :, None, None]
        by_allowed = (nothing if by_negatives is None else -by_negatives)[:, :, None, None]
        result = torch.empty_like(probability)
        # A gradient g at one class of one voxel adds p g to that class and takes p_k p g from each class k of the
        # voxel. What is taken is one number a voxel, so lines cost what they number, however many classes there are.
        by_entry = taken = None
        if by_line is not None and by_line.shape[0] > 0:
            num_classes, num_voxels = probability.shape[1], probability[0, 0].numel()
            by_entry = by_line * line_maximum.clamp_min(0)
            item = torch.div(line_index, num_classes * num_voxels, rounding_mode="floor")
            voxel = item * num_voxels + line_index % num_voxels
            taken = probability.new_zeros(probability.shape[0] * num_voxels).index_add_(0, voxel, by_entry)
            taken = taken.view_as(probability[:, :1])
        for rows in row_blocks(probability):
            # The backward pass of softmax: p (g - sum of p g).
            block = probability[:, :, rows]
            gradient = as_numbers(allowed[:, :, rows], block.dtype).mul_(by_allowed).add_(by_mass)
            if valid is not None:
                gradient.mul_(as_numbers(valid[:, :, rows], block.dtype))
            if by_component is not None and component_class is not None:
                gradient.scatter_add_(1, component_class[:, :, rows], by_component[:, :, rows])
            total = (gradient * block).sum(1, keepdim=True)
            if taken is not None:
                total += taken[:, :, rows]
            torch.mul(gradient.sub_(total), block, out=result[:, :, rows])
        if by_entry is not None:
            result.view(-1).index_add_(0, line_index, by_entry)
        if by_point is not None:
            result.view(-1).index_add_(0, point_index, by_point)
        return result, None, None, None, None, None, None, None


def _largest_of_each_line(
    probability: Tensor, box_index: Tensor, line: Tensor, num_lines: int
) -> tuple[Tensor, Tensor]:
    """The largest probability of each line and where it stands; no gradient.

    Args:
        probability: one line of numbers in [0, 1].
        box_index: (M,) int64, into `probability`.
        line: (M, D) int64, in [0, num_lines]; the last stands for "none".
        num_lines: L.

    Returns:
        maximum (L,), -1 for a line without a voxel; index (L,) int64 into `probability`, 0 for such a line.
    """
    if num_lines == 0:
        return probability[:0], box_index[:0]
    value = probability.index_select(0, box_index)
    if value.dtype == torch.float32:
        # Numbers of at least 0 sort as their bits do: one reduction finds the largest and, in the lower half, where.
        key = (value.view(torch.int32).long() << 32) | torch.arange(box_index.shape[0], device=line.device)
        best = key.new_full((num_lines + 1,), -1)
        for axis in line.unbind(1):
            best.scatter_reduce_(0, axis, key, "amax")
        best = best[:num_lines]
        filled = best >= 0
        maximum = torch.where(filled, (best >> 32).to(torch.int32).view(torch.float32), -1.0)
        winner = best & 0xFFFFFFFF
    else:
        line_of_entry = line.reshape(-1)
        entry = torch.arange(box_index.shape[0], device=line.device)[:, None].expand_as(line).reshape(-1)
        value = value[:, None].expand_as(line).reshape(-1)
        maximum = value.new_full((num_lines + 1,), -1.0).scatter_reduce(0, line_of_entry, value, "amax")
        largest = value == maximum.index_select(0, line_of_entry)
        winner = line_of_entry.new_zeros(num_lines + 1)
        winner = winner.scatter_reduce(0, line_of_entry, torch.where(largest, entry, 0), "amax")[:num_lines]
        maximum = maximum[:num_lines]
        filled = maximum >= 0
    return maximum, box_index.index_select(0, winner * filled) * filled


def _default_losses(
    logits: Tensor,
    annotations: AnnotationBatch,
    target: Tensor | None,
    components: Tensor | None,
    allowed: Tensor,
    ignore_label: int | None,
    eps: float,
    num_components: int | None,
    box_index: Tensor,
) -> DSPLosses:
    batch_size, num_classes = logits.shape[:2]
    rows = (batch_size, num_classes, -1, logits.shape[-1])
    num_voxels = logits[0, 0].numel()
    valid = ~annotations.outside.reshape(batch_size, 1, -1, logits.shape[-1]) if annotations.outside.numel() else None

    known: Tensor | None = None
    classes: Tensor | None = None
    if components is not None and target is not None:
        classes, known = masked_classes(target, batch_size, num_classes, ignore_label)
        known = known & (components.reshape(batch_size, num_voxels) > 0)
        if valid is not None:
            known = known & valid.view(batch_size, num_voxels)
        classes = classes.long() * known

    every_class = torch.arange(num_classes, device=logits.device)
    num_lines = annotations.line_box.shape[0]
    line = annotations.box_line
    skipped = line < 0
    if valid is not None:
        skipped = skipped | ~valid.view(-1).index_select(0, annotations.box_voxels)[:, None]
    line = line.masked_fill(skipped, num_lines)  # one line more, for what belongs to none
    negatives, mass, line_maximum, point_logits, component_probability = _Reductions.apply(
        logits.contiguous().view(rows),
        allowed.contiguous().view(rows),
        valid,
        box_index,
        line,
        num_lines,
        flat_class_index(annotations.points[:, None], every_class, num_classes, num_voxels).view(-1),
        None if classes is None else classes.view(batch_size, 1, -1, logits.shape[-1]),
    )
    log_negatives = (negatives.sum(0) + eps).log()

    # Image-level labels: a positive for each class of each item.
    if valid is None:
        num_valid = torch.full((batch_size, 1), num_voxels, dtype=mass.dtype, device=mass.device)
    else:
        num_valid = valid.view(batch_size, -1).sum(1, keepdim=True).to(mass.dtype)
    evidence = (mass / num_valid.clamp_min(1) + eps).log()
    present = (annotations.tags == 1) & (num_valid > 0)
    image = _mean_over_classes(log_negatives, (evidence * present).sum(0), present.sum(0))

    # Boxes: a positive for each tight box with a whole line.
    evidence, counts = _box_evidence(line_maximum, annotations, eps)
    box = _mean_over_positives(log_negatives, evidence, annotations.box_class, counts)

    # Points: a positive for each.
    log_probability = F.log_softmax(point_logits.view(-1, num_classes), 1)
    evidence = log_probability.gather(1, annotations.point_class[:, None])[:, 0]
    seen = torch.ones_like(annotations.points, dtype=torch.bool)
    if valid is not None:
        seen = valid.view(-1).index_select(0, annotations.points)
    point = _mean_over_positives(log_negatives, evidence, annotations.point_class, seen)

    # Masks: a positive for each connected component.
    if components is None or known is None or classes is None:
        mask = 0.0 * log_negatives.sum()
    else:
        num_slots = 1 + (components.numel() if num_components is None else num_components)
        slot = (components.reshape(-1).long() * known.view(-1)).clamp_max(num_slots - 1)
        total = logits.new_zeros(num_slots).index_add(0, slot, component_probability.reshape(-1))
        size = logits.new_zeros(num_slots).index_add(0, slot, torch.ones_like(component_probability).reshape(-1))
        slot_class = torch.zeros_like(slot[:1]).expand(num_slots).scatter_reduce(0, slot, classes.view(-1), "amax")
        evidence = (total / size.clamp_min(1) + eps).log()
        counts = size > 0
        counts[0] = False  # voxels without a component
        mask = _mean_over_positives(log_negatives, evidence, slot_class, counts)
    return DSPLosses(image, box, point, mask)


def _box_evidence(line_maximum: Tensor, annotations: AnnotationBatch, eps: float) -> tuple[Tensor, Tensor]:
    """Log evidence of each box: the mean, over its whole lines, of the largest probability in each.

    A tight box promises its class at least once in every line it spans, but not where in it; the maxima ask for
    exactly that promise.

    Args:
        line_maximum: (L,), the largest probability of its box's class in each line; negative: the line has no voxel.
        annotations: its boxes and lines.
        eps: added to the mean.

    Returns:
        evidence (K,); counts (K,) bool: the box is tight and has a whole line.
    """
    num_boxes = annotations.box_class.shape[0]
    filled = line_maximum >= 0
    total = line_maximum.new_zeros(num_boxes).index_add(0, annotations.line_box, line_maximum * filled)
    lines = line_maximum.new_zeros(num_boxes).index_add(0, annotations.line_box, filled.to(line_maximum.dtype))
    return (total / lines.clamp_min(1) + eps).log(), annotations.box_tight & (lines > 0)


def _mean_over_positives(log_negatives: Tensor, evidence: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """`_mean_over_classes` of positives that stand in a list: evidence (N,), classes (N,), counts (N,) bool."""
    weight = counts.to(evidence.dtype)
    total = torch.zeros_like(log_negatives).index_add(0, classes, evidence * weight)
    number = torch.zeros_like(log_negatives).index_add(0, classes, weight)
    return _mean_over_classes(log_negatives, total, number)


def _mean_over_classes(log_negatives: Tensor, total: Tensor, number: Tensor) -> Tensor:
    """Mean, over the classes with a positive, of D_c minus the mean log evidence.

    Args:
        log_negatives: (C,), D_c.
        total: (C,), sum of the log evidence of each class's positives.
        number: (C,), how many there are.
    """
    has = number > 0
    terms = (log_negatives - total / number.clamp_min(1)) * has
    return terms.sum() / has.sum().clamp_min(1)


class DSPLoss(nn.Module):
    """The weighted sum of the four DSP losses, and the four themselves for the log.

    Args:
        image, box, point, mask: weight of each kind.
        ignore_label, variant, eps: see dsp_losses().
    """

    def __init__(
        self,
        *,
        image: float = 1.0,
        box: float = 1.0,
        point: float = 1.0,
        mask: float = 1.0,
        ignore_label: int | None = None,
        variant: str = "default",
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"Expected argument `variant` to be one of {', '.join(VARIANTS)}, but got {variant!r}.")
        self.weights = {"image": image, "box": box, "point": point, "mask": mask}
        self.ignore_label = ignore_label
        self.variant = variant
        self.eps = eps

    def forward(
        self,
        logits: Tensor,
        annotations: AnnotationBatch,
        target: Tensor | None = None,
        components: Tensor | None = None,
        allowed: Tensor | None = None,
        num_components: int | None = None,
    ) -> tuple[Tensor, DSPLosses]:
        """The weighted sum (scalar) and its unweighted terms; arguments as of dsp_losses()."""
        losses = dsp_losses(
            logits,
            annotations,
            target=target,
            components=components,
            allowed=allowed,
            ignore_label=self.ignore_label,
            variant=self.variant,
            eps=self.eps,
            num_components=num_components,
        )
        total = torch.stack([weight * getattr(losses, kind) for kind, weight in self.weights.items()]).sum()
        return total, losses
