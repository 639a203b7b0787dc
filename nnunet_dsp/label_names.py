"""The classes of a dataset, as dataset.json names and numbers them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nnunet_dsp.annotation_errors import AnnotationError, did_you_mean, show, whole

BACKGROUND = "background"  # nnU-Net insists on these two names
IGNORE = "ignore"


@dataclass(frozen=True)
class LabelNames:
    """The classes of a dataset, as dataset.json's "labels" gives them.

    Attributes:
        names: all classes but "ignore", background first, in the order of their numbers (regions last).
        values: the number of each name in masks; None for a region, which has no single one.
        ignore_label: value of voxels nobody annotated; None if the dataset has none.
    """

    names: tuple[str, ...]
    values: tuple[int | None, ...]
    ignore_label: int | None = None
    _value_of: dict[str, int | None] = field(init=False, repr=False, compare=False)
    _name_of: dict[int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pairs = list(zip(self.names, self.values, strict=True))
        object.__setattr__(self, "_value_of", dict(pairs))
        object.__setattr__(self, "_name_of", {value: name for name, value in pairs if value is not None})

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any]) -> LabelNames:
        """From a parsed dataset.json, or from its "labels" alone.

        Raises:
            AnnotationError: no labels, labels nnU-Net would not take (background not 0, gaps, two names for one
                number, ignore not the highest), or labels written the nnU-Net v1 way round.
        """
        labels = dataset_json.get("labels", dataset_json)
        if "labels" not in dataset_json and ("channel_names" in dataset_json or "numTraining" in dataset_json):
            raise AnnotationError('dataset.json: it lacks "labels". Add the classes: {"background": 0, ...}.')
        if not isinstance(labels, Mapping):
            raise AnnotationError(
                f"dataset.json: labels must be an object of names and numbers, but got {show(labels)}."
            )
        values: dict[str, int | None] = {}
        for name, value in labels.items():
            if isinstance(value, str) and str(name).isdigit():
                raise AnnotationError(
                    f'dataset.json: labels must map names to numbers ("{value}": {name}), as nnU-Net v2 has them, but '
                    f'got "{name}": "{value}", as in nnU-Net v1. Swap them (nnUNetv2_convert_old_nnUNet_dataset).'
                )
            parts = [whole(part) for part in value] if isinstance(value, (list, tuple)) else [whole(value)]
            if not parts or any(part is None or part < 0 for part in parts):
                raise AnnotationError(
                    f"dataset.json: label {name!r} must be a whole number from 0 or a list of them, but got "
                    f"{show(value)}."
                )
            values[str(name)] = parts[0] if len(set(parts)) == 1 else None
        ignore = values.pop(IGNORE, None)
        if IGNORE in labels and ignore is None:
            raise AnnotationError(f"dataset.json: label 'ignore' must be one number, but got {show(labels[IGNORE])}.")
        if values.get(BACKGROUND, -1) != 0:
            got = f"but got {show(labels[BACKGROUND])}" if BACKGROUND in labels else "but it is missing"
            raise AnnotationError(f"dataset.json: labels must hold 'background' with the number 0, {got}.")
        plain = sorted((value, name) for name, value in values.items() if value is not None)
        regions = [name for name, value in values.items() if value is None]
        numbers = [value for value, _ in plain]
        if len(set(numbers)) != len(numbers) or (not regions and numbers != list(range(len(numbers)))):
            raise AnnotationError(
                f"dataset.json: labels must be numbered 0, 1, 2, ... without gaps or repeats, but got {numbers}."
            )
        if ignore is not None and not regions and ignore != len(numbers):
            raise AnnotationError(
                f"dataset.json: label 'ignore' must be the highest label ({len(numbers)}), but got {ignore}."
            )
        return cls(
            names=(*(name for _, name in plain), *regions),
            values=(*numbers, *(None for _ in regions)),
            ignore_label=ignore,
        )

    @property
    def has_regions(self) -> bool:
        """Whether a name stands for several labels, as in nnU-Net's region-based training."""
        return None in self.values

    def index(self, label: str | int) -> int:
        """The number that stands for a class in masks, from its name or number.

        Raises:
            AnnotationError: no such class, the ignore label, or a region.
        """
        number = whole(label)
        if number is not None:
            self.name(number)
            return number
        if label == IGNORE:
            raise AnnotationError(ignore_message(label))
        if not isinstance(label, str) or label not in self._value_of:
            hint = ""
            if isinstance(label, str) and label.isdecimal():
                hint = f" Numbers are written without quotes: {label[:20]}."
            elif isinstance(label, str):
                hint = did_you_mean(label, self.names)
            raise AnnotationError(f"unknown label {show(label)}, expected one of {self._known()}.{hint}")
        value = self._value_of[label]
        if value is None:
            raise AnnotationError(
                f"label {label!r} is a region (several labels in dataset.json), which cannot be annotated. "
                "Use a dataset without regions."
            )
        return value

    def name(self, number: int) -> str:
        """The class that a number stands for.

        Raises:
            AnnotationError: no such class, or the ignore label.
        """
        if number == self.ignore_label:
            raise AnnotationError(ignore_message(number))
        if isinstance(number, bool) or number not in self._name_of:
            raise AnnotationError(f"unknown label {show(number)}, expected one of {self._known()}.")
        return self._name_of[number]

    def _known(self) -> str:
        known = [
            repr(name) if value is None else f"{name!r} ({value})"
            for name, value in zip(self.names, self.values, strict=True)
        ]
        return ", ".join(known[:30]) + (f" and {len(known) - 30} more" if len(known) > 30 else "")


def ignore_message(label: Any) -> str:
    """What is said to someone who annotates "ignore"."""
    return (
        f"label {show(label)} is nnU-Net's ignore label, which means that nobody looked; it cannot be annotated. "
        "Leave the entry out."
    )
