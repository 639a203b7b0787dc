"""The four DSP losses as one writes them down first: loops over classes, items and objects, a mask for each.

The yardstick of `benchmark loss`; training uses losses.dsp_losses, which computes the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.losses import DSPLosses


def naive_dsp_losses(
    logits: Tensor,
    annotations: AnnotationBatch,
    target: Tensor,
    components: Tensor,
    allowed: Tensor,
    eps: float = 1e-7,
) -> DSPLosses:
    """Arguments and result as of losses.dsp_losses(); batches without `outside` voxels only, shapes without channel."""
    probability = logits.softmax(1)
    log_probability = logits.log_softmax(1)
    batch_size, num_classes = logits.shape[:2]
    num_voxels = logits[0, 0].numel()
    losses: list[Tensor] = []
    evidence: dict[str, list[Tensor]] = {}
    terms: dict[str, list[Tensor]] = {kind: [] for kind in DSPLosses._fields}
    for label in range(num_classes):
        negatives = (1 - probability[:, label] * allowed[:, label]).sum()
        evidence = {kind: [] for kind in DSPLosses._fields}
        for item in range(batch_size):
            here = probability[item, label]
            if annotations.tags[item, label] == 1:
                evidence["image"].append((here.mean() + eps).log())
            for box in range(len(annotations.box_class)):
                if int(annotations.box_item[box]) != item or int(annotations.box_class[box]) != label:
                    continue
                if not bool(annotations.box_tight[box]):
                    continue
                mine = annotations.box_of_voxel == box
                voxels = annotations.box_voxels[mine] - item * num_voxels
                values = here.reshape(-1)[voxels]
                maxima = []
                for axis in range(annotations.box_line.shape[1]):
                    line = annotations.box_line[mine, axis]
                    maxima += [values[line == number].max() for number in line.unique() if number >= 0]
                if maxima:
                    evidence["box"].append((torch.stack(maxima).mean() + eps).log())
            for point, owner in zip(annotations.points.tolist(), annotations.point_class.tolist(), strict=True):
                if owner == label and point // num_voxels == item:
                    evidence["point"].append(log_probability[item, label].reshape(-1)[point - item * num_voxels])
            for number in components[item].unique():
                component = components[item] == number
                if number > 0 and int(target[item][component][0]) == label:
                    evidence["mask"].append((here[component].mean() + eps).log())
        for kind, values_of_kind in evidence.items():
            if values_of_kind:
                terms[kind].append((negatives + eps).log() - torch.stack(values_of_kind).mean())
    for kind in DSPLosses._fields:
        losses.append(torch.stack(terms[kind]).mean() if terms[kind] else 0.0 * logits.sum())
    return DSPLosses(*losses)
