"""Stacks of sections that were published one file a section: pairing the files, and which sections train or test."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from nnunet_dsp.dataset_conversion.arguments import add_making_arguments


def add_section_arguments(parser: argparse.ArgumentParser) -> None:
    """--train-sections, --test-sections, --gap, and what every conversion has: --num-processes, --overwrite."""
    parser.add_argument(
        "--train-sections",
        metavar="N",
        type=int,
        nargs="+",
        help="numbers of the sections for imagesTr (default: all that are far enough from the test sections)",
    )
    parser.add_argument(
        "--test-sections",
        metavar="N",
        type=int,
        nargs="*",
        help="numbers of the sections for imagesTs and labelsTs (default: the last fifth)",
    )
    parser.add_argument(
        "--gap",
        metavar="SECTIONS",
        type=int,
        default=1,
        help="sections left out between training and test, and training and validation (default: %(default)s)",
    )
    add_making_arguments(parser)


def find_pairs(source: Path, image: tuple[str, str], label: tuple[str, str]) -> dict[int, tuple[Path, Path]]:
    """Image and label file of every section, by number; `image` and `label` are a folder in `source` and an ending.

    Raises:
        ValueError: a file name does not end in a number, or images and labels do not match one to one.
    """
    images, labels = (_by_number(source / folder, ending) for folder, ending in (image, label))
    if images.keys() != labels.keys() or not images:
        lonely = sorted(images.keys() ^ labels.keys())
        raise ValueError(
            f"{source}: expected one {'/*'.join(image)} and one {'/*'.join(label)} for every section, but got "
            f"{len(images)} and {len(labels)}" + (f"; sections {lonely} have only one of them." if lonely else ".")
        )
    return {n: (images[n], labels[n]) for n in sorted(images)}


def _by_number(folder: Path, ending: str) -> dict[int, Path]:
    files: dict[int, Path] = {}
    for file in sorted(folder.glob(f"*{ending}")):
        digits = re.search(r"([0-9]+)$", file.stem)
        if digits is None:
            raise ValueError(f"{file}: expected a file name that ends in the section's number, such as 07{ending}.")
        if int(digits[1]) in files:
            raise ValueError(f"{file} and {files[int(digits[1])].name} are both section {int(digits[1])}.")
        files[int(digits[1])] = file
    return files


def choose_sections(
    numbers: Sequence[int], train: Sequence[int] | None, test: Sequence[int] | None, gap: int
) -> tuple[list[int], list[int]]:
    """Section numbers for training and for test; those nearer than `gap` + 1 to a test section are in neither.

    Raises:
        ValueError: sections that do not exist, that are named for both, or for training within the gap.
    """
    if gap < 0:
        raise ValueError(f"Expected --gap of 0 or more, but got {gap}.")
    if test is None:
        test = sorted(numbers)[len(numbers) - round(len(numbers) / 5) :]
        test = [n for n in test if n not in set(train or ())]
    for option, named in (("--train-sections", train), ("--test-sections", test)):
        unknown = sorted(set(named or ()) - set(numbers))
        if unknown:
            raise ValueError(f"{option}: there is no section {unknown}; there are {min(numbers)} to {max(numbers)}.")
    free = [n for n in sorted(numbers) if all(abs(n - t) > gap for t in test)]
    if train is not None:
        near = sorted(set(train) - set(free))
        if near:
            raise ValueError(
                f"--train-sections: {near} lie within {gap} sections (--gap) of the test sections {sorted(test)}, and "
                "neighbours look alike. Name others, or say --gap 0 if they are not test sections themselves."
            )
        free = sorted(set(train))
    if not free:
        raise ValueError(f"No section is left for training with test sections {sorted(test)} and a gap of {gap}.")
    return free, sorted(set(test))
