"""Random batches for the timing benchmarks: logits, masks and annotations of any size, by seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.data import mask_components


class RandomBatch(NamedTuple):
    """A batch of B items, C classes, V voxels each.

    Attributes:
        logits: (B, C, *S) float32, requires a gradient.
        labels: (B, *S) int64, a class for each voxel, for the cross entropy that serves as baseline.
        target: (B, *S) int16, classes in the first items and the ignore label C in the others.
        components: (B, *S) int32; num_components: the highest id.
        annotations: tags for every item, boxes and points for those without mask.
    """

    logits: Tensor
    labels: Tensor
    target: Tensor
    components: Tensor
    num_components: int
    annotations: AnnotationBatch


def random_batch(
    batch_size: int,
    num_classes: int,
    shape: Sequence[int],
    *,
    num_boxes: int,
    num_points: int,
    sides: tuple[int, int],
    num_masked: int,
    seed: int,
    device: torch.device,
) -> RandomBatch:
    """A batch in which everything occurs that the losses deal with.

    Masks are blocks of one class, an eighth of the image wide. Boxes lie in the items without mask, anywhere, and may
    overlap; those of half of the classes are complete.

    Args:
        sides: shortest and longest side of a box in voxels, both included.
        num_masked: how many items carry a mask; fewer than `batch_size`.
    """
    rng = np.random.default_rng(seed)
    dim = len(shape)
    num_voxels = int(np.prod(shape))
    blocks = rng.integers(0, num_classes, (num_masked, *[8] * dim))
    target = np.full((batch_size, *shape), num_classes, dtype=np.int16)
    components = np.zeros((batch_size, *shape), dtype=np.int32)
    where = np.ix_(*[np.arange(size) * 8 // size for size in shape])
    count = 0
    for item in range(num_masked):
        target[item] = blocks[item][where]
        ids = mask_components(target[item], num_classes).astype(np.int32)
        components[item] = ids + count
        count += int(ids.max())

    voxels, of_voxel, lines, line_box = [], [], [], []
    num_lines = 0
    box_item = rng.integers(num_masked, batch_size, num_boxes)
    size = rng.integers(sides[0], sides[1] + 1, (num_boxes, dim))
    start = (rng.random((num_boxes, dim)) * (np.asarray(shape) - size + 1)).astype(np.int64)
    for box in range(num_boxes):
        inside = np.indices(tuple(size[box])).reshape(dim, -1)
        flat = np.ravel_multi_index(tuple(inside + start[box][:, None]), tuple(shape))
        voxels.append(flat + box_item[box] * num_voxels)
        of_voxel.append(np.full(len(flat), box))
        first = num_lines + np.concatenate([[0], np.cumsum(size[box])[:-1]])
        lines.append(inside.T + first)
        line_box.append(np.full(size[box].sum(), box))
        num_lines += int(size[box].sum())

    def index(arrays: list[np.ndarray] | np.ndarray, width: int = 0) -> Tensor:
        empty = np.zeros((0, width) if width else 0, np.int64)
        joined = np.concatenate(arrays) if isinstance(arrays, list) and arrays else arrays
        return torch.from_numpy(np.asarray(joined if len(joined) else empty, dtype=np.int64)).to(device)

    points = rng.integers(num_masked * num_voxels, batch_size * num_voxels, num_points)
    complete = torch.zeros(batch_size, num_classes, dtype=torch.bool)
    complete[num_masked:, ::2] = num_boxes > 0
    annotations = AnnotationBatch.empty(batch_size, num_classes, dim)._replace(
        tags=torch.from_numpy(rng.choice([-1, 1, 1, 0], (batch_size, num_classes)).astype(np.int8)),
        points=index(points),
        point_class=index(rng.integers(0, num_classes, num_points)),
        box_item=index(box_item),
        box_class=index(rng.integers(0, num_classes, num_boxes)),
        box_tight=torch.ones(num_boxes, dtype=torch.bool),
        box_voxels=index(voxels),
        box_of_voxel=index(of_voxel),
        box_line=index(lines, dim),
        line_box=index(line_box),
        complete_boxes=complete,
    )
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch_size, num_classes, *shape, generator=generator).to(device).requires_grad_()
    labels = torch.randint(0, num_classes, (batch_size, *shape), generator=generator).to(device)
    return RandomBatch(
        logits,
        labels,
        torch.from_numpy(target).to(device),
        torch.from_numpy(components).to(device),
        count,
        annotations.to(device),
    )
