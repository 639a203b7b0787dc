"""Which part of a case to show, and the picture of it: whole slices for the contact sheet, close-ups for findings."""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nnunet_dsp.annotation_checks import Contradiction, box_voxels, point_voxels
from nnunet_dsp.annotations import Annotations, LabelNames
from nnunet_dsp.report.drawing import (
    IGNORED,
    MAX_MARKS,
    SCRIBBLED,
    UNDRAWN,
    Frame,
    Mark,
    Picture,
    Window,
    colour_instances,
    encode_image,
    encode_layer,
    hatch,
    intensity_range,
    shrink_labels,
    to_bytes,
)

if TYPE_CHECKING:
    from nnunet_dsp.report.case_checks import CaseJob

CLOSE_UP_SIZE = 320
_MARGIN = 3.0  # a close-up is this many times as wide as what it shows
_LEAST = 48.0  # voxels that a close-up shows at least
_SCRIBBLES = 0.1  # share of annotated voxels below which masks are drawn strongly, background included
_ANISOTROPIC = 1.5  # slices are cut across the axis whose spacing is at least this many times the others'


def label_number(label: str, labels: LabelNames | None) -> int:
    """Number by which a class is coloured: its value in masks; of a region, a number after all those."""
    if labels is None or label not in labels.names:
        return -1
    position = labels.names.index(label)
    value = labels.values[position]
    if value is not None:
        return value
    return max([*(v for v in labels.values if v is not None), labels.ignore_label or 0]) + 1 + position


def slice_axis(shape: tuple[int, ...], spacing: tuple[float, ...]) -> int:
    """The axis across which a volume is cut: the one it was acquired along, else the first."""
    if 1 in shape:
        return shape.index(1)
    if len(spacing) == 3:
        widest = int(np.argmax(spacing))
        others = [size for axis, size in enumerate(spacing) if axis != widest]
        if spacing[widest] >= _ANISOTROPIC * max(others):
            return widest
    return 0


class CaseView:
    """Pictures of one case.

    Args:
        image: (channels, z, y, x).
        mask: (z, y, x) class map or None.
        said: the case's annotations, fitting the image, or None.
        job: what to show of it, and how large.
        spacing: of the image, array order.
    """

    def __init__(
        self,
        image: npt.NDArray[Any],
        mask: npt.NDArray[np.integer[Any]] | None,
        said: Annotations | None,
        job: CaseJob,
        spacing: tuple[float, ...],
    ) -> None:
        self.image, self.mask, self.said, self.job = image, mask, said, job
        self.shape = tuple(int(size) for size in image.shape[1:])
        self.colours = job.colours and len(image) >= 3
        self.labels = job.labels
        self.ignore = job.labels.ignore_label if job.labels is not None else None
        self.axis = slice_axis(self.shape, spacing)
        known = len(spacing) == 3 and all(math.isfinite(size) and size > 0 for size in spacing)
        first, second = (axis for axis in range(3) if axis != self.axis)
        self.plane = (first, second)
        pixel = (float(spacing[first]), float(spacing[second])) if known else (1.0, 1.0)
        # A spacing that would turn the image into a strip is more likely wrong than true.
        self.pixel = pixel if max(pixel) <= 20 * min(pixel) else (1.0, 1.0)
        self.points = point_voxels(said) if said is not None else np.zeros((0, 3), np.int64)
        self.starts, self.stops = box_voxels(said) if said is not None else (self.points, self.points)

    # --- what to show

    def contact_sheet(self) -> tuple[list[Picture], str]:
        """The slices in which annotations lie, as many as the job allows, and in words what they leave out."""
        slices, hidden = self._slices()
        return [self._whole_slice(index) for index in slices], hidden

    def close_up(self, problem: Contradiction) -> Picture:
        """What a contradiction is about, with its surroundings."""
        starts = [self.points[i] for i in problem.points] + [self.starts[i] for i in problem.boxes]
        stops = [self.points[i] + 1 for i in problem.points] + [self.stops[i] for i in problem.boxes]
        if starts:
            if len(starts) > 2:
                common = Counter(int(start[self.axis]) for start in starts).most_common(1)[0][0]
                return self._whole_slice(common)
            return self.close_up_at(np.min(starts, axis=0), np.max(stops, axis=0), problem, int(starts[0][self.axis]))
        found = self._stray_area(problem)
        if found is not None:
            return self.close_up_at(*found, problem)
        return self._whole_slice(self._slice_of_label(problem.label))

    def close_up_at(
        self,
        start: npt.NDArray[np.int64],
        stop: npt.NDArray[np.int64],
        problem: Contradiction | None = None,
        index: int | None = None,
    ) -> Picture:
        """A block of voxels with its surroundings, in its middle slice or the one given."""
        if index is None or not start[self.axis] <= index < stop[self.axis]:
            index = int(start[self.axis] + stop[self.axis] - 1) // 2
        elif problem is not None and problem.boxes and not problem.points:
            index = int(start[self.axis] + stop[self.axis] - 1) // 2
        plane, pixel = self.plane, np.array(self.pixel)
        low, high = start[list(plane)].astype(float), stop[list(plane)].astype(float)
        size = np.array([self.shape[axis] for axis in plane])
        side = max(float(((high - low) * pixel).max()) * _MARGIN, _LEAST * float(pixel.min()))
        reach = np.ceil(side / pixel)
        first = np.clip(np.floor((low + high - reach) / 2), 0, np.maximum(size - reach, 0)).astype(int)
        last = np.minimum(first + reach, size).astype(int)
        window = Window(self.axis, index, (int(first[0]), int(first[1])), (int(last[0]), int(last[1])), self.pixel)
        named = problem is not None and (problem.points or problem.boxes)
        look = self._look(window, problem) if problem is not None and named else [(low, high)]
        return self._picture(window, CLOSE_UP_SIZE, look)

    def _look(self, window: Window, problem: Contradiction) -> list[tuple[Any, Any]]:
        plane = list(self.plane)
        found = []
        for index in problem.points:
            if self.points[index][self.axis] == window.index:
                found.append((self.points[index][plane], self.points[index][plane] + 1))
        for index in problem.boxes:
            if self.starts[index][self.axis] <= window.index < self.stops[index][self.axis]:
                found.append((self.starts[index][plane], self.stops[index][plane]))
        return found

    def _stray_area(self, problem: Contradiction) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
        """The largest part of a class's mask outside all its boxes, where objects lack the box they should have."""
        import cc3d

        if problem.kind != "complete" or problem.label is None or self.mask is None or self.said is None:
            return None
        stray = self.mask == label_number(problem.label, self.labels)
        for index, box in enumerate(self.said.boxes):
            if box.label == problem.label:
                stray[tuple(slice(a, b) for a, b in zip(self.starts[index], self.stops[index], strict=True))] = False
        if not stray.any():
            return None
        ids = cc3d.connected_components(stray, connectivity=26, binary_image=True)
        largest = int(np.bincount(ids.ravel())[1:].argmax()) + 1
        where = np.nonzero(ids == largest)
        return np.array([w.min() for w in where]), np.array([w.max() + 1 for w in where])

    def _slice_of_label(self, label: str | None) -> int:
        if label is not None and self.mask is not None:
            others = tuple(axis for axis in range(3) if axis != self.axis)
            area = (self.mask == label_number(label, self.labels)).sum(axis=others)
            if area.any():
                return int(area.argmax())
        return self._slices()[0][0]

    def _slices(self) -> tuple[list[int], str]:
        """Slices that together show as many annotations as possible, in order, and what is left out."""
        count = self.shape[self.axis]
        if count == 1:
            return [0], ""
        if self.job.instances:
            return self._slices_of_instances(count)
        items = [np.arange(count) == point[self.axis] for point in self.points]
        items += [
            (np.arange(count) >= start[self.axis]) & (np.arange(count) < stop[self.axis])
            for start, stop in zip(self.starts, self.stops, strict=True)
        ]
        drawn = np.zeros(count, bool)
        if self.mask is not None:
            others = tuple(axis for axis in range(3) if axis != self.axis)
            for value in np.unique(self.mask).tolist():
                if value == self.ignore:
                    continue
                area = (self.mask == value).sum(axis=others)
                if value > 0:
                    drawn |= area > 0
                    items.append(2 * area >= area.max())
        if not items:
            return [count // 2], f"The middle one of {count} slices is shown."
        matrix = np.stack(items)
        held = matrix.any(axis=0) | drawn
        central = -np.abs(np.arange(count) - (count - 1) / 2) / count
        chosen: list[int] = []
        left = matrix
        while len(chosen) < self.job.slices and len(left):
            best = int((left.sum(axis=0) + 0.5 * central).argmax())
            chosen.append(best)
            left = left[~left[:, best]]
        # places left over go to slices of the mask far from those chosen
        drawn[chosen] = False
        while len(chosen) < self.job.slices and drawn.any():
            distance = np.min([np.abs(np.arange(count) - index) for index in chosen], axis=0)
            chosen.append(int(np.where(drawn, distance, -1).argmax()))
            drawn[chosen[-1]] = False
        hidden = f"{len(chosen)} of {int(held.sum())} slices with annotations are shown"
        unseen = int((~matrix[: len(self.points) + len(self.starts), chosen].any(axis=1)).sum())
        hidden += f"; {unseen} points and boxes lie in others." if unseen else "."
        return sorted(chosen), hidden if len(chosen) < held.sum() else ""

    def _slices_of_instances(self, count: int) -> tuple[list[int], str]:
        """Slices at equal steps through those that show instances: each shows many of them."""
        held = np.zeros(count, bool)
        if self.mask is not None:
            labelled = (self.mask > 0) & (self.mask != (-1 if self.ignore is None else self.ignore))
            held = labelled.any(axis=tuple(axis for axis in range(3) if axis != self.axis))
        places = np.flatnonzero(held)
        if not len(places):
            return [count // 2], f"The middle one of {count} slices is shown."
        number = min(self.job.slices, len(places))
        chosen = places[((np.arange(number) + 0.5) * len(places) / number).astype(int)].tolist()
        return chosen, f"{number} of {len(places)} slices with instances are shown." if number < len(places) else ""

    # --- how it looks

    @cached_property
    def _limits(self) -> tuple[float, float]:
        if self.colours:
            low, high = float(np.nanmin(self.image)), float(np.nanmax(self.image))
            return (0.0, 255.0) if low >= 0 and 1 < high <= 255 else intensity_range(self.image[:3])
        return intensity_range(self.image[self._channel])

    @cached_property
    def _annotated(self) -> float:
        if self.mask is None or self.ignore is None:
            return 1.0
        return float(np.count_nonzero(self.mask != self.ignore) / max(1, self.mask.size))

    @property
    def _channel(self) -> int:
        return min(self.job.channel, len(self.image) - 1)

    def _whole_slice(self, index: int) -> Picture:
        size = tuple(self.shape[axis] for axis in self.plane)
        window = Window(self.axis, index, (0, 0), (size[0], size[1]), self.pixel)
        return self._picture(window, self.job.size, [])

    def _picture(self, window: Window, size: int, look: list[tuple[Any, Any]]) -> Picture:
        frame = Frame(window, float(size))
        shape = (math.ceil(frame.height), math.ceil(frame.width))
        if self.colours:
            pixels = to_bytes(np.moveaxis(window.cut(self.image[:3]), 0, -1), self._limits)
        else:
            pixels = to_bytes(window.cut(self.image[self._channel]), self._limits)
        image, media = encode_image(pixels, shape)
        marks, seen = self._marks(frame)
        for low, high in look:
            x, y = frame.place(low)
            right, bottom = frame.place(high)
            space = 0.025 * size
            at = (round(x - space, 1), round(y - space, 1), right - x + 2 * space, bottom - y + 2 * space)
            marks.append(Mark("look", at, -1, "here"))
        depth = self.shape[self.axis]
        place = f"slice {window.index} of 0 to {depth - 1}" if depth > 1 else ""
        if depth > 1 and self.axis:
            place += f" along {'zyx'[self.axis]}"
        layer, drawn = self._layer(window, shape)
        rows, columns = pixels.shape[:2]
        return Picture(
            width=round(frame.width, 1),
            height=round(frame.height, 1),
            image=image,
            media=media,
            layer=layer,
            marks=tuple(marks),
            description="; ".join(filter(None, [place, seen, drawn])) or "nothing is annotated here",
            caption=place,
            sharp=max(rows, columns) < 0.7 * size,
        )

    def _layer(self, window: Window, shape: tuple[int, int]) -> tuple[bytes | None, str]:
        if self.mask is None or (self.ignore is not None and not (self.mask != self.ignore).any()):
            return None, ""
        ignored = -1000 if self.ignore is None else self.ignore
        codes = shrink_labels(window.cut(self.mask).astype(np.int64), shape, ignored)
        partial = self.said is not None and self.said.mask_labels is not None
        values = set(np.unique(codes).tolist())
        codes = np.where(codes == ignored, IGNORED, codes)
        if self.job.instances:
            number = len(values - {0, ignored})
            drawn = f"{number} labelled instance{'' if number == 1 else 's'}"
            return encode_layer(*colour_instances(codes)), drawn
        scribbles = self._annotated < _SCRIBBLES
        if partial:
            codes = np.where(codes == 0, UNDRAWN, codes)
        elif scribbles:
            codes = np.where(codes == 0, SCRIBBLED, codes)
        names = [self._name(value) for value in sorted(values - {0, ignored})]
        drawn = f"mask of {', '.join(names)}" if names else "mask of background"
        return encode_layer(*hatch(codes, 235) if scribbles else hatch(codes)), drawn

    def _name(self, value: int) -> str:
        if self.labels is not None and value in self.labels.values:
            return self.labels.names[self.labels.values.index(value)]
        return f"value {value}"

    def _marks(self, frame: Frame) -> tuple[list[Mark], str]:
        """The points and boxes of a window, large boxes first, and how many there are of each class in words."""
        if self.said is None:
            return [], ""
        window = frame.window
        marks: list[tuple[float, Mark]] = []
        number: dict[str, Counter[str]] = {"point": Counter(), "box": Counter()}
        for index, box in enumerate(self.said.boxes):
            low, high = self.starts[index], self.stops[index]
            if not low[window.axis] <= window.index < high[window.axis]:
                continue
            start, stop = self._in_plane(box.start, 0.0), self._in_plane(box.stop, 1.0)
            if any(b <= a0 or a >= b0 for a, b, a0, b0 in zip(start, stop, window.start, window.stop, strict=True)):
                continue
            (x, y), (right, bottom) = frame.place(start), frame.place(stop)
            number["box"][box.label] += 1
            title = f"boxes[{index}] {box.label}{'' if box.tight else ' (loose)'}"
            at = (x, y, round(right - x, 1), round(bottom - y, 1))
            area = (right - x) * (bottom - y)
            marks.append((area, Mark("box", at, label_number(box.label, self.labels), title, not box.tight)))
        marks.sort(key=lambda pair: -pair[0])
        for index, point in enumerate(self.said.points):
            if self.points[index][window.axis] != window.index:
                continue
            centre = self._in_plane(point.at, 0.0)
            if any(v + 0.5 < a or v + 0.5 > b for v, a, b in zip(centre, window.start, window.stop, strict=True)):
                continue
            number["point"][point.label] += 1
            title = f"points[{index}] {point.label}"
            place = frame.place([v + 0.5 for v in centre])
            marks.append((0.0, Mark("point", place, label_number(point.label, self.labels), title)))
        words = [
            f"{count} {('boxes' if kind == 'box' else 'points') if count > 1 else kind} of {label}"
            for kind, counts in number.items()
            for label, count in counts.items()
        ]
        if len(marks) > MAX_MARKS:
            words.append(f"only {MAX_MARKS} of {len(marks)} marks are drawn")
        return [mark for _, mark in marks[:MAX_MARKS]], ", ".join(words)

    def _in_plane(self, at: tuple[float, ...], slice_value: float) -> tuple[float, float]:
        full = at if len(at) == 3 else (slice_value, *at)
        return full[self.plane[0]], full[self.plane[1]]
