"""What a user can say about an image (tags, points, boxes, what is complete), and the auxiliary file that holds it.

One JSON file a case, ``annotationsTr/<case>.json``; docs/annotation_file.md describes it for users. Reading validates
everything. Nothing here knows nnU-Net, torch or what preprocessing does to coordinates (geometry.py).
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

import numpy as np

from nnunet_dsp.annotation_checks import (
    absent_problems,
    check_against_image,
    check_axes,
    check_positions,
    find_contradictions,
)
from nnunet_dsp.annotation_errors import AnnotationError, did_you_mean, listed, show, whole
from nnunet_dsp.label_names import BACKGROUND, IGNORE, LabelNames, ignore_message

__all__ = [
    "FORMAT",
    "MAX_FILE_BYTES",
    "VERSION",
    "AnnotationError",
    "Annotations",
    "Box",
    "LabelNames",
    "Point",
    "annotations_from_dict",
    "annotations_to_dict",
    "case_file",
    "check_against_image",
    "describe_source",
    "find_contradictions",
    "read_annotations",
    "read_folder",
    "write_annotations",
]

FORMAT = "nnunet_dsp.annotations"
VERSION = 1
MAX_FILE_BYTES = 64 * 2**20
MAX_COORDINATE = 2**31 - 1

_FILE_REQUIRED = frozenset({"format", "version"})
_FILE_OPTIONAL = frozenset({"shape", "image_level", "points", "boxes", "complete", "mask_labels"})
_POINT_KEYS = frozenset({"label", "at"})
_BOX_KEYS = frozenset({"label", "start", "stop"})
_BOX_OPTIONAL = frozenset({"tight"})


@dataclass(frozen=True, slots=True)
class Point:
    """One voxel that shows `label`, at array-order coordinates; voxel centres lie at whole numbers."""

    label: str
    at: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A box around an object of class `label`: the voxels v with start <= v < stop, array order.

    A tight box promises its class in each of its rows, columns (and slices); a loose one only confines its object.
    """

    label: str
    start: tuple[float, ...]
    stop: tuple[float, ...]
    tight: bool = True


@dataclass(frozen=True, slots=True)
class Annotations:
    """All that is said about one image beside its mask.

    Attributes:
        shape: the image's shape in array order, (y, x) or (z, y, x); None: not stated.
        present: classes known to be somewhere in the image.
        absent: classes known to be nowhere in it. For classes in neither list nothing is known.
        points: see `Point`.
        boxes: see `Box`.
        complete_points: classes of which every object carries a point.
        complete_boxes: classes of which every object carries a box; outside all its boxes such a class is absent.
        mask_labels: the classes that the annotator of this image's mask drew, without background; a voxel labelled
            background may then be any class not listed. None: all classes were drawn (an ordinary mask).
    """

    shape: tuple[int, ...] | None = None
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    points: tuple[Point, ...] = ()
    boxes: tuple[Box, ...] = ()
    complete_points: tuple[str, ...] = ()
    complete_boxes: tuple[str, ...] = ()
    mask_labels: tuple[str, ...] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is said (the shape says nothing about classes)."""
        lists = (self.present, self.absent, self.points, self.boxes, self.complete_points, self.complete_boxes)
        return self.mask_labels is None and not any(lists)


def read_annotations(path: str | os.PathLike[str], labels: LabelNames | None = None) -> Annotations:
    """Read and validate one auxiliary label file.

    Args:
        path: the file; its name without ".json" is the case.
        labels: the dataset's classes. Without them names are taken as they are, and numbers are refused.

    Raises:
        AnnotationError: anything wrong with the file, with case, file, entry and remedy in the message.
        OSError: the file is missing or cannot be read.
    """
    path = Path(path)
    source = describe_source(path)
    if path.exists() and not path.is_file():
        raise AnnotationError(f"{source}: expected a JSON file, but it is a folder or a device.")
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise AnnotationError(
            f"{source}: the file is larger than {MAX_FILE_BYTES // 2**20} MiB, the limit for annotations. "
            "Dense annotations belong into the mask."
        )
    return annotations_from_dict(_parse(data, source), source=source, labels=labels)


def write_annotations(path: str | os.PathLike[str], annotations: Annotations, labels: LabelNames | None = None) -> None:
    """Validate annotations and write them to one file, replacing it at once or not at all; its folder is made.

    Entries that are as without them (empty lists, `tight: true`) are left out, so the same annotations always give
    the same bytes.

    Raises:
        AnnotationError: annotations that `read_annotations` would refuse; nothing is written.
        OSError: the file cannot be written; what was there stays.
    """
    source = describe_source(path)
    path = Path(os.path.realpath(path))  # a link stays a link
    normal = annotations_from_dict(annotations_to_dict(annotations), source=source, labels=labels)
    data = _layout(annotations_to_dict(normal)).encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are private to the user (mode 0600), and datasets are shared.
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def annotations_from_dict(d: Any, *, source: str, labels: LabelNames | None = None) -> Annotations:
    """Validate parsed JSON and turn it into annotations; numbers become names, doubled names become one.

    Raises:
        AnnotationError: see `read_annotations`.
    """
    return _Reader(source, labels).annotations(d)


def annotations_to_dict(annotations: Annotations) -> dict[str, Any]:
    """What goes into the file, in the order it stands there, without entries that are as without them."""
    d: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    if annotations.shape is not None:
        d["shape"] = [_plain(size) for size in annotations.shape]
    tags = {
        "present": [_plain(name) for name in annotations.present],
        "absent": [_plain(name) for name in annotations.absent],
    }
    if any(tags.values()):
        d["image_level"] = {key: names for key, names in tags.items() if names}
    if annotations.points:
        d["points"] = [
            {"label": _plain(point.label), "at": [_plain(value) for value in point.at]} for point in annotations.points
        ]
    if annotations.boxes:
        d["boxes"] = []
        for box in annotations.boxes:
            entry = {
                "label": _plain(box.label),
                "start": [_plain(value) for value in box.start],
                "stop": [_plain(value) for value in box.stop],
            }
            if box.tight is not True and _plain(box.tight) is not True:
                entry["tight"] = _plain(box.tight)
            d["boxes"].append(entry)
    complete = {
        "points": [_plain(name) for name in annotations.complete_points],
        "boxes": [_plain(name) for name in annotations.complete_boxes],
    }
    if any(complete.values()):
        d["complete"] = {key: names for key, names in complete.items() if names}
    if annotations.mask_labels is not None:
        d["mask_labels"] = [_plain(name) for name in annotations.mask_labels]
    return d


def case_file(folder: str | os.PathLike[str], case: str) -> Path:
    """The auxiliary label file of a case in a folder such as annotationsTr.

    Raises:
        AnnotationError: a name that would lead out of the folder.
    """
    if case in ("", ".", "..") or "\0" in case or PureWindowsPath(case).name != case:
        raise AnnotationError(
            f"Expected the name of a case, but got {show(case)}. "
            "Case names hold no '/', '\\' or drive and are not '.' or '..'."
        )
    return Path(folder) / f"{case}.json"


def read_folder(
    folder: str | os.PathLike[str],
    cases: Iterable[str] | None = None,
    labels: LabelNames | None = None,
    jobs: int = 1,
) -> dict[str, Annotations]:
    """Read all auxiliary label files of a folder; a folder that does not exist holds none.

    Args:
        folder: annotationsTr or the like. Hidden files and files that are not JSON are passed over.
        cases: the cases there are; None: whatever has a file.
        labels: see `read_annotations`.
        jobs: threads. They help where files come over a network; parsing itself is not faster.

    Returns:
        Annotations by case, sorted; cases without a file are not in it.

    Raises:
        AnnotationError: a file that cannot be used (up to ten are named at once), or a file that belongs to no case.
    """
    folder = Path(folder)
    if not folder.exists():
        return {}
    if not folder.is_dir():
        raise AnnotationError(f"{folder}: expected a folder of annotation files, but it is a file.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".json" and path.name[0] != ".")
    problems = [
        f"{describe_source(path)}: the file name ends in {path.suffix}. Rename it to {path.stem}.json."
        for path in files
        if path.suffix != ".json"
    ]
    if cases is not None:
        known = set(cases)
        problems += [_orphan_message(path, known) for path in files if path.stem not in known]

    def read(path: Path) -> Annotations | AnnotationError:
        try:
            return read_annotations(path, labels)
        except AnnotationError as error:
            return error

    found: dict[str, Annotations] = {}
    if not problems:
        if jobs > 1:
            with ThreadPoolExecutor(jobs) as pool:
                results = list(pool.map(read, files))
        else:
            results = [read(path) for path in files]
        for path, result in zip(files, results, strict=True):
            if isinstance(result, AnnotationError):
                problems.append(str(result))
            else:
                found[path.stem] = result
    if problems:
        more = [f"... and {len(problems) - 10} more files like these."] if len(problems) > 10 else []
        raise AnnotationError("\n".join(problems[:10] + more))
    return found


def describe_source(path: str | os.PathLike[str]) -> str:
    """How messages name a file: ``case_012 (annotationsTr/case_012.json)``."""
    path = Path(path)
    return f"{path.stem} ({path.parent.name}/{path.name})" if path.parent.name else f"{path.stem} ({path.name})"


class _Reader:
    """Validates one file's parsed JSON. Entries are named as in the file: ``points[3].at``, counted from 0."""

    def __init__(self, source: str, labels: LabelNames | None) -> None:
        self.source = source
        self.labels = labels
        self.known: dict[tuple[type, Any], str] = {}

    def fail(self, text: str) -> NoReturn:
        raise AnnotationError(f"{self.source}: {text}")

    def annotations(self, d: Any) -> Annotations:
        if type(d) is not dict:
            self.fail(f"expected a JSON object {{...}}, but got {show(d)}.")
        # Format and version come first: another version may well have other keys.
        if d.get("format") != FORMAT:
            got = f"but got {show(d['format'])}" if "format" in d else "but it is missing"
            self.fail(f'expected "format": "{FORMAT}", {got}. Is this an annotation file?')
        version = whole(d.get("version"))
        if version != VERSION:
            got = f"but got {show(d['version'])}" if "version" in d else "but it is missing"
            newer = version is not None and version > VERSION
            hint = " A newer nnunet_dsp wrote it: pip install --upgrade nnunet-dsp." if newer else ""
            self.fail(f'expected "version": {VERSION}, {got}.{hint}')
        self.keys(d, "the file", _FILE_REQUIRED, _FILE_OPTIONAL)
        tags = self.keys(d.get("image_level", {}), "image_level", frozenset(), frozenset({"present", "absent"}))
        complete = self.keys(d.get("complete", {}), "complete", frozenset(), frozenset({"points", "boxes"}))
        drawn = self.names(d["mask_labels"], "mask_labels") if "mask_labels" in d else None
        annotations = Annotations(
            shape=self.shape(d["shape"]) if "shape" in d else None,
            present=self.names(tags.get("present", []), "image_level.present"),
            absent=self.names(tags.get("absent", []), "image_level.absent"),
            points=tuple(self.point(value, index) for index, value in enumerate(self.entries(d, "points"))),
            boxes=tuple(self.box(value, index) for index, value in enumerate(self.entries(d, "boxes"))),
            complete_points=self.names(complete.get("points", []), "complete.points"),
            complete_boxes=self.names(complete.get("boxes", []), "complete.boxes"),
            mask_labels=None if drawn is None else tuple(name for name in drawn if name != BACKGROUND),
        )
        check_axes(annotations, self.source)
        check_positions(annotations, annotations.shape, self.source)
        for problem in absent_problems(annotations):
            self.fail(problem)
        return annotations

    def keys(self, value: Any, entry: str, required: frozenset[str], optional: frozenset[str]) -> dict[str, Any]:
        allowed = required | optional
        if type(value) is not dict:
            self.fail(f"{entry} must be an object with {listed(sorted(allowed))}, but got {show(value)}.")
        for key in value:
            if key not in allowed:
                hint = did_you_mean(key, sorted(allowed))
                self.fail(f"{entry} has an unknown key {show(key)}, expected {listed(sorted(allowed))}.{hint}")
        for key in sorted(required):
            if key not in value:
                self.fail(f"{entry} lacks the key {key!r}. Add it.")
        return value

    def entries(self, d: dict[str, Any], key: str) -> Sequence[Any]:
        value = d.get(key, [])
        if not isinstance(value, (list, tuple)):
            self.fail(f"{key} must be a list [...], but got {show(value)}.")
        return value

    def names(self, value: Any, entry: str) -> tuple[str, ...]:
        if not isinstance(value, (list, tuple)):
            hint = f" Write [{show(value)}]." if isinstance(value, str) else ""
            self.fail(f"{entry} must be a list of labels, but got {show(value)}.{hint}")
        # dict.fromkeys: each once, in the order of the file
        return tuple(dict.fromkeys(self.label(label, f"{entry}[{index}]") for index, label in enumerate(value)))

    def label(self, value: Any, entry: str) -> str:
        key = (type(value), value)  # the type, because True == 1 == 1.0
        try:
            return self.known[key]
        except (KeyError, TypeError):  # new, or unhashable
            pass
        number = whole(value)
        if number is not None:
            if self.labels is None:
                self.fail(
                    f"{entry} is the number {show(value)}, which means a class only beside a dataset.json. "
                    "Write the name of the class, or give the labels."
                )
        elif not isinstance(value, str) or not value:
            self.fail(f"{entry} must be a label, the name of a class or its number, but got {show(value)}.")
        elif value == IGNORE:
            self.fail(f"{entry}: {ignore_message(value)}")
        elif not value.isprintable() and any(0xD800 <= ord(letter) < 0xE000 for letter in value):
            self.fail(f"{entry} is {show(value)}, which holds half a character (a lone surrogate). Correct the name.")
        name: str = value
        if self.labels is not None:
            try:
                name = self.labels.name(number) if number is not None else value
                self.labels.index(name)
            except AnnotationError as error:
                self.fail(f"{entry}: {error}")
        self.known[key] = name
        return name

    def shape(self, value: Any) -> tuple[int, ...]:
        sizes = tuple(map(whole, value)) if isinstance(value, (list, tuple)) else ()
        if len(sizes) not in (2, 3) or any(size is None or not 1 <= size <= MAX_COORDINATE for size in sizes):
            self.fail(f"shape must be 2 or 3 positive whole numbers, [y, x] or [z, y, x], but got {show(value)}.")
        return tuple(size for size in sizes if size is not None)

    def position(self, value: Any, entry: str) -> tuple[float, ...]:
        if not isinstance(value, (list, tuple)) or len(value) not in (2, 3):
            self.fail(f"{entry} must be a list of 2 or 3 numbers, [y, x] or [z, y, x], but got {show(value)}.")
        for axis, number in enumerate(value):
            if type(number) is not int and type(number) is not float:
                self.fail(f"{entry}[{axis}] must be a number, but got {show(number)}.")
            if not -MAX_COORDINATE <= number <= MAX_COORDINATE:  # NaN and infinity, too
                self.fail(f"{entry}[{axis}] must be a coordinate in voxels, but got {show(number)}.")
        return tuple(map(float, value))

    def point(self, value: Any, index: int) -> Point:
        entry = f"points[{index}]"
        if type(value) is not dict or value.keys() != _POINT_KEYS:
            self.keys(value, entry, _POINT_KEYS, frozenset())
        return Point(self.label(value["label"], f"{entry}.label"), self.position(value["at"], f"{entry}.at"))

    def box(self, value: Any, index: int) -> Box:
        entry = f"boxes[{index}]"
        if type(value) is not dict or value.keys() != _BOX_KEYS:
            self.keys(value, entry, _BOX_KEYS, _BOX_OPTIONAL)
        tight = value.get("tight", True)
        if type(tight) is not bool:
            self.fail(f"{entry}.tight must be true or false, but got {show(tight)}.")
        return Box(
            label=self.label(value["label"], f"{entry}.label"),
            start=self.position(value["start"], f"{entry}.start"),
            stop=self.position(value["stop"], f"{entry}.stop"),
            tight=tight,
        )


class _JSONProblem(ValueError):
    """What the JSON parser's hooks refuse."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    d = dict(pairs)
    if len(d) != len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _JSONProblem(f"the key {show(doubled)} stands twice in one object. Keep one of them")
    return d


def _no_constant(text: str) -> NoReturn:
    raise _JSONProblem(f"{text} is no number in JSON, and no coordinate. Remove the entry or correct it")


def _parse(data: bytes, source: str) -> Any:
    """JSON from bytes nobody has looked at yet."""
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise AnnotationError(f"{source}: the file starts with a byte order mark. Save it as UTF-8 without BOM.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{source}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    if not text.strip():
        raise AnnotationError(f"{source}: the file is empty. Remove it, or write at least format and version.")
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except _JSONProblem as error:
        raise AnnotationError(f"{source}: {error}.") from None
    except json.JSONDecodeError as error:
        # Cut off: within a string, or with nothing behind the error but the beginning of a number or word.
        truncated = error.msg.startswith("Unterminated") or re.fullmatch(r"[\w.+-]*\s*", text[error.pos :])
        hint = " The file seems to be cut off; copy it again." if truncated else ""
        raise AnnotationError(
            f"{source}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}.{hint}"
        ) from None
    except RecursionError:
        raise AnnotationError(f"{source}: the JSON is nested too deeply for an annotation file.") from None
    except ValueError as error:  # a number of thousands of digits
        raise AnnotationError(f"{source}: not valid JSON: {error}.") from None


def _layout(d: dict[str, Any]) -> str:
    """JSON with a line for each entry, point and box: small, readable, good to compare."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    lines = []
    for key, value in d.items():
        if key in ("points", "boxes"):
            entries = ",\n".join(f"    {compact(entry)}" for entry in value)
            lines.append(f"  {compact(key)}: [\n{entries}\n  ]")
        else:
            lines.append(f"  {compact(key)}: {compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _plain(value: Any) -> Any:
    """Numpy's scalars as Python's, whole floats as int; anything else as it is, for the reader to judge."""
    if isinstance(value, np.generic):
        value = value.item()
    return int(value) if type(value) is float and value.is_integer() else value


def _orphan_message(path: Path, cases: set[str]) -> str:
    stem, _, channel = path.stem.rpartition("_")
    if stem in cases and channel.isdigit():
        hint = f"Annotation files carry the case's name without the channel number: {stem}.json."
    else:
        hint = f"Files are named after the case, <case>.json.{did_you_mean(path.stem, sorted(cases))}"
    return f"{describe_source(path)}: the dataset has no case {path.stem!r}. {hint}"
