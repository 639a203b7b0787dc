"""The dataset that a benchmark starts from: which cases train, which are evaluated, what its masks show."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nnunet_dsp.benchmark.accuracy.pretraining import PretrainingFacts
from nnunet_dsp.benchmark.accuracy.workplace import checksum
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.raw_dataset import RawCase, RawDataset
from nnunet_dsp.dataset_conversion.simulate import net_like_classes
from nnunet_dsp.dataset_conversion.splits import SPLITS_FILE, read_splits
from nnunet_dsp.dataset_conversion.weak_labels import (
    WeakOptions,
    annotate,
    box_coverage,
    check_rectangle,
    find_objects,
)

RESERVED = "mean"  # beside the classes in every record


class Split(NamedTuple):
    """Cases trained on, and cases evaluated on. `evaluation` is None where imagesTs and labelsTs are taken."""

    training: tuple[str, ...]
    evaluation: tuple[str, ...] | None
    how: str


def choose_cases(source: RawDataset, fixed: Mapping[str, Any]) -> Split:
    """Who trains and who is evaluated on.

    The test cases are those of imagesTs and labelsTs, or else held out of the training cases; to evaluate on
    validation cases, these are held out of the rest, and the test cases are not touched.

    Args:
        fixed: the configuration: evaluate_on, {test,val}_{cases,fold,share}, split_seed, group.

    Raises:
        ValueError: cases that do not exist, or too few to train on.
    """
    cases = tuple(source.cases)
    own_test = all(any((source.folder / part).glob("*")) for part in ("imagesTs", "labelsTs"))
    asked = any(fixed[f"test_{key}"] is not None for key in ("cases", "fold", "share"))
    notes = []
    test: tuple[str, ...] | None = None
    if not own_test or asked:
        cases, test, how = _hold_out(source, cases, "test", fixed)
        notes.append(how)
    else:
        notes.append("test cases: imagesTs and labelsTs")
    if fixed["evaluate_on"] == "val":
        cases, validation, how = _hold_out(source, cases, "val", fixed)
        return Split(cases, validation, f"{how}; {notes[0]}, not touched")
    return Split(cases, test, notes[0])


def _hold_out(
    source: RawDataset, cases: tuple[str, ...], part: str, fixed: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    named, fold, share = (fixed[f"{part}_{key}"] for key in ("cases", "fold", "share"))
    if sum(value is not None for value in (named, fold, share)) > 1:
        raise ValueError(f"Give one of --{part}-cases, --{part}-fold and --{part}-share.")
    file = source.folder / SPLITS_FILE
    what = {"test": "test cases", "val": "validation cases"}[part]
    if named is not None:
        unknown = sorted(set(named) - set(cases))
        if unknown:
            raise ValueError(f"--{part}-cases: there is no training case {', '.join(unknown[:10])} to hold out.")
        out, kept, how = set(named), None, f"{what}: as named"
    elif fold is not None or (share is None and file.is_file()):
        if not file.is_file():
            raise ValueError(f"--{part}-fold: there is no {file}.")
        splits = read_splits(file, source.cases)
        if fold is None:  # of the validation folds the first that the test cases leave
            fold = next((number for number, split in enumerate(splits) if set(split["val"]) & set(cases)), 0)
        if not 0 <= fold < len(splits):
            raise ValueError(f"--{part}-fold: expected 0 to {len(splits) - 1}, the folds of {file}, but got {fold}.")
        out, kept = set(splits[fold]["val"]) & set(cases), set(splits[fold]["train"])
        how = f"{what}: validation cases of fold {fold} of {SPLITS_FILE}"
    else:
        share = 0.2 if share is None else share
        out, kept = _random_share(cases, share, fixed, part), None
        how = f"{what}: {share:.0%} of the training cases, seed {fixed['split_seed']}"
    held_out = tuple(case for case in cases if case in out)
    left = tuple(case for case in cases if case not in out and (kept is None or case in kept))
    if not held_out or not left:
        raise ValueError(
            f"Of {len(cases)} training cases, {len(left)} would be left to train on and {len(held_out)} to evaluate "
            f"on. Choose the {what} by --{part}-cases, --{part}-fold or --{part}-share."
        )
    return left, held_out, how


def _random_share(cases: Sequence[str], share: float, fixed: Mapping[str, Any], part: str) -> set[str]:
    if not 0 < share < 1:
        raise ValueError(f"--{part}-share: expected a number between 0 and 1, but got {share}.")
    members: dict[str, list[str]] = {}
    for case, group in group_cases(cases, fixed["group"]).items():
        members.setdefault(group, []).append(case)
    names = sorted(members)
    random = np.random.default_rng([fixed["split_seed"], {"test": 0, "val": 1}[part]])
    out: set[str] = set()
    for index in random.permutation(len(names)):
        if len(out) >= max(1, round(share * len(cases))):
            break
        out |= set(members[names[index]])
    return out


def group_cases(cases: Iterable[str], pattern: str | None) -> dict[str, str]:
    """By case what `pattern` finds in its name (its first group, where it has one); without a pattern, its name.

    Raises:
        ValueError: a case in whose name it finds nothing.
    """
    if pattern is None:
        return {case: case for case in cases}
    found: dict[str, str] = {}
    for case in cases:
        match = re.search(pattern, case)
        if match is None:
            raise ValueError(f"--group: {pattern!r} finds nothing in the case name {case!r}.")
        found[case] = match.group(1) if match.groups() else match.group(0)
    return found


class _SurveyJob(NamedTuple):
    case: RawCase
    reader_writer: Any
    labels: dict[str, int]
    ignore: int | None
    channels: int


def _survey_case(job: _SurveyJob) -> tuple[str, dict[str, int], dict[str, float], bool, int]:
    """Case, objects by class shown, share of the image in boxes by class, whether every voxel is annotated, axes."""
    mask, _ = raw_dataset.read_label(job.reader_writer, job.case.label)
    flat = mask[0] if mask.shape[0] == 1 else mask
    values = _values(job.case.label, flat, job.labels, job.ignore)
    names = tuple(name for name in job.labels if name != "background")
    objects: dict[str, int] = {}
    for item in find_objects(flat, job.labels, names):
        objects[item.label] = objects.get(item.label, 0) + 1
    options = WeakOptions(box_classes=names)
    coverage = box_coverage(annotate(flat, job.labels, ("boxes",), options, (0,)))
    return job.case.name, objects, coverage, job.ignore is None or job.ignore not in values, flat.ndim


def _values(file: Path, mask: np.ndarray, labels: Mapping[str, int], ignore: int | None) -> set[int]:
    """Values of a mask; ValueError where one is no label."""
    values = set(np.unique(mask).tolist())
    unknown = sorted(values - set(labels.values()) - {ignore})
    if unknown:
        raise ValueError(f"{file}: value(s) {unknown} are no label of dataset.json, which has {labels}.")
    return values


def read_evaluation_case(case: RawCase, reader_writer: Any, channels: int) -> np.ndarray:
    """The label of an evaluation case, whose images must fit it and dataset.json.

    Args:
        case: of its images the first is read; the others are taken to have as many channels.
        reader_writer: class of nnU-Net that reads the files.
        channels: how many dataset.json names.

    Returns:
        (Z, Y, X) label values, Z 1 for a 2D image.

    Raises:
        ValueError: images of other channels than dataset.json names, or a label of another shape than its image.
    """
    label, _ = raw_dataset.read_label(reader_writer, case.label)
    image, _ = reader_writer().read_images([str(case.images[0])])
    found = image.shape[0] * len(case.images)
    if found != channels:
        raise ValueError(
            f"{case.name}: expected the {channels} channel(s) that dataset.json names, but got {found} from "
            f"{', '.join(map(str, case.images))}."
        )
    if image.shape[1:] != label.shape:
        raise ValueError(
            f"{case.label}: expected a label of the shape of its image, {image.shape[1:]}, but got {label.shape}."
        )
    return label


def _check_evaluation_case(job: _SurveyJob) -> None:
    """Refuse what nnU-Net's evaluation would stumble over, once all is trained."""
    label = read_evaluation_case(job.case, job.reader_writer, job.channels)
    _values(job.case.label, label, job.labels, job.ignore)


@dataclass(frozen=True)
class SourceFacts:
    """What source.json holds.

    Attributes:
        name: of the source dataset.
        folder: where it was.
        training, evaluation: cases. The latter lie in nnUNet_raw/Dataset001*/imagesTs of DIR.
        how: how they were chosen.
        labels: value by class, background first, without ignore.
        ignore: the source's ignore label.
        objects: connected components by case and class; classes not shown are left out.
        not_boxed: classes that are like a net, whose boxes would say nothing.
        checksums: SHA-256 by file, relative to the source folder.
        groups: what --group finds in the names of the training cases; empty without it.
    """

    name: str
    folder: str
    training: tuple[str, ...]
    evaluation: tuple[str, ...]
    how: str
    labels: dict[str, int]
    ignore: int | None
    file_ending: str
    objects: dict[str, dict[str, int]]
    not_boxed: tuple[str, ...]
    checksums: dict[str, str]
    groups: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> SourceFacts:
        content = raw_dataset.read_json(file)
        for key in ("training", "evaluation", "not_boxed"):
            content[key] = tuple(content[key])
        return cls(**content)

    @property
    def shown(self) -> dict[str, set[str]]:
        """Classes that each training case shows."""
        return {case: set(self.objects[case]) for case in self.training}

    @property
    def foreground(self) -> tuple[str, ...]:
        return tuple(name for name in self.labels if name != "background")

    def weak_options(self, fixed: Mapping[str, Any]) -> WeakOptions:
        """How the simulated annotator works."""
        boxed = tuple(name for name in self.foreground if name not in self.not_boxed)
        if fixed["box_classes"] is not None:
            unknown = sorted(set(fixed["box_classes"]) - set(self.foreground))
            if unknown:
                raise ValueError(
                    f"--box-classes: unknown class(es) {', '.join(unknown)}. The dataset has "
                    f"{', '.join(self.foreground)}."
                )
            boxed = tuple(name for name in self.foreground if name in fixed["box_classes"])
        return WeakOptions(
            share=fixed["share"],
            points_per_object=fixed["points_per_object"],
            loosen=fixed["loosen"],
            min_size=fixed["min_size"],
            tag_classes=self.foreground,
            point_classes=self.foreground,
            box_classes=boxed,
            scribble_classes=tuple(self.labels),
            rectangle=tuple(fixed["rectangle"]),
        )

    def boxes_exclude(self, fixed: Mapping[str, Any]) -> bool:
        """Whether outside all boxes is background: every foreground class is boxed, every object of it."""
        options = self.weak_options(fixed)
        return set(options.box_classes) == set(self.foreground) and options.share >= 1


def survey(
    source: RawDataset, fixed: Mapping[str, Any], processes: int, *, with_checksums: bool = True
) -> tuple[SourceFacts, dict[str, Any]]:
    """Look at every file once.

    Returns:
        The facts, and for each evaluation case its image files and label file.

    Raises:
        ValueError: masks that are missing or not complete; test cases without a mask that fits; a --rectangle of
            other axes; a class called as the mean is.
    """
    labels = source.labels
    if RESERVED in labels:
        raise ValueError(
            f"{source.folder / 'dataset.json'}: a class is called {RESERVED!r}, as records and tables call the mean "
            "over classes. Give it another name."
        )
    split = choose_cases(source, fixed)
    missing = [case.name for case in source.cases.values() if not case.label.is_file()]
    if missing:
        raise ValueError(
            f"{source.folder}: the benchmark needs a mask for every training case, but {len(missing)} have none: "
            f"{', '.join(missing[:10])}."
        )
    evaluation = _evaluation_files(source, split)
    reader_writer = source.reader_writer()
    about = (reader_writer, labels, source.ignore_label, len(source.json["channel_names"]))
    jobs = [_SurveyJob(source.cases[name], *about) for name in split.training]
    objects: dict[str, dict[str, int]] = {}
    coverages = []
    partly = []
    for name, found, coverage, whole, axes in map_cases(
        _survey_case, jobs, processes=processes, description="Reading masks"
    ):
        check_rectangle(fixed["rectangle"], axes)
        objects[name] = found
        coverages.append(coverage)
        if not whole:
            partly.append(name)
    if partly:
        raise ValueError(
            f"{source.folder}: {len(partly)} training cases have voxels labelled 'ignore', so what they show is not "
            f"known: {', '.join(partly[:10])}. The benchmark takes annotations away from full masks."
        )
    jobs = [_SurveyJob(RawCase(name, images, label), *about) for name, (images, label) in evaluation.items()]
    for _ in map_cases(_check_evaluation_case, jobs, processes=processes, description="Reading evaluation cases"):
        pass
    facts = SourceFacts(
        name=source.folder.name,
        folder=str(source.folder.resolve()),
        training=split.training,
        evaluation=tuple(evaluation),
        how=split.how,
        labels=labels,
        ignore=source.ignore_label,
        file_ending=source.file_ending,
        objects=objects,
        not_boxed=tuple(net_like_classes(coverages)),
        checksums=checksums_of(source, split, evaluation) if with_checksums else {},
        groups={} if fixed["group"] is None else group_cases(split.training, fixed["group"]),
    )
    return facts, evaluation


def evaluation_files(source: RawDataset, fixed: Mapping[str, Any]) -> dict[str, tuple[tuple[Path, ...], Path]]:
    """Images and label of each evaluation case."""
    return _evaluation_files(source, choose_cases(source, fixed))


def _evaluation_files(source: RawDataset, split: Split) -> dict[str, tuple[tuple[Path, ...], Path]]:
    if split.evaluation is not None:
        return {name: (source.cases[name].images, source.cases[name].label) for name in split.evaluation}
    ending = source.file_ending
    images: dict[str, list[Path]] = {}
    for file in sorted((source.folder / "imagesTs").iterdir()):
        match = re.fullmatch(r"(.+)_\d{4}" + re.escape(ending), file.name)
        if match and file.is_file():
            images.setdefault(match[1], []).append(file)
    labels = {name: source.folder / "labelsTs" / f"{name}{ending}" for name in images}
    without = [name for name, label in labels.items() if not label.is_file()]
    if without or not images:
        raise ValueError(
            f"{source.folder / 'labelsTs'}: expected a mask for each image of imagesTs, but {len(without)} of "
            f"{len(images)} have none: {', '.join(without[:10])}. Or hold test cases out of the training cases "
            "(--test-cases, --test-fold, --test-share)."
        )
    return {name: (tuple(files), labels[name]) for name, files in images.items()}


def checksums_of(source: RawDataset, split: Split, evaluation: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of dataset.json and of every image and label used, by path relative to the source folder."""
    files = {source.folder / "dataset.json"}
    for name in split.training:
        files |= {*source.cases[name].images, source.cases[name].label}
    for images, label in evaluation.values():
        files |= {*images, label}
    bar = tqdm(sorted(files), desc="Checksums")
    return {os.path.relpath(file, source.folder): checksum(file) for file in bar}


def verify_source(facts: SourceFacts | PretrainingFacts, source: RawDataset) -> None:
    """Stop where a dataset has changed since the benchmark began.

    Raises:
        ValueError: a file that differs, by name.
    """
    for name, expected in tqdm(facts.checksums.items(), desc="Verifying checksums"):
        file = source.folder / name
        if not file.is_file():
            raise ValueError(
                f"{file} was there when this benchmark began. Put it back, or choose a new folder with -o."
            )
        if checksum(file) != expected:
            raise ValueError(
                f"{file} has changed since this benchmark began, so further runs could not be compared with the "
                "finished ones. Put it back, or choose a new folder with -o."
            )


__all__ = [
    "SourceFacts",
    "Split",
    "checksums_of",
    "choose_cases",
    "evaluation_files",
    "group_cases",
    "survey",
    "verify_source",
]
