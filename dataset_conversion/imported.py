"""What an annotation tool said of an image, in one typed form for every tool, and helpers to read untrusted files.

Each module of importers/ turns one format into `SourceImage`s; import_annotations.py turns those into a dataset.
Nothing here knows a format or nnU-Net. Coordinates are voxels of the image file in array order, (y, x) or (z, y, x), in
one of two conventions that every field states:

- *centres*: voxel i has its centre at i. Points and lines.
- *faces*: voxel i reaches from i to i + 1. Boxes and polygons.

A coordinate t of a tool that counts from the outer corner of the first pixel is t in faces and t - 0.5 in centres.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.image_files import Geometry, ImageFolder

__all__ = [
    "MAX_BYTES",
    "MAX_ENTRIES",
    "AnnotationError",
    "BoxMark",
    "Geometry",
    "ImageFolder",
    "Importer",
    "Mark",
    "PointMark",
    "RasterMask",
    "Region",
    "Scribble",
    "SourceImage",
    "Tag",
    "fail",
    "finite",
    "identifier",
    "read_json_bounded",
    "resolve_inside",
    "text_of",
    "whole_number",
]

MAX_BYTES = 1 << 30  # of one annotation file: COCO's own instances_train2017.json has 450 MB
MAX_ENTRIES = 10_000_000  # of one file: a bound, not a target
MAX_COORDINATE = float(2**31 - 1)
MAX_DEPTH = 64  # of nested JSON

Position: TypeAlias = tuple[float, ...]


@dataclass(frozen=True)
class Tag:
    """The image shows `label` somewhere (`present`), or nowhere."""

    label: str
    present: bool
    entry: str


@dataclass(frozen=True)
class PointMark:
    """The voxel at `at` (centres) shows `label`."""

    label: str
    at: Position
    entry: str


@dataclass(frozen=True)
class BoxMark:
    """An object of `label` within start and stop (faces). `tight`: it touches its object on every side."""

    label: str
    start: Position
    stop: Position
    tight: bool
    entry: str


@dataclass(frozen=True)
class Scribble:
    """A line drawn on `label`: vertices (centres), width in voxels (None: the tool says nothing of it)."""

    label: str
    vertices: tuple[Position, ...]
    width: float | None
    entry: str


@dataclass(frozen=True)
class Region:
    """An area of `label`: rings of (y, x) in faces, even-odd over all of them, so that holes and several parts work.

    plane: z (centres) of the polygon in a 3D image; None in 2D. crowd: several objects, outlined together.
    """

    label: str
    rings: tuple[tuple[Position, ...], ...]
    plane: float | None
    entry: str
    crowd: bool = False


@dataclass(frozen=True)
class RasterMask:
    """Voxels of one class, or a map of several.

    label: the class, and the array is bool; None: the array holds whole numbers that `names` explains. Values that
        `names` does not list are voxels nobody annotated; "background" in it means that nothing is there.
    array: shape (y, x) or (z, y, x), or a function that returns it: picklable (functools.partial of a module's
        function) and called when the array is needed, so that a thousand masks do not lie in memory at once.
    offset: voxel of the image at which array[0, ...] lies.
    """

    label: str | None
    array: npt.NDArray[Any] | Callable[[], npt.NDArray[Any]]
    offset: tuple[int, ...]
    entry: str
    names: Mapping[int, str] = field(default_factory=dict)
    crowd: bool = False

    def load(self) -> npt.NDArray[Any]:
        """The array, read now if it has not been."""
        return self.array() if callable(self.array) else self.array


Mark: TypeAlias = Tag | PointMark | BoxMark | Scribble | Region | RasterMask


@dataclass(frozen=True)
class SourceImage:
    """An image and all that one annotation file says of it.

    Attributes:
        file: the image file, as ImageFolder.find() returned it. With `embedded`: any path that has the right name.
        name: the wish for the case's name; made unique and fit for a file name by the writer.
        marks: what was said, in the order of the file.
        source: the annotation file, for messages.
        expected_shape: the image's shape (y, x) or (z, y, x) that the annotation file states; compared with the image.
        complete: by kind ("boxes", "points") the classes of which the format itself says that every object is marked.
        notes: what was left out and why, one sentence each; shown to the user.
        classes: the format's own list of classes in its order, the same in each image; () where it has none.
        incomplete: classes of which marks were left out by the importer (see `notes`): --complete does not hold for
            them in this image. `drawn`: the classes of which the format itself says that masks show every object.
        mask_labels: the same, but only where masks are, those of the background among them: the rest is unknown.
        embedded: the bytes of an image file (PNG, JPEG, ...) that the annotation file carries; used if not None.
    """

    file: Path
    name: str
    marks: tuple[Mark, ...]
    source: str
    expected_shape: tuple[int, ...] | None = None
    complete: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    embedded: bytes | None = None
    incomplete: tuple[str, ...] = ()
    drawn: tuple[str, ...] | None = None
    mask_labels: tuple[str, ...] | None = None


class Importer(Protocol):
    """A module of importers/: these names, and nothing else, make a format."""

    NAME: str
    HELP: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Options of this format alone; SRC and those of every format are there already."""

    def read(self, src: Path, args: argparse.Namespace, images: ImageFolder) -> Iterable[SourceImage]:
        """Every image of SRC (a file or a folder, which exists) with its marks; AnnotationError for what is wrong."""


def fail(source: str | os.PathLike[str], entry: str, got: str, remedy: str = "") -> NoReturn:
    """Refuse something in a file: AnnotationError "source: entry: got. remedy".

    Args:
        source: the file (or its name).
        entry: where in it, "" for the file as a whole.
        got: what was expected and what is there, without a full stop.
        remedy: a sentence with what to do.
    """
    where = f"{source}: {entry}: " if entry else f"{source}: "
    raise AnnotationError(f"{where}{got.rstrip('.')}.{' ' + remedy if remedy else ''}")


def bytes_of(path: Path, limit: int = MAX_BYTES) -> bytes:
    """All of a regular file; AnnotationError if it is larger than `limit` bytes, or no file."""
    if not path.is_file():
        fail(path, "", "expected a file" + (", but it is a folder or a device" if path.exists() else ""))
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        fail(path, "", f"the file is larger than {limit / 2**20:.4g} MiB, more than an annotation file may have")
    return data


def text_of(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a file: UTF-8 or UTF-16 by its byte order mark, else UTF-8, else Windows-1252 / Latin-1.

    Line ends become "\\n". NUL characters mean that it is no text, which is an AnnotationError.
    """
    data = bytes_of(path, limit)
    try:
        if data.startswith(b"\xef\xbb\xbf"):
            text = data[3:].decode("utf-8")
        elif data.startswith((b"\xff\xfe", b"\xfe\xff")):
            text = data.decode("utf-16")
        else:
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                try:
                    text = data.decode("cp1252")
                except UnicodeDecodeError:
                    text = data.decode("latin-1")
    except UnicodeDecodeError as error:
        fail(path, "", f"its byte order mark says {error.encoding}, but byte {error.start} is not", "Save it as UTF-8.")
    if "\0" in text:
        fail(path, "", "it holds NUL characters, so it is no text file", "Was an image given, or UTF-16 without a BOM?")
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _Refused(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    d = dict(pairs)
    if len(d) != len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key {doubled[:60]!r} stands twice in one object")
    return d


def _constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is no number in JSON")


def read_json_bounded(path: Path, limit: int = MAX_BYTES) -> Any:
    """Parse a JSON file nobody has looked at: bounded in size and depth, without NaN, without doubled keys.

    Raises:
        AnnotationError: naming the file and, where it is not JSON, line and column.
    """
    text = text_of(path, limit)
    if not text.strip():
        fail(path, "", "the file is empty")
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except _Refused as error:
        fail(path, "", str(error), "Correct the file, or export it again.")
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated") or not text[error.pos :].strip()
        fail(
            path,
            f"line {error.lineno}, column {error.colno}",
            f"not valid JSON: {error.msg}",
            "The file seems to be cut off; copy it again." if cut else "",
        )
    except RecursionError:
        fail(path, "", "the JSON is nested too deeply for annotations")
    except ValueError as error:  # a number of thousands of digits
        fail(path, "", f"not valid JSON: {error}")
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            fail(path, "", "the JSON is nested too deeply for annotations")
        level = (
            [
                child
                for value in level
                for child in (value.values() if isinstance(value, dict) else value)
                if isinstance(child, (dict, list))
            ]
            if depth > 1 or isinstance(content, (dict, list))
            else []
        )
    return content


def resolve_inside(root: Path, relative: str, source: str | os.PathLike[str] = "", entry: str = "") -> Path:
    """The path of a file that an annotation file names, which must lie in the folder `root`.

    Backslashes separate folders, as on Windows. The file need not exist.

    Raises:
        AnnotationError: an absolute path, a drive, "..", a NUL, or a symbolic link that leads out of `root`.
    """
    text = str(relative).replace("\\", "/")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    shown = text[:100]
    if not parts or "\0" in text:
        fail(source or root, entry, f"expected the name of a file, but got {shown!r}")
    if text.startswith("/") or (len(parts[0]) >= 2 and parts[0][1] == ":") or ".." in parts:
        fail(source or root, entry, f"the path {shown!r} may lead out of {root}", "Use paths relative to that folder.")
    if len(text) > 4000 or any(len(os.fsencode(part)) > 255 for part in parts):
        fail(source or root, entry, f"the file name {shown!r}... is too long")
    path = root.joinpath(*parts)
    real, real_root = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([real, real_root]) != real_root:
        fail(source or root, entry, f"{shown!r} is a link that leads out of {root}", "Copy the file there.")
    return path


def finite(value: Any, source: str | os.PathLike[str], entry: str) -> float:
    """A number from a file as float: JSON number or text; AnnotationError for NaN, infinity, bool, words, huge."""
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value) if abs(value) <= MAX_COORDINATE else math.inf
    elif isinstance(value, str) and len(value) <= 100 and "_" not in value:
        try:
            number = float(value)
        except ValueError:
            pass
    if not -MAX_COORDINATE <= number <= MAX_COORDINATE:
        shown = repr(value[:60]) if isinstance(value, str) else repr(value)[:60]
        fail(source, entry, f"expected a number, but got {shown}")
    return number


def whole_number(value: Any, source: str | os.PathLike[str], entry: str) -> int:
    """Like finite(), for whole numbers; 3.0 is 3."""
    number = finite(value, source, entry)
    if not number.is_integer():
        fail(source, entry, f"expected a whole number, but got {number:g}")
    return int(number)


def identifier(value: Any, source: str | os.PathLike[str], entry: str) -> int:
    """Like whole_number(), of any size: a number that tells things apart, such as a date with the time of day."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and len(value) <= 100 and value.strip().isdecimal():
        return int(value)
    return whole_number(value, source, entry)


def points_of(values: Sequence[Any], source: str | os.PathLike[str], entry: str) -> list[tuple[float, float]]:
    """A flat list x0, y0, x1, y1, ... as [(x0, y0), ...], checked."""
    if len(values) % 2:
        fail(source, entry, f"expected pairs of x and y, but got {len(values)} numbers")
    numbers = [finite(value, source, entry) for value in values]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def shoelace(ring: Sequence[Position]) -> float:
    """Area that a ring of (y, x) encloses, in voxels; 0 for fewer than three vertices."""
    if len(ring) < 3:
        return 0.0
    y, x = np.asarray(ring, np.float64).T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
