"""LabelMe (JSON, one file an image): rectangles, points, lines, polygons, circles, masks; flags as tags.

SRC is a folder with the .json files, or one of them. LabelMe counts pixels from the outer corner of the first one,
x first.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import io
import math
import os
import posixpath
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dsp.annotation_errors import show
from nnunet_dsp.dataset_conversion.image_files import stem_of
from nnunet_dsp.dataset_conversion.imported import (
    AnnotationError,
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
    read_json_bounded,
    whole_number,
)
from nnunet_dsp.dataset_conversion.importers._pairing import annotation_files, each
from nnunet_dsp.dataset_conversion.importers._shapes import Ring, ellipse_ring, hull, is_upright_rectangle

NAME = "labelme"
HELP = "LabelMe (JSON): rectangles, points, lines, polygons, circles, masks; flags as tags"
EXAMPLE = "nnunet_dsp import labelme annotated/ -d 511 --name Cells --mask-labels all"

MAX_FILE_BYTES = 256 * 2**20  # they carry the image
MAX_MASK_VOXELS = 2**28
TURNED = "turned rectangles: the upright box around each is taken, as loose"
COUNTS = {"rectangle": 2, "point": 1, "line": 2, "circle": 2, "mask": 2, "oriented_rectangle": 4}
"""How many points a shape of this type has, where that is fixed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """LabelMe's own options."""
    parser.add_argument(
        "--absent-flags",
        action="store_true",
        help="image flags that are not set mean that the class is nowhere in the image (default: it is unknown, as "
        "LabelMe starts with no flag set)",
    )


def read(src: Path, args: argparse.Namespace, images: ImageFolder) -> Iterator[SourceImage]:
    """Every LabelMe file of SRC.

    Raises:
        AnnotationError: a file that is not LabelMe's, a shape that cannot be what it says, or an image that is missing.
    """
    for file in each(annotation_files(src, (".json",), "LabelMe file")):
        content = read_json_bounded(file, MAX_FILE_BYTES)
        if not isinstance(content, dict) or "shapes" not in content:
            is_coco = isinstance(content, dict) and "images" in content
            hint = "It looks like COCO: nnunet_dsp import coco." if is_coco else ""
            fail(file, "", 'expected LabelMe\'s JSON with "shapes" and "imagePath"', hint)
        yield _File(file, content).source_image(src, images, bool(args.absent_flags))


class _File:
    """One JSON file."""

    def __init__(self, file: Path, content: dict[str, Any]) -> None:
        self.file = file
        self.content = content
        self.notes: list[str] = []

    def source_image(self, src: Path, images: ImageFolder, absent_flags: bool) -> SourceImage:
        shapes = self.content["shapes"]
        if not isinstance(shapes, list):
            fail(self.file, "shapes", f"expected a list, but got {show(shapes)}")
        marks: list[Mark] = list(self._tags(absent_flags))
        set_flags: set[str] = set()
        for index, shape in enumerate(shapes):
            where = f"shapes[{index}]"
            if not isinstance(shape, dict):
                fail(self.file, where, f"expected an object, but got {show(shape)}")
            marks += self._marks(shape, where)
            flags = shape.get("flags")
            set_flags |= {name for name, value in flags.items() if value} if isinstance(flags, dict) else set()
        if set_flags:
            named = ", ".join(show(name) for name in sorted(set_flags)[:5])
            self.notes.append(f"left out: flags of single shapes ({named})")
        image, name, embedded = self._image(src, images)
        return SourceImage(
            file=image,
            name=name,
            marks=tuple(marks),
            source=str(self.file),
            expected_shape=self._shape(),
            notes=tuple(self.notes),
            embedded=embedded,
        )

    def _shape(self) -> tuple[int, int] | None:
        sizes = [self.content.get(key) for key in ("imageHeight", "imageWidth")]
        if sizes[0] is None or sizes[1] is None:
            return None
        height, width = (whole_number(size, self.file, "imageHeight and imageWidth") for size in sizes)
        return height, width

    def _image(self, src: Path, images: ImageFolder) -> tuple[Path, str, bytes | None]:
        """The image file, the case's name, and the image's bytes if the file carries them and there is no other."""
        path = self.content.get("imagePath")
        data = self.content.get("imageData")
        if path is not None and not isinstance(path, str):
            fail(self.file, "imagePath", f"expected the name of the image, but got {show(path)}")
        if not path and data is None:
            fail(self.file, "imagePath", "the file names no image, and carries none")
        asked = (path or "").replace("\\", "/")
        if asked:
            below = os.path.relpath(self.file.parent, src if src.is_dir() else src.parent).replace(os.sep, "/")
            beside = posixpath.normpath(posixpath.join(below, asked))  # LabelMe's paths start at the JSON file
            try:
                image = images.find(asked if beside.startswith(("..", "/")) else beside, self.file, "imagePath")
            except AnnotationError:
                if data is None:
                    raise
            else:
                return image, stem_of(asked), None
        if not isinstance(data, str):
            fail(self.file, "imageData", f"expected an image in base64, but got {show(data)}")
        name = posixpath.basename(asked) or f"{self.file.stem}.png"
        return self.file.parent / name, stem_of(name), self._decode(data, "imageData")

    def _decode(self, data: str, where: str) -> bytes:
        try:
            return base64.b64decode(data.encode("ascii"), validate=True)
        except (UnicodeEncodeError, binascii.Error, ValueError):
            return fail(self.file, where, "it is not base64", "The file seems to be damaged; save it in LabelMe again.")

    def _tags(self, absent_flags: bool) -> Iterator[Tag]:
        flags = self.content.get("flags") or {}
        if not isinstance(flags, dict):
            fail(self.file, "flags", f'expected an object such as {{"tumour": true}}, but got {show(flags)}')
        for name, value in flags.items():
            if not isinstance(value, bool):
                fail(self.file, f"flags, {show(name)}", f"expected true or false, but got {show(value)}")
            if name and (value or absent_flags):
                yield Tag(name, value, f"flags, {show(name)}")

    def _points(self, shape: dict[str, Any], where: str) -> list[tuple[float, float]]:
        """Points as (y, x)."""
        points = shape.get("points")
        if not isinstance(points, list) or not points:
            fail(self.file, where, f"expected points [[x, y], ...], but got {show(points)}")
        found = []
        for index, point in enumerate(points):
            if not isinstance(point, list) or len(point) != 2:
                fail(self.file, where, f"expected point {index} as [x, y], but got {show(point)}")
            x, y = (finite(value, self.file, f"{where}, point {index}") for value in point)
            found.append((y, x))
        return found

    def _marks(self, shape: dict[str, Any], where: str) -> Iterator[Mark]:
        label = shape.get("label")
        if not isinstance(label, str) or not label:
            fail(self.file, where, f"expected a label, but got {show(label)}")
        kind = shape.get("shape_type") or "polygon"  # LabelMe 3 knew polygons only, and did not say so
        points = self._points(shape, where)
        if isinstance(kind, str) and len(points) != COUNTS.get(kind, len(points)):
            fail(self.file, where, f"a {kind} has {COUNTS[kind]} points, but it has {len(points)}")
        centres = tuple((y - 0.5, x - 0.5) for y, x in points)
        if kind == "rectangle":
            start, stop = hull(points)
            yield BoxMark(label, start, stop, True, where)
        elif kind == "oriented_rectangle":
            start, stop = hull(points)
            upright = is_upright_rectangle(points)
            if not upright:
                self.notes.append(TURNED)
            yield BoxMark(label, start, stop, upright, where)
        elif kind in ("point", "points"):
            for index, at in enumerate(centres):
                yield PointMark(label, at, where if len(centres) == 1 else f"{where}, point {index}")
        elif kind in ("line", "linestrip"):
            yield Scribble(label, centres, None, where)
        elif kind == "polygon":
            if len(points) < 3:
                fail(self.file, where, f"a polygon needs three points, but it has {len(points)}")
            yield Region(label, (tuple(points),), None, where)
        elif kind == "circle":
            yield Region(label, (self._circle(points, where),), None, where)
        elif kind == "mask":
            yield self._mask(shape, label, points, where)
        else:
            fail(self.file, where, f"expected a shape_type of LabelMe, but got {show(kind)}")

    def _circle(self, points: list[tuple[float, float]], where: str) -> Ring:
        center, rim = points
        radius = math.dist(center, rim)
        if radius == 0:
            fail(self.file, where, "the circle's radius is 0", "Remove it, or make it a point.")
        return ellipse_ring(center, (radius, radius))

    def _mask(self, shape: dict[str, Any], label: str, points: list[tuple[float, float]], where: str) -> RasterMask:
        """A PNG of the mask's bounding box, whose first and last pixel `points` name."""
        data = shape.get("mask")
        if not isinstance(data, str):
            fail(self.file, where, f"expected its mask as PNG in base64, but got {show(data)}")
        png = self._decode(data, f"{where}, mask")
        height, width = _png_size(png, self.file, f"{where}, mask")
        (y0, x0), (y1, x1) = points
        whole = all(float(v).is_integer() for point in points for v in point)  # LabelMe 5; later ones have fractions
        if whole and (height, width) != (y1 - y0 + 1, x1 - x0 + 1):
            fail(
                self.file,
                where,
                f"its mask has {width} x {height} pixels, but its points span {x1 - x0 + 1:g} x {y1 - y0 + 1:g}",
                "Draw it again.",
            )
        _unpack(png, str(self.file), where)  # now rather than in the middle of writing
        # Unpacked again when it is needed: the masks of a large folder would not fit into memory
        return RasterMask(label, partial(_unpack, png, str(self.file), where), (round(y0), round(x0)), where)


def _png_size(png: bytes, file: Path, where: str) -> tuple[int, int]:
    """(y, x) from the header, before anything is unpacked."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        fail(file, where, f"it is no PNG image: {error}")
    if width * height > MAX_MASK_VOXELS:
        fail(file, where, f"it has {width} x {height} pixels, more than {MAX_MASK_VOXELS}")
    return height, width


def _unpack(png: bytes, file: str, where: str) -> np.ndarray:
    """A mask's pixels, bool (y, x): those that are not 0."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            array: np.ndarray = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        fail(file, f"{where}, mask", f"the PNG image is damaged: {error}")
    if array.ndim == 3:  # colours, and perhaps an alpha channel, which says nothing
        array = array[..., : 3 if array.shape[2] >= 3 else 1].max(axis=2)
    return array != 0
