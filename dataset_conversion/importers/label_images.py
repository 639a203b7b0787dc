"""Label images: masks, partly drawn masks and scribbles, as PNG, TIFF, BMP, NIfTI, NRRD or MHA.

SRC is the folder of the label images, called like their images (scan7.png, or scan7_mask.png and the like), or the
folder above it and the images'. What each value or colour stands for is said with --values, or known from the dataset
with --add.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_dsp.annotation_errors import listed
from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.image_files import ENDINGS, ImageFolder, stem_of
from nnunet_dsp.dataset_conversion.image_store import (
    ITK_ENDINGS,
    JPEG_ENDINGS,
    TIFF_ENDINGS,
    probe,
    read_picture,
    read_volume,
)
from nnunet_dsp.dataset_conversion.imported import RasterMask, SourceImage, fail
from nnunet_dsp.dataset_conversion.importers._pairing import annotation_files
from nnunet_dsp.label_names import BACKGROUND, IGNORE

NAME = "labels"
HELP = "label images: masks, partial masks, scribbles, colour maps"
EXAMPLE = "nnunet_dsp import labels masks/ --images images/ -d 510 --values 0=background,255=cell"

SUFFIXES = (
    "mask",
    "masks",
    "label",
    "labels",
    "seg",
    "segmentation",
    "annotation",
    "gt",
    "scribble",
    "scribbles",
    "lbl",
)
LABEL_FOLDERS = (*SUFFIXES, "annotations", "labelstr", "groundtruth", "ground_truth", "manual", "truth")
IMAGE_FOLDERS = ("images", "image", "imagestr", "img", "imgs", "raw", "data")
UNLABELLED = ("unlabelled", "unlabeled", "unannotated", IGNORE)
MAX_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--values",
        metavar="V=CLASS,...",
        help="what the values stand for: 1=cell,2=nucleus; a range of instance numbers: 1-65535=cell; a colour: "
        "#FF0000=cell; what nobody drew on: 255=unlabelled. 0 is background unless said. Or a file, a line for each",
    )
    parser.add_argument(
        "--mask-suffix",
        metavar="TEXT",
        help="what label images have behind their image's name (default: _mask and the like)",
    )


@dataclass(frozen=True)
class Table:
    """What values and colours stand for: ranges (first, last, name), and colours as 0xRRGGBB."""

    ranges: tuple[tuple[int, int, str], ...]
    colours: Mapping[int, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Every class named, in order, without background and what means unlabelled."""
        names = [name for *_, name in self.ranges] + list(self.colours.values())
        return tuple(n for n in dict.fromkeys(names) if n != BACKGROUND and n not in UNLABELLED)


def read(src: Path, args: argparse.Namespace, images: ImageFolder) -> Iterator[SourceImage]:
    """Every image that has a label image.

    Raises:
        AnnotationError: no table of values, a label image without image, or values that the table does not hold.
    """
    folder, root = _folders(src, args, images)
    table = _table(args)
    found = False
    for file in annotation_files(folder, ENDINGS, "label image"):
        if src.is_dir() and root == folder and not _suffix(file, args.mask_suffix):
            continue  # an image, in one folder with its label image
        image = _image_of(file, folder, args.mask_suffix, images)
        if image is None:
            continue
        found = True
        images.label_images.add(file.resolve())
        if table is None:
            raise _unsaid_values(file)
        numbers = {name: number for number, name in enumerate((BACKGROUND, *table.names))}
        shape = probe(file).shape
        unsaid = {probe(image).turned_shape} if args.exif is None else set()  # the label image shows how it is meant
        if shape not in {images.shape(image), *unsaid}:
            fail(
                file,
                "",
                f"the label image has the shape {shape}, but its image {image.name} has {images.shape(image)}",
                "Was one of them resized?",
            )
        _check_place(file, image, images)
        mask = RasterMask(
            None,
            partial(read_label_image, file, table, numbers),
            (0,) * len(shape),
            "",
            names={number: name for name, number in numbers.items()},
        )
        yield SourceImage(
            file=image,
            name=stem_of(image),
            marks=(mask,),
            source=file.name,
            expected_shape=shape,
            classes=table.names,
        )
    if not found:
        fail(src, "", f"no label image belongs to an image of {images.root}", "Name the images' folder: --images DIR.")


def _folders(src: Path, args: argparse.Namespace, images: ImageFolder) -> tuple[Path, Path]:
    """The folder of the label images and that of the images."""
    if args.images is not None or src.is_file():
        return src, images.root
    below = sorted(p for p in src.iterdir() if p.is_dir() and not p.name.startswith("."))
    labels = [p for p in below if p.name.lower() in LABEL_FOLDERS]
    pictures = [p for p in below if p.name.lower() in IMAGE_FOLDERS]
    if len(labels) == 1 and len(pictures) == 1:
        images.root = pictures[0]
        return labels[0], pictures[0]
    if any(_suffix(path, args.mask_suffix) for path in images.files()):
        return src, src
    fail(
        src,
        "",
        "it does not show which files are images and which label images",
        "Name the images' folder: --images DIR.",
    )


def _suffix(file: Path, stated: str | None) -> str:
    """What a label image has behind the name of its image, "" for nothing."""
    stem = stem_of(file)
    if stated is not None:
        return stated if stem.endswith(stated) and len(stem) > len(stated) else ""
    match = re.search(rf"[_\-. ]({'|'.join(SUFFIXES)})$", stem, re.IGNORECASE)
    return match[0] if match and match.start() else ""


def _image_of(file: Path, folder: Path, suffix: str | None, images: ImageFolder) -> Path | None:
    relative = file.parent.relative_to(folder) if folder.is_dir() else Path()
    stem = stem_of(file)
    behind = _suffix(file, suffix)
    wishes = [stem[: -len(behind)]] if behind else []
    wishes += [] if behind and suffix is not None else [stem]
    error: AnnotationError | None = None
    for wish in wishes:
        for name in (wish, f"{wish}_0000"):
            try:
                image = images.find(str(relative / name), file, "", images.root / relative)
            except AnnotationError as problem:
                error = error or problem
                continue
            if image.resolve() != file.resolve():
                return image
    if error is not None:
        raise error
    return None


def _check_place(file: Path, image: Path, images: ImageFolder) -> None:
    """Refuse a label volume that lies elsewhere in the world than its image: flipped, shifted or scaled."""
    if not (file.name.lower().endswith(ITK_ENDINGS) and image.name.lower().endswith(ITK_ENDINGS)):
        return
    one, two = images.read_geometry(file), images.read_geometry(image)
    tolerance = 1e-3 * max(two.spacing)
    same = (
        np.allclose(one.spacing, two.spacing, rtol=1e-3, atol=0)
        and np.allclose(one.origin, two.origin, rtol=0, atol=max(tolerance, 1e-2 * min(two.spacing)))
        and np.allclose(one.direction, two.direction, rtol=0, atol=1e-3)
    )
    if not same:
        fail(
            file,
            "",
            f"it lies elsewhere in the world than {image.name}: origin {_round(one.origin)} and {_round(two.origin)}, "
            f"spacing {_round(one.spacing)} and {_round(two.spacing)}, or another direction",
            "Resample it to the image's grid.",
        )


def _round(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)


def _table(args: argparse.Namespace) -> Table | None:
    """The table of --values; with --add that of the dataset; None where there is neither."""
    if args.values is not None:
        return parse_values(args.values)
    if not args.add:
        return None
    dataset = raw_dataset.read_dataset(args.dataset)
    ranges = [(value, value, name) for name, value in dataset.labels.items()]
    if dataset.ignore_label is not None:
        ranges.append((dataset.ignore_label, dataset.ignore_label, IGNORE))
    return Table(tuple(ranges), {})


def parse_values(text: str) -> Table:
    """A table from "1=cell,2-9=nucleus,#FF0000=vessel,255=unlabelled", or from a file with a line for each.

    Raises:
        AnnotationError: no such table, or two classes for one value.
    """
    if "=" not in text:
        from nnunet_dsp.dataset_conversion.imported import text_of

        path = Path(text)
        if not path.is_file():
            raise AnnotationError(
                f"--values: expected VALUE=CLASS,VALUE=CLASS or a file with lines of them, but got {text!r}."
            )
        if path.name == "dataset.json":
            labels = raw_dataset.read_json(path).get("labels")
            pairs = [f"{v}={k}" for k, v in labels.items()] if isinstance(labels, dict) else []
        else:
            lines = (line.strip() for line in text_of(path, 1 << 24).split("\n"))
            pairs = [line for line in lines if line and not re.match(r"#(?![0-9a-fA-F]{6}\s*[=,;\t])", line)]
    else:
        pairs = [pair for pair in text.split(",") if pair.strip()]
    ranges: list[tuple[int, int, str]] = []
    colours: dict[int, str] = {}
    for pair in pairs:
        match = re.fullmatch(r"\s*(#[0-9a-fA-F]{6}|\d{1,9}(?:\s*-\s*\d{1,9})?)\s*[=,;\t]\s*(.*\S)\s*", pair)
        if match is None:
            raise AnnotationError(
                f"--values: expected VALUE=CLASS, FIRST-LAST=CLASS or #RRGGBB=CLASS, but got {pair.strip()[:60]!r}."
            )
        key, name = match[1], match[2]
        name = BACKGROUND if name.lower() == BACKGROUND else name
        name = IGNORE if name.lower() in UNLABELLED else name
        if key.startswith("#"):
            if colours.setdefault(int(key[1:], 16), name) != name:
                raise AnnotationError(f"--values: the colour {key} has two classes.")
            continue
        first, _, last = key.partition("-")
        ranges.append((int(first), int(last or first), name))
    for index, (first, last, name) in enumerate(ranges):
        if last < first or any(a <= last and first <= b and n != name for a, b, n in ranges[:index]):
            raise AnnotationError(f"--values: {first}-{last} is no range, or one of its values has two classes.")
    if not ranges and not colours:
        raise AnnotationError("--values: it is empty.")
    if not colours and not any(a <= 0 <= b for a, b, _ in ranges):
        ranges.insert(0, (0, 0, BACKGROUND))
    if colours:
        colours.setdefault(0, BACKGROUND)
    return Table(tuple(ranges), colours)


def _unsaid_values(file: Path) -> AnnotationError:
    """What is said where nobody says what the values of label images mean; it shows those of the first."""
    array = _voxels(file, False)
    if array.ndim > len(probe(file).shape):
        values = [f"#{int(v):06X}" for v in np.unique(_packed(array))[:MAX_SHOWN]]
    else:
        values = [f"{v:g}" for v in np.unique(array)[:MAX_SHOWN].tolist()]
    example = ",".join(f"{v}={'background' if v in ('0', '#000000') else 'cell'}" for v in values[:2])
    shown = ", ".join(values) + (", ..." if len(values) == MAX_SHOWN else "")
    return AnnotationError(f"{file}: nothing says what its values stand for: {shown}. Say it: --values {example}")


def read_label_image(file: Path, table: Table, numbers: Mapping[str, int]) -> npt.NDArray[Any]:
    """A label image as numbers of classes, int32; -1 where nobody drew.

    Raises:
        AnnotationError: it cannot be read, or holds values that the table does not.
    """
    array = _voxels(file, bool(table.colours))
    if table.colours:
        lookup: Mapping[int, str] = table.colours
        array = _packed(array)
    elif array.ndim > len(probe(file).shape):
        if not (array == array[..., :1]).all():
            fail(file, "", "it is a colour image, and --values names no colours", "Say them: --values #FF0000=cell,...")
        array = array[..., 0]
    whole = array.astype(np.int64)
    if array.dtype.kind == "f" and not np.array_equal(whole, array):
        fail(file, "", "it holds values that are not whole numbers", "Was it resampled with interpolation?")
    values, inverse, counts = np.unique(whole, return_inverse=True, return_counts=True)
    codes = np.full(len(values), -1, np.int32)
    unknown = []
    for index, value in enumerate(values.tolist()):
        if table.colours:
            name = lookup.get(value)
        else:
            name = next((n for a, b, n in table.ranges if a <= value <= b), None)
        if name is None:
            unknown.append(f"#{value:06X} ({counts[index]})" if table.colours else f"{value} ({counts[index]})")
        elif name not in UNLABELLED:
            codes[index] = numbers[name]
    if unknown:
        hint = "Name every value: --values V=CLASS,..., V=unlabelled for what nobody drew on."
        if len(unknown) > 2 * len(values) / 3 and len(values) > 10:
            hint += " Or was it saved as JPEG, resized with smooth edges, or is it the image?"
        fail(
            file,
            "",
            f"{len(unknown)} of its values have no class (voxels): {', '.join(unknown[:MAX_SHOWN])}"
            f"{', ...' if len(unknown) > MAX_SHOWN else ''}; known are {listed(sorted(set(numbers)))}",
            hint,
        )
    return codes[inverse].reshape(whole.shape)


def _voxels(file: Path, colours: bool) -> npt.NDArray[Any]:
    """The voxels of a label image; of one with a palette the indices, unless colours are wanted."""
    name = file.name.lower()
    info = probe(file)
    try:
        if name.endswith(ITK_ENDINGS):
            return read_volume(file, info)
        if name.endswith(TIFF_ENDINGS):
            return read_picture(file, None, info)
        from PIL import Image

        if name.endswith(JPEG_ENDINGS):
            fail(file, "", "JPEG changes the values of a label image", "Save label images as PNG or TIFF.")
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")
            if colours or image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
                image = image.convert("RGB")
            return np.asarray(image)
    except AnnotationError:
        raise
    except Exception as error:
        fail(file, "", f"the label image cannot be read: {str(error)[:200] or type(error).__name__}")


def _packed(array: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Colours (y, x, 3) as 0xRRGGBB; grey counts as equal red, green and blue."""
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    red, green, blue = (array[..., c].astype(np.int64) for c in range(3))
    return (red << 16) | (green << 8) | blue
