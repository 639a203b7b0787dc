"""Annotations beside masks: nnU-Net's own dataloader, handing over what is known about each patch.

Three things are added to it: which cases a batch holds, where patches are centred, and the annotations.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.geometry import IntArray, PatchMap, coordinate_channels
from nnunet_dsp.patch_annotations import CaseAnnotations, PatchAnnotations, annotate_patch, collate


def mask_components(target: npt.NDArray[np.integer[Any]], ignore_label: int | None) -> npt.NDArray[np.uint32]:
    """Connected components of a class map, background included: ids 1..N, 0 where the mask says nothing.

    Neighbours share a face (4 in 2D, 6 in 3D); touching components of different classes stay apart.

    Args:
        target: (*spatial) integer class map.
    """
    classes = (target + 1).astype(np.uint16)
    if ignore_label is not None:
        classes[target == ignore_label] = 0
    ids = cc3d.connected_components(classes, connectivity=4 if classes.ndim == 2 else 6, out_dtype=np.uint32)
    return np.asarray(ids, dtype=np.uint32)


class DSPDataLoader(nnUNetDataLoader):
    """nnU-Net's loader, with annotations beside the masks.

    Cases with at least one annotated mask voxel are *masked*, the others *weak*. A batch holds a stated share of
    masked cases, at its end; the rest are weak. Patches of weak cases are centred on a random point or box as often
    as nnU-Net centres those of masked cases on foreground, and lie anywhere otherwise. Where a masked case has points
    or boxes too, half of its patches with foreground are centred on these.

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
        masked_batches: the batches with numbers below it hold masked cases only, where there are any.
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
        masked_batches: int = 0,
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
        self._masked_batches = masked_batches
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
        if not self._weak or (self._masked and self._batch_number() < self._masked_batches):
            return int(self.batch_size)
        if not self._masked:
            return 0
        exact = self.batch_size * self._masked_fraction
        return int(exact) + int(np.random.uniform() < exact - int(exact))

    def _oversample_within_group(self, sample_idx: int) -> bool:
        """nnU-Net's rule, applied to the weak and to the masked items of the batch separately.

        For a group of one item it would be never. Such an item takes turns by chance, as often as those of two do.
        """
        share = self.oversample_foreground_percent
        if self._probabilistic:
            return bool(np.random.uniform() < share)
        num_weak = self.batch_size - self._num_masked
        first, size = (0, num_weak) if sample_idx < num_weak else (num_weak, self._num_masked)
        if size == 1 < self.batch_size:
            return bool(np.random.uniform() < 1 - round(2 * (1 - share)) / 2)
        return not sample_idx - first < round(size * (1 - share))

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
            beside = self._annotated_locations() if force_fg else {}
            if beside and np.random.uniform() < 0.5:  # what is annotated beside a mask may lie far from it
                class_locations = beside
            bbox = super().get_bbox(data_shape, force_fg, class_locations, overwrite_class, verbose)
        self._crop = (tuple(int(low) for low in bbox[0]), tuple(int(size) for size in data_shape))
        return bbox

    def _weak_locations(self, force_fg: bool) -> tuple[dict[int, IntArray] | None, bool]:
        locations = self._annotated_locations() if force_fg else {}
        return (locations, True) if locations else (None, False)

    def _annotated_locations(self) -> dict[int, IntArray]:
        case = self._annotations.get(self._cases[self._position])
        return {} if case is None else case.locations()

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
        if weak or (case is not None and case.needs_map):  # weak: padding, the transforms' own too, counts for nothing
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
                known.outside = patch.outside()
        else:
            known = annotate_patch(case, patch, target, drawn_background, start, self._ignored_value)
        self._patches.append(known)
        if self._with_components:
            self._components.append(None if weak else mask_components(target, self._ignore_label))
        return sample

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
            numbers = ids.view(np.int32)
            highest = int(ids.max(initial=0))
            if count:
                numbers = np.add(numbers, count, out=numbers.copy(), where=numbers > 0)
            joined[item] = torch.from_numpy(numbers)
            count += highest
        return joined, count

    def _batch_number(self) -> int:
        """Of the batch that is being made, counted over all workers and from the beginning of the training."""
        return self._first_batch + self._generated * self._num_workers + int(self.thread_id)

    def _seed_batch(self) -> None:
        if self._batch_seed is None:
            return
        entropy = [self._batch_seed, self._stream, self._batch_number()]
        state = np.random.SeedSequence(entropy).generate_state(3)
        np.random.seed(int(state[0]))
        torch.manual_seed(int(state[1]))
        random.seed(int(state[2]))
