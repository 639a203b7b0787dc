"""YOLO txt (detect, segment, pose with one keypoint, oriented boxes): boxes, polygons, points.

SRC is the data set's folder (data.yaml or classes.txt, images/, labels/) or its data.yaml. Lines hold a class number
and fractions of the image's width and height: centre and size of a box, or the corners of a polygon, x first.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from nnunet_dsp.annotation_errors import show
from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.image_files import stem_of
from nnunet_dsp.dataset_conversion.imported import (
    BoxMark,
    ImageFolder,
    Mark,
    PointMark,
    Region,
    SourceImage,
    fail,
    finite,
    text_of,
)
from nnunet_dsp.dataset_conversion.importers._pairing import annotation_files
from nnunet_dsp.dataset_conversion.importers._shapes import is_upright_rectangle

NAME = "yolo"
HELP = "YOLO txt (detect, segment): boxes, polygons"
EXAMPLE = "nnunet_dsp import yolo cells_yolo/ -d 510 --complete boxes=all"

MAX_LINE_NUMBERS = 200_000
NAME_FILES = ("classes.txt", "obj.names", "names.txt", "classes.names", "_darknet.labels", "labels.txt")
LABEL_LINE = re.compile(r"\s*\d{1,6}(\s+[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?){4,}\s*$")
FARTHEST = 2.0  # fractions beyond this are pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--names",
        metavar="FILE",
        type=Path,
        help="the classes: data.yaml, or a text file with one name a line (default: looked for in SRC)",
    )
    parser.add_argument(
        "--oriented",
        action="store_true",
        help="lines of four corners are turned boxes (YOLO OBB): the upright box around them is taken, as not tight "
        "(default: they are polygons)",
    )


def read(src: Path, args: argparse.Namespace, images: ImageFolder) -> Iterator[SourceImage]:
    """Every image that has a label file, an empty one as well.

    Raises:
        AnnotationError: no class names, no image for a label file, or a line that is no annotation.
    """
    folder = src if src.is_dir() else src.parent
    table = args.names or _names_file(src, images)
    if table is None:
        fail(
            src,
            "",
            f"there are no class names: no data.yaml, {', '.join(NAME_FILES[:3])}",
            "Name a file with one class a line: --names FILE.",
        )
    names, keypoints = _class_names(table)
    labels = [src] if src.is_file() and src.suffix.lower() == ".txt" else _label_files(folder)
    pairs = [(file, _image_of(file, folder, images)) for file in labels]
    lost = [file for file, image in pairs if image is None and _looks_like_labels(file)]
    if lost:
        fail(
            lost[0],
            "",
            f"{len(lost)} label file(s) with objects belong to no image in {images.root}",
            "Label files are called like their images. Name the images' folder (--images DIR), or move these files.",
        )
    if all(image is None for _, image in pairs):
        fail(src, "", "no text file in this folder belongs to an image", "Label files are called like their images.")
    for file, image in pairs:
        if image is not None:
            yield _Lines(file, image, images, names, keypoints, args.oriented).source_image()


def _names_file(src: Path, images: ImageFolder) -> Path | None:
    """The file with the classes' names, in SRC or the folder of the images or up to two folders above SRC's labels."""
    if src.is_file() and src.suffix.lower() in (".yaml", ".yml"):
        return src
    folder = src if src.is_dir() else src.parent
    for place in dict.fromkeys((folder, folder / "labels", images.root)):
        if not place.is_dir():
            continue
        yamls = sorted(p for p in place.iterdir() if p.suffix.lower() in (".yaml", ".yml") and p.is_file())
        for file in sorted(yamls, key=lambda p: (p.stem.lower() not in ("data", "dataset"), p.name)):
            if "names" in text_of(file, 1 << 24):
                return file
        for name in NAME_FILES:
            if (place / name).is_file():
                return place / name
    return None


def _class_names(file: Path) -> tuple[dict[int, str], tuple[int, int] | None]:
    """Name by number, and the number of keypoints and numbers for each, where data.yaml says so."""
    text = text_of(file, 1 << 24)
    if file.suffix.lower() not in (".yaml", ".yml"):
        lines = [line.strip() for line in text.split("\n")]
        while lines and not lines[-1]:
            lines.pop()
        if not lines or not all(lines):
            fail(file, "", "expected the name of a class in every line, but the file is empty or has empty lines")
        return dict(enumerate(lines)), None
    import yaml

    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        fail(file, "", f"not valid YAML: {' '.join(str(error).split())[:200]}")
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    elif isinstance(names, str):
        names = dict(enumerate(part.strip() for part in names.strip("[]").split(",")))
    if not isinstance(names, dict) or not names:
        fail(file, "names", f"expected the list of classes, but got {show(names)}")
    table = {}
    for number, name in names.items():
        if isinstance(number, bool) or not str(number).isdecimal() or not isinstance(name, (str, int, float)):
            fail(file, "names", f"expected numbers and names, but got {show(number)}: {show(name)}")
        table[int(number)] = str(name).strip()
    shape = content.get("kpt_shape")
    if shape is None:
        return table, None
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(isinstance(v, int) for v in shape)
        or shape[1] not in (2, 3)
    ):
        fail(file, "kpt_shape", f"expected [number of keypoints, 2 or 3], but got {show(shape)}")
    return table, (shape[0], shape[1])


def _label_files(folder: Path) -> list[Path]:
    files = annotation_files(folder, (".txt",), "YOLO label file")
    return [file for file in files if file.name.lower() not in NAME_FILES]


def _image_of(file: Path, src: Path, images: ImageFolder) -> Path | None:
    """The image of a label file: beside it, in images/ in place of labels/, or anywhere under that name."""
    try:
        relative = file.relative_to(src).parts
    except ValueError:
        relative = (file.name,)
    wish = [*src.parts[-2:], *relative]
    where = max((i for i, part in enumerate(wish[:-1]) if part.lower() == "labels"), default=None)
    if where is not None:
        wish[where] = "images"
    wish[-1] = file.stem  # whatever the image ends in
    try:
        return images.find(os.path.join(*[part for part in wish if part not in ("/", "\\")]), file, "", file.parent)
    except AnnotationError as error:
        if where is None and "there is no image" in str(error):
            return None  # a text file of another kind: train.txt, a README
        raise


def _looks_like_labels(file: Path) -> bool:
    """Whether a line is a class number and at least four numbers, as in no other text file of a data set."""
    try:
        lines = text_of(file).split("\n")
    except AnnotationError:
        return False
    return any(LABEL_LINE.match(line) for line in lines)


class _Lines:
    """One label file."""

    def __init__(
        self,
        file: Path,
        image: Path,
        images: ImageFolder,
        names: dict[int, str],
        keypoints: tuple[int, int] | None,
        oriented: bool,
    ) -> None:
        self.file, self.image, self.names, self.keypoints, self.oriented = file, image, names, keypoints, oriented
        shape = images.shape(image)
        if len(shape) != 2:
            fail(file, "", f"YOLO's labels are 2D, but {image.name} has the shape {shape}")
        self.height, self.width = shape
        self.marks: list[Mark] = []
        self.notes: list[str] = []

    def source_image(self) -> SourceImage:
        for index, line in enumerate(text_of(self.file).split("\n"), start=1):
            cells = line.split()
            if cells:
                self._line(cells, f"line {index}")
        return SourceImage(
            file=self.image,
            name=stem_of(self.image),
            marks=tuple(self.marks),
            source=f"{self.file.parent.name}/{self.file.name}",
            notes=tuple(self.notes),
            classes=tuple(name for _, name in sorted(self.names.items())),
        )

    def _line(self, cells: Sequence[str], entry: str) -> None:
        if len(cells) > MAX_LINE_NUMBERS:
            fail(self.file, entry, f"the line holds {len(cells)} numbers, more than {MAX_LINE_NUMBERS}")
        number = finite(cells[0], self.file, f"{entry}, class")
        if number not in self.names:
            known = f"0 to {max(self.names)}" if self.names else "none"
            fail(self.file, f"{entry}, class", f"there is no name for class {cells[0][:20]}, known are {known}")
        label = self.names[int(number)]
        values = [finite(cell, self.file, f"{entry}, number {i}") for i, cell in enumerate(cells[1:], start=2)]
        if self.keypoints is not None:
            self._pose(values, label, entry)
        elif len(values) in (4, 5):
            if len(values) == 5:
                self._refuse_pixels(values[4:], entry)
                self.notes.append("lines with a confidence behind the box: these are predictions, not annotations")
            self._box(values, label, entry)
        elif len(values) >= 6 and len(values) % 2 == 0:
            self._polygon(values, label, entry)
        else:
            fail(
                self.file,
                entry,
                f"expected a class and x, y, width, height, or a class and the corners of a polygon, but got "
                f"{len(cells)} numbers",
                "Poses need kpt_shape in data.yaml." if len(values) > 5 else "",
            )

    def _refuse_pixels(self, values: Sequence[float], entry: str) -> None:
        far = next((v for v in values if not -FARTHEST <= v <= FARTHEST), None)
        if far is not None:
            fail(
                self.file,
                entry,
                f"expected fractions of the image's width and height, 0 to 1, but got {far:g}",
                "Are these pixels? Export the labels as YOLO writes them.",
            )

    def _box(self, values: Sequence[float], label: str, entry: str) -> None:
        self._refuse_pixels(values, entry)
        x, y, width, height = values[:4]
        start = ((y - height / 2) * self.height, (x - width / 2) * self.width)
        stop = ((y + height / 2) * self.height, (x + width / 2) * self.width)
        self.marks.append(BoxMark(label, _neat(start), _neat(stop), True, entry))

    def _polygon(self, values: Sequence[float], label: str, entry: str) -> None:
        self._refuse_pixels(values, entry)
        ring = [(y * self.height, x * self.width) for x, y in zip(values[::2], values[1::2], strict=True)]
        if self.oriented and len(ring) == 4:
            start = (min(y for y, _ in ring), min(x for _, x in ring))
            stop = (max(y for y, _ in ring), max(x for _, x in ring))
            upright = is_upright_rectangle(ring, 0.01)
            if not upright:
                self.notes.append("turned boxes: the upright box around them is taken, as not tight")
            self.marks.append(BoxMark(label, _neat(start), _neat(stop), upright, entry))
            return
        self.marks.append(Region(label, (tuple(ring),), None, entry))

    def _pose(self, values: Sequence[float], label: str, entry: str) -> None:
        number, size = self.keypoints or (0, 2)
        if len(values) != 4 + number * size:
            fail(
                self.file,
                entry,
                f"expected a box and {number} keypoints of {size} numbers, as kpt_shape says, but got "
                f"{len(values)} numbers",
            )
        self._box(values, label, entry)
        if number != 1:
            self.notes.append("left out: keypoints, of which there are several an object (they are parts, not classes)")
            return
        x, y = values[4:6]
        self._refuse_pixels((x, y), entry)
        seen = values[6] if size == 3 else (2.0 if (x, y) != (0.0, 0.0) else 0.0)
        if seen == 2:
            at = _neat((y * self.height - 0.5, x * self.width - 0.5))
            self.marks.append(PointMark(label, at, entry))
        elif seen == 1:
            self.notes.append("left out: keypoints marked as hidden, whose pixel shows something else")


def _neat(values: Sequence[float]) -> tuple[float, ...]:
    """Without the rounding of six decimals times a thousand pixels, where a whole or half pixel is meant."""
    return tuple(round(v * 2) / 2 if abs(v * 2 - round(v * 2)) < 0.02 else v for v in values)
