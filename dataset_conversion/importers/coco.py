"""COCO JSON (instances, keypoints): boxes, polygons, run-length masks, single keypoints, annotations without a place.

SRC is the JSON file, or a folder with one or more of them (instances_train.json, train/_annotations.coco.json). COCO
counts pixels from the outer corner of the first one, x first; keypoints are whole pixels, or fractions of that count.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

from nnunet_dsp.annotation_errors import show
from nnunet_dsp.dataset_conversion.image_files import stem_of
from nnunet_dsp.dataset_conversion.imported import (
    BoxMark,
    ImageFolder,
    Mark,
    PointMark,
    RasterMask,
    Region,
    SourceImage,
    Tag,
    fail,
    finite,
    identifier,
    points_of,
    read_json_bounded,
    whole_number,
)
from nnunet_dsp.dataset_conversion.importers._pairing import annotation_files
from nnunet_dsp.dataset_conversion.importers._rle import decode, runs_of

NAME = "coco"
HELP = "COCO JSON: boxes, polygons, RLE masks, single keypoints, tags"
EXAMPLE = "nnunet_dsp import coco annotations/instances_train.json --images train/ -d 510 --complete boxes=all"

OWN_KEY = "nnunet_dsp"  # what COCO has no word for, in images and annotations that nnunet_dsp export wrote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-boxes",
        action="store_true",
        help="take masks without the boxes around them (boxes of annotations without a mask are taken)",
    )


def read(src: Path, args: argparse.Namespace, images: ImageFolder) -> Iterator[SourceImage]:
    """Every image that a file lists, those without annotations as well.

    Raises:
        AnnotationError: a file that is not COCO's, or an annotation that cannot be what it says.
    """
    files = annotation_files(src, (".json",), "COCO file")
    found = False
    for file in files:
        content = read_json_bounded(file)
        if src.is_dir() and not _is_coco(content):
            continue
        found = True
        near = file.parent if images.root in (file.parent, *file.parents) else None
        yield from _File(file, content, images, near, args.no_boxes).images_of()
    if not found:
        fail(src, "", 'no JSON file in this folder holds COCO\'s "images" and "annotations"')


def _is_coco(content: Any) -> bool:
    """Whether two of COCO's three lists are there; the one that lacks is then named, not the file passed over."""
    if not isinstance(content, dict):
        return False
    if isinstance(content.get("images"), list):
        return "categories" in content or "annotations" in content
    return all(isinstance(content.get(key), list) for key in ("annotations", "categories"))


class _File:
    """One JSON file."""

    def __init__(self, file: Path, content: Any, images: ImageFolder, near: Path | None, no_boxes: bool) -> None:
        self.file, self.images, self.near, self.no_boxes = file, images, near, no_boxes
        if not isinstance(content, dict):
            fail(file, "", "expected COCO's object of images, annotations and categories, but got " + show(content))
        self.listed = self._list(content, "images")
        self.annotations = self._list(content, "annotations")
        self.names: dict[int, str] = {}
        self.keypoints: dict[int, int] = {}
        for index, category in enumerate(self._list(content, "categories")):
            entry = f"categories[{index}]"
            number = identifier(self._need(category, "id", entry), file, f"{entry}.id")
            name = self._need(category, "name", entry)
            if not isinstance(name, str) or not name.strip():
                fail(file, f"{entry}.name", f"expected the name of a class, but got {show(name)}")
            if self.names.setdefault(number, name.strip()) != name.strip():
                fail(file, entry, f"the id {number} is also that of {self.names[number]!r}")
            points = category.get("keypoints")
            self.keypoints[number] = len(points) if isinstance(points, list) else 0

    def _list(self, content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
        value = content.get(key)
        if not isinstance(value, list):
            hint = " The file lists no annotations: is it that of a test set?" if key == "annotations" else ""
            fail(self.file, "", f'expected a list "{key}", but got {show(value)}', "Is it a COCO file?" + hint)
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                fail(self.file, f"{key}[{index}]", f"expected an object, but got {show(item)}")
        return value

    def _need(self, item: Mapping[str, Any], key: str, entry: str) -> Any:
        if key not in item:
            fail(self.file, entry, f'it lacks "{key}"')
        return item[key]

    def images_of(self) -> Iterator[SourceImage]:
        index_of: dict[int, int] = {}
        for index, image in enumerate(self.listed):
            entry = f"images[{index}]"
            number = identifier(self._need(image, "id", entry), self.file, f"{entry}.id")
            if number in index_of:
                fail(self.file, entry, f"the id {number} is also that of images[{index_of[number]}]")
            index_of[number] = index
        marks: list[list[tuple[int, dict[str, Any]]]] = [[] for _ in self.listed]
        for index, annotation in enumerate(self.annotations):
            entry = f"annotations[{index}]"
            number = identifier(self._need(annotation, "image_id", entry), self.file, f"{entry}.image_id")
            if number not in index_of:
                fail(self.file, entry, f"there is no image with the id {number}")
            marks[index_of[number]].append((index, annotation))
        for index, image in enumerate(self.listed):
            yield self._image(image, f"images[{index}]", marks[index])

    def _image(
        self, image: Mapping[str, Any], entry: str, annotations: list[tuple[int, dict[str, Any]]]
    ) -> SourceImage:
        name = image.get("file_name")
        if name is None and isinstance(image.get("coco_url"), str):  # LVIS
            name = "/".join(PurePosixPath(unquote(urlparse(image["coco_url"]).path)).parts[-2:])
        if not isinstance(name, str) or not name.strip():
            fail(self.file, f"{entry}.file_name", f"expected the name of the image file, but got {show(name)}")
        file = self.images.find(name, self.file, entry, self.near)
        size = (image.get("height"), image.get("width"))
        stated = None
        if all(value not in (None, 0) for value in size):
            stated = (
                whole_number(size[0], self.file, f"{entry}.height"),
                whole_number(size[1], self.file, f"{entry}.width"),
            )
        one = _Image(self, file, stated, image, entry)
        for index, annotation in annotations:
            one.add(annotation, f"annotations[{index}]")
        return one.source_image()

    def category(self, value: Any, entry: str) -> tuple[int, str]:
        number = identifier(value, self.file, entry)
        if number not in self.names:
            fail(self.file, entry, f"there is no category with the id {number}")
        return number, self.names[number]


class _Image:
    """The annotations of one image, as marks."""

    def __init__(
        self, file: _File, path: Path, stated: tuple[int, int] | None, image: Mapping[str, Any], entry: str
    ) -> None:
        self.file, self.path, self.stated, self.image, self.entry = file, path, stated, image, entry
        self.marks: list[Mark] = []
        self.notes: list[str] = []
        self.incomplete: set[str] = set()
        self._size: tuple[int, ...] | None = None

    def add(self, annotation: Mapping[str, Any], entry: str) -> None:
        source = self.file.file
        if "id" in annotation:
            entry = f"{entry} (id {str(annotation['id'])[:20]})"
        number, label = self.file.category(self.file._need(annotation, "category_id", entry), f"{entry}.category_id")
        own = self._own(annotation, entry)
        crowd = annotation.get("iscrowd", 0)
        if crowd not in (0, 1, False, True):
            fail(source, f"{entry}.iscrowd", f"expected 0 or 1, but got {show(crowd)}")
        before = len(self.marks)
        has_mask = self._segmentation(annotation.get("segmentation"), label, entry, bool(crowd))
        self._box(annotation, label, entry, own, has_mask, bool(crowd))
        said = self._keypoints(annotation.get("keypoints"), number, label, entry)
        if len(self.marks) == before and not said and annotation.get("bbox") in (None, []):
            self.marks.append(Tag(label, True, entry))

    def _own(self, item: Mapping[str, Any], entry: str) -> Mapping[str, Any]:
        own = item.get(OWN_KEY, {})
        if not isinstance(own, dict):
            fail(self.file.file, f"{entry}.{OWN_KEY}", f"expected an object, but got {show(own)}")
        return own

    def _box(
        self, annotation: Mapping[str, Any], label: str, entry: str, own: Mapping[str, Any], mask: bool, crowd: bool
    ) -> None:
        box = annotation.get("bbox")
        if box is None or box == []:
            return
        if not isinstance(box, list) or len(box) != 4:
            fail(self.file.file, f"{entry}.bbox", f"expected [x, y, width, height], but got {show(box)}")
        x, y, width, height = (finite(v, self.file.file, f"{entry}.bbox[{i}]") for i, v in enumerate(box))
        if crowd:
            if not mask:
                self.notes.append(f"left out: the box of a crowd of {label!r}, which holds several objects")
                self.incomplete.add(label)
            return
        if own.get("box") is False or (mask and self.file.no_boxes):
            return
        if width <= 0 and height <= 0 and "keypoints" in annotation:
            return  # tools that mark points write an empty box beside them
        self.marks.append(BoxMark(label, (y, x), (y + height, x + width), own.get("tight") is not False, entry))

    def _segmentation(self, value: Any, label: str, entry: str, crowd: bool) -> bool:
        """Take up polygons or runs; whether there are any."""
        source, entry_of = self.file.file, f"{entry}.segmentation"
        if value is None or value == []:
            return False
        if isinstance(value, dict):
            size = value.get("size")
            if not isinstance(size, list) or len(size) != 2:
                fail(source, f"{entry_of}.size", f"expected [height, width], but got {show(size)}")
            height, width = (whole_number(v, source, f"{entry_of}.size") for v in size)
            if self._size is None:
                self._size = self.file.images.shape(self.path)
            if (height, width) not in (tuple(self._size[-2:]), self.stated):
                fail(
                    source,
                    f"{entry_of}.size",
                    f"the mask has {height} rows and {width} columns, but the image {self.path.name} has the shape "
                    f"{self._size}",
                    "Was the image resized?",
                )
            runs = runs_of(value.get("counts"), height * width, str(source), entry_of)
            mask = partial(decode, runs, height, width)
            self.marks.append(RasterMask(label, mask, (0, 0), entry, crowd=crowd))
            return True
        if not isinstance(value, list):
            fail(source, entry_of, f"expected a list of polygons or run lengths, but got {show(value)}")
        if not isinstance(value[0], list):  # one polygon, without the list around it
            value = [value]
        for index, polygon in enumerate(value):  # each is filled: COCO joins them, holes are for run lengths
            if not isinstance(polygon, list):
                fail(source, f"{entry_of}[{index}]", f"expected x, y, x, y, ..., but got {show(polygon)}")
            ring = tuple((y, x) for x, y in points_of(polygon, source, f"{entry_of}[{index}]"))
            self.marks.append(Region(label, (ring,), None, entry, crowd))
        return True

    def _keypoints(self, value: Any, number: int, label: str, entry: str) -> bool:
        """Take up the keypoint of a category that has only one; whether there are keypoints at all."""
        source = self.file.file
        if value is None or value == []:
            return False
        if not isinstance(value, list) or len(value) % 3:
            fail(source, f"{entry}.keypoints", f"expected x, y, visibility, x, y, ..., but got {show(value)}")
        if max(self.file.keypoints[number], len(value) // 3) != 1:
            self.notes.append(
                f"left out: the keypoints of {label!r}, whose category has several (they are parts, not classes)"
            )
            return True
        x, y, seen = (finite(v, source, f"{entry}.keypoints[{i}]") for i, v in enumerate(value))
        if seen == 2:
            self.marks.append(PointMark(label, (point_centre(y), point_centre(x)), entry))
        elif seen == 1:
            self.notes.append(f"left out: keypoints of {label!r} marked as hidden, whose pixel shows something else")
            self.incomplete.add(label)
        elif seen != 0:
            fail(source, f"{entry}.keypoints[2]", f"expected a visibility of 0, 1 or 2, but got {seen:g}")
        return True

    def source_image(self) -> SourceImage:
        complete = self._claims()
        own = self._own(self.image, self.entry)
        name = stem_of(self.path)
        return SourceImage(
            file=self.path,
            name=name,
            marks=tuple(self.marks),
            source=f"{self.file.file.name}, {self.path.name}",
            expected_shape=self.stated,
            complete=complete,
            notes=tuple(self.notes),
            classes=tuple(self.file.names.values()),
            incomplete=tuple(sorted(self.incomplete)),
            drawn=self._names("drawn", own) if "drawn" in own else None,
            mask_labels=self._names("mask_labels", own) if "mask_labels" in own else None,
        )

    def _claims(self) -> dict[str, tuple[str, ...]]:
        """What the file says of whole classes: LVIS's lists, and those that nnunet_dsp export writes."""
        complete: dict[str, tuple[str, ...]] = {}
        if "neg_category_ids" in self.image or "not_exhaustive_category_ids" in self.image:
            absent = self._names("neg_category_ids", self.image)
            partly = self._names("not_exhaustive_category_ids", self.image)
            self.marks += [Tag(name, False, f"{self.entry}.neg_category_ids") for name in absent]
            boxed = {mark.label for mark in self.marks if isinstance(mark, BoxMark)}
            complete["boxes"] = tuple(sorted(boxed - set(partly)))
        own = self._own(self.image, self.entry)
        for key in ("boxes", "points"):
            if key in own:
                complete[key] = self._names(key, own)
        return complete

    def _names(self, key: str, item: Mapping[str, Any]) -> tuple[str, ...]:
        numbers = item.get(key) or []
        if not isinstance(numbers, list):
            fail(self.file.file, f"{self.entry}.{key}", f"expected a list of category ids, but got {show(numbers)}")
        return tuple(dict.fromkeys(self.file.category(n, f"{self.entry}.{key}")[1] for n in numbers))


def point_centre(t: float) -> float:
    """A keypoint's coordinate in centres: a whole number is the pixel itself, a fraction lies within pixel floor(t).

    COCO's own keypoints are indices of pixels; tools that let one click between write continuous coordinates, counted
    from the outer corner of the first pixel. Both lie in the pixel floor(t).
    """
    return t if float(t).is_integer() else t - 0.5
