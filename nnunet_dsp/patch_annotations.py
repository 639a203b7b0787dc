"""What annotations say about a case and about one training patch of it, up to the compact AnnotationBatch.

CaseAnnotations holds a case's annotations in the coordinates of its preprocessed array; PatchAnnotations what holds in
one patch of it. Arrays only: nothing here reads files or knows nnU-Net.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnunet_dsp.annotations import Annotations, LabelNames
from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.geometry import CaseFrame, FloatArray, IntArray, PatchMap, box_lines

PRESENT, ABSENT, UNKNOWN = 1, 0, -1


@dataclass(frozen=True)
class CaseAnnotations:
    """One case's annotations in the coordinates of its preprocessed array (always three axes; 2D has one slice).

    Attributes:
        shape: (3,) voxels of the case.
        tags: (C,) int8; 1 present somewhere in the case, 0 absent, -1 unknown.
        points: (P, 3) float64 positions. point_class: (P,) int64.
        boxes: (K, 2, 3) float64 spans between voxel faces. box_class: (K,) int64. box_tight: (K,) bool.
        complete_boxes: (C,) bool. listed: (C,) bool, the classes the annotator of the mask drew.
    """

    shape: IntArray
    tags: npt.NDArray[np.int8]
    points: FloatArray
    point_class: IntArray
    boxes: FloatArray
    box_class: IntArray
    box_tight: npt.NDArray[np.bool_]
    complete_boxes: npt.NDArray[np.bool_]
    listed: npt.NDArray[np.bool_]

    @property
    def needs_map(self) -> bool:
        """Whether what holds in a patch depends on where the patch lies."""
        return bool(len(self.points) or len(self.boxes) or (self.tags == PRESENT).any() or not self.listed.all())

    def locations(self, rng: Any = np.random) -> dict[int, IntArray]:
        """Voxels to centre patches on, by class, in the form of nnU-Net's ``class_locations``: (N, 4), channel first.

        Of a box, a voxel is drawn at random each time, so that no patch is centred on the same one for ever.
        """
        span = self.boxes[:, 1] - self.boxes[:, 0]
        inside = self.boxes[:, 0] + span * rng.uniform(size=span.shape)
        positions = np.concatenate([self.points, inside])
        voxels = np.clip(np.floor(positions + 0.5).astype(np.int64), 0, self.shape - 1)
        voxels = np.concatenate([np.zeros((len(voxels), 1), np.int64), voxels], axis=1)
        classes = np.concatenate([self.point_class, self.box_class])
        return {int(c): voxels[classes == c] for c in np.unique(classes)}


def map_case(annotations: Annotations, labels: LabelNames, frame: CaseFrame) -> CaseAnnotations:
    """Annotations of the image file as annotations of the preprocessed case.

    Everything that follows for the whole case is drawn here: a class all of whose objects carry a point (or a box),
    none being there, is absent.
    """
    num_classes = len(labels.names)

    def indices(names: Sequence[str]) -> IntArray:
        return np.asarray([labels.index(name) for name in names], dtype=np.int64)

    def coordinates(rows: Sequence[Sequence[float]], slice_value: float) -> FloatArray:
        array = np.asarray(rows, dtype=np.float64).reshape(len(rows), len(rows[0]) if rows else 3)
        if array.shape[1] == 2:
            array = np.concatenate([np.full((len(array), 1), slice_value), array], axis=1)
        return array.reshape(len(rows), 3)

    point_class = indices([point.label for point in annotations.points])
    box_class = indices([box.label for box in annotations.boxes])
    points = frame.points(coordinates([point.at for point in annotations.points], 0.0))
    # a point drawn on the image's outer face belongs to the voxel it touches
    points = np.clip(points, -0.499, frame.shape - 0.501) if len(points) and (frame.offset == 0).all() else points
    starts = coordinates([box.start for box in annotations.boxes], 0.0)
    stops = coordinates([box.stop for box in annotations.boxes], 1.0)
    boxes = frame.boxes(np.stack([starts, stops], axis=1))

    tags = np.full(num_classes, UNKNOWN, dtype=np.int8)
    for names, seen in ((annotations.complete_points, point_class), (annotations.complete_boxes, box_class)):
        complete = indices(names)
        tags[np.setdiff1d(complete, np.concatenate([point_class, box_class, seen]))] = ABSENT
    tags[indices(annotations.present)] = PRESENT
    tags[indices(annotations.absent)] = ABSENT

    kept = ((points >= -0.5) & (points <= frame.shape - 0.5)).all(axis=1)  # the others nnU-Net cropped off with zeros
    points, point_class = points[kept], point_class[kept]

    complete_boxes = np.zeros(num_classes, dtype=np.bool_)
    complete_boxes[indices(annotations.complete_boxes)] = True
    listed = np.ones(num_classes, dtype=np.bool_)
    if annotations.mask_labels is not None:
        listed[:] = False
        listed[indices(annotations.mask_labels)] = True
        listed[0] = True
    return CaseAnnotations(
        shape=frame.shape,
        tags=tags,
        points=points,
        point_class=point_class,
        boxes=boxes,
        box_class=box_class,
        box_tight=np.asarray([box.tight for box in annotations.boxes], dtype=np.bool_),
        complete_boxes=complete_boxes,
        listed=listed,
    )


@dataclass
class PatchAnnotations:
    """What is known about one patch, before collation; fields as in AnnotationBatch, voxels counted from 0."""

    tags: npt.NDArray[np.int8]
    complete_boxes: npt.NDArray[np.bool_]
    listed: npt.NDArray[np.bool_]
    points: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    point_class: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    box_class: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    box_tight: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    box_voxels: list[IntArray] = field(default_factory=list)
    box_lines: list[IntArray] = field(default_factory=list)
    box_num_lines: list[int] = field(default_factory=list)
    partial: npt.NDArray[np.bool_] | None = None
    outside: npt.NDArray[np.bool_] | None = None

    @classmethod
    def unknown(cls, num_classes: int) -> PatchAnnotations:
        return cls(
            tags=np.full(num_classes, UNKNOWN, np.int8),
            complete_boxes=np.zeros(num_classes, np.bool_),
            listed=np.ones(num_classes, np.bool_),
        )


def annotate_patch(
    case: CaseAnnotations,
    patch: PatchMap | None,
    target: npt.NDArray[np.integer[Any]],
    drawn_background: npt.NDArray[np.bool_] | None = None,
    crop_start: Sequence[int] = (0, 0, 0),
    ignored_value: int = -1,
) -> PatchAnnotations:
    """What a case's annotations say about one patch of it.

    Args:
        case: the case's annotations.
        patch: where the patch's voxels came from; None only where the case does not need it.
        target: (*patch) integer class map after augmentation.
        drawn_background: (*crop) bool, before augmentation: voxels the annotator of a partial mask left as background.
        crop_start: first voxel of that crop, in the case, 3 entries.
        ignored_value: what the target holds where nothing was drawn.
    """
    result = PatchAnnotations(case.tags.copy(), case.complete_boxes, case.listed)
    if patch is None:
        return result
    dim = patch.dim
    in_slice: Callable[[FloatArray], Any] = lambda z: np.abs(z - patch.slice_index) <= 0.5  # noqa: E731

    points, point_class = case.points, case.point_class
    if dim == 2 and len(points):
        shown = in_slice(points[:, 0])
        points, point_class = points[shown], point_class[shown]
    voxels, visible = patch.locate(points[:, 3 - dim :])
    result.points = np.ravel_multi_index(tuple(voxels[visible].T), tuple(patch.shape)).astype(np.int64)
    result.point_class = point_class[visible]

    whole_boxes: list[int] = []
    if len(case.boxes):
        whole_boxes = _annotate_boxes(case, patch, result)

    result.outside = patch.outside()

    if drawn_background is not None:
        source = patch.source()
        index = []
        for axis in range(dim):
            nearest = np.floor(source[axis] + 0.5).astype(np.int64) - int(crop_start[3 - dim + axis])
            index.append(np.clip(nearest, 0, drawn_background.shape[axis] - 1))
        result.partial = drawn_background[tuple(index)] & (target == ignored_value)
        if result.outside is not None:
            result.partial &= ~result.outside

    claimed = np.flatnonzero(case.tags == PRESENT)
    if len(claimed) and not _whole_case_shown(case, patch):
        shown_classes = set(result.point_class.tolist()) | {int(case.box_class[k]) for k in whole_boxes}
        for c in claimed:
            if int(c) not in shown_classes and not (target == c).any():
                result.tags[c] = UNKNOWN
    return result


def _whole_case_shown(case: CaseAnnotations, patch: PatchMap) -> bool:
    return (patch.dim == 3 or case.shape[0] == 1) and patch.shows_whole_case()


def _annotate_boxes(case: CaseAnnotations, patch: PatchMap, result: PatchAnnotations) -> list[int]:
    """Fills the boxes of a patch; returns the numbers of those of the case's boxes that lie wholly in the patch."""
    dim = patch.dim
    candidates = np.arange(len(case.boxes))
    if dim == 2:
        z = float(patch.slice_index)
        candidates = candidates[(case.boxes[:, 0, 0] <= z) & (case.boxes[:, 1, 0] > z)]
    spans = case.boxes[:, :, 3 - dim :]
    candidates = candidates[patch.spans_touch(spans[candidates])]
    complete = patch.spans_visible(spans[candidates])
    whole, kept = [], []
    for k, all_of_it in zip(candidates.tolist(), complete.tolist(), strict=True):
        straight = patch.straight_box(spans[k], all_of_it)
        flat, source = patch.voxels_in(spans[k]) if straight is None else (straight[0], None)
        if len(flat) == 0:
            continue
        through_one_slice = dim == 3 or case.boxes[k, 1, 0] - case.boxes[k, 0, 0] <= 1 + 1e-6
        if through_one_slice and straight is not None:
            _, lines, count = straight
        elif through_one_slice and source is not None:
            lines, count = box_lines(patch, spans[k], source, all_of_it)
        else:  # one slice of a 3D box: the object shows in it once, but not in each of its rows and columns
            lines = np.full((len(flat), dim), -1, dtype=np.int64)
            count = 0
            if all_of_it:
                lines[:, 0], count = 0, 1
        kept.append(k)
        if all_of_it:
            whole.append(k)
        result.box_voxels.append(flat)
        result.box_lines.append(lines)
        result.box_num_lines.append(count)
    result.box_class = case.box_class[kept]
    result.box_tight = case.box_tight[kept]
    # a loose box wholly inside the patch shows its object too; a slice of a 3D box shows it only where it is tight
    return [k for k in whole if dim == 3 or case.box_tight[k] or case.shape[0] == 1]


def collate(patches: Sequence[PatchAnnotations], spatial_shape: Sequence[int]) -> AnnotationBatch:
    """One AnnotationBatch from the patches of a batch, in the batch's order."""
    size, dim = int(np.prod(spatial_shape)), len(spatial_shape)

    def joined(arrays: Sequence[npt.NDArray[Any]], empty: tuple[int, ...], dtype: Any) -> Tensor:
        kept = [array for array in arrays if len(array)]
        return torch.from_numpy(np.concatenate(kept).astype(dtype, copy=False) if kept else np.zeros(empty, dtype))

    def dense(masks: Sequence[npt.NDArray[np.bool_] | None]) -> Tensor:
        if all(mask is None for mask in masks):
            return torch.zeros(0, dtype=torch.bool)
        blank = np.zeros(tuple(spatial_shape), np.bool_)
        return torch.from_numpy(np.stack([blank if mask is None else mask for mask in masks]))

    box_voxels, box_of_voxel, box_line, line_box, box_item = [], [], [], [], []
    boxes = lines = 0
    for item, patch in enumerate(patches):
        for flat, line, count in zip(patch.box_voxels, patch.box_lines, patch.box_num_lines, strict=True):
            box_voxels.append(flat + item * size)
            box_of_voxel.append(np.full(len(flat), boxes, np.int64))
            box_line.append(np.where(line >= 0, line + lines, -1))
            line_box.append(np.full(count, boxes, np.int64))
            box_item.append(np.asarray([item], np.int64))
            boxes += 1
            lines += count
    return AnnotationBatch(
        tags=torch.from_numpy(np.stack([patch.tags for patch in patches])),
        points=joined([patch.points + i * size for i, patch in enumerate(patches)], (0,), np.int64),
        point_class=joined([patch.point_class for patch in patches], (0,), np.int64),
        box_item=joined(box_item, (0,), np.int64),
        box_class=joined([patch.box_class for patch in patches], (0,), np.int64),
        box_tight=joined([patch.box_tight for patch in patches], (0,), np.bool_),
        box_voxels=joined(box_voxels, (0,), np.int64),
        box_of_voxel=joined(box_of_voxel, (0,), np.int64),
        box_line=joined(box_line, (0, dim), np.int64),
        line_box=joined(line_box, (0,), np.int64),
        complete_boxes=torch.from_numpy(np.stack([patch.complete_boxes for patch in patches])),
        listed=torch.from_numpy(np.stack([patch.listed for patch in patches])),
        partial=dense([patch.partial for patch in patches]),
        outside=dense([patch.outside for patch in patches]),
    )
