"""napari CSV: points layers and shapes layers, in 2D and 3D; one file a layer.

SRC is a folder with .csv files, called after their images ("scan7.csv", "scan7_nucleus.csv"), or in folders that are;
or one such file. napari writes data coordinates in array order, with voxel centres at whole numbers; it stores neither
the layer's scale nor, for shapes, any property.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_dsp.annotation_errors import show
from nnunet_dsp.dataset_conversion.image_files import stem_of
from nnunet_dsp.dataset_conversion.imported import (
    MAX_ENTRIES,
    BoxMark,
    ImageFolder,
    Mark,
    PointMark,
    Scribble,
    SourceImage,
    fail,
    finite,
    text_of,
    whole_number,
)
from nnunet_dsp.dataset_conversion.importers._pairing import Pairing, annotation_files, each, merged
from nnunet_dsp.dataset_conversion.importers._shapes import IN_ONE_SLICE, MAX_RING, flat_area, hull

NAME = "napari"
HELP = "napari CSV (points and shapes layers): points, rectangles, ellipses, polygons, lines, paths; 2D and 3D"
EXAMPLE = "nnunet_dsp import napari layers/ --images scans/ -d 513 --name Nuclei --label nucleus"

MAX_FILE_BYTES = 256 * 2**20
IN_PLANE = 1e-3  # voxels within which all vertices of a flat shape lie
ELLIPSE_STEP = 0.02
COUNTS = {"rectangle": 4, "ellipse": 4, "line": 2}
LABEL_COLUMNS = ("label", "class", "category")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """napari's own options."""
    parser.add_argument("--label", metavar="NAME", help="class of everything in SRC")
    parser.add_argument(
        "--label-column",
        metavar="COLUMN",
        help="column of points layers (a feature) that holds the class (default: the first of "
        f"{', '.join(LABEL_COLUMNS)} that is there; else the part of the file's name behind the image's)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        nargs="+",
        metavar="S",
        help="world units per voxel on each axis, in array order, if the layer was drawn without the image's scale, so "
        "that its coordinates are world units (default: they are voxels)",
    )
    parser.add_argument("--image", metavar="FILE", help="the image that all layers belong to, if names do not tell")


def read(src: Path, args: argparse.Namespace, images: ImageFolder) -> Iterator[SourceImage]:
    """Every image that a layer of SRC belongs to, with all its layers.

    Raises:
        AnnotationError: a file that is no layer, a shape that cannot be what it says, no class, or no image.
        ValueError: a scale that is not positive.
    """
    if args.scale is not None and not all(1e-9 <= s <= 1e9 for s in args.scale):
        raise ValueError(f"Expected --scale to be positive numbers, but got {' '.join(f'{s:g}' for s in args.scale)}.")
    pairing = Pairing(images, args.image)
    files = annotation_files(src, (".csv",), "napari layer")
    layers = (_Layer(file, pairing, images, args) for file in each(files))
    yield from merged((layer.source_image() for layer in layers), src)


@dataclass(frozen=True)
class _Row:
    line: int
    cells: list[str]


class _Layer:
    """One CSV file."""

    def __init__(self, file: Path, pairing: Pairing, images: ImageFolder, args: argparse.Namespace) -> None:
        self.file = file
        self.args = args
        self.notes: list[str] = []
        self.in_one_slice: set[str] = set()
        self.columns, self.rows = self._table()
        self.axes = self._axes()
        self.is_shapes = {"shape-type", "vertex-index", "index"} <= set(self.columns)
        self.image, self.layer_name = pairing.find(file, ".csv")
        self.shape = images.shape(self.image)
        self._check_axes()

    def _table(self) -> tuple[list[str], list[_Row]]:
        text = text_of(self.file, MAX_FILE_BYTES)
        if not text.strip():
            fail(self.file, "", "the file is empty", "Save the layer in napari again.")
        first = text.lstrip().split("\n", 1)[0]
        separator = max(",;\t", key=first.count)  # napari writes commas; spreadsheets do as they please
        reader = csv.reader(io.StringIO(text), delimiter=separator)
        rows: list[_Row] = []
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    rows.append(_Row(reader.line_num, cells))
                    if len(rows) > MAX_ENTRIES:
                        fail(self.file, "", f"it has more than {MAX_ENTRIES} rows")
        except csv.Error as error:
            fail(self.file, f"line {reader.line_num}", f"not valid CSV: {error}")
        columns = [cell.strip() for cell in rows[0].cells]
        doubled = next((c for c in columns if c and columns.count(c) > 1), None)
        if doubled is not None:
            fail(self.file, f"line {rows[0].line}", f"the column {show(doubled)} stands there twice")
        for row in rows[1:]:
            if len(row.cells) != len(columns):
                fail(self.file, f"line {row.line}", f"expected {len(columns)} cells, but got {len(row.cells)}")
        return columns, rows[1:]

    def _axes(self) -> list[int]:
        """Indices of the columns axis-0, axis-1, ..., in this order."""
        names = [column for column in self.columns if column.startswith("axis-")]
        wanted = [f"axis-{number}" for number in range(len(names))]
        if len(names) < 2 or sorted(names) != sorted(wanted):
            got = ", ".join(map(show, self.columns[:8]))
            fail(
                self.file,
                "line 1",
                f"expected the columns axis-0, axis-1, ... of a napari layer, but got {got}",
                "For other tables there is: nnunet_dsp import csv.",
            )
        return [self.columns.index(name) for name in wanted]

    def _check_axes(self) -> None:
        dim, axes = len(self.shape), len(self.axes)
        if axes != dim and not (axes == 2 and dim == 3 and self.shape[0] == 1):
            fail(
                self.file,
                "",
                f"the layer has {axes} axes, but the image {self.image.name} has {dim}",
                "Save it from a layer with as many axes as the image (channels and time are not axes here)."
                if axes > dim
                else "In napari, add the layer with ndim=3, so that it says in which slice its shapes lie.",
            )
        if self.args.scale is not None and len(self.args.scale) not in (1, axes):
            fail(self.file, "", f"expected --scale with {axes} numbers, one an axis, but got {len(self.args.scale)}")

    def _position(self, row: _Row) -> tuple[float, ...]:
        """Centres."""
        values = [
            finite(row.cells[column].strip(), self.file, f"line {row.line}, {self.columns[column]}")
            for column in self.axes
        ]
        if self.args.scale is not None:
            scale = self.args.scale * (len(values) if len(self.args.scale) == 1 else 1)
            values = [value / s for value, s in zip(values, scale, strict=True)]
        return tuple(values) if len(values) == len(self.shape) else (0.0, *values)

    def _label_column(self) -> int | None:
        if self.args.label_column is not None:
            if self.args.label_column in self.columns:
                return self.columns.index(self.args.label_column)
            if not self.is_shapes:  # napari writes no properties of shapes, so there they come from the file's name
                fail(self.file, "line 1", f"there is no column {show(self.args.label_column)}")
            return None
        if self.args.label:
            return None
        lower = [column.lower() for column in self.columns]
        return next((lower.index(name) for name in LABEL_COLUMNS if name in lower), None)

    def _label(self, row: _Row, column: int | None) -> str:
        where = f"line {row.line}"
        if column is not None:
            label = row.cells[column].strip()
            if not label:
                fail(self.file, where, f"the column {show(self.columns[column])} is empty", "Every row needs a class.")
            try:  # beside float coordinates napari writes a whole number n as n.0
                number = float(label)
            except ValueError:
                return label
            return str(int(number)) if number.is_integer() and abs(number) < 2**31 else label
        label = self.args.label or self.layer_name
        if not label:
            fail(
                self.file,
                where,
                "nothing says which class it is",
                f"Give --label NAME, --label-column COLUMN, or call the file {stem_of(self.image)}_CLASS.csv.",
            )
        return str(label)

    def source_image(self) -> SourceImage:
        column = self._label_column()
        marks: list[Mark] = []
        if self.is_shapes:
            for where, kind, rows in self._shapes():
                vertices = [self._position(row) for row in rows]
                marks += self._of_shape(kind, vertices, self._label(rows[0], column), where)
        else:
            for row in self.rows:
                marks.append(PointMark(self._label(row, column), self._position(row), f"line {row.line}"))
        return SourceImage(
            file=self.image,
            name=stem_of(self.image),
            marks=tuple(marks),
            source=str(self.file),
            notes=tuple(self.notes),
            incomplete=tuple(sorted(self.in_one_slice)),
        )

    def _shapes(self) -> Iterator[tuple[str, str, list[_Row]]]:
        """Shapes in the order of the file: where, what, and their rows by vertex-index."""
        index, kind, vertex = (self.columns.index(name) for name in ("index", "shape-type", "vertex-index"))
        groups: dict[int, list[tuple[int, _Row]]] = {}
        for row in self.rows:
            numbers = [
                whole_number(row.cells[column].strip(), self.file, f"line {row.line}, {self.columns[column]}")
                for column in (index, vertex)
            ]
            groups.setdefault(numbers[0], []).append((numbers[1], row))
        for number, group in groups.items():
            where = f"shape {number} (line {group[0][1].line})"
            group.sort(key=lambda pair: pair[0])
            kinds = {row.cells[kind].strip() for _, row in group}
            if len(kinds) > 1:
                fail(self.file, where, f"its shape-type is {', '.join(map(show, sorted(kinds)[:4]))} at once")
            if [n for n, _ in group] != list(range(len(group))):
                fail(self.file, where, f"expected its vertices 0 to {len(group) - 1}, each once")
            if len(group) > MAX_RING:
                fail(self.file, where, f"it has {len(group)} vertices, more than {MAX_RING}")
            yield where, kinds.pop(), [row for _, row in group]

    def _of_shape(self, kind: str, vertices: list[tuple[float, ...]], label: str, where: str) -> Iterator[Mark]:
        if len(vertices) != COUNTS.get(kind, len(vertices)):
            fail(self.file, where, f"a {kind} has {COUNTS[kind]} vertices, but it has {len(vertices)}")
        if kind in ("line", "path"):
            yield Scribble(label, tuple(vertices), None, where)
        elif kind == "rectangle":
            yield self._box(vertices, label, where)
        elif kind in ("polygon", "ellipse"):
            if kind == "polygon" and len(vertices) < 3:
                fail(self.file, where, f"a polygon needs three vertices, but it has {len(vertices)}")
            vertices = _ellipse(vertices) if kind == "ellipse" else vertices
            yield flat_area(vertices, label, self.shape, IN_PLANE, self.file, where)
        else:
            fail(self.file, where, f"expected a shape-type of napari, but got {show(kind)}")

    def _box(self, vertices: Sequence[tuple[float, ...]], label: str, where: str) -> BoxMark:
        """The upright box around a rectangle; on an axis on which the rectangle is flat it is one voxel thick."""
        low, high = hull(vertices)
        flat = [b - a <= IN_PLANE for a, b in zip(low, high, strict=True)]
        if sum(flat) > len(low) - 2:
            fail(self.file, where, "the rectangle has no area", "Delete it in napari.")
        if sum(flat) and self.shape[flat.index(True)] > 1:
            self.in_one_slice.add(label)
            self.notes.append(IN_ONE_SLICE)
        # Upright: on each axis its corners have two values (one where it is flat)
        upright = (
            all(min(v - a, b - v) <= IN_PLANE for p in vertices for v, a, b in zip(p, low, high, strict=True))
            and sum(flat) == len(low) - 2
        )
        if not upright:
            self.notes.append("turned rectangles: the upright box around each is taken, as loose")
        start = tuple(float(round(a)) if f else a + 0.5 for a, f in zip(low, flat, strict=True))
        stop = tuple(float(round(b)) + 1 if f else b + 0.5 for b, f in zip(high, flat, strict=True))
        return BoxMark(label, start, stop, upright, where)


def _ellipse(corners: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The ellipse within a parallelogram, given by its corners in order, as a polygon in the same plane."""
    a, b, c, d = (np.asarray(corner) for corner in corners)
    center, right, down = (a + b + c + d) / 4, (b - a + c - d) / 4, (d - a + c - b) / 4
    radius = max(float(np.linalg.norm(right)), float(np.linalg.norm(down)))
    count = min(4096, max(16, int(np.ceil(np.pi * np.sqrt(radius / ELLIPSE_STEP)))))
    t = np.arange(count) * (2 * np.pi / count)
    return [tuple(p) for p in (center + np.outer(np.cos(t), right) + np.outer(np.sin(t), down)).tolist()]
