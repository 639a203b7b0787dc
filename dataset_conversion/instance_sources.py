"""Which image belongs to which label image: files paired by name, or the cases of a raw nnU-Net dataset."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nnunet_dsp.dataset_conversion import raw_dataset

IMAGE_ENDINGS = (
    ".nii.gz", ".nii", ".nrrd", ".mha", ".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg", ".npy", ".h5", ".hdf5",
    ".hdf",
)  # fmt: skip
SUFFIXES = ("", "_label", "_labels", "_mask", "_masks", "_cp_masks", "_instances", "_seg", "_gt", "-labels", "-masks")
IMAGE_SUFFIXES = ("", "_image", "_img", "_raw", "-image")
LABEL_FOLDERS = ("labels", "masks", "label", "mask")
IMAGE_FOLDERS = ("images", "image", "raw")


class Source(NamedTuple):
    """One pair of files: an image (one file, or one for each channel) and its labels (None in a test set without)."""

    name: str
    images: tuple[Path, ...]
    label: Path | None


def _name(path: Path) -> str:
    ending = next(e for e in IMAGE_ENDINGS if path.name.lower().endswith(e))
    return path.name[: len(path.name) - len(ending)]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [
        f for f in sorted(path.iterdir())
        if f.is_file() and not f.name.startswith(".") and f.name.lower().endswith(IMAGE_ENDINGS)
    ]  # fmt: skip


def _strip(name: str, suffixes: Sequence[str]) -> str:
    fitting = [s for s in suffixes if s and name.lower().endswith(s) and len(name) > len(s)]
    return name[: len(name) - max(map(len, fitting))] if fitting else name


def pair_files(images: Path, labels: Path) -> list[Source]:
    """Images and their labels, by name.

    Raises:
        ValueError: an image without labels, labels without an image, or two of one name.
    """
    image_files, label_files = _files(images), _files(labels)
    if len(image_files) == len(label_files) == 1:
        return [Source(_clean(_strip(_name(image_files[0]), IMAGE_SUFFIXES)), (image_files[0],), label_files[0])]
    found: list[dict[str, Path]] = []
    for files, suffixes, where in ((image_files, IMAGE_SUFFIXES, images), (label_files, SUFFIXES, labels)):
        exact = {_name(f): f for f in files}
        stripped = {_strip(name, suffixes): f for name, f in exact.items()}
        if len(exact) != len(files):
            raise ValueError(f"{where} holds files that differ in their ending only. Keep one of each.")
        found.append(exact if len(stripped) != len(exact) else stripped)
    of_image, of_label = found
    if of_image.keys() != of_label.keys():  # names that end like a suffix by chance
        exact_images, exact_labels = ({_name(f): f for f in files} for files in (image_files, label_files))
        if exact_images.keys() == exact_labels.keys():
            of_image, of_label = exact_images, exact_labels
    without = sorted(of_image.keys() - of_label.keys())
    lonely = sorted(of_label.keys() - of_image.keys())
    if without or lonely or not of_image:
        raise ValueError(
            f"{images} and {labels}: expected a label image of the same name for each image (an ending such as _label, "
            f"_mask or _cp_masks may follow), but "
            + (f"{len(without)} image(s) have none: {', '.join(without[:5])}" if without else "")
            + ("; " if without and lonely else "")
            + (f"{len(lonely)} label image(s) have no image: {', '.join(lonely[:5])}" if lonely else "")
            + ("there is no image" if not of_image and not lonely else "")
            + "."
        )
    return [Source(_clean(name), (file,), of_label[name]) for name, file in sorted(of_image.items())]


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_\-]+", "_", name)


def _find(source: Path, given: str | None, folders: Iterable[str]) -> Path | None:
    if given is not None:
        path = source / given
        if not path.exists():
            raise FileNotFoundError(f"{source} holds no {given}.")
        return path
    return next((source / f for f in folders if (source / f).is_dir()), None)


def find_sources(args: argparse.Namespace) -> tuple[list[Source], list[Source]]:
    """Sources of the training and of the test set."""
    source = args.source
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder {source}.")
    train = source / "train" if args.images is None and (source / "train").is_dir() else source
    images = _find(train, args.images, IMAGE_FOLDERS)
    labels = _find(train, args.labels, LABEL_FOLDERS)
    if images is None or labels is None:
        raise FileNotFoundError(
            f"{source}: expected the folders images and labels (or masks) in it, or their paths with --images and "
            "--labels."
        )
    test_images = _find(source, args.test_images, [f"test{joint}{f}" for joint in "_/" for f in IMAGE_FOLDERS])
    test_labels = _find(source, args.test_labels, [f"test{joint}{f}" for joint in "_/" for f in LABEL_FOLDERS])
    test: list[Source] = []
    if test_images is not None and test_labels is not None:
        test = pair_files(test_images, test_labels)
    elif args.test_labels is not None:
        raise ValueError(f"--test-labels {args.test_labels}: there are no test images. Name them with --test-images.")
    elif test_images is not None:
        test = [Source(_clean(_strip(_name(f), IMAGE_SUFFIXES)), (f,), None) for f in _files(test_images)]
    return pair_files(images, labels), test


def nnunet_sources(source: Path) -> tuple[list[Source], list[Source], dict[str, Any]]:
    """Sources of a raw nnU-Net dataset, and its dataset.json."""
    dataset = raw_dataset.read_dataset(source)
    train = [Source(c.name, c.images, c.label) for c in dataset.cases.values()]
    test: dict[str, list[Path]] = {}
    if (source / "imagesTs").is_dir():
        for file in sorted((source / "imagesTs").iterdir()):
            match = re.fullmatch(r"(.+)_\d{4}" + re.escape(dataset.file_ending), file.name)
            if match:
                test.setdefault(match[1], []).append(file)
    found = []
    for name, files in test.items():
        label = source / "labelsTs" / f"{name}{dataset.file_ending}"
        found.append(Source(name, tuple(files), label if label.is_file() else None))
    return train, found, dataset.json


__all__ = ["Source", "find_sources", "nnunet_sources", "pair_files"]
