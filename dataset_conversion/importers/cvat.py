"""CVAT for images 1.1 (XML): boxes, points, polylines, polygons, masks, ellipses and tags of many images in one file.

SRC is the XML file, or the folder into which the exported .zip was unpacked (annotations.xml beside images/). CVAT
counts pixels from the outer corner of the first one, x first.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunet_dsp.annotation_errors import show
from nnunet_dsp.dataset_conversion.image_files import stem_of
from nnunet_dsp.dataset_conversion.imported import (
    BoxMark,
    ImageFolder,
    Mark,
    PointMark,
    RasterMask,
    Region,
    Scribble,
    SourceImage,
    Tag,
    fail,
    finite,
    whole_number,
)
from nnunet_dsp.dataset_conversion.importers._pairing import annotation_files, each
from nnunet_dsp.dataset_conversion.importers._shapes import around_rotated, ellipse_ring
from nnunet_dsp.dataset_conversion.importers._xml import parse_xml

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

NAME = "cvat"
HELP = "CVAT for images 1.1 (XML): boxes, points, polylines, polygons, masks, ellipses, tags"
EXAMPLE = "nnunet_dsp import cvat task_12/ -d 510 --name Cells --complete boxes=RBC"

MAX_FILE_BYTES = 512 * 2**20  # masks of a large task are long
MAX_MASK_VOXELS = 2**28
SHAPES = ("box", "points", "polyline", "polygon", "mask", "ellipse")
TURNED = "turned boxes: the upright box around each is taken, as loose"
REFUSED = {
    "skeleton": "Draw points or boxes in its place, or delete the skeletons before you export.",
    "cuboid": "Draw boxes in its place, or delete the cuboids before you export.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CVAT's export says all that is needed; there are no options of its own."""


def read(src: Path, args: argparse.Namespace, images: ImageFolder) -> Iterator[SourceImage]:
    """Every <image> of every XML file of SRC, those without annotations as well.

    Raises:
        AnnotationError: a file that is not CVAT's for images, or a shape that cannot be what it says.
    """
    for file in each(annotation_files(src, (".xml",), "CVAT export")):
        yield from _read_file(file, images)


def _read_file(file: Path, images: ImageFolder) -> Iterator[SourceImage]:
    root = parse_xml(file, MAX_FILE_BYTES)
    if root.tag != "annotations":
        hint = "It looks like Pascal VOC: nnunet_dsp import voc." if root.tag == "annotation" else ""
        fail(file, "", f"expected CVAT's <annotations>, but the file begins with <{root.tag[:60]}>", hint)
    track = root.find("track")
    if track is not None:
        fail(
            file,
            f"track {show(track.get('id', '0'))}",
            "the file is 'CVAT for video', which holds tracks",
            "Export the task as 'CVAT for images 1.1': it writes the tracks frame by frame.",
        )
    classes = tuple(
        dict.fromkeys(
            name.text.strip()
            for label in root.iterfind("meta/*/labels/label")
            # a skeleton's parts are listed as labels of their own, with the parent's name
            if (name := label.find("name")) is not None and name.text and label.find("parent") is None
        )
    )
    elements = root.findall("image")
    if not elements:
        fail(file, "", "there is no <image> in it", "Export the task as 'CVAT for images 1.1'.")
    missing: list[str] = []
    read: list[SourceImage] = []
    for index, element in enumerate(elements):
        image = _Image(file, element, index, classes)
        if not len(element) and not _is_there(images, image):
            missing.append(image.name)  # a task of which only the annotated images were kept
            continue
        read.append(image.source_image(images))
    for index, one in enumerate(read):
        if index == 0 and missing:
            note = (
                f"{file.name} lists {len(missing)} images without annotations that are not there "
                f"({show(missing[0])} first); they are left out"
            )
            one = replace(one, notes=(*one.notes, note))
        yield one
    if not read:
        fail(file, "", f"none of its {len(elements)} images is there", "Name the folder of the images: --images DIR.")


def _is_there(images: ImageFolder, image: _Image) -> bool:
    try:
        images.find(image.path, image.file, image.entry)
    except ValueError:
        return False
    return True


class _Image:
    """One <image> element."""

    def __init__(self, file: Path, element: Element, index: int, classes: tuple[str, ...]) -> None:
        self.file = file
        self.element = element
        self.classes = classes
        self.name = element.get("name") or ""
        self.entry = f"image {show(self.name)}" if self.name else f"image[{index}]"
        if not self.name:
            fail(file, self.entry, "it has no name", "Export the task again.")
        subset = element.get("subset")
        self.path = f"{subset}/{self.name}" if subset else self.name  # projects keep images/<subset>/<name>
        self.size = self._size()
        self.notes: list[str] = []

    def _size(self) -> tuple[int, int] | None:
        """(y, x)."""
        width, height = self.element.get("width"), self.element.get("height")
        if width is None or height is None or "None" in (width, height):
            return None
        size = tuple(whole_number(v, self.file, f"{self.entry}, its width and height") for v in (height, width))
        if min(size) < 1:
            fail(self.file, self.entry, f"the image is {size[1]} x {size[0]} pixels")
        return size[0], size[1]

    def source_image(self, images: ImageFolder) -> SourceImage:
        """The image with its marks, those with a lower z_order first, as CVAT draws them."""
        marks: list[tuple[int, list[Mark]]] = []
        attributes: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for child in self.element:
            kind = child.tag
            where = f"{self.entry}, {kind}[{counts[kind]}]"
            counts[kind] += 1
            if kind in REFUSED:
                label = child.get("label", "")
                fail(self.file, where, f"it is a {kind} of {show(label)}, which this cannot import", REFUSED[kind])
            if kind != "tag" and kind not in SHAPES:
                fail(self.file, where, f"expected {', '.join(SHAPES)} or tag, but got <{kind[:40]}>")
            for attribute in child.iterfind("attribute"):
                attributes[attribute.get("name") or ""] += 1
            order = whole_number(child.get("z_order", "0"), self.file, f"{where}, z_order")
            marks.append((order, list(self._marks(child, kind, where))))
        if attributes:
            self.notes += [f"left out: the attribute {show(name)} of shapes" for name in sorted(attributes.elements())]
        marks.sort(key=lambda pair: pair[0])
        return SourceImage(
            file=images.find(self.path, self.file, self.entry),
            name="/".join([*self.path.replace("\\", "/").split("/")[:-1], stem_of(self.path)]),
            marks=tuple(mark for _, group in marks for mark in group),
            source=str(self.file),
            expected_shape=self.size,
            notes=tuple(self.notes),
            classes=self.classes,
        )

    def _marks(self, shape: Element, kind: str, where: str) -> Iterator[Mark]:
        label = shape.get("label")
        if not label:
            fail(self.file, where, "it has no label", "Give it one in CVAT, or remove it.")
        if kind == "tag":
            yield Tag(label, True, where)
        elif kind == "box":
            yield self._box(shape, label, where)
        elif kind == "ellipse":
            yield self._ellipse(shape, label, where)
        elif kind == "mask":
            yield self._mask(shape, label, where)
        else:
            points = self._points(shape, where)
            if kind == "points":
                for index, (y, x) in enumerate(points):
                    yield PointMark(label, (y - 0.5, x - 0.5), where if len(points) == 1 else f"{where}, point {index}")
            elif kind == "polyline":
                yield Scribble(label, tuple((y - 0.5, x - 0.5) for y, x in points), None, where)
            elif len(points) < 3:
                fail(self.file, where, f"a polygon needs three points, but it has {len(points)}")
            else:
                yield Region(label, (tuple(points),), None, where)

    def _number(self, shape: Element, key: str, where: str) -> float:
        value = shape.get(key)
        if value is None:
            fail(self.file, where, f"it lacks {key}", "Export the task as 'CVAT for images 1.1'.")
        return finite(value, self.file, f"{where}, {key}")

    def _whole(self, shape: Element, key: str, where: str) -> int:
        return whole_number(self._number(shape, key, where), self.file, f"{where}, {key}")

    def _points(self, shape: Element, where: str) -> list[tuple[float, float]]:
        """ "x,y;x,y;..." as [(y, x), ...]."""
        points = []
        for index, pair in enumerate((shape.get("points") or "").split(";")):
            numbers = pair.split(",")
            if len(numbers) != 2:
                fail(self.file, where, f'expected points as "x,y;x,y;...", but number {index} is {show(pair)}')
            x, y = (finite(number, self.file, f"{where}, point {index}") for number in numbers)
            points.append((y, x))
        return points

    def _box(self, shape: Element, label: str, where: str) -> BoxMark:
        x0, y0, x1, y1 = (self._number(shape, key, where) for key in ("xtl", "ytl", "xbr", "ybr"))
        start, stop = (min(y0, y1), min(x0, x1)), (max(y0, y1), max(x0, x1))
        rotation = finite(shape.get("rotation", "0"), self.file, f"{where}, rotation") % 360
        if not rotation:
            return BoxMark(label, start, stop, True, where)
        # A quarter turn leaves a box along the axes; anything else only an upright box around it
        tight = rotation % 90 == 0
        outer_start, outer_stop = around_rotated(start, stop, rotation)
        if not tight:
            self.notes.append(TURNED)
        return BoxMark(label, outer_start, outer_stop, tight, where)

    def _ellipse(self, shape: Element, label: str, where: str) -> Region:
        cx, cy, rx, ry = (self._number(shape, key, where) for key in ("cx", "cy", "rx", "ry"))
        if rx <= 0 or ry <= 0:
            fail(self.file, where, f"expected radii above 0, but got rx {rx:g} and ry {ry:g}")
        rotation = finite(shape.get("rotation", "0"), self.file, f"{where}, rotation")
        return Region(label, (ellipse_ring((cy, cx), (ry, rx), rotation),), None, where)

    def _mask(self, shape: Element, label: str, where: str) -> RasterMask:
        """Runs of outside, inside, outside, ..., row by row within a rectangle (left, top, width, height)."""
        left, top, width, height = (self._whole(shape, key, where) for key in ("left", "top", "width", "height"))
        if width < 1 or height < 1 or left < 0 or top < 0:
            fail(self.file, where, f"its rectangle (left {left}, top {top}, {width} x {height}) is none")
        if self.size is not None and (top + height > self.size[0] or left + width > self.size[1]):
            fail(
                self.file,
                where,
                f"its rectangle (left {left}, top {top}, {width} x {height}) leaves the image of "
                f"{self.size[1]} x {self.size[0]} pixels",
            )
        if width * height > MAX_MASK_VOXELS:
            fail(self.file, where, f"its rectangle of {width} x {height} pixels is larger than any image here")
        text = shape.get("rle") or ""
        parts = text.split(",") if text.strip() else []
        if len(parts) > width * height + 1:
            fail(self.file, where, f"it has more runs ({len(parts)}) than pixels ({width * height})")
        runs = [part.strip() for part in parts]
        if not all(run.isascii() and run.isdigit() and len(run) <= 10 for run in runs):
            wrong = next(run for run in runs if not (run.isascii() and run.isdigit() and len(run) <= 10))
            fail(self.file, where, f"expected lengths of runs (whole numbers), but got {show(wrong)}")
        lengths = np.array([int(run) for run in runs], np.int64)
        if int(lengths.sum()) != width * height:
            fail(
                self.file,
                where,
                f"its runs cover {int(lengths.sum())} pixels, but {width} x {height} are {width * height}",
                "The file seems to be damaged; export it again.",
            )
        # Unpacked when it is needed: the masks of a whole task would not fit into memory
        return RasterMask(label, partial(_unpack, lengths, height, width), (top, left), where)


def _unpack(lengths: np.ndarray, height: int, width: int) -> np.ndarray:
    """Runs of outside, inside, outside, ... as bool (height, width)."""
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(height, width)
