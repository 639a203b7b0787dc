"""One imported image: from typed marks to annotations and a label map, and what had to be changed on the way.

Pure but for loading masks; files are written by import_writing.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_dsp.annotation_checks import show_position
from nnunet_dsp.annotations import (
    AnnotationError,
    Annotations,
    Box,
    LabelNames,
    Point,
    annotations_from_dict,
    annotations_to_dict,
    find_contradictions,
)
from nnunet_dsp.dataset_conversion.import_classes import Claims
from nnunet_dsp.dataset_conversion.imported import (
    BoxMark,
    PointMark,
    Position,
    RasterMask,
    Region,
    Scribble,
    SourceImage,
    Tag,
    fail,
    shoelace,
)
from nnunet_dsp.dataset_conversion.rasterise import Patch, draw_line, fill_rings
from nnunet_dsp.label_names import BACKGROUND

KINDS = ("boxes", "points", "regions", "masks", "scribbles", "present", "absent")
"""What is counted, in the order of the table."""

DEFAULT_WIDTH = 3.0
_SLACK = 1.0  # voxels by which a mark may leave the image without being wrong: a matter of rounding
_AXES = {2: "(y, x)", 3: "(z, y, x)"}


@dataclass(frozen=True)
class Options:
    """What holds for all images of one import.

    target: class by name in the annotation file, None: left out. names: all classes and their numbers, and the ignore
    label. negatives: images without a mark were looked at, too. drop_outside: leave out what lies outside of its image,
    rather than refuse it. loose: voxels by which boxes may be too large; above 0 they are not tight. scribble_width:
    voxels; None: what the tool says, else DEFAULT_WIDTH.
    """

    target: Mapping[str, str | None]
    names: LabelNames
    ignore: int
    claims: Claims = Claims()
    negatives: bool = False
    drop_outside: bool = False
    loose: float = 0.0
    scribble_width: float | None = None


@dataclass
class Said:
    """What an image's marks come to.

    annotations: in voxels of the image. label: the label map, int32, of the image's shape; None without any mask.
    counts: marks by (class, kind). notes: what was changed or left out, by sentence, with the places. problems:
    contradictions that `nnunet_dsp prepare` would refuse. marked: the image has at least one mark.
    """

    annotations: Annotations
    label: npt.NDArray[np.int32] | None
    counts: Counter[tuple[str, str]]
    notes: dict[str, list[str]]
    problems: list[str]
    marked: bool
    classes_drawn: frozenset[str] = frozenset()


def said_of(image: SourceImage, shape: tuple[int, ...], options: Options) -> Said:
    """Everything that an image's marks say.

    Args:
        image: as a parser gave it.
        shape: of the image as it will lie in the dataset, (y, x) or (z, y, x).
        options: see `Options`.

    Raises:
        AnnotationError: marks that do not fit the image, or contradict each other.
    """
    return _Case(image, shape, options).said()


@dataclass
class _Layer:
    """Voxels of one class, to be painted: `voxels` where in the image."""

    label: str
    patch: Patch
    size: int


@dataclass
class _Case:
    image: SourceImage
    shape: tuple[int, ...]
    options: Options
    notes: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    missing: dict[str, set[str]] = field(default_factory=lambda: {"boxes": set(), "points": set(), "masks": set()})
    layers: list[_Layer] = field(default_factory=list)
    lines: list[_Layer] = field(default_factory=list)
    bases: list[tuple[RasterMask, npt.NDArray[Any]]] = field(default_factory=list)
    extents: dict[tuple[str, str], list[tuple[slice, ...]]] = field(default_factory=dict)
    has_area: bool = False

    def note(self, text: str, entry: str) -> None:
        self.notes.setdefault(text, []).append(f"{self.image.source}: {entry}" if entry else self.image.source)

    def fail(self, entry: str, got: str, remedy: str = "") -> None:
        fail(self.image.source, entry, got, remedy)

    def said(self) -> Said:
        image, options = self.image, self.options
        self._check_shape()
        for text in image.notes:
            self.note(text, "")
        for missing in self.missing.values():
            missing |= {c for c in map(options.target.get, image.incomplete) if c is not None}
        boxes: list[tuple[str, str, Box]] = []
        points: list[Point] = []
        tags: dict[str, tuple[bool, str]] = {}
        regions: set[tuple[str, str]] = set()
        for mark in image.marks:
            label = self._class_of(mark)
            if label is None:
                continue
            if isinstance(mark, Tag):
                if tags.setdefault(label, (mark.present, mark.entry))[0] != mark.present:
                    self.fail(
                        mark.entry, f"{label!r} is tagged as present and as absent ({tags[label][1]})", "Keep one."
                    )
                self.counts[label, "present" if mark.present else "absent"] += 1
            elif isinstance(mark, PointMark):
                at = self._point(mark)
                if at is not None:
                    points.append(Point(label, at))
                    self.counts[label, "points"] += 1
            elif isinstance(mark, BoxMark):
                box = self._box(mark, label)
                if box is not None:
                    boxes.append((mark.entry, label, box))
                    self.counts[label, "boxes"] += 1
            elif isinstance(mark, Region):
                if self._region(mark, label) and (label, mark.entry) not in regions:
                    regions.add((label, mark.entry))
                    self.counts[label, "regions"] += 1
            elif isinstance(mark, Scribble):
                if self._scribble(mark, label):
                    self.counts[label, "scribbles"] += 1
            else:
                self._raster(mark, label)
        marked = bool(self.counts) or bool(image.marks)
        looked_at = marked or options.negatives
        label_map, mask_labels, drawn = self._paint(looked_at)
        own = [self._grown(entry, name, box) for entry, name, box in boxes]
        present = tuple(name for name, (there, _) in tags.items() if there)
        absent = tuple(name for name, (there, _) in tags.items() if not there)
        if looked_at:
            shown = {name for name, _ in self.counts} | set(drawn)
            absent += tuple(n for n in options.claims.tags if n not in tags and n not in shown)
        annotations = Annotations(
            shape=self.shape,
            present=present,
            absent=absent,
            points=tuple(points),
            boxes=tuple(own),
            complete_points=self._complete("points", options.claims.points, looked_at),
            complete_boxes=self._complete("boxes", options.claims.boxes, looked_at),
            mask_labels=mask_labels,
        )
        annotations = self._boxes_hold_masks(annotations, label_map)
        normal = annotations_from_dict(annotations_to_dict(annotations), source=image.source, labels=options.names)
        mask = label_map if label_map is not None else np.full(self.shape, options.ignore, np.int32)
        problems = find_contradictions(
            normal, mask, source=image.source, labels=options.names, ignore_label=options.ignore
        )
        return Said(normal, label_map, self.counts, self.notes, problems, marked, frozenset(drawn))

    def _check_shape(self) -> None:
        stated = self.image.expected_shape
        if stated is None or tuple(stated) == self.shape or (1, *stated) == self.shape:
            return
        hint = "Were the annotations made on another image, or before it was resized?"
        if tuple(stated)[::-1] == self.shape:
            hint = "Width and height are exchanged: was the image turned after it was annotated?"
        self.fail(
            "",
            f"the file says that the image {self.image.file.name} has the shape {show_position(stated)} "
            f"{_AXES.get(len(stated), '')}, but it has {show_position(self.shape)}",
            hint,
        )

    def _class_of(self, mark: Any) -> str | None:
        """The class of a mark, None if it is to be left out. A map of several classes is handled as background here."""
        if isinstance(mark, RasterMask) and mark.label is None:
            return BACKGROUND
        name = self.options.target.get(mark.label)
        if name is None:
            self.note(f"left out by --map: {mark.label!r}", mark.entry)
        return name

    def _coordinates(self, values: Sequence[float], entry: str, filler: float = 0.0) -> npt.NDArray[np.float64]:
        """A position with as many coordinates as the image has axes."""
        position = np.asarray(values, np.float64)
        if len(position) == 2 and len(self.shape) == 3 and self.shape[0] == 1:
            position = np.concatenate([[filler], position])
        if len(position) != len(self.shape):
            self.fail(
                entry,
                f"it has {len(position)} coordinates, but the image {self.image.file.name} has the shape "
                f"{show_position(self.shape)}",
                "Was a slice annotated rather than the volume, or the other way round?",
            )
        if not np.isfinite(position).all():
            self.fail(entry, "a coordinate is not a finite number")
        return position

    def _outside(self, label: str, entry: str, what: str, where: str) -> None:
        """Refuse something that lies outside of the image, or leave it out if that is wanted."""
        if not self.options.drop_outside:
            self.fail(
                entry,
                f"{what} of {label!r} at {where} lies outside the image {self.image.file.name} of shape "
                f"{show_position(self.shape)} {_AXES[len(self.shape)]}",
                "Are x and y exchanged, was the image resized, or is it another image? --drop-outside leaves "
                "such marks out.",
            )
        kind = {"a point": "points", "a box": "boxes"}.get(what, "masks")
        self.missing[kind].add(label)
        self.note(f"left out (--drop-outside): {what} outside of its image", entry)

    def _point(self, mark: PointMark) -> Position | None:
        at = self._coordinates(mark.at, mark.entry)
        high = np.asarray(self.shape) - 0.5
        if ((at < -0.5 - _SLACK / 2) | (at > high + _SLACK / 2)).any():
            self._outside(str(self.options.target[mark.label]), mark.entry, "a point", show_position(at.tolist()))
            return None
        inside = np.clip(at, -0.5, high)
        if (inside != at).any():
            self.note("points up to half a voxel outside of the image: moved to its border", mark.entry)
        return tuple(float(v) for v in inside)

    def _box(self, mark: BoxMark, label: str) -> Box | None:
        start, stop = self._coordinates(mark.start, mark.entry), self._coordinates(mark.stop, mark.entry, 1.0)
        size = np.asarray(self.shape, np.float64)
        if (stop <= start).any():
            self.missing["boxes"].add(label)
            self.note("left out: boxes without extent", mark.entry)
            return None
        if (np.maximum(start, 0) >= np.minimum(stop, size)).any():
            self._outside(
                label, mark.entry, "a box", f"{show_position(start.tolist())} to {show_position(stop.tolist())}"
            )
            return None
        excess = float(np.maximum(-start, stop - size).max())
        tight = mark.tight and self.options.loose <= 0
        if excess > 0:
            self.note("boxes that leave the image: cut off at its border", mark.entry)
        if excess > _SLACK and tight:
            tight = False
            self.note("boxes that leave the image by more than a voxel: no longer counted as tight", mark.entry)
        start, stop = np.maximum(start, 0), np.minimum(stop, size)
        first, after = np.ceil(start - 0.5), np.ceil(stop - 0.5)  # the voxels whose centres lie in the box
        thin = first >= after
        first = np.where(thin, np.clip(np.floor((start + stop) / 2), 0, size - 1), first)
        after = np.where(thin, first + 1, after)
        return Box(label, tuple(map(float, first)), tuple(map(float, after)), tight)

    def _region(self, mark: Region, label: str) -> bool:
        """Take up a polygon; False if it is left out."""
        rings = [ring for ring in mark.rings if len(ring)]
        for ring in rings:
            for vertex in ring:
                if len(vertex) != 2 or not np.isfinite(vertex).all():
                    self.fail(mark.entry, f"expected vertices of two finite numbers, but got {vertex}")
        if not rings or max(map(shoelace, rings)) <= 0:
            self.missing["masks"].add(label)
            self.note("left out: regions without area", mark.entry)
            return False
        plane = self._plane(mark)
        frame = self.shape[-2:]
        corners = np.concatenate([np.asarray(ring, np.float64) for ring in rings])
        low, high = corners.min(0), corners.max(0)
        if (high <= 0).any() or (low >= frame).any() or plane is None:
            between = f"{show_position(low)} to {show_position(high)}"
            self._outside(
                label, mark.entry, "a region", between + ("" if plane is not None else f", z = {mark.plane:g}")
            )
            return False
        if float(np.maximum(-low, high - frame).max()) > _SLACK:
            self.note("regions that leave the image: cut off at its border", mark.entry)
        patch = fill_rings(rings, (frame[0], frame[1]))
        if patch is None:  # so small that it holds no voxel's centre
            middle = np.clip(np.floor((low + high) / 2), 0, np.asarray(frame) - 1).astype(int)
            patch = tuple(slice(int(v), int(v) + 1) for v in middle), np.ones((1, 1), bool)
        where, voxels = patch
        if len(self.shape) == 3:
            where, voxels = (slice(plane, plane + 1), *where), voxels[None]
        self._layer(label, (where, voxels), mark.entry)
        if mark.crowd:  # objects without a box or point each
            self.missing["boxes"].add(label)
            self.missing["points"].add(label)
        return True

    def _plane(self, mark: Region) -> int | None:
        """The slice of a polygon; None if the image has no such slice."""
        if len(self.shape) == 2:
            if mark.plane is not None and round(mark.plane) != 0:
                self.fail(mark.entry, f"it lies in slice {mark.plane:g}, but {self.image.file.name} is a 2D image")
            return 0
        if mark.plane is None and self.shape[0] > 1:
            self.fail(
                mark.entry,
                f"it states no slice, but {self.image.file.name} is a 3D image of {self.shape[0]} slices",
                "Import the slices as 2D images, or annotate in a tool that knows volumes.",
            )
        plane = int(np.ceil((mark.plane or 0.0) - 0.5))
        return plane if 0 <= plane < self.shape[0] else None

    def _scribble(self, mark: Scribble, label: str) -> bool:
        if not mark.vertices:
            self.note("left out: lines without a vertex", mark.entry)
            return False
        vertices = [self._coordinates(vertex, mark.entry).tolist() for vertex in mark.vertices]
        width = self.options.scribble_width or mark.width or DEFAULT_WIDTH
        try:
            patch = draw_line(vertices, width, self.shape)
        except ValueError as error:
            fail(self.image.source, mark.entry, str(error))
        if patch is None:
            self._outside(label, mark.entry, "a line", show_position(vertices[0]))
            return False
        corners = np.asarray(vertices)
        if (corners < -0.5 - _SLACK).any() or (corners > np.asarray(self.shape) - 0.5 + _SLACK).any():
            self.note("lines that leave the image: cut off at its border", mark.entry)
        self.lines.append(_Layer(label, patch, int(patch[1].sum())))
        return True

    def _raster(self, mark: RasterMask, label: str) -> None:
        array = mark.load()
        offset = tuple(mark.offset)
        if array.ndim == 2 and len(self.shape) == 3 and self.shape[0] == 1:
            array, offset = array[None], (0, *offset[-2:])
        if array.ndim == 3 and len(self.shape) == 2 and array.shape[0] == 1:
            array, offset = array[0], offset[-2:]
        if array.ndim != len(self.shape) or len(offset) != array.ndim:
            self.fail(
                mark.entry,
                f"the mask has {array.ndim} axes, but the image {self.image.file.name} has the shape "
                f"{show_position(self.shape)}",
            )
        where, part = [], []
        for begin, length, size in zip(offset, array.shape, self.shape, strict=True):
            first, after = max(begin, 0), min(begin + length, size)
            where.append(slice(first, max(first, after)))
            part.append(slice(first - begin, max(first, after) - begin))
        array_inside = array[tuple(part)]
        if array_inside.shape != array.shape:
            if array_inside.size == 0:
                self._outside(label, mark.entry, "a mask", show_position(offset))
                return
            self.note("masks that leave the image: cut off at its border", mark.entry)
        if mark.label is None:
            self._base(mark, tuple(where), array_inside)
            return
        voxels = array_inside.astype(bool)
        if not voxels.any():
            self.missing["masks"].add(label)
            self.note("left out: masks without a voxel", mark.entry)
            return
        self._layer(label, (tuple(where), voxels), mark.entry)
        self.counts[label, "masks"] += 1
        if mark.crowd:  # objects without a box or point each
            self.missing["boxes"].add(label)
            self.missing["points"].add(label)

    def _base(self, mark: RasterMask, where: tuple[slice, ...], array: npt.NDArray[Any]) -> None:
        """A map of several classes: its values as those of the dataset, -1 for voxels nobody annotated."""
        values = np.full(array.shape, -1, np.int32)
        for value, name in mark.names.items():
            label = BACKGROUND if name == BACKGROUND else self.options.target.get(name)
            here = array == value
            number = int(here.sum())
            if number == 0:
                continue
            if label is None:
                self.note(f"left out by --map: {name!r}", mark.entry)
                continue
            values[here] = self.options.names.index(label)
            self.counts[label, "masks"] += 1
        whole = np.full(self.shape, -1, np.int32)
        whole[where] = values
        self.bases.append((mark, whole))

    def _layer(self, label: str, patch: Patch, entry: str) -> None:
        self.has_area = True
        where, voxels = patch
        self.layers.append(_Layer(label, patch, int(voxels.sum())))
        bounds = []
        for axis, part in enumerate(where):
            lines = np.flatnonzero(voxels.any(axis=tuple(a for a in range(voxels.ndim) if a != axis)))
            bounds.append(slice(part.start + int(lines[0]), part.start + int(lines[-1]) + 1))
        self.extents.setdefault((entry, label), []).append(tuple(bounds))

    def _paint(self, looked_at: bool) -> tuple[npt.NDArray[np.int32] | None, tuple[str, ...] | None, set[str]]:
        """The label map, its mask_labels, and the classes in it."""
        options, names = self.options, self.options.names
        claimed = options.claims.mask_labels
        within = claimed is None and self.image.drawn is None  # what lies outside of the masks stays unknown
        stated_labels = self.image.mask_labels if within else self.image.drawn
        if claimed is None and stated_labels is not None:
            claimed = tuple(c for c in map(options.target.get, stated_labels) if c is not None)
        has_area = self.has_area or bool(self.bases)
        if not has_area and not self.lines:
            stated = self.image.drawn is not None and options.claims.mask_labels is None
            if claimed is None or (not stated and (self.image.marks or not looked_at)):
                return None, None, set()
        painted = np.full(self.shape, -1, np.int32)
        for _, base in self.bases:
            np.copyto(painted, base, where=base >= 0)
        overlaps: Counter[tuple[str, str]] = Counter()
        name_of = {names.index(n): n for n in names.names}
        order = sorted(self.layers, key=lambda layer: -layer.size) + sorted(self.lines, key=lambda line: -line.size)
        for layer in order:
            where, voxels = layer.patch
            value = names.index(layer.label)
            here = painted[where]
            covered = here[voxels & (here >= 0) & (here != value) & (here != 0)]
            for other, number in zip(*np.unique(covered, return_counts=True), strict=True):
                overlaps[layer.label, name_of[int(other)]] += int(number)
            here[voxels] = value
        for (above, below), number in overlaps.items():
            self.note(f"{above!r} drawn over {below!r}: the smaller area lies on top", f"{number} voxels")
        drawn = {name_of[int(v)] for v in np.unique(painted) if v >= 0}
        mask_labels: tuple[str, ...] | None = None
        fill = options.ignore
        if claimed is not None and (has_area or not self.lines):
            unclaimed = sorted((drawn | (self.missing["masks"] if not self.bases else set())) - {*claimed, BACKGROUND})
            if within:
                mask_labels = None if {*claimed} >= {*names.names} - {BACKGROUND} else tuple(claimed)
            elif unclaimed and self.bases:
                self.fail(
                    "", f"the label image holds {unclaimed[0]!r}, which --mask-labels does not name", "Name it too."
                )
            elif unclaimed or set(claimed) & self.missing["masks"]:
                culprit = (unclaimed or sorted(set(claimed) & self.missing["masks"]))[0]
                self.note(
                    f"not every {culprit!r} of these images is known to be drawn: what is outside of their masks stays "
                    "'ignore'",
                    "",
                )
            else:
                fill = fill if self.bases else 0
                mask_labels = None if {*claimed} >= {*names.names} - {BACKGROUND} else tuple(claimed)
        painted[painted < 0] = fill
        return painted, mask_labels, drawn

    def _grown(self, entry: str, label: str, box: Box) -> Box:
        """A box that holds the outline of its own object, should rounding have left a line of voxels outside."""
        extents = self.extents.get((entry, label))
        if not extents:
            return box
        low = np.min([[part.start for part in e] for e in extents], axis=0)
        high = np.max([[part.stop for part in e] for e in extents], axis=0)
        start, stop = np.minimum(box.start, low), np.maximum(box.stop, high)
        grown = float(np.max([np.asarray(box.start) - start, stop - np.asarray(box.stop)]))
        if 0 < grown <= _SLACK:
            self.note("boxes that leave out a line of voxels of their own region: extended by it", entry)
            return replace(box, start=tuple(map(float, start)), stop=tuple(map(float, stop)))
        return box

    def _complete(self, kind: str, claimed: Sequence[str], looked_at: bool) -> tuple[str, ...]:
        """The classes of which every object of this image carries a box (a point)."""
        stated = {c for c in map(self.options.target.get, self.image.complete.get(kind, ())) if c is not None}
        names = [*dict.fromkeys([*(claimed if looked_at else ()), *sorted(stated)])]
        missing = self.missing[kind]
        for name in sorted(missing & set(names)):
            self.note(
                f"{name!r} has marks that were left out or outline several objects: its {kind} are not complete", ""
            )
        return tuple(name for name in names if name not in missing)

    def _boxes_hold_masks(self, said: Annotations, label: npt.NDArray[np.int32] | None) -> Annotations:
        """Boxes are not complete where a mask shows their class outside all of them."""
        if label is None or not said.complete_boxes:
            return said
        kept = []
        for name in said.complete_boxes:
            outside = label == self.options.names.index(name)
            for box in said.boxes:
                if box.label == name:
                    outside[tuple(slice(int(a), int(b)) for a, b in zip(box.start, box.stop, strict=True))] = False
            if outside.any():
                self.note(f"masks show {name!r} outside of its boxes, which are then not called complete", "")
            else:
                kept.append(name)
        return replace(said, complete_boxes=tuple(kept))


def refuse_if_empty(results: Sequence[Said], source: str) -> None:
    """AnnotationError if no image has a single mark: a wrong folder, most likely."""
    if not any(said.marked for said in results):
        raise AnnotationError(f"{source}: nothing is marked in any of {len(results)} images. Is it the right folder?")
