"""The simulated annotators: which case they annotate how, what they draw in it, and how much that was."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_dsp.annotations import Annotations
from nnunet_dsp.benchmark.accuracy.arms import Data
from nnunet_dsp.benchmark.accuracy.cost import Counts
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.mixture import assign
from nnunet_dsp.dataset_conversion.raw_dataset import RawCase
from nnunet_dsp.dataset_conversion.weak_labels import WeakOptions, annotate, find_objects, rectangle, scribble


def order_of_masks(
    shown: Mapping[str, Collection[str]], seed: int, groups: Mapping[str, str] | None = None
) -> list[str]:
    """All cases, in the order in which they get a mask: the first N keep theirs where N do, so counts are nested.

    Each next case is the one that adds most classes not shown yet, as one would choose who annotates; among equals,
    and once every class is shown, a random order decides. The rest of its group follows it, sorted by name.

    Args:
        shown: classes by case.
        groups: by case, such as its patient. A case that is not in it is a group of its own.
    """
    names = sorted(shown)
    random = np.random.default_rng([seed, 0])
    left = [names[i] for i in random.permutation(len(names))]
    missing = set().union(*shown.values()) if shown else set()
    order: list[str] = []
    while left:
        best = max(left, key=lambda name: len(missing & set(shown[name]))) if missing else left[0]
        group = (groups or {}).get(best)
        rest = [name for name in names if name != best and groups and group is not None and groups.get(name) == group]
        for name in (best, *rest):
            order.append(name)
            left.remove(name)
            missing -= set(shown[name])
    return order


def order_of_weak(cases: Collection[str], seed: int) -> list[str]:
    """All cases in the order in which they get weak annotations; masked ones are passed over."""
    names = sorted(cases)
    return [names[i] for i in np.random.default_rng([seed, 1]).permutation(len(names))]


def deal(
    data: Data, shown: Mapping[str, Collection[str]], groups: Mapping[str, str] | None = None
) -> dict[str, tuple[str, ...]]:
    """For each case of a dataset ("mask",), or its weak kinds, or (); cases that are not in it are left out.

    `shown` and `groups` are as in order_of_masks.
    """
    if data.source == "full":
        return dict.fromkeys(shown, ("mask",))
    if data.source == "pretrain":
        return {}
    masked = order_of_masks(shown, data.seed, groups)[: data.masks]
    weak = [case for case in order_of_weak(shown, data.seed) if case not in masked][: data.weak]
    chosen = {case: shown[case] for case in shown if case in {*masked, *weak}}
    kinds: dict[str, Any] = dict.fromkeys(data.kinds, "rest")
    if data.dealt:
        number, further = divmod(len(weak), len(data.dealt))
        kinds = {kind: number + (position < further) for position, kind in enumerate(data.dealt)}
    dealt = assign(chosen, masks=len(masked), kinds=kinds, masked_cases=masked, seed=data.seed)
    keep = {"mask", *data.kinds}
    return {case: tuple(kind for kind in given if kind in keep) for case, given in dealt.items()}


def rasterise(
    annotations: Annotations,
    shape: tuple[int, ...],
    labels: Mapping[str, int],
    ignore: int,
    *,
    radius: float = 0,
    strokes: np.ndarray | None = None,
) -> np.ndarray:
    """What nnU-Net's ignore label can hold of weak annotations.

    - Boxes: where they are complete for every foreground class, what lies outside all of them is background; inside
      stays `ignore`, for a box does not say which of its voxels show the object. Otherwise boxes say nothing.
    - Strokes are taken as they are.
    - Points: the nearest voxel, or all within `radius` (in voxels). They are painted last.
    - Tags cannot be painted.

    Args:
        annotations: coordinates in voxels, array order.
        shape: (y, x) or (z, y, x).
        labels: value by class name, with background.
        ignore: value of voxels about which nothing is known.
        radius: of the disc or ball around a point. Above 0 it may cover other classes.
        strokes: same shape, `ignore` where nothing was drawn (partial masks as well as strokes).

    Returns:
        Integer, of that shape.
    """
    result = np.full(shape, ignore, np.int16)
    foreground = {name for name in labels if name != "background"}
    if foreground and foreground <= set(annotations.complete_boxes):
        inside = np.zeros(shape, bool)
        for box in annotations.boxes:
            where = tuple(
                slice(max(int(np.floor(a)), 0), max(int(np.ceil(b)), 0))
                for a, b in zip(box.start, box.stop, strict=True)
            )
            inside[where] = True
        result[~inside] = labels["background"]
    if strokes is not None:
        result = np.where(strokes != ignore, strokes, result)
    reach = int(np.floor(radius))
    for point in annotations.points:
        at = [min(max(round(v), 0), size - 1) for v, size in zip(point.at, shape, strict=True)]
        where = tuple(slice(max(a - reach, 0), a + reach + 1) for a in at)
        axes = (np.arange(s.start, min(s.stop, size)) for s, size in zip(where, shape, strict=True))
        grid = np.meshgrid(*axes, indexing="ij")
        distance = sum((g - a) ** 2 for g, a in zip(grid, at, strict=True))
        result[where][distance <= radius**2] = labels[point.label]
    return result


class CaseJob(NamedTuple):
    case: RawCase
    label_file: Path
    kinds: tuple[str, ...]
    source: str
    reader_writer: Any
    labels: dict[str, int]
    ignore: int
    options: WeakOptions
    seed: int
    radius: float


def make_case(job: CaseJob) -> tuple[str, Annotations, Counts, bool]:
    """Write a weak case's label file; its annotations, what was annotated, whether any voxel has a label."""
    mask, properties = raw_dataset.read_label(job.reader_writer, job.case.label)
    flat = mask[0] if mask.shape[0] == 1 else mask
    seed = (job.seed, *job.case.name.encode())
    spacing = tuple(float(s) for s in properties["spacing"])[-flat.ndim :]
    said = annotate(flat, job.labels, job.kinds, job.options, seed, spacing)
    strokes = scribble(flat, job.labels, job.ignore, job.options, seed) if "scribbles" in job.kinds else None
    drawn, part = strokes, None
    if "rectangles" in job.kinds:
        part, where = rectangle(flat, job.ignore, job.options.rectangle, seed)
        drawn = np.full_like(flat, job.ignore) if strokes is None else strokes.copy()
        drawn[where] = part[where]
    counts = count(said, strokes, part, job.labels)
    if job.source == "ignore":
        label = rasterise(said, flat.shape, job.labels, job.ignore, radius=job.radius, strokes=drawn)
        said = Annotations()
    else:
        label = np.full_like(flat, job.ignore) if drawn is None else drawn
    raw_dataset.write_label(job.reader_writer, label.reshape(mask.shape), job.label_file, properties)
    return job.case.name, said, counts, bool((label != job.ignore).any())


def count(said: Annotations, strokes: np.ndarray | None, part: np.ndarray | None, labels: Mapping[str, int]) -> Counts:
    """What was annotated in one case: said of it, scribbled on it, drawn in full on part of it."""
    tags = len(said.present) + len(said.absent)
    points = {point.label for point in said.points}
    boxes = {box.label for box in said.boxes}
    drawn = classes = 0
    if strokes is not None:
        for plane in strokes if strokes.ndim == 3 else strokes[None]:
            found = find_objects(plane, labels, tuple(labels))
            drawn += len(found)
            classes += len({item.label for item in found})
    foreground = tuple(name for name in labels if name != "background")
    seen = [] if part is None else find_objects(part, labels, foreground)
    return Counts(
        rectangle_images=int(part is not None),
        rectangle_classes=len({item.label for item in seen}),
        rectangle_objects=len(seen),
        tag_images=int(tags > 0),
        tags=tags,
        point_images=int(bool(points)),
        point_classes=len(points),
        points=len(said.points),
        box_images=int(bool(boxes)),
        box_classes=len(boxes),
        boxes=len(said.boxes),
        scribble_images=int(drawn > 0),
        scribble_classes=classes,
        scribbles=drawn,
    )


def mask_counts(objects: Mapping[str, int]) -> Counts:
    """What was annotated in one masked case."""
    return Counts(mask_images=1, mask_classes=len(objects), mask_objects=sum(objects.values()))


__all__ = ["CaseJob", "count", "deal", "make_case", "mask_counts", "order_of_masks", "order_of_weak", "rasterise"]
