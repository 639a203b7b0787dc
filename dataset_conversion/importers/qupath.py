"""QuPath GeoJSON: points, rectangles, polygons with holes, lines, with their classifications; one file an image.

SRC is a folder with .geojson (or .json) files, called after their images, or one such file. QuPath counts pixels of the
full resolution from the outer corner of the first one, x first. Images that QuPath exported as tiles say in their names
where they lie ("slide [d=2,x=1000,y=0,w=512,h=512].tif"); the slide's annotations are cut to each.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dsp.annotation_errors import show
from nnunet_dsp.dataset_conversion.image_files import stem_of
from nnunet_dsp.dataset_conversion.imported import (
    BoxMark,
    ImageFolder,
    Mark,
    PointMark,
    Region,
    Scribble,
    SourceImage,
    fail,
    finite,
    read_json_bounded,
    text_of,
    whole_number,
)
from nnunet_dsp.dataset_conversion.importers._pairing import Pairing, annotation_files, beginnings, each, merged
from nnunet_dsp.dataset_conversion.importers._shapes import IN_ONE_SLICE, MAX_RING, hull, is_upright_rectangle

NAME = "qupath"
HELP = "QuPath GeoJSON: points, rectangles, polygons with holes, lines, classifications"
EXAMPLE = "nnunet_dsp import qupath geojson/ --images slides/ -d 512 --name Tumour --map classes.csv"

MAX_FILE_BYTES = 1 << 30  # a slide's cells
MAX_CHILDREN = 16  # levels of objects within objects
ENDINGS = (".geojson", ".json")
DROPPED_TYPES = {"root", "tile", "tmaCore", "tma_core", "PathRootObject", "PathTileObject", "TMACoreObject"}
# qupath.lib.images.writers.TileExporter
TILE = re.compile(
    r"(?P<stem>.*?)[ _]?\[(?:d=(?P<d>[\d.]+),)?x=(?P<x>-?\d+),y=(?P<y>-?\d+),w=(?P<w>\d+),h=(?P<h>\d+)"
    r"(?:,z=(?P<z>\d+))?(?:,t=(?P<t>\d+))?\]"
)
EVERYWHERE = (-math.inf, -math.inf, math.inf, math.inf)
TILE_DEFAULTS = (("d", "1"), ("x", ""), ("y", ""), ("z", "0"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """QuPath's own options."""
    parser.add_argument(
        "--rectangles",
        choices=("boxes", "regions"),
        default="boxes",
        help="rectangles are boxes around objects (default), or regions that the class fills",
    )
    parser.add_argument(
        "--unclassified", metavar="NAME", help="class of objects without a classification (default: they are left out)"
    )
    parser.add_argument(
        "--base-class",
        action="store_true",
        help='"Tumor: Positive" counts as "Tumor" (default: as a class of its own)',
    )
    parser.add_argument(
        "--downsample",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="full-resolution pixels per pixel of the image, if it was exported downsampled (default: 1)",
    )
    parser.add_argument(
        "--offset",
        type=float,
        nargs=2,
        default=(0.0, 0.0),
        metavar=("X", "Y"),
        help="upper left corner of the image in full-resolution pixels of the slide, if only a part was exported",
    )
    parser.add_argument(
        "--image", metavar="FILE", help="the image that all annotations belong to, if names do not tell"
    )


@dataclass(frozen=True)
class _Frame:
    """Where the image lies in the slide: full-resolution pixel (x, y) of its corner, and pixels per image pixel."""

    x: float
    y: float
    downsample: float
    plane: int  # z of the slide that a 2D image shows
    is_part: bool  # of the slide, so that annotations may lie outside
    is_tile: bool = False  # one of many parts, so that most annotations do

    def place(self, x: float, y: float) -> tuple[float, float]:
        """(y, x) in the image, faces."""
        return (y - self.y) / self.downsample, (x - self.x) / self.downsample


def read(src: Path, args: argparse.Namespace, images: ImageFolder) -> Iterator[SourceImage]:
    """Every image that a GeoJSON file of SRC belongs to, with all its files' annotations.

    Raises:
        AnnotationError: a file that is not QuPath's, a geometry that cannot be what it says, or no image.
        ValueError: a downsampling of 0 or below.
    """
    if not 0.001 <= args.downsample <= 10_000:
        raise ValueError(f"Expected --downsample between 0.001 and 10000, but got {args.downsample:g}.")
    yield from merged(_read_files(src, args, images), src)


def _read_files(src: Path, args: argparse.Namespace, images: ImageFolder) -> Iterator[SourceImage]:
    corner = tuple(finite(value, "--offset", "") for value in args.offset)
    whole = _Frame(corner[0], corner[1], args.downsample, 0, args.downsample != 1 or corner != (0, 0))
    tiles: dict[str, list[tuple[Path, _Frame]]] = {}
    others: set[str] = set()
    for image in images.files():
        tile = _tile(image)
        if tile is not None:
            tiles.setdefault(tile[0].lower(), []).append((image, tile[1]))
        else:
            others |= {image.name.lower(), stem_of(image).lower()}
    pairing: Pairing | None = None
    files = annotation_files(src, ENDINGS, "GeoJSON file")
    if src.is_dir() and any(file.name.lower().endswith(ENDINGS[0]) for file in files):
        files = [file for file in files if file.name.lower().endswith(ENDINGS[0])]  # other JSON is of other programs
    for file in each(files):
        stem = next((file.name[: -len(e)] for e in ENDINGS if file.name.lower().endswith(e)), file.name)
        names = (name.lower() for name in beginnings(stem))  # slide_1_points: slide_1_points, slide_1, slide
        slide = None if args.image else next((name for name in names if name in tiles or name in others), None)
        found = tiles.get(slide) if slide is not None else None
        if found is None:
            pairing = pairing or Pairing(images, args.image)
            image = pairing.find(file, file.name[len(stem) :])[0]
            tile = None if whole.is_part else _tile(image)
            found = [(image, whole if tile is None else tile[1])]
        objects = list(_features(file, _read_json(file)))
        if len(found) == 1:
            yield _Image(file, images, found[0][0], found[0][1], args).source_image(objects)
            continue
        bounds = np.array([_bounds(feature.get("geometry")) for _, feature in objects]).reshape(-1, 4)
        for image, frame in found:  # a slide may have a thousand tiles and a hundred thousand cells
            one = _Image(file, images, image, frame, args)
            yield one.source_image([objects[index] for index in np.flatnonzero(one.may_show(bounds))])


def _tile(image: Path) -> tuple[str, _Frame] | None:
    """Slide's name and frame of a tile, None for other images."""
    match = TILE.fullmatch(stem_of(image))
    if match is None:
        return None
    downsample, x, y, z = (finite(match[key] or default, image, "its name") for key, default in TILE_DEFAULTS)
    if downsample <= 0:
        return None
    return match["stem"], _Frame(x, y, downsample, int(z), is_part=True, is_tile=True)


def _read_json(file: Path) -> Any:
    """QuPath writes a measurement that is not a number as NaN, which is no JSON: read as null, as are coordinates."""
    text = text_of(file, MAX_FILE_BYTES)
    if "NaN" not in text and "Infinity" not in text:
        return read_json_bounded(file, MAX_FILE_BYTES)
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except RecursionError:
        return fail(file, "", "the JSON is nested too deeply for annotations")
    except ValueError as error:
        return fail(file, "", f"not valid JSON: {error}")


def _features(file: Path, content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Features with where they stand: of a FeatureCollection, a bare list, one Feature, and those within features."""
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        features, where = content.get("features"), "features"
    elif isinstance(content, dict) and content.get("type") == "Feature":
        features, where = [content], "features"
    else:
        features, where = content, ""
    if not isinstance(features, list):
        fail(
            file,
            where,
            f"expected a FeatureCollection or a list of features, as QuPath exports them, but got {show(features)}",
            'In QuPath: File > Export objects as GeoJSON, with "Export as FeatureCollection".',
        )
    level = [(f"{where}[{index}]", feature) for index, feature in enumerate(features)]
    for _ in range(MAX_CHILDREN):
        children = []
        for name, feature in level:
            if not isinstance(feature, dict) or feature.get("type") != "Feature":
                fail(file, name, f'expected an object with "type": "Feature", but got {show(feature)}')
            yield name, feature
            properties = feature.get("properties")
            below = properties.get("childObjects") if isinstance(properties, dict) else None
            if isinstance(below, list):
                children += [(f"{name}.childObjects[{index}]", child) for index, child in enumerate(below)]
        level = children
    if level:
        fail(file, level[0][0], f"objects lie within objects more than {MAX_CHILDREN} levels deep")


def _bounds(geometry: Any) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of a geometry; of one that cannot be read everything, so that it is looked at, and refused."""
    low, high = [math.inf, math.inf], [-math.inf, -math.inf]
    todo = [geometry.get("coordinates"), geometry.get("geometries")] if isinstance(geometry, dict) else []
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += [value.get("coordinates"), value.get("geometries")]
        elif (
            isinstance(value, list)
            and len(value) > 1
            and all(type(v) in (int, float) and abs(v) < 1e12 for v in value[:2])
        ):
            for axis in (0, 1):
                low[axis], high[axis] = min(low[axis], value[axis]), max(high[axis], value[axis])
        elif isinstance(value, list):
            todo += value
        elif value is not None:
            return EVERYWHERE
    return (low[0], low[1], high[0], high[1]) if low[0] <= high[0] else EVERYWHERE


class _Image:
    """The annotations of one file as they fall on one image."""

    def __init__(self, file: Path, images: ImageFolder, image: Path, frame: _Frame, args: argparse.Namespace) -> None:
        self.file = file
        self.image = image
        self.frame = frame
        self.args = args
        self.shape = images.shape(image)
        self.notes: list[str] = []
        self.in_one_slice: set[str] = set()

    def may_show(self, bounds: np.ndarray) -> np.ndarray:
        """Which objects the image may show any of, by their bounds (x0, y0, x1, y1) in the slide."""
        height, width = (size * self.frame.downsample for size in self.shape[-2:])
        x0, y0, x1, y1 = bounds.T
        x, y = self.frame.x, self.frame.y
        return (x1 >= x) & (y1 >= y) & (x0 <= x + width) & (y0 <= y + height)

    def source_image(self, objects: Sequence[tuple[str, dict[str, Any]]]) -> SourceImage:
        marks: list[Mark] = []
        for where, feature in objects:
            marks += self._of_feature(where, feature)
        return SourceImage(
            file=self.image,
            name=stem_of(self.image),
            marks=tuple(marks),
            source=str(self.file),
            notes=tuple(self.notes),
            incomplete=tuple(sorted(self.in_one_slice)),
        )

    def _of_feature(self, where: str, feature: dict[str, Any]) -> Iterator[Mark]:
        properties = feature.get("properties")
        if properties is None:
            properties = {}
        if not isinstance(properties, dict):
            fail(self.file, where, f"expected its properties as an object, but got {show(properties)}")
        # QuPath 0.2 wrote the type as "id"
        types = [properties.get(key) for key in ("objectType", "object_type", "type")] + [feature.get("id")]
        if any(isinstance(kind, str) and kind in DROPPED_TYPES for kind in types):
            self.notes.append("left out: tiles and TMA cores, which are no objects")
            return
        label = self._label(properties.get("classification"), where)
        if label is None:
            self.notes.append("left out: objects without a classification (--unclassified NAME keeps them)")
            return
        geometry = feature.get("geometry")
        if geometry is None:
            self.notes.append("left out: objects without a geometry")
            return
        if "nucleusGeometry" in feature:
            self.notes.append("left out: the outlines of cells' nuclei")
        plane = self._plane(geometry, where)
        if plane is not False:
            yield from self._of_geometry(geometry, label, plane, where, 0)

    def _label(self, classification: Any, where: str) -> str | None:
        """The class's name in any of the forms that QuPath has had; None: unclassified."""
        name: Any = classification
        if isinstance(classification, dict):
            name = classification.get("name")
            names = classification.get("names")
            if name is None and isinstance(names, list) and names and all(isinstance(n, str) for n in names):
                name = ": ".join(names)  # derived classes, as QuPath shows them
            elif name is None and names is not None:
                fail(self.file, where, f"expected the names of its classification as a list, but got {show(names)}")
        if name is None or name == "" or name == "Unclassified":
            return str(self.args.unclassified) if self.args.unclassified else None
        if not isinstance(name, str):
            fail(self.file, where, f"expected the name of its classification, but got {show(name)}")
        return name.split(":")[0].strip() if self.args.base_class else name.strip()

    def _plane(self, geometry: Any, where: str) -> float | bool | None:
        """z of the geometry in a 3D image, None in 2D, False: not in this image."""
        plane = geometry.get("plane") if isinstance(geometry, dict) else None
        z = t = 0
        if isinstance(plane, dict):
            z, t = (whole_number(plane.get(key, 0), self.file, f"{where}, plane.{key}") for key in ("z", "t"))
        if t != 0:
            self.notes.append("left out: objects at later time points")
            return False
        if len(self.shape) == 2:
            if z != self.frame.plane:
                self.notes.append("left out: objects in other z planes than the image's")
                return False
            return None
        if not 0 <= z < self.shape[0]:
            fail(self.file, where, f"it lies in plane z = {z}, but the image has {self.shape[0]} planes")
        return float(z)

    def _of_geometry(self, geometry: Any, label: str, plane: float | None, where: str, depth: int) -> Iterator[Mark]:
        kind = geometry.get("type") if isinstance(geometry, dict) else None
        if kind == "GeometryCollection":
            parts = geometry.get("geometries")
            if not isinstance(parts, list) or depth > 4:
                fail(self.file, where, f"expected the parts of its GeometryCollection, but got {show(parts)}")
            for part in parts:
                yield from self._of_geometry(part, label, plane, where, depth + 1)
            return
        coordinates = geometry.get("coordinates") if isinstance(geometry, dict) else None
        levels = {"Point": 0, "MultiPoint": 1, "LineString": 1, "MultiLineString": 2, "Polygon": 2, "MultiPolygon": 3}
        if not isinstance(kind, str) or kind not in levels:
            fail(self.file, where, f"expected a geometry of GeoJSON ({', '.join(levels)}), but got {show(kind)}")
        if not isinstance(coordinates, list):
            fail(self.file, where, f"expected the coordinates of its {kind}, but got {show(coordinates)}")
        if kind in ("Point", "MultiPoint"):
            points = [coordinates] if kind == "Point" else coordinates
            for index, (y, x) in enumerate(self._line(points, where)):
                if self._is_inside(y, x):
                    entry = where if kind == "Point" else f"{where}, point {index}"
                    yield PointMark(label, self._at(y - 0.5, x - 0.5, plane), entry)
        elif kind in ("LineString", "MultiLineString"):
            for line in [coordinates] if kind == "LineString" else coordinates:
                vertices = self._line(line, where)
                if not vertices:
                    fail(self.file, where, "its line has no points")
                if self._overlaps(*hull(vertices)):
                    yield Scribble(label, tuple(self._at(y - 0.5, x - 0.5, plane) for y, x in vertices), None, where)
        else:
            polygons = coordinates if kind == "MultiPolygon" else [coordinates]
            yield from self._area(polygons, geometry, label, plane, where)

    def _area(
        self, polygons: list[Any], geometry: dict[str, Any], label: str, plane: float | None, where: str
    ) -> Iterator[Mark]:
        rings: list[tuple[tuple[float, float], ...]] = []
        for polygon in polygons:
            if not isinstance(polygon, list):
                fail(self.file, where, f"expected a polygon as a list of rings, but got {show(polygon)}")
            for ring in polygon:
                points = self._line(ring, where)
                if len(points) > 1 and points[0] == points[-1]:
                    points.pop()  # GeoJSON closes its rings
                if len(points) < 3:
                    fail(self.file, where, f"a polygon needs three different points, but it has {len(points)}")
                rings.append(tuple(points))
        if not rings:
            self.notes.append("left out: polygons without points")
            return
        start, stop = hull([point for ring in rings for point in ring])
        if not self._overlaps(start, stop):
            return
        rectangle = len(rings) == 1 and not geometry.get("isEllipse") and is_upright_rectangle(rings[0])
        if not rectangle or self.args.rectangles == "regions":
            yield Region(label, tuple(rings), plane, where)
            return
        tight = True
        if self.frame.is_part:
            size = self.shape[-2:]
            cut = tuple(max(v, 0.0) for v in start), tuple(min(v, float(n)) for v, n in zip(stop, size, strict=True))
            if cut != (start, stop):
                tight = False
                self.notes.append("rectangles across the edge of the exported part: what is in it is taken, as loose")
            start, stop = cut
        if plane is not None:
            if self.shape[0] > 1:
                self.in_one_slice.add(label)
                self.notes.append(IN_ONE_SLICE)
            start, stop = (plane, *start), (plane + 1, *stop)
        yield BoxMark(label, start, stop, tight, where)

    def _line(self, points: Any, where: str) -> list[tuple[float, float]]:
        """Points [[x, y], ...] as (y, x) in the image, faces."""
        if not isinstance(points, list):
            fail(self.file, where, f"expected points [[x, y], ...], but got {show(points)}")
        if len(points) > MAX_RING:
            fail(self.file, where, f"it has {len(points)} points, more than {MAX_RING}")
        placed = []
        for index, point in enumerate(points):
            if not isinstance(point, list) or len(point) not in (2, 3):
                fail(self.file, where, f"expected point {index} as [x, y], but got {show(point)}")
            x, y = (finite(value, self.file, f"{where}, point {index}") for value in point[:2])
            placed.append(self.frame.place(x, y))
        return placed

    @staticmethod
    def _at(y: float, x: float, plane: float | None) -> tuple[float, ...]:
        return (y, x) if plane is None else (plane, y, x)

    def _is_inside(self, y: float, x: float) -> bool:
        height, width = self.shape[-2:]
        if self.frame.is_part and not (0 <= y <= height and 0 <= x <= width):
            if not self.frame.is_tile:
                self.notes.append("left out: points outside of the exported part")
            return False
        return True

    def _overlaps(self, start: Sequence[float], stop: Sequence[float]) -> bool:
        height, width = self.shape[-2:]
        if self.frame.is_part and not (stop[0] > 0 and stop[1] > 0 and start[0] < height and start[1] < width):
            if not self.frame.is_tile:
                self.notes.append("left out: shapes outside of the exported part")
            return False
        return True
