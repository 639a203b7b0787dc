"""3D Slicer markups: point lists, ROIs, lines and curves (.mrk.json), fiducials (.fcsv).

SRC is a folder with markup files, called after their images ("scan7.mrk.json", "scan7_liver.mrk.json"), or in folders
that are; or one such file. Slicer writes millimetres of the patient, LPS or RAS; the image's own origin, spacing and
direction say which voxel that is.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dsp.annotation_errors import show
from nnunet_dsp.dataset_conversion.image_files import stem_of
from nnunet_dsp.dataset_conversion.imported import (
    BoxMark,
    Geometry,
    ImageFolder,
    Mark,
    PointMark,
    Scribble,
    SourceImage,
    fail,
    finite,
    read_json_bounded,
    text_of,
)
from nnunet_dsp.dataset_conversion.importers._pairing import Pairing, annotation_files, each, merged
from nnunet_dsp.dataset_conversion.importers._shapes import flat_area, hull

NAME = "slicer"
HELP = "3D Slicer markups (.mrk.json, .fcsv): points, ROI boxes, lines, curves"
EXAMPLE = "nnunet_dsp import slicer markups/ --images scans/ -d 514 --name Liver --label-from markup"

MAX_FILE_BYTES = 64 * 2**20
MAX_POINTS = 100_000  # of one markup
ENDINGS = (".mrk.json", ".fcsv")
UPRIGHT = 0.05  # voxels by which the corners of an upright ROI may miss a box along the image's axes
IN_SLICE = 0.5
SAMPLES = 10  # of a curve between two control points, as Slicer has it
UNITS = {"mm": 1.0, "um": 1e-3, "µm": 1e-3, "cm": 10.0, "m": 1000.0}
SYSTEMS = {"LPS": "LPS", "RAS": "RAS", "1": "LPS", "0": "RAS"}
DEFAULT_NAME = re.compile(r"(F|P|MarkupsFiducial|Fiducial|PointList)(_\d+)?")  # what Slicer itself calls point lists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Slicer's own options."""
    parser.add_argument("--label", metavar="NAME", help="class of everything in SRC")
    parser.add_argument(
        "--label-from",
        choices=("auto", "point", "markup"),
        default="auto",
        help="where classes stand: in each point's label, in the markup's name, or (default) in the point's label "
        "without its number if it is not one that Slicer gave (F-1), else in the markup's name without its number",
    )
    parser.add_argument(
        "--closed-curves",
        choices=("lines", "regions"),
        default="lines",
        help="closed curves are scribbles on the class (default), or outline it, in one slice of the image",
    )
    parser.add_argument(
        "--straight-curves",
        action="store_true",
        help="join the control points of curves by straight lines (default: by Slicer's default, a spline)",
    )
    parser.add_argument("--image", metavar="FILE", help="the image that all markups belong to, if names do not tell")


def read(src: Path, args: argparse.Namespace, images: ImageFolder) -> Iterator[SourceImage]:
    """Every image that a markup of SRC belongs to, with all its markups.

    Raises:
        AnnotationError: a file that is not Slicer's, a markup that cannot be what it says, no class, or no image.
    """
    pairing = Pairing(images, args.image)
    files = annotation_files(src, ENDINGS, "markup")
    yield from merged((_File(file, pairing, images, args).source_image() for file in each(files)), src)


class _File:
    """One file of markups."""

    def __init__(self, file: Path, pairing: Pairing, images: ImageFolder, args: argparse.Namespace) -> None:
        self.file = file
        self.args = args
        self.notes: list[str] = []
        endings = (*ENDINGS, ".json")
        ending = next((e for e in endings if file.name.lower().endswith(e)), file.suffix)
        self.is_table = ending == ".fcsv"
        self.content = None if self.is_table else read_json_bounded(file, MAX_FILE_BYTES)
        self.image, self.file_name = pairing.find(file, ending)
        self.geometry = _without_time(images.read_geometry(self.image))
        if len(self.geometry.shape) not in (2, 3):
            fail(file, "", f"its image {self.image.name} has {len(self.geometry.shape)} axes, but markups need 2 or 3")

    def source_image(self) -> SourceImage:
        marks = list(self._fcsv() if self.is_table else self._json())
        return SourceImage(
            file=self.image,
            name=stem_of(self.image),
            marks=tuple(marks),
            source=str(self.file),
            notes=tuple(self.notes),
        )

    # what a place is

    def _voxels(self, points: np.ndarray, system: str) -> list[tuple[float, ...]]:
        """Millimetres, shape (N, 3), as voxels in array order (centres)."""
        if system == "RAS":
            points = points * [-1, -1, 1]
        voxels = self.geometry.to_voxels(points[:, : len(self.geometry.shape)])
        return [tuple(p) for p in voxels.round(4).tolist()]  # NIfTI keeps its matrix as float32

    def _vector(self, value: Any, length: int, where: str) -> list[float]:
        if not isinstance(value, list) or len(value) != length:
            fail(self.file, where, f"expected a list of {length} numbers, but got {show(value)}")
        return [finite(v, self.file, where) for v in value]

    def _system(self, value: Any, where: str) -> str:
        system = SYSTEMS.get(str(value).strip().upper()) if isinstance(value, (str, int)) else None
        if system is None:
            fail(
                self.file,
                where,
                f"expected LPS or RAS (in .fcsv also 1 or 0), but got {show(value)}",
                "Save the markup in 3D Slicer again; voxel indices (IJK) cannot be read.",
            )
        return system

    def _unit(self, value: Any, where: str) -> float:
        """Millimetres per unit; a code is ["mm", "UCUM", "millimeter"]."""
        name = value[0] if isinstance(value, list) and value else value
        if not isinstance(name, str) or name not in UNITS:
            fail(self.file, where, f"expected coordinates in {', '.join(UNITS)}, but got {show(value)}")
        return UNITS[name]

    # what its class is

    def _of_markup(self, name: str, where: str) -> str:
        """Class of a markup that is one thing (ROI, curve)."""
        if self.args.label:
            return str(self.args.label)
        found = name or self.file_name
        if self.args.label_from != "markup":
            found = re.sub(r"_\d+$", "", found)  # Slicer counts markups of one name: liver, liver_1, liver_2
        if not found:
            self._no_class(where)
        return found

    def _of_point(self, label: str, name: str, label_format: str, where: str) -> str:
        if self.args.label:
            return str(self.args.label)
        if self.args.label_from == "markup":
            return self._of_markup(name, where)
        if self.args.label_from == "point":
            if not label:
                fail(self.file, where, "the point has no label", "Give --label NAME, or --label-from markup.")
            return label
        given = _without_number(label, label_format)
        if given and not DEFAULT_NAME.fullmatch(given):
            return given
        if name or self.file_name:
            return self._of_markup(name, where)
        return given or self._no_class(where)

    def _no_class(self, where: str) -> str:
        return fail(
            self.file,
            where,
            "nothing says which class it is",
            f"Give --label NAME, or call the file {stem_of(self.image)}_CLASS{ENDINGS[0]}.",
        )

    # .fcsv

    def _fcsv(self) -> Iterator[Mark]:
        system, columns, versioned = "RAS", None, False  # RAS: what Slicer takes where the file says nothing
        lines = text_of(self.file, MAX_FILE_BYTES).split("\n")
        if not any(line.strip() for line in lines):
            fail(self.file, "", "the file is empty", "Save it in 3D Slicer again.")
        for number, line in enumerate(lines, 1):
            where = f"line {number}"
            if line.startswith("#"):
                key, _, value = line[1:].partition("=")
                key, value = key.strip().lower(), value.strip().rstrip(",").strip()  # spreadsheets append commas
                if key == "coordinatesystem":
                    system = self._system(value, where)
                elif key == "columns":
                    columns = [column.strip() for column in value.split(",")]
                elif key == "markups fiducial file version":
                    versioned = True
                continue
            if not line.strip(" \t,"):
                continue
            try:
                cells = next(csv.reader(io.StringIO(line)))
            except csv.Error as error:
                fail(self.file, where, f"not valid CSV: {error}")
            if not versioned:
                fail(
                    self.file,
                    where,
                    "the file does not begin with '# Markups fiducial file version = ...'",
                    "Load it in 3D Slicer 4.11 or later and save it again.",
                )
            names = columns or ["id", "x", "y", "z", "ow", "ox", "oy", "oz", "vis", "sel", "lock", "label"]
            if not {"x", "y", "z"} <= set(names):
                fail(self.file, where, f"expected the columns x, y and z, but got {show(names)}")
            cell = dict(zip(names, (c.strip() for c in cells), strict=False))
            if not {"x", "y", "z"} <= set(cell):
                fail(self.file, where, f"expected at least {names.index('z') + 1} cells, but got {len(cells)}")
            at = [finite(cell[axis], self.file, f"{where}, {axis}") for axis in "xyz"]
            label = self._of_point(cell.get("label", ""), "", "%N-%d", where)
            yield PointMark(label, self._voxels(np.array([at]), system)[0], where)

    # .mrk.json

    def _json(self) -> Iterator[Mark]:
        markups = self.content.get("markups") if isinstance(self.content, dict) else None
        if not isinstance(markups, list):
            fail(
                self.file,
                "markups",
                f"expected the list of markups that 3D Slicer writes, but got {show(markups)}",
                "Save the markup in 3D Slicer as .mrk.json.",
            )
        for index, markup in enumerate(markups):
            where = f"markups[{index}]"
            if not isinstance(markup, dict):
                fail(self.file, where, f"expected an object, but got {show(markup)}")
            yield from self._markup(markup, where)

    def _markup(self, markup: dict[str, Any], where: str) -> Iterator[Mark]:
        kind = markup.get("type")
        if not isinstance(kind, str):
            fail(self.file, where, f"expected the type of the markup, but got {show(kind)}")
        name = markup.get("name", "")
        if not isinstance(name, str):
            fail(self.file, f"{where}.name", f"expected a name, but got {show(name)}")
        system = self._system(markup.get("coordinateSystem", "LPS"), f"{where}.coordinateSystem")
        unit = self._unit(markup.get("coordinateUnits", "mm"), f"{where}.coordinateUnits")
        if kind == "ROI":
            yield self._roi(markup, name, system, unit, where)
        elif kind in ("Fiducial", "PointList"):
            yield from self._points(markup, name, system, unit, where)
        elif kind in ("Line", "Curve", "ClosedCurve"):
            yield from self._curve(kind, markup, name, system, unit, where)
        else:
            self.notes.append(f"left out: markups of type {show(kind)}")

    def _control_points(
        self, markup: dict[str, Any], system: str, unit: float, where: str
    ) -> tuple[list[tuple[float, ...]], list[tuple[str, str]]]:
        """Voxels of the control points that have been placed; where each stands, and its label."""
        points = markup.get("controlPoints", [])
        if not isinstance(points, list):
            fail(self.file, f"{where}.controlPoints", f"expected a list, but got {show(points)}")
        if len(points) > MAX_POINTS:
            fail(self.file, f"{where}.controlPoints", f"it has {len(points)} points, more than {MAX_POINTS}")
        positions: list[list[float]] = []
        said: list[tuple[str, str]] = []
        for index, point in enumerate(points):
            entry = f"{where}.controlPoints[{index}]"
            if not isinstance(point, dict):
                fail(self.file, entry, f"expected an object, but got {show(point)}")
            if point.get("positionStatus", "defined") != "defined":
                self.notes.append("left out: control points that were never placed")
                continue
            label = point.get("label", "")
            if not isinstance(label, str):
                fail(self.file, f"{entry}.label", f"expected a label, but got {show(label)}")
            positions.append(self._vector(point.get("position"), 3, f"{entry}.position"))
            said.append((entry, label.strip()))
        if not positions:
            return [], []
        return self._voxels(np.array(positions) * unit, system), said

    def _points(self, markup: dict[str, Any], name: str, system: str, unit: float, where: str) -> Iterator[Mark]:
        label_format = markup.get("labelFormat", "%N-%d")
        label_format = label_format if isinstance(label_format, str) else ""
        voxels, said = self._control_points(markup, system, unit, where)
        for at, (entry, label) in zip(voxels, said, strict=True):
            yield PointMark(self._of_point(label, name, label_format, entry), at, entry)

    def _curve(
        self, kind: str, markup: dict[str, Any], name: str, system: str, unit: float, where: str
    ) -> Iterator[Mark]:
        voxels, _ = self._control_points(markup, system, unit, where)
        closed = kind == "ClosedCurve" and len(voxels) > 2
        if not voxels:
            self.notes.append("left out: markups without a placed point")
            return
        label = self._of_markup(name, where)
        if kind != "Line" and not self.args.straight_curves:
            voxels = _spline(voxels, closed)
        if closed and self.args.closed_curves == "regions":
            yield flat_area(voxels, label, self.geometry.shape, IN_SLICE, self.file, where)
        else:
            yield Scribble(label, tuple([*voxels, voxels[0]] if closed else voxels), None, where)

    def _roi(self, markup: dict[str, Any], name: str, system: str, unit: float, where: str) -> BoxMark:
        """The box along the image's axes around the ROI's eight corners."""
        points, _ = self._control_points(markup, system, unit, where)
        if "size" in markup:
            corners = self._roi_corners(markup, system, unit, where)
        elif markup.get("roiType") == "BoundingBox" and len(points) > 1:
            # Bounds along the patient's axes, of points that are in voxels by now
            fail(self.file, where, "the ROI lacks its size", "Save it in 3D Slicer 5 or later.")
        else:
            fail(self.file, where, "the ROI lacks its size", "Save it in 3D Slicer 4.13 or later.")
        low, high = hull(corners)
        upright = all(min(v - a, b - v) <= UPRIGHT for p in corners for v, a, b in zip(p, low, high, strict=True))
        if not upright:
            self.notes.append("ROIs turned against the image: the box around each is taken, as loose")
        if markup.get("insideOut") is True:
            self.notes.append("ROIs that are inside out: their inside is taken")
        start, stop = tuple(v + 0.5 for v in low), tuple(v + 0.5 for v in high)
        return BoxMark(self._of_markup(name, where), start, stop, upright, where)

    def _roi_corners(self, markup: dict[str, Any], system: str, unit: float, where: str) -> list[tuple[float, ...]]:
        size = np.array(self._vector(markup["size"], 3, f"{where}.size")) * unit
        if not (size > 0).all():
            fail(self.file, f"{where}.size", f"expected sizes above 0, but got {show(size.tolist())}")
        center = markup.get("center")
        if center is None:  # by hand, or by other programs: the ROI's one control point is its centre
            points = markup.get("controlPoints")
            first = points[0] if isinstance(points, list) and points and isinstance(points[0], dict) else {}
            center = first.get("position")
        middle = np.array(self._vector(center, 3, f"{where}.center")) * unit
        default = [-1, 0, 0, 0, -1, 0, 0, 0, 1] if system == "LPS" else [1, 0, 0, 0, 1, 0, 0, 0, 1]
        orientation = self._vector(markup.get("orientation", default), 9, f"{where}.orientation")
        axes = np.array(orientation).reshape(3, 3)  # columns: the ROI's axes in the file's coordinates
        if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-2):
            fail(
                self.file,
                f"{where}.orientation",
                "it is no rotation (three axes of length 1, at right angles)",
                "Save the ROI in 3D Slicer again.",
            )
        signs = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
        return self._voxels(middle + (signs * size) @ axes.T, system)


def _without_time(geometry: Geometry) -> Geometry:
    """A volume stored as a series of one time point, as that volume."""
    if len(geometry.shape) != 4 or geometry.shape[0] != 1:
        return geometry
    return Geometry(geometry.shape[1:], geometry.origin[:3], geometry.spacing[:3], geometry.direction[:3, :3])


def _without_number(label: str, label_format: str) -> str:
    """A point's label without the number that its format appends: "liver" for "liver-3" where it is "%N-%d"."""
    if "%d" not in label_format:
        return label
    before, _, after = label_format.partition("%d")
    before = re.escape(before.split("%N")[-1])
    match = re.fullmatch(rf"(.*?){before}\d+{re.escape(after.replace('%N', ''))}", label)
    return match[1].strip() if match else label


def _spline(points: Sequence[tuple[float, ...]], closed: bool) -> list[tuple[float, ...]]:
    """Slicer's default curve through control points: cubic, each coordinate over the point's number.

    Open curves have no slope at their ends, closed ones are periodic (vtkParametricSpline over vtkCardinalSpline).
    """
    from scipy.interpolate import CubicSpline

    if len(points) < 3:
        return list(points)
    values = np.array([*points, points[0]] if closed else points)
    parameter = np.arange(len(values), dtype=np.float64)
    spline = CubicSpline(parameter, values, bc_type="periodic" if closed else "clamped")
    at = np.linspace(0, parameter[-1], SAMPLES * (len(values) - 1) + 1)
    samples = spline(at[:-1] if closed else at)
    return [tuple(p) for p in samples.tolist()]
