"""nnU-Net's own integrity check, case by case, its words caught and kept as findings.

nnU-Net's verify_dataset_integrity() stops at the first thing it does not like and prints the rest; it is made of
verify_labels() and check_cases(), which are called here for one case at a time, on files that are read only once.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# where one of nnU-Net's printed messages ends and the next begins
_BEGINNING = re.compile(r"^(?=(?:error|warning|images contain|segmentation contains))", re.IGNORECASE | re.MULTILINE)


class ReadOnce:
    """A reader class and its instance in one: hands out nnU-Net's reading of each file, done once.

    nnU-Net's functions take the class and call it for an instance; calling this returns itself.
    """

    def __init__(self, reader_writer: Any) -> None:
        self._reader = reader_writer()
        self._images: dict[tuple[str, ...], tuple[npt.NDArray[Any], dict[str, Any]]] = {}
        self._masks: dict[str, tuple[npt.NDArray[Any], dict[str, Any]]] = {}

    def __call__(self) -> ReadOnce:
        return self

    def read_images(self, files: Sequence[str]) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        key = tuple(files)
        if key not in self._images:
            self._images[key] = self._reader.read_images(files)
        return self._images[key]

    def read_seg(self, file: str) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        if file not in self._masks:
            self._masks[file] = self._reader.read_seg(file)
        return self._masks[file]


class Verdict(NamedTuple):
    """What nnU-Net said about one case."""

    errors: list[str]
    warnings: list[str]


def check_case(
    images: Sequence[Path], label: Path | None, channels: int, expected_labels: Sequence[int], reader: ReadOnce
) -> Verdict:
    """Run nnU-Net's two checks on one case.

    Args:
        images: its image files.
        label: its label file; None: there is none yet, so only the images can be looked at.
        channels: how many dataset.json names.
        expected_labels: the values a mask may hold, the ignore label included.
        reader: what has read, or will read, the files.
    """
    from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels

    files = [str(image) for image in images]
    if label is None:
        read, _ = reader.read_images(files)
        errors = []
        if np.isnan(read).any():
            errors.append("Images contain NaN pixel values. Replace them by something that makes sense.")
        if len(read) != channels:
            errors.append(f"Unexpected number of modalities. Expected: {channels}. Got: {len(read)}.")
        return Verdict(errors, [])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        good = verify_labels(str(label), reader, list(expected_labels))
        good &= check_cases(files, str(label), channels, reader)
    verdict = Verdict([], [])
    for message in messages(printed.getvalue(), images[0].parent.parent):
        warning = message.lower().startswith("warning")
        (verdict.warnings if warning else verdict.errors).append(message)
    if not good and not verdict.errors:
        verdict.errors.append("nnU-Net refuses this case and does not say why.")
    return verdict


def messages(printed: str, folder: Path) -> list[str]:
    """nnU-Net's printed messages, one string each: on one line, paths short, without "Error:" in front."""
    parts = [" ".join(part.split()) for part in _BEGINNING.split(printed)]
    short = [part.replace(f"{folder}/", "") for part in parts if part]
    return [re.sub(r"^error[:!]\s*", "", part, flags=re.IGNORECASE) for part in short]
