"""Annotations beside masks: from annotation files to the compact AnnotationBatch, inside nnU-Net's own dataloader.

CaseAnnotations is a case's annotation in the coordinates of its preprocessed array; DSPDataLoader is nnU-Net's loader
with three things added: which cases a batch holds, where patches are centred, and what is known about each patch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor

from nnunet_dsp.annotations import AnnotationError, Annotations, LabelNames
from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.geometry import CaseFrame, FloatArray, IntArray, PatchMap, box_lines, coordinate_channels

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

    outside = patch.outside()
    result.outside = outside if outside.any() else None

    if drawn_background is not None:
        source = patch.source()
        index = []
        for axis in range(dim):
            nearest = np.floor(source[axis] + 0.5).astype(np.int64) - int(crop_start[3 - dim + axis])
            index.append(np.clip(nearest, 0, drawn_background.shape[axis] - 1))
        result.partial = drawn_background[tuple(index)] & ~outside & (target == ignored_value)

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
        flat, source = patch.voxels_in(spans[k])
        if len(flat) == 0:
            continue
        through_one_slice = dim == 3 or case.boxes[k, 1, 0] - case.boxes[k, 0, 0] <= 1 + 1e-6
        if through_one_slice:
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


def mask_components(target: npt.NDArray[np.integer[Any]], ignore_label: int | None) -> npt.NDArray[np.uint32]:
    """Connected components of a class map, background included: ids 1..N, 0 where the mask says nothing.

    Neighbours share a face (4 in 2D, 6 in 3D); touching components of different classes stay apart.

    Args:
        target: (*spatial) integer class map.
    """
    classes = (target + 1).astype(np.uint16)
    if ignore_label is not None:
        classes[target == ignore_label] = 0
    ids = cc3d.connected_components(classes, connectivity=4 if classes.ndim == 2 else 6)
    return np.asarray(ids, dtype=np.uint32)


class DSPDataLoader(nnUNetDataLoader):
    """nnU-Net's loader, with annotations beside the masks.

    Cases with at least one annotated mask voxel are *masked*, the others *weak*. A batch holds a stated share of
    masked cases, at its end; the rest are weak. Patches of weak cases are centred on a random point or box as often
    as nnU-Net centres those of masked cases on foreground, and lie anywhere otherwise.

    The batch has, beside nnU-Net's entries:
        annotations: list of tensors, see AnnotationBatch.from_list.
        num_masked: int, how many of the last items carry a mask.
        components: (B, *S) int32 ids of the masks' connected components, numbered through the batch, only where asked
            for; num_components: int.

    Args:
        annotations: by case, in case coordinates; cases without an entry have none.
        weak_cases: the cases whose mask is the ignore label all over.
        masked_fraction: share of masked cases in a batch, in [0, 1]; where it gives no whole number, batches take
            turns at random so that the share holds on average.
        num_classes: channels of the network, background included.
        ignore_label: the dataset's, or None.
        with_components: whether to label the masks' connected components.
        seed: None for nnU-Net's own randomness; else the n-th batch is a function of (seed, n) alone, for any number
            of workers.
        first_batch: number of the first batch, to take up an interrupted run.
        num_workers: processes among which the batches are dealt in turn.
        stream: keeps the random numbers of several loaders (and DDP ranks) apart.
        All others: see nnUNetDataLoader.
    """

    transforms: Any
    has_ignore: bool

    def __init__(
        self,
        *args: Any,
        annotations: Mapping[str, CaseAnnotations],
        weak_cases: Collection[str],
        masked_fraction: float,
        num_classes: int,
        ignore_label: int | None,
        with_components: bool = False,
        seed: int | None = None,
        first_batch: int = 0,
        num_workers: int = 1,
        stream: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        weak = frozenset(weak_cases)
        if weak and ignore_label is None:
            raise ValueError("Expected argument `weak_cases` to be empty for a dataset without ignore label.")
        for case, said in annotations.items():
            if ignore_label is None and not said.listed.all():
                raise AnnotationError(
                    f"{case}: `mask_labels` leaves classes out, so parts of the mask are unknown, but dataset.json "
                    "declares no ignore label. Run `nnunet_dsp prepare`, which declares one, and preprocess again."
                )
        self._annotations = annotations
        self._weak = [case for case in self.indices if case in weak]
        self._masked = [case for case in self.indices if case not in weak]
        self._masked_fraction = masked_fraction
        self._num_classes = num_classes
        self._ignore_label = ignore_label
        self._ignored_value = -1 if ignore_label is None else ignore_label
        self._with_components = with_components
        self._batch_seed = seed
        self._first_batch = first_batch
        self._num_workers = max(1, num_workers)
        self._stream = stream
        self._generated = 0
        self._augment = self.transforms
        self.transforms = self._augment_sample
        self._probabilistic = bool(kwargs.get("probabilistic_oversampling", False))
        self.get_do_oversample = self._oversample_within_group
        self._cases: list[str] = []
        self._num_masked = 0
        self._crop: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._patches: list[PatchAnnotations] = []
        self._components: list[npt.NDArray[np.uint32] | None] = []
        self._position = 0

    # --- which cases, and where in them

    def get_indices(self) -> list[str]:
        """Weak cases first, masked ones last."""
        self._num_masked = self._draw_num_masked()
        num_weak = self.batch_size - self._num_masked
        drawn = [str(case) for case in np.random.choice(self._weak, num_weak)] if num_weak else []
        drawn += [str(case) for case in np.random.choice(self._masked, self._num_masked)] if self._num_masked else []
        self._cases = drawn
        return drawn

    def _draw_num_masked(self) -> int:
        if not self._weak:
            return int(self.batch_size)
        if not self._masked:
            return 0
        exact = self.batch_size * self._masked_fraction
        return int(exact) + int(np.random.uniform() < exact - int(exact))

    def _oversample_within_group(self, sample_idx: int) -> bool:
        """nnU-Net's rule, applied to the weak and to the masked items of the batch separately."""
        if self._probabilistic:
            return bool(np.random.uniform() < self.oversample_foreground_percent)
        num_weak = self.batch_size - self._num_masked
        first, size = (0, num_weak) if sample_idx < num_weak else (num_weak, self._num_masked)
        return not sample_idx - first < round(size * (1 - self.oversample_foreground_percent))

    def get_bbox(
        self, data_shape: Any, force_fg: bool, class_locations: Any, overwrite_class: Any = None, verbose: bool = False
    ) -> Any:
        """nnU-Net's for masked cases; for weak ones, centred on an annotation where foreground is asked for."""
        if self._position < self.batch_size - self._num_masked:
            class_locations, force_fg = self._weak_locations(force_fg)
            has_ignore, self.has_ignore = self.has_ignore, False
            bbox = super().get_bbox(data_shape, force_fg, class_locations, overwrite_class, verbose)
            self.has_ignore = has_ignore
        else:
            bbox = super().get_bbox(data_shape, force_fg, class_locations, overwrite_class, verbose)
        self._crop = (tuple(int(low) for low in bbox[0]), tuple(int(size) for size in data_shape))
        return bbox

    def _weak_locations(self, force_fg: bool) -> tuple[dict[int, IntArray] | None, bool]:
        case = self._annotations.get(self._cases[self._position])
        if not force_fg or case is None:
            return None, False
        locations = case.locations()
        return (locations, True) if locations else (None, False)

    # --- what is known about each patch

    def _augment_sample(self, image: Tensor, segmentation: Tensor) -> dict[str, Any]:
        """nnU-Net's transforms for one sample, and what its annotations say about the patch that comes out."""
        case = self._annotations.get(self._cases[self._position])
        weak = self._position < self.batch_size - self._num_masked
        self._position += 1
        dim = image.ndim - 1
        start, shape = self._crop
        drawn_background = None
        if case is not None and not weak and not case.listed.all():
            drawn_background = (segmentation[0] == 0).numpy()
            segmentation = segmentation.clone()
            segmentation[0][segmentation[0] == 0] = self._ignored_value
        sample: dict[str, Any] = {"image": image, "segmentation": segmentation}
        if (case is not None and case.needs_map) or (weak and self._sticks_out(start, image.shape[1:], shape)):
            sample["regression_target"] = coordinate_channels(start, image.shape[1:], dim)
        mapped = "regression_target" in sample
        if self._augment is not None:
            sample = self._augment(**sample)
        patch = None
        if mapped:
            moved = sample.pop("regression_target", None)
            if moved is None:
                raise RuntimeError(
                    "A transform dropped the coordinate map ('regression_target') that carries the annotations. "
                    "Custom transforms must pass regression_target on, as batchgeneratorsv2's own do."
                )
            patch = PatchMap(moved, shape, start[0])
        segmentations = sample["segmentation"]
        segmentations = segmentations if isinstance(segmentations, list) else [segmentations]
        if weak:  # whatever padding became on the way, nobody annotated anything here
            for scale in segmentations:
                scale.fill_(self._ignored_value)
        target = segmentations[0][0].numpy()
        if case is None:
            known = PatchAnnotations.unknown(self._num_classes)
            if patch is not None:
                outside = patch.outside()
                known.outside = outside if outside.any() else None
        else:
            known = annotate_patch(case, patch, target, drawn_background, start, self._ignored_value)
        self._patches.append(known)
        if self._with_components:
            self._components.append(None if weak else mask_components(target, self._ignore_label))
        return sample

    @staticmethod
    def _sticks_out(start: Sequence[int], crop: Sequence[int], shape: Sequence[int]) -> bool:
        axes = range(3 - len(crop), 3)
        return any(start[a] < 0 or start[a] + c > shape[a] for a, c in zip(axes, crop, strict=True))

    # --- the batch

    def generate_train_batch(self) -> dict[str, Any]:
        self._seed_batch()
        self._patches, self._components, self._position = [], [], 0
        batch: dict[str, Any] = super().generate_train_batch()
        self._generated += 1
        spatial = batch["data"].shape[2:]
        batch["annotations"] = list(collate(self._patches, spatial))
        batch["num_masked"] = self._num_masked
        if self._with_components:
            batch["components"], batch["num_components"] = self._join_components(spatial)
        return batch

    def _join_components(self, spatial: Sequence[int]) -> tuple[Tensor, int]:
        joined = torch.zeros((self.batch_size, *spatial), dtype=torch.int32)
        count = 0
        for item, ids in enumerate(self._components):
            if ids is None:
                continue
            numbers = torch.from_numpy(ids.astype(np.int32))
            highest = int(ids.max(initial=0))
            joined[item] = torch.where(numbers > 0, numbers + count, 0)
            count += highest
        return joined, count

    def _seed_batch(self) -> None:
        if self._batch_seed is None:
            return
        number = self._first_batch + self._generated * self._num_workers + int(self.thread_id)
        state = np.random.SeedSequence([self._batch_seed, self._stream, number]).generate_state(3)
        np.random.seed(int(state[0]))
        torch.manual_seed(int(state[1]))
        random.seed(int(state[2]))
