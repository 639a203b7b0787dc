"""CSV, TSV and plain text tables: image-level labels, points, boxes.

SRC is a table with an image in each row, or a folder of such tables, or a folder with one table an image, called like
it ("x y class" a line). What a column holds is known by its name (docs/formats/csv.md lists them), or is said with
--columns. A table says nothing of where it counts from: see --first-pixel and --inclusive.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_dsp.annotation_errors import did_you_mean, listed, show
from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.image_files import stem_of
from nnunet_dsp.dataset_conversion.imported import (
    BoxMark,
    ImageFolder,
    Mark,
    PointMark,
    SourceImage,
    Tag,
    fail,
    finite,
    text_of,
)
from nnunet_dsp.dataset_conversion.importers._pairing import annotation_files
from nnunet_dsp.dataset_conversion.importers.coco import point_centre

NAME = "csv"
HELP = "CSV, TSV, text tables: image-level labels, points, boxes"
EXAMPLE = "nnunet_dsp import csv labels.csv --images slides/ -d 510 --complete tags=all"

MAX_COLUMNS = 20_000
CENTRES = {a: (f"center_{a}", f"centre_{a}", f"c{a}", f"centroid_{a}", f"{a}_center", f"{a}_centre") for a in "xyz"}
"""Columns of an object's centre: with width and height, the box lies around it."""
ROLES = {
    "image": (
        "image", "images", "filename", "file_name", "file", "image_id", "image_name", "imagename", "image_file",
        "image_path", "image_index", "path", "img", "img_name", "img_path", "imageid", "case", "id",
    ),
    "label": (
        "label", "class", "class_name", "classname", "category", "category_name", "label_name", "cell_type", "type",
        "class_id", "category_id",
    ),
    "labels": ("labels", "classes", "tags", "present", "categories", "finding_labels", "findings"),
    "absent": ("absent", "absent_labels"),
    "x": ("x", "x_px", "x_pixel", "col", "column", "point_x", *CENTRES["x"], "pos_x"),
    "y": ("y", "y_px", "y_pixel", "row", "point_y", *CENTRES["y"], "pos_y"),
    "z": ("z", "z_px", "slice", "plane", *CENTRES["z"], "pos_z"),
    "xmin": ("xmin", "x_min", "left", "x1", "x0", "bbox_x_min", "x_start", "bbox_left"),
    "ymin": ("ymin", "y_min", "top", "y1", "y0", "bbox_y_min", "y_start", "bbox_top"),
    "zmin": ("zmin", "z_min", "z1", "z0", "z_start"),
    "xmax": ("xmax", "x_max", "right", "x2", "bbox_x_max", "x_stop", "x_end", "bbox_right"),
    "ymax": ("ymax", "y_max", "bottom", "y2", "bbox_y_max", "y_stop", "y_end", "bbox_bottom"),
    "zmax": ("zmax", "z_max", "z2", "z_stop", "z_end"),
    "width": ("width", "w", "bbox_width", "box_width"),
    "height": ("height", "h", "bbox_height", "box_height"),
    "tight": ("tight",),
    "kind": ("kind",),
    "ignored": ("split", "set", "fold", "confidence", "score", "depth", "area", "comment", "difficult"),
}  # fmt: skip
"""What columns are called, lower case, with "_" for anything but letters and digits."""

YES = frozenset("1 yes y true t x + present positive pos ja oui si".split())
NO = frozenset("0 no n false f - absent negative neg nein non".split())
UNKNOWN = frozenset(["", "?", "-1", "na", "n/a", "nan", "none", "null", "unknown", "unk", "u", "uncertain", "not sure"])
OWN_KINDS = ("image", "present", "absent", "point", "box", "complete_points", "complete_boxes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--columns",
        metavar="A,B,...",
        help="what the columns hold, for tables without a header or with other names: any of image, label, labels, x, "
        "y, z, xmin, ymin, zmin, xmax, ymax, zmax, width, height, or - for a column to pass over",
    )
    parser.add_argument(
        "--class-columns",
        metavar="A,B",
        help="the columns that are classes, holding yes, no or unknown (default: all that are nothing else)",
    )
    parser.add_argument("--label", metavar="CLASS", help="the class of all points or boxes, where no column says it")
    parser.add_argument(
        "--first-pixel",
        type=int,
        choices=(0, 1),
        default=0,
        help="the number of the first pixel (default: %(default)s)",
    )
    parser.add_argument(
        "--inclusive",
        action="store_true",
        help="xmax and ymax are the last pixel of the object (default: where it ends, so the pixel after it)",
    )


def read(src: Path, args: argparse.Namespace, images: ImageFolder) -> Iterator[SourceImage]:
    """Every image that a table mentions.

    Raises:
        AnnotationError: a table that cannot be understood; names file and line.
    """
    files = annotation_files(src, (".csv", ".tsv"), "table") if src.is_file() else _tables(src, images)
    found: dict[Path, _Marks] = {}
    for file in files:
        table = _Table(file, args)
        table.refuse_fractions()
        table.find_image_sizes(images)
        if src.is_file() and not table.lines:
            fail(file, "", "the table holds no row")
        for number, row in table.rows():
            image = table.image_of(row, number, images)
            marks = found.setdefault(image, _Marks(file, args))
            marks.add(table, row, number)
        if not table.has("image"):
            found.setdefault(table.own_image(images), _Marks(file, args))
    for image, marks in found.items():
        yield marks.source_image(image)


def _tables(src: Path, images: ImageFolder) -> list[Path]:
    """The tables of a folder: .csv and .tsv, else the .txt that are called like an image."""
    try:
        return annotation_files(src, (".csv", ".tsv"), "table")
    except AnnotationError:
        pass
    known = {stem_of(path).lower() for path in images.files()}
    files = [f for f in annotation_files(src, (".txt",), "table") if f.stem.lower() in known]
    if not files:
        fail(
            src, "", "the folder holds no .csv or .tsv, and no .txt that is called like an image of " + str(images.root)
        )
    return files


class _Table:
    """One table: its rows, and which column holds what."""

    def __init__(self, file: Path, args: argparse.Namespace) -> None:
        self.file, self.label, self.first_pixel = file, args.label, args.first_pixel
        self.delimiter, self.lines = _split(file)
        self.columns: dict[str, int] = {}
        self.classes: dict[str, int] = {}
        self.centred: set[str] = set()
        self.holds_image_sizes = False
        self._own_image: Path | None = None
        first = self.lines[0][1] if self.lines else []
        self.width = len(first)
        if not self.lines:  # of an image on which nothing is marked, if it is called like one
            return
        if len(first) > MAX_COLUMNS:
            fail(file, "line 1", f"the table has {len(first)} columns, more than {MAX_COLUMNS}")
        names = [re.sub(r"[^a-z0-9]+", "_", cell.strip().lower()).strip("_") for cell in first]
        known = {alias for aliases in ROLES.values() for alias in aliases}
        header = any(name in known for name in names) and not any(_is_number(cell) for cell in first)
        if args.columns is not None:
            self._state_columns([word.strip().lower() for word in args.columns.split(",")], first)
            places = [i for role, i in self.columns.items() if role[0] in "xyzwh" and i < len(first)]
            header = header or any(first[i].strip() and not _is_number(first[i]) for i in places)
        elif header:
            self._name_columns(names, [cell.strip() for cell in first], args.class_columns)
        elif len(first) == 3 and all(_is_number(cell) for cell in first[:2]):
            self.columns = {"x": 0, "y": 1, "label": 2}
        elif len(first) == 2 and all(_is_number(cell) for cell in first) and self.label is not None:
            self.columns = {"x": 0, "y": 1}
        else:
            fail(
                file,
                "line 1",
                f"no column is called image, label, x, xmin or the like: {listed([c[:20] for c in first[:8]])}",
                "Say what they hold: --columns image,x,y,label",
            )
        if header:
            self.lines = self.lines[1:]

    def _state_columns(self, words: Sequence[str], first: Sequence[str]) -> None:
        for index, word in enumerate(words):
            if word in ("-", ""):
                continue
            if word not in ROLES or word == "ignored":
                raise AnnotationError(f"--columns: there is no {word!r}.{did_you_mean(word, list(ROLES))}")
            if word in self.columns:
                raise AnnotationError(f"--columns: {word!r} stands there twice.")
            self.columns[word] = index
        if first and len(words) != len(first):
            fail(self.file, "line 1", f"--columns names {len(words)} columns, but the table has {len(first)}")

    def _name_columns(self, names: Sequence[str], shown: Sequence[str], classes: str | None) -> None:
        if len({name for name in shown if name}) != len([name for name in shown if name]):
            doubled = next(name for name in shown if name and shown.count(name) > 1)
            fail(self.file, "line 1", f"two columns are called {doubled!r}")
        wanted = None if classes is None else [word.strip() for word in classes.split(",")]
        for word in wanted or ():
            if word not in shown:
                fail(self.file, "line 1", f"there is no column {word!r}.{did_you_mean(word, list(shown))}".rstrip("."))
        x0 = "x0" in names and "x1" in names  # then x1 is where the box ends
        for role, aliases in ROLES.items():
            for alias in aliases:
                for index, name in enumerate(names):
                    if x0 and name in ("x1", "y1", "z1"):
                        name = name[0] + "2"
                    if name == alias and role not in self.columns and not (wanted and shown[index] in wanted):
                        if index not in self.columns.values():
                            self.columns[role] = index
                            if alias in CENTRES.get(role, ()):
                                self.centred.add(role)
        used = set(self.columns.values()) | {i for i, n in enumerate(names) if n in ROLES["ignored"]}
        if wanted is not None:
            self.classes = {word: shown.index(word) for word in wanted}
        elif self._is_wide():
            self.classes = {name: i for i, name in enumerate(shown) if i not in used and name}
            if not self.classes:
                fail(
                    self.file, "line 1", "there is no column with classes, points or boxes", "See docs/formats/csv.md."
                )

    def _is_wide(self) -> bool:
        return not any(role in self.columns for role in ("label", "labels", "absent", "x", "y", "xmin", "kind"))

    def has(self, *roles: str) -> bool:
        return all(role in self.columns for role in roles)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        for number, row in self.lines:
            if len(row) != self.width:
                fail(
                    self.file,
                    f"line {number}",
                    f"expected {self.width} cells, as in the first line, but got {len(row)}",
                    "A cell that holds the separator must stand in quotes.",
                )
            yield number, row

    def cell(self, row: Sequence[str], role: str) -> str:
        return row[self.columns[role]].strip() if role in self.columns else ""

    def number(self, row: Sequence[str], role: str, line: int) -> float:
        text = self.cell(row, role)
        if self.delimiter != "," and re.fullmatch(r"[-+]?\d+,\d+", text):
            text = text.replace(",", ".")
        return finite(text, self.file, f"line {line}, {role}")

    def refuse_fractions(self) -> None:
        """Boxes of fractions of the image's size, as Open Images has them: in voxels, all would be the first one."""
        corners = ("xmin", "ymin", "xmax", "ymax")
        choices = (corners, ("xmin", "ymin", "width", "height"), ("x", "y", "width", "height"))
        roles = next((roles for roles in choices if self.has(*roles)), None)
        if roles is None or self.has("kind"):
            return
        values = [self.number(row, role, n) for n, row in self.rows() for role in roles if self.cell(row, role)]
        if values and all(0 <= v <= 1 for v in values) and not all(v.is_integer() for v in values):
            fail(
                self.file,
                "",
                f"expected {', '.join(roles)} in pixels, but all lie between 0 and 1: are they fractions of the "
                "image's width and height?",
                "Multiply them by these.",
            )

    def find_image_sizes(self, images: ImageFolder) -> None:
        """Whether width and height beside points are those of the image: in all rows they are as large as it is."""
        roles = ("x", "y", "width", "height")
        if not self.has(*roles) or self.has("kind") or self.has("xmin", "ymin"):
            return
        places = set()
        for line, row in self.rows():
            if not all(self.cell(row, role) for role in roles):
                continue
            x, y, width, height = (self.number(row, role, line) for role in roles)
            if (height, width) != images.shape(self.image_of(row, line, images)):
                return
            places.add((x, y))
        # at the first pixel in every row, they are boxes around whole images
        self.holds_image_sizes = bool(places - {(self.first_pixel, self.first_pixel)})

    def image_of(self, row: Sequence[str], line: int, images: ImageFolder) -> Path:
        if not self.has("image"):
            return self.own_image(images)
        name = self.cell(row, "image")
        if not name:
            fail(self.file, f"line {line}", "it names no image")
        return images.find(name, self.file, f"line {line}")

    def own_image(self, images: ImageFolder) -> Path:
        """The image that a table without an image column is called like."""
        if self._own_image is None:
            self._own_image = images.find(self.file.stem, self.file, "", self.file.parent)
        return self._own_image


def _split(file: Path) -> tuple[str, list[tuple[int, list[str]]]]:
    """The separator, and line number and cells of every line that is not empty."""
    text = text_of(file)
    lines = [line for line in text.split("\n") if line.strip()]
    first = lines[0] if lines else ""
    bare = re.sub(r'"[^"]*"', "", first)
    counts = {mark: bare.count(mark) for mark in ("\t", ";", ",", "|")}
    best = max(counts, key=lambda mark: counts[mark])
    if counts[best] == 0 and file.suffix.lower() == ".txt":
        return " ", [(n, line.split()) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if counts[best] == 0:
        best = ","
    rows = []
    reader = csv.reader(io.StringIO(text), delimiter=best, strict=True, skipinitialspace=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((reader.line_num, row))
    except csv.Error as error:
        fail(file, f"line {reader.line_num}", f"no table: {error}", "Is a quotation mark missing?")
    return best, rows


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*[-+]?(\d+[.,]?\d*|[.,]\d+)([eE][-+]?\d+)?\s*", text) is not None


@dataclass
class _Marks:
    """What the tables say of one image."""

    file: Path
    args: argparse.Namespace
    marks: list[Mark] = field(default_factory=list)
    shape: tuple[int, int] | None = None
    complete: dict[str, list[str]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)

    def add(self, table: _Table, row: Sequence[str], line: int) -> None:
        entry = f"line {line}"
        if table.has("kind"):
            self._own(table, row, line)
            return
        for name, column in table.classes.items():
            said = row[column].strip().lower()
            said = {"1.0": "1", "0.0": "0", "-1.0": "-1"}.get(said, said)
            if name not in self.classes:
                self.classes.append(name)
            if said in YES or said in NO:
                self.marks.append(Tag(name, said in YES, f"{entry}, column {show(name)}"))
            elif said not in UNKNOWN:
                fail(
                    table.file,
                    f"{entry}, column {show(name)}",
                    f"expected yes, no or unknown, but got {show(row[column].strip())}",
                    "If it is no class, name those that are: --class-columns A,B",
                )
        for role, present in (("labels", True), ("absent", False)):
            for name in re.split(r"[;|,]", table.cell(row, role)):
                if name.strip():
                    self.marks.append(Tag(name.strip(), present, entry))
        if table.has("xmin", "ymin", "xmax", "ymax"):
            self._sized(table, row, line)
            self._place(table, row, line, ("ymin", "xmin"), ("ymax", "xmax"))
        elif table.has("xmin", "ymin", "width", "height"):
            self._place(table, row, line, ("ymin", "xmin"), ("height", "width"))
        elif table.has("x", "y", "width", "height") and not table.holds_image_sizes:
            self._place(table, row, line, ("y", "x"), ("height", "width"))
        elif table.has("x", "y"):
            self._sized(table, row, line)
            self._place(table, row, line, ("y", "x"), ())
        elif table.has("label"):
            if table.cell(row, "label"):
                self.marks.append(Tag(table.cell(row, "label"), True, entry))
        elif not table.classes and not table.has("labels") and not table.has("absent"):
            fail(table.file, "line 1", "its columns hold neither classes nor complete points or boxes")

    def _sized(self, table: _Table, row: Sequence[str], line: int) -> None:
        """Width and height beside corners, and some beside points, are those of the image."""
        if table.has("width", "height") and table.cell(row, "width") and table.cell(row, "height"):
            size = (int(table.number(row, "height", line)), int(table.number(row, "width", line)))
            if min(size) > 0:
                self.shape = size

    def _place(
        self, table: _Table, row: Sequence[str], line: int, first: tuple[str, ...], second: tuple[str, ...]
    ) -> None:
        """A point or a box of the columns named; nothing where all of them are empty."""
        entry = f"line {line}"
        if second == ("height", "width") and table.has("zmax"):
            fail(table.file, "line 1", "boxes in 3D need zmin and zmax, ymin and ymax, xmin and xmax")
        if second and table.has("zmin", "zmax"):
            first, second = ("zmin", *first), ("zmax", *second)
        elif not second and table.has("z"):
            first = ("z", *first)
        label = table.cell(row, "label") or (table.label or "")
        cells = [table.cell(row, role) for role in (*first, *second)]
        if not any(cells):
            if table.cell(row, "label"):
                self.marks.append(Tag(label, True, entry))
            return
        if not label:
            fail(table.file, entry, "it names no class", "Say the class of all rows: --label CLASS")
        count = self.args.first_pixel
        one = [table.number(row, role, line) - count for role in first]
        if not second:
            self.marks.append(PointMark(label, tuple(map(point_centre, one)), entry))
            return
        two = [table.number(row, role, line) for role in second]
        if second == ("height", "width"):
            centred = [role in table.centred for role in first]
            one = [a - size / 2 if around else a for a, size, around in zip(one, two, centred, strict=True)]
            two = [a + size for a, size in zip(one, two, strict=True)]
        else:
            two = [b - count + (1 if self.args.inclusive else 0) for b in two]
        self.marks.append(BoxMark(label, tuple(one), tuple(two), _tight(table, row, line), entry))

    def _own(self, table: _Table, row: Sequence[str], line: int) -> None:
        """A row that `nnunet_dsp export csv` wrote: coordinates are those of annotation files."""
        kind, label, entry = table.cell(row, "kind").lower(), table.cell(row, "label"), f"line {line}"
        if kind not in OWN_KINDS:
            fail(table.file, f"{entry}, kind", f"expected one of {', '.join(OWN_KINDS)}, but got {show(kind)}")
        if kind == "image":
            return
        if not label:
            fail(table.file, entry, "it names no class")
        axes = "zyx" if table.cell(row, "z") else "yx"
        if kind in ("present", "absent"):
            self.marks.append(Tag(label, kind == "present", entry))
        elif kind == "point":
            at = tuple(table.number(row, axis, line) for axis in axes)
            self.marks.append(PointMark(label, at, entry))
        elif kind == "box":
            start = tuple(table.number(row, axis, line) for axis in axes)
            stop = tuple(table.number(row, f"{axis}max", line) for axis in axes)
            self.marks.append(BoxMark(label, start, stop, _tight(table, row, line), entry))
        else:
            self.complete.setdefault(kind.split("_")[1], []).append(label)

    def source_image(self, image: Path) -> SourceImage:
        return SourceImage(
            file=image,
            name=stem_of(image),
            marks=tuple(self.marks),
            source=self.file.name,
            expected_shape=self.shape,
            complete={kind: tuple(dict.fromkeys(names)) for kind, names in self.complete.items()},
            classes=tuple(self.classes),
        )


def _tight(table: _Table, row: Sequence[str], line: int) -> bool:
    text = table.cell(row, "tight").lower()
    if text and text not in YES | NO:
        fail(table.file, f"line {line}, tight", f"expected yes or no, but got {show(text)}")
    return text not in NO
