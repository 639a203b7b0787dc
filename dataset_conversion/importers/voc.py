"""Pascal VOC XML, one file an image: boxes.

SRC is a folder with .xml files (Annotations/ beside JPEGImages/, or both in one folder), or one such file. VOC counts
pixels from 1, and xmax and ymax are the last pixel of the object.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_dsp.annotation_errors import show
from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.image_files import stem_of
from nnunet_dsp.dataset_conversion.imported import BoxMark, ImageFolder, SourceImage, fail, finite
from nnunet_dsp.dataset_conversion.importers._pairing import annotation_files
from nnunet_dsp.dataset_conversion.importers._xml import parse_xml

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

NAME = "voc"
HELP = "Pascal VOC XML (also LabelImg): boxes"
EXAMPLE = "nnunet_dsp import voc VOCdevkit/VOC2012 -d 510 --complete boxes=RBC,WBC"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--zero-based",
        action="store_true",
        help="xmin and ymin count from 0, and xmax and ymax are the pixel after the last, as some tools write VOC",
    )
    parser.add_argument(
        "--difficult",
        choices=("loose", "keep", "drop"),
        default="loose",
        help="boxes marked as difficult: not counted as tight, kept like any other, or left out (default: %(default)s)",
    )


def read(src: Path, args: argparse.Namespace, images: ImageFolder) -> Iterator[SourceImage]:
    """Every image that has an XML file.

    Raises:
        AnnotationError: XML that is not VOC's, or a box that is none.
    """
    found = False
    for file in annotation_files(src, (".xml",), "VOC annotation"):
        root = parse_xml(file)
        if root.tag != "annotation":
            if src.is_dir() and root.tag != "annotations":
                continue
            hint = "It looks like CVAT's format: nnunet_dsp import cvat." if root.tag == "annotations" else ""
            fail(file, "", f"expected VOC's <annotation>, but the file begins with <{root.tag[:60]}>", hint)
        found = True
        yield _read_file(file, root, args, images)
    if not found:
        fail(src, "", "no XML file in this folder holds VOC's <annotation>")


def _read_file(file: Path, root: Element, args: argparse.Namespace, images: ImageFolder) -> SourceImage:
    image = _find_image(file, root, images)
    marks: list[BoxMark] = []
    notes: list[str] = []
    incomplete: set[str] = set()
    for index, item in enumerate(root.findall("object")):
        entry = f"object[{index}]"
        label = (item.findtext("name") or "").strip()
        if not label:
            fail(file, entry, "it has no <name>")
        box = item.find("bndbox")
        if box is None:
            fail(file, entry, f"{label!r} has no <bndbox>", "Other shapes than boxes have no place in VOC.")
        x0, y0, x1, y1 = (_number(box, key, file, f"{entry}.bndbox") for key in ("xmin", "ymin", "xmax", "ymax"))
        difficult, truncated = (_flag(item, key, file, entry) for key in ("difficult", "truncated"))
        if item.find("part") is not None:
            notes.append("left out: <part> of an object")
        if item.find("polygon") is not None or item.find("segm") is not None:
            notes.append("left out: outlines, which VOC's format does not define; the boxes are taken")
        if difficult and args.difficult == "drop":
            notes.append(f"left out: boxes of {label!r} marked as difficult")
            incomplete.add(label)
            continue
        if difficult and args.difficult == "loose":
            notes.append("boxes marked as difficult: not counted as tight")
        if truncated:
            notes.append("boxes of truncated objects: not counted as tight")
        if not args.zero_based:
            if min(x0, y0) < 1:
                notes.append(
                    "boxes that begin at 0, though VOC counts from 1: cut off by a pixel (or did the tool count from "
                    "0? --zero-based)"
                )
            x0, y0 = x0 - 1, y0 - 1
        tight = not truncated and not (difficult and args.difficult == "loose")
        marks.append(BoxMark(label, (y0, x0), (y1, x1), tight, entry))
    return SourceImage(
        file=image,
        name=stem_of(image),
        marks=tuple(marks),
        source=file.name,
        expected_shape=_stated_shape(file, root),
        notes=tuple(notes),
        incomplete=tuple(sorted(incomplete)),
    )


def _find_image(file: Path, root: Element, images: ImageFolder) -> Path:
    """The image a file names, or else the one that is called like the file itself."""
    named = (root.findtext("filename") or "").strip()
    if named:
        try:
            return images.find(named, file, "filename", file.parent)
        except AnnotationError:
            if stem_of(named.replace("\\", "/")) == file.stem:
                raise  # else the same name would be found in any other folder
    try:
        return images.find(file.stem, file, "", file.parent)
    except AnnotationError:
        return images.find(named or file.stem, file, "filename" if named else "", file.parent)


def _stated_shape(file: Path, root: Element) -> tuple[int, int] | None:
    """(height, width); None where they are missing or 0, as some tools write them."""
    size = root.find("size")
    if size is None:
        return None
    height, width = (finite(size.findtext(key) or "0", file, f"size.{key}") for key in ("height", "width"))
    if height <= 0 or width <= 0:
        return None
    return int(height), int(width)


def _number(box: Element, key: str, file: Path, entry: str) -> float:
    text = box.findtext(key)
    if text is None:
        fail(file, entry, f"it has no <{key}>")
    return finite(text.strip(), file, f"{entry}.{key}")


def _flag(item: Element, key: str, file: Path, entry: str) -> bool:
    text = (item.findtext(key) or "0").strip().lower()
    if text not in ("0", "1", "true", "false", "unspecified"):
        fail(file, f"{entry}.{key}", f"expected 0 or 1, but got {show(text)}")
    return text in ("1", "true")
