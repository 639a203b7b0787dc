"""Checks of annotations: inside one file, against the image's shape, against the image's mask.

Reading and writing belong to annotations.py, which re-exports what is public here. Numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from nnunet_dsp.annotation_errors import AnnotationError

if TYPE_CHECKING:
    from nnunet_dsp.annotations import Annotations
    from nnunet_dsp.label_names import LabelNames

_AXES = {2: "(y, x)", 3: "(z, y, x)"}
_AXES_REVERSED = {2: "(x, y)", 3: "(x, y, z)"}
_SENTENCES_PER_KIND = 10
_CHUNK = 1 << 22


class Contradiction(NamedTuple):
    """One thing that cannot be right, and where in the annotations it stands.

    Attributes:
        kind: "tag", "point", "box", "complete" or "mask": what to look at first.
        text: one sentence or two, without the file's name.
        label: the class it is about, where it is about one.
        points: numbers of the points concerned; boxes: of the boxes.
    """

    kind: str
    text: str
    label: str | None = None
    points: tuple[int, ...] = ()
    boxes: tuple[int, ...] = ()


def show_position(values: Sequence[float]) -> str:
    """`(40, 512.5, 7)`: whole numbers without a decimal point."""
    parts = [f"{float(value):.10g}" for value in values]
    return f"({', '.join(parts)})"


def check_against_image(
    annotations: Annotations, shape: Sequence[int], *, source: str, labels: LabelNames | None = None
) -> None:
    """Refuse annotations that do not fit the image they belong to.

    Args:
        annotations: as read from the case's file.
        shape: the image's spatial shape in array order, without channels: (y, x) or (z, y, x). A 2D image may come
            as (1, y, x), as nnU-Net's readers return it, whichever way its annotations are written.
        source: what messages start with, see `describe_source`.
        labels: where given, every label must be one of its classes.

    Raises:
        AnnotationError: another shape than the file states, another number of axes, a point or box outside the
            image, an unknown label.
        ValueError: `shape` has neither 2 nor 3 axes.
    """
    image_shape = tuple(int(size) for size in shape)
    if len(image_shape) not in _AXES:
        raise ValueError(f"Expected argument `shape` to have 2 or 3 axes (no channels), but got {image_shape}.")
    stated = annotations.shape
    if stated is not None and _three_axes(stated) != _three_axes(image_shape):
        raise AnnotationError(
            f"{source}: the file says that the image has the shape {show_position(stated)}, but it has "
            f"{show_position(image_shape)}. {_shape_hint(stated, image_shape)}"
        )
    axes = check_axes(annotations, source)
    frame = image_shape
    if axes is not None and axes != len(image_shape):
        if _three_axes(image_shape)[0] != 1:
            raise AnnotationError(
                f"{source}: the annotations have {axes} coordinates {_AXES[axes]}, but the image has the shape "
                f"{show_position(image_shape)}. Give every point and box one coordinate for each axis of the image."
            )
        frame = _three_axes(image_shape) if axes == 3 else image_shape[1:]
    check_positions(annotations, frame, source)
    if labels is not None:
        for entry, label in _all_labels(annotations):
            try:
                labels.index(label)
            except AnnotationError as error:
                raise AnnotationError(f"{source}: {entry}: {error}") from None


def check_axes(annotations: Annotations, source: str) -> int | None:
    """Number of axes that all points and boxes (and the shape) have; None where there is nothing to count.

    Raises:
        AnnotationError: two entries disagree.
    """
    axes, first = (len(annotations.shape), "shape") if annotations.shape is not None else (None, "")
    counts = [(len(point.at), "points", index) for index, point in enumerate(annotations.points)]
    for index, box in enumerate(annotations.boxes):
        counts.append((len(box.start), "boxes", index))
        counts.append((len(box.stop), "boxes", index))
    for count, kind, index in counts:
        if axes is None:
            axes, first = count, f"{kind}[{index}]"
        elif count != axes:
            raise AnnotationError(
                f"{source}: {kind}[{index}] has {count} coordinates, but {first} has {axes}. All entries of a file "
                f"have one coordinate for each axis of the image: {_AXES[2]} in 2D, {_AXES[3]} in 3D."
            )
    return axes


def check_positions(annotations: Annotations, shape: Sequence[int] | None, source: str) -> None:
    """Refuse points and boxes outside an image of this shape (None: only below zero), and empty boxes.

    A point may lie anywhere in a voxel, so on [-0.5, size - 0.5] of each axis. A box is half-open,
    0 <= start < stop <= size, and must hold at least one voxel centre.
    """
    if annotations.points:
        at = np.array([point.at for point in annotations.points], dtype=np.float64)
        limit = np.inf if shape is None else np.array(shape, dtype=np.float64)
        outside = ~((at >= -0.5) & (at <= limit - 0.5)).all(axis=1)
        if outside.any():
            index = int(outside.argmax())
            raise AnnotationError(
                f"{source}: points[{index}] lies at {show_position(annotations.points[index].at)}, "
                f"{_outside(shape)}. {_order_hint(at.shape[1])}"
            )
    if annotations.boxes:
        start = np.array([box.start for box in annotations.boxes], dtype=np.float64)
        stop = np.array([box.stop for box in annotations.boxes], dtype=np.float64)
        limit = np.inf if shape is None else np.array(shape, dtype=np.float64)
        empty = ~(np.ceil(start) < np.ceil(stop)).all(axis=1)
        if empty.any():
            index = int(empty.argmax())
            raise AnnotationError(
                f"{source}: {_show_box(annotations, index)} is empty: on each axis, at least one voxel v must satisfy "
                "start <= v < stop. Boxes are half-open, so stop is the first voxel after the object; was the last "
                "voxel of the object given?"
            )
        outside = ~((start >= 0) & (stop <= limit)).all(axis=1)
        if outside.any():
            index = int(outside.argmax())
            raise AnnotationError(
                f"{source}: {_show_box(annotations, index)} reaches {_outside(shape)}. {_order_hint(start.shape[1])}"
            )


def absent_problems(annotations: Annotations) -> Iterator[str]:
    """What contradicts the `absent` list of the same file, one sentence each."""
    return (problem.text for problem in _against_absent(annotations))


def _against_absent(annotations: Annotations) -> Iterator[Contradiction]:
    absent = set(annotations.absent)
    if not absent:
        return
    for label in annotations.present:
        if label in absent:
            text = (
                f"{label!r} is listed as present and as absent in image_level. "
                "Keep one of the two, or neither if it is not known."
            )
            yield Contradiction("tag", text, label)
    for index, point in enumerate(annotations.points):
        if point.label in absent:
            text = (
                f"points[{index}] marks {point.label!r}, which image_level lists as absent. "
                "Remove the point, or the class from image_level.absent."
            )
            yield Contradiction("tag", text, point.label, points=(index,))
    for index, box in enumerate(annotations.boxes):
        if box.label in absent:
            text = (
                f"boxes[{index}] marks {box.label!r}, which image_level lists as absent. "
                "Remove the box, or the class from image_level.absent."
            )
            yield Contradiction("tag", text, box.label, boxes=(index,))


def find_contradictions(
    annotations: Annotations,
    mask: npt.NDArray[np.generic] | None,
    *,
    source: str,
    labels: LabelNames,
    ignore_label: int | None = None,
) -> list[str]:
    """What in these annotations contradicts itself or the image's mask.

    The mask's ignore voxels say nothing. Where `mask_labels` is given, background says only "none of these classes".

    Args:
        annotations: as read from the case's file.
        mask: label map in the image file's own voxels, (y, x) or (z, y, x) or (1, y, x), integers (floats holding
            whole numbers will do); None: look only at the annotations themselves.
        source: what each sentence starts with.
        labels: the dataset's classes.
        ignore_label: value of voxels nobody annotated; None: that of `labels`, if it has one.

    Returns:
        One sentence for each contradiction, at most 10 of a kind and the number of the others; empty if all is well.

    Raises:
        AnnotationError: annotations that do not fit the mask's shape, or a mask that is no label map.
    """
    sentences = []
    for group in locate_contradictions(annotations, mask, source=source, labels=labels, ignore_label=ignore_label):
        shown = group if len(group) <= _SENTENCES_PER_KIND else group[: _SENTENCES_PER_KIND - 1]
        sentences += [f"{source}: {problem.text}" for problem in shown]
        if len(shown) < len(group):
            sentences.append(f"{source}: and {len(group) - len(shown)} more of the same kind.")
    return sentences


def locate_contradictions(
    annotations: Annotations,
    mask: npt.NDArray[np.generic] | None,
    *,
    source: str,
    labels: LabelNames,
    ignore_label: int | None = None,
) -> list[list[Contradiction]]:
    """As find_contradictions(), which says more: all of them, a list for each kind, with the entries they are about."""
    if mask is not None:
        check_against_image(annotations, mask.shape, source=source, labels=labels)
    groups = list(_contradictions_within(annotations))
    if mask is not None:
        ignore = labels.ignore_label if ignore_label is None else ignore_label
        groups.extend(_contradictions_with_mask(annotations, mask, labels, ignore, source))
    return [group for group in groups if group]


def _contradictions_within(annotations: Annotations) -> Iterator[list[Contradiction]]:
    """Contradictions between the entries of one file, a list for each kind."""
    yield list(_against_absent(annotations))

    voxels = point_voxels(annotations)
    axes = len(annotations.points[0].at) if annotations.points else 0
    first_at: dict[tuple[int, ...], int] = {}
    group = []
    for index, voxel in enumerate(map(tuple, voxels.tolist())):
        other = first_at.setdefault(voxel, index)
        label, other_label = annotations.points[index].label, annotations.points[other].label
        if label != other_label:
            text = (
                f"points[{other}] and points[{index}] mark the voxel {show_position(voxel[-axes:])} as "
                f"{other_label!r} and as {label!r}. Remove one of them."
            )
            group.append(Contradiction("point", text, label, points=(other, index)))
    yield group

    point_label = np.array([point.label for point in annotations.points], dtype=object)
    box_label = np.array([box.label for box in annotations.boxes], dtype=object)
    start, stop = box_voxels(annotations)

    group = []
    for label in annotations.complete_boxes:
        own = np.flatnonzero(box_label == label)
        if own.size == 0 and label in annotations.present:
            text = (
                f"complete.boxes says that every object of {label!r} has a box, and there is none, but image_level "
                f"lists it as present. Add the boxes or take {label!r} out of complete.boxes."
            )
            group.append(Contradiction("complete", text, label))
        for index in np.flatnonzero(point_label == label).tolist():
            inside = (voxels[index] >= start[own]) & (voxels[index] < stop[own])
            if not inside.all(axis=1).any():
                text = (
                    f"points[{index}] marks {label!r} outside every box of {label!r}, but complete.boxes says that "
                    f"every object has one. Add its box or take {label!r} out of complete.boxes."
                )
                group.append(Contradiction("complete", text, label, points=(index,)))
    yield group

    group = []
    for label in annotations.complete_points:
        own = np.flatnonzero(point_label == label)
        if own.size == 0 and label in annotations.present:
            text = (
                f"complete.points says that every object of {label!r} has a point, and there is none, but image_level "
                f"lists it as present. Add the points or take {label!r} out of complete.points."
            )
            group.append(Contradiction("complete", text, label))
        for index in np.flatnonzero(box_label == label).tolist():
            inside = (voxels[own] >= start[index]) & (voxels[own] < stop[index])
            if not inside.all(axis=1).any():
                text = (
                    f"boxes[{index}] of {label!r} holds no point of {label!r}, but complete.points says that every "
                    f"object has one. Add its point or take {label!r} out of complete.points."
                )
                group.append(Contradiction("complete", text, label, boxes=(index,)))
    yield group


def _contradictions_with_mask(
    annotations: Annotations, mask: npt.NDArray[np.generic], labels: LabelNames, ignore: int | None, source: str
) -> Iterator[list[Contradiction]]:
    """Contradictions between annotations and mask, a list for each kind. One pass over the mask, then only boxes."""
    mask = mask if mask.ndim == 3 else mask[None]
    counts = _count_values(mask, source)
    name_of = {labels.index(name): name for name in labels.names}
    unannotated = 0 if ignore is None else counts.pop(ignore, 0)
    listed = None if annotations.mask_labels is None else {labels.index(name) for name in annotations.mask_labels}

    def drawn(value: int) -> bool:
        """Whether the mask's annotator drew this class, so that background means its absence."""
        return listed is None or value == 0 or value in listed

    unknown = sorted(set(counts) - set(name_of))
    yield [
        Contradiction(
            "mask",
            f"the mask holds the value {value} ({counts[value]} voxels), which is no class of dataset.json. "
            "Correct the mask or the labels in dataset.json.",
        )
        for value in unknown
    ]
    yield [
        Contradiction(
            "mask",
            f"the mask holds {counts[value]} voxels of {name_of[value]!r}, which mask_labels does not list. "
            "List it, or take these voxels out of the mask.",
            name_of[value],
        )
        for value in sorted(counts)
        if value in name_of and not drawn(value)
    ]

    group: list[Contradiction] = []
    for label in annotations.present:
        value = labels.index(label)
        hiding_places = unannotated if drawn(value) else unannotated + counts.get(0, 0)
        if counts.get(value, 0) == 0 and hiding_places == 0:
            text = (
                f"image_level lists {label!r} as present, but the mask is complete and has no voxel of it. "
                "Correct one of the two."
            )
            group.append(Contradiction("tag", text, label))
    for label in annotations.absent:
        count = counts.get(labels.index(label), 0)
        if count:
            text = (
                f"image_level lists {label!r} as absent, but the mask has {count} voxels of it. Correct one of the two."
            )
            group.append(Contradiction("tag", text, label))
    for label in annotations.complete_points:
        count = counts.get(labels.index(label), 0)
        if count and all(point.label != label for point in annotations.points):
            text = (
                f"complete.points says that every object of {label!r} has a point, and there is none, but the mask has "
                f"{count} voxels of it. Add the points or take {label!r} out of complete.points."
            )
            group.append(Contradiction("complete", text, label))
    yield group

    if not counts:  # nobody annotated anything
        return
    yield _points_against_mask(annotations, mask, labels, ignore, drawn, name_of)

    start, stop = box_voxels(annotations)
    slices = [
        tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        for low, high in zip(start.tolist(), stop.tolist(), strict=True)
    ]
    group = []
    for index, (box, where) in enumerate(zip(annotations.boxes, slices, strict=True)):
        value = labels.index(box.label)
        part = mask[where]
        if counts.get(value, 0) and (part == value).any():
            continue
        if unannotated and (part == ignore).any():
            continue
        if not drawn(value) and (part == 0).any():
            continue
        text = (
            f"{_show_box(annotations, index)} holds no voxel of {box.label!r}, and the mask is complete inside it. "
            "Correct the box or the mask."
        )
        group.append(Contradiction("box", text, box.label, boxes=(index,)))
    yield group

    group = []
    covered = None
    for label in annotations.complete_boxes:
        value = labels.index(label)
        outside = counts.get(value, 0)
        own = [where for box, where in zip(annotations.boxes, slices, strict=True) if box.label == label]
        if not outside:
            continue
        if covered is None:  # pages of this volume come into being only where boxes are
            covered = np.zeros(mask.shape, dtype=bool)
        for where in own:
            outside -= int(np.count_nonzero((mask[where] == value) & ~covered[where]))
            covered[where] = True
        for where in own:
            covered[where] = False
        if outside:
            text = (
                f"the mask has {outside} voxels of {label!r} outside every box of {label!r}, but complete.boxes says "
                f"that every object has one. Add or enlarge boxes, or take {label!r} out of complete.boxes."
            )
            group.append(Contradiction("complete", text, label))
    yield group


def _points_against_mask(
    annotations: Annotations,
    mask: npt.NDArray[np.generic],
    labels: LabelNames,
    ignore: int | None,
    drawn: Callable[[int], bool],
    name_of: dict[int, str],
) -> list[Contradiction]:
    """About points that lie in the mask of another class."""
    if not annotations.points:
        return []
    value = np.array([labels.index(point.label) for point in annotations.points])
    not_drawn = np.array([not drawn(int(one)) for one in value])

    def wrong_at(voxels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        here = mask[tuple(voxels.T)]
        wrong = (here != value) & ~((here == 0) & not_drawn)
        return wrong if ignore is None else wrong & (here != ignore)

    size = np.array(mask.shape)
    voxels = point_voxels(annotations)
    wrong = wrong_at(voxels)
    problems = []
    for index in np.flatnonzero(wrong).tolist():
        point, found = annotations.points[index], int(mask[tuple(voxels[index])])
        sentence = (
            f"points[{index}] marks {point.label!r} at {show_position(point.at)}, where the mask has "
            f"{name_of.get(found, found)!r}. Move the point or correct the mask."
        )
        if found == 0:
            sentence += (
                f" If the mask's annotator did not draw {point.label!r}, name the classes that were drawn in "
                "mask_labels."
            )
        problems.append(Contradiction("point", sentence, point.label, points=(index,)))
    if 2 * len(problems) > len(annotations.points):
        axes = len(annotations.points[0].at)
        reversed_voxels = voxels[:, [0, 2, 1]] if axes == 2 else voxels[:, ::-1]
        if (reversed_voxels < size).all():
            right = int((~wrong_at(reversed_voxels)).sum())
            if 2 * right > len(annotations.points):
                sentence = (
                    f"{len(problems)} of {len(annotations.points)} points lie in the mask of another class; with the "
                    f"axes reversed, {right} would agree with it. Coordinates are voxels in array order {_AXES[axes]}; "
                    f"were they written as {_AXES_REVERSED[axes]}?"
                )
                problems.insert(0, Contradiction("point", sentence, points=tuple(np.flatnonzero(wrong).tolist())))
    return problems


def _count_values(mask: npt.NDArray[np.generic], source: str) -> dict[int, int]:
    """How many voxels hold each value, in pieces so that no copy of the mask is needed."""
    counts: dict[int, int] = {}
    flat = mask.ravel(order="K")
    for begin in range(0, flat.size, _CHUNK):
        chunk = flat[begin : begin + _CHUNK]
        if chunk.dtype.kind in "biu":
            whole = chunk.astype(np.int64)
        else:
            with np.errstate(invalid="ignore"):
                whole = chunk.astype(np.int64)
            odd = whole != chunk
            if odd.any():
                raise AnnotationError(
                    f"{source}: the mask holds the value {chunk[odd.argmax()]}, but expected whole numbers. "
                    "Was it resampled with interpolation, or is it an image?"
                )
        if whole.min() >= 0 and whole.max() <= np.iinfo(np.uint16).max:
            number = np.bincount(whole)
            values = np.flatnonzero(number)
            number = number[values]
        else:
            values, number = np.unique(whole, return_counts=True)
        for value, count in zip(values.tolist(), number.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + count
    return counts


def point_voxels(annotations: Annotations) -> npt.NDArray[np.int64]:
    """(P, 3) int64: the voxel each point lies in; 2D points lie in slice 0.

    Halfway between two voxels it is the lower one, so that size - 0.5 is still inside; -0.5 is voxel 0.
    """
    if not annotations.points:
        return np.zeros((0, 3), dtype=np.int64)
    at = np.array([point.at for point in annotations.points], dtype=np.float64)
    voxels = np.zeros((len(at), 3), dtype=np.int64)
    voxels[:, 3 - at.shape[1] :] = np.maximum(np.ceil(at - 0.5), 0)
    return voxels


def box_voxels(annotations: Annotations) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(K, 3) int64 first voxel and voxel after the last of each box; 2D boxes span slice 0."""
    start = np.zeros((len(annotations.boxes), 3), dtype=np.int64)
    stop = np.ones((len(annotations.boxes), 3), dtype=np.int64)
    if annotations.boxes:
        axes = len(annotations.boxes[0].start)
        start[:, 3 - axes :] = np.ceil([box.start for box in annotations.boxes])
        stop[:, 3 - axes :] = np.ceil([box.stop for box in annotations.boxes])
    return start, stop


def _all_labels(annotations: Annotations) -> Iterator[tuple[str, str]]:
    """Every label with the entry it stands in."""
    for kind, names in (
        ("image_level.present", annotations.present),
        ("image_level.absent", annotations.absent),
        ("complete.points", annotations.complete_points),
        ("complete.boxes", annotations.complete_boxes),
        ("mask_labels", annotations.mask_labels or ()),
    ):
        yield from ((f"{kind}[{index}]", name) for index, name in enumerate(names))
    yield from ((f"points[{index}].label", point.label) for index, point in enumerate(annotations.points))
    yield from ((f"boxes[{index}].label", box.label) for index, box in enumerate(annotations.boxes))


def _three_axes(shape: Sequence[int]) -> tuple[int, ...]:
    return (1, *shape) if len(shape) == 2 else tuple(shape)


def _shape_hint(stated: Sequence[int], actual: Sequence[int]) -> str:
    if tuple(stated)[::-1] == tuple(actual) or _three_axes(tuple(stated)[::-1]) == _three_axes(actual):
        return f"Sizes are in array order {_AXES[len(stated)]}; were they written as {_AXES_REVERSED[len(stated)]}?"
    return (
        "Annotations are in the voxels of the image file, in array order; were they made on another image, or before "
        "it was resized or cropped?"
    )


def _outside(shape: Sequence[int] | None) -> str:
    return "outside the image (below zero)" if shape is None else f"outside the image of shape {show_position(shape)}"


def _order_hint(axes: int) -> str:
    return f"Coordinates are voxels in array order {_AXES[axes]}; were they written as {_AXES_REVERSED[axes]}?"


def _show_box(annotations: Annotations, index: int) -> str:
    box = annotations.boxes[index]
    return f"boxes[{index}] from {show_position(box.start)} to {show_position(box.stop)}"
