"""The dataset as a whole: dataset.json, which files there are, what only shows when all cases are seen together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dsp.annotations import AnnotationError, LabelNames, describe_source
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.instance_labels import LEAST_BACKGROUND, MOST_IDS, is_instance_dataset
from nnunet_dsp.dataset_conversion.raw_dataset import RawCase
from nnunet_dsp.dataset_conversion.splits import SPLITS_FILE, read_splits
from nnunet_dsp.report.case_checks import FOLDER, MASKED, PARTIAL, UNREADABLE, CaseReport
from nnunet_dsp.report.findings import Finding

_SHOWN = 12  # cases named in one sentence
_LEAST_BOXES = 5  # from which a shift is called a habit
_HABIT = 0.7  # share of the boxes that must show it


@dataclass(slots=True)
class DatasetFacts:
    """What is known of a raw dataset before its cases are looked at.

    Attributes:
        folder: nnUNet_raw/DatasetXXX_Name.
        json: dataset.json, empty if it cannot be read.
        cases: the training cases; a case may lack image files.
        labels: its classes, None if dataset.json does not give them in a way that can be used.
        expected_labels: the values masks may hold, by nnU-Net's own label manager; None likewise.
        reader_writer: nnU-Net's reader class, None if there is none.
        findings: what is wrong so far.
    """

    folder: Path
    json: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, RawCase] = field(default_factory=dict)
    labels: LabelNames | None = None
    expected_labels: tuple[int, ...] | None = None
    reader_writer: Any = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def instances(self) -> bool:
        """Whether the masks hold ids of instances (`nnunet_dsp convert instances`)."""
        return self.labels is not None and is_instance_dataset(self.json)

    @property
    def num_channels(self) -> int:
        return len(self.json.get("channel_names", ())) or 1

    def problem(self, kind: str, text: str) -> None:
        self.findings.append(Finding(kind, text))


def survey(folder: Path) -> DatasetFacts:
    """Read dataset.json and list the cases; whatever is wrong becomes a finding, nothing is raised."""
    facts = DatasetFacts(folder)
    try:
        facts.json = raw_dataset.read_json(folder / "dataset.json")
    except (OSError, ValueError) as error:
        facts.problem("dataset", str(error))
        return facts
    required = ("channel_names", "labels", "file_ending", "numTraining")
    missing = [key for key in required if key not in facts.json]
    if missing:
        facts.problem("dataset", f"dataset.json lacks {', '.join(missing)}, without which nnU-Net cannot read it.")
    elif "dataset" in facts.json or (folder / "imagesTr").is_dir():
        for text in raw_dataset.layout_problems(folder, facts.json):
            facts.problem("dataset", text)
    _read_labels(facts)
    ending, channels = facts.json.get("file_ending"), facts.json.get("channel_names", {})
    if not isinstance(ending, str) or not ending.startswith(".") or not isinstance(channels, dict):
        return facts
    try:
        facts.cases = _list_cases(facts)
    except Exception as error:  # nnU-Net's own listing asserts what it needs
        facts.problem("dataset", f"The training cases cannot be listed: {error or type(error).__name__}")
        return facts
    if not facts.cases:
        facts.problem("dataset", f"imagesTr holds no image named like CASE_0000{ending}. Is file_ending right?")
        return facts
    _find_reader(facts)
    _unprepared(facts)
    _stray_files(facts)
    _splits(facts)
    return facts


def _read_labels(facts: DatasetFacts) -> None:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    if "labels" not in facts.json:
        return
    try:
        facts.labels = LabelNames.from_dataset_json(facts.json)
    except AnnotationError as error:
        facts.problem("dataset", str(error))
        return
    try:
        manager = LabelManager(facts.json["labels"], regions_class_order=facts.json.get("regions_class_order"))
        expected = [int(label) for label in manager.all_labels]
        expected += [int(manager.ignore_label)] if manager.has_ignore_label else []
    except Exception as error:  # asserts and more
        facts.problem("dataset", f"dataset.json: nnU-Net does not accept these labels: {error}")
        return
    if any(np.diff(expected) != 1):
        facts.problem("dataset", f"dataset.json: labels must be consecutive (0, 1, 2, ...), but are {expected}.")
        return
    if facts.instances and expected[-1] > MOST_IDS + 1:
        facts.problem(
            "dataset",
            f"dataset.json declares labels up to {expected[-1]}, but nnU-Net stores preprocessed labels as 16 bit "
            f"integers, which leaves {MOST_IDS} instances an image. Cut images into tiles (convert instances --tile).",
        )
    facts.expected_labels = tuple(expected)


def _list_cases(facts: DatasetFacts) -> dict[str, RawCase]:
    if "dataset" in facts.json:
        return raw_dataset._listed_cases(facts.folder, facts.json)
    if not (facts.folder / "imagesTr").is_dir():
        raise FileNotFoundError(f"{facts.folder} holds no folder imagesTr.")
    cases = raw_dataset._cases_in_folder(facts.folder, facts.json["file_ending"])
    return {name: case for name, case in cases.items() if case.images}  # the others are among layout_problems()


def _find_reader(facts: DatasetFacts) -> None:
    with_images = {name: case for name, case in facts.cases.items() if case.images}
    if not with_images:
        return
    for case in list(with_images.values())[:3]:  # the first may be the broken one: readers are tried on a file
        dataset = raw_dataset.RawDataset(facts.folder, facts.json, {case.name: case})
        try:
            facts.reader_writer = dataset.reader_writer()
            return
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
    facts.problem("dataset", reason)


def _unprepared(facts: DatasetFacts) -> None:
    without = [case.name for case in facts.cases.values() if not case.label.is_file()]
    if without:
        facts.problem(
            "unprepared",
            f"{len(without)} of {len(facts.cases)} cases have no label file ({_some(without)}). "
            "They get one that is 'ignore' all over.",
        )
    stated = facts.json.get("numTraining")
    if stated is not None and stated != len(facts.cases):
        facts.problem("unprepared", f"dataset.json says numTraining {stated}, but there are {len(facts.cases)} cases.")


def _stray_files(facts: DatasetFacts) -> None:
    folder = facts.folder / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() != ".json" or path.name.startswith("."):
            continue
        if path.suffix != ".json":
            text = f"{describe_source(path)}: the file name ends in {path.suffix}. Rename it to {path.stem}.json."
            facts.problem("annotation-file", text)
        elif path.stem not in facts.cases:
            text = f"{describe_source(path)}: there is no case {path.stem!r} in imagesTr. Rename or remove the file."
            facts.problem("annotation-file", text)
    labels, ending = facts.folder / "labelsTr", facts.json["file_ending"]
    if "dataset" not in facts.json and labels.is_dir():
        names = sorted(path.name[: -len(ending)] for path in labels.iterdir() if path.name.endswith(ending))
        orphans = [name for name in names if name not in facts.cases and not name.startswith(".")]
        if orphans:
            facts.problem("orphan-label", f"{len(orphans)} label file(s) in labelsTr have no image: {_some(orphans)}.")


def _splits(facts: DatasetFacts) -> None:
    file = facts.folder / SPLITS_FILE
    if not file.is_file():
        return
    try:
        splits = read_splits(file, facts.cases)
    except (OSError, ValueError) as error:
        facts.problem("split", str(error))
        return
    for number, split in enumerate(splits):
        both = sorted(set(split["train"]) & set(split["val"]))
        if both and len(split["train"]) > 1 and set(both) != set(split["val"]):
            facts.problem("warning", f"{SPLITS_FILE}: fold {number} trains and validates on {_some(both)}.")


# --- what only shows when all cases are seen together


@dataclass(slots=True)
class ClassCounts:
    """How often one class occurs in the dataset; `number` is its colour."""

    name: str
    number: int
    region: bool = False
    voxels: int = 0
    mask_cases: int = 0
    points: int = 0
    point_cases: int = 0
    tight_boxes: int = 0
    loose_boxes: int = 0
    box_cases: int = 0
    present: int = 0
    absent: int = 0
    complete_points: int = 0
    complete_boxes: int = 0

    @property
    def occurs(self) -> bool:
        return bool(self.mask_cases or self.points or self.box_cases or self.present)


def count_classes(labels: LabelNames | None, cases: Sequence[CaseReport], json_labels: Any) -> list[ClassCounts]:
    """The counts of every class, background first."""
    from nnunet_dsp.report.views import label_number

    if labels is None:
        return []
    counts = {name: ClassCounts(name, label_number(name, labels), name not in _plain(labels)) for name in labels.names}
    values: dict[str, set[int]] = {}
    for name, value in zip(labels.names, labels.values, strict=True):
        values[name] = {value} if value is not None else {int(part) for part in json_labels[name]}
    for case in cases:
        for name, count in counts.items():
            voxels = sum(case.voxels.get(value, 0) for value in values[name])
            count.voxels += voxels
            count.mask_cases += voxels > 0
            count.points += case.points[name]
            count.point_cases += case.points[name] > 0
            count.tight_boxes += case.tight_boxes[name]
            count.loose_boxes += case.loose_boxes[name]
            count.box_cases += case.tight_boxes[name] + case.loose_boxes[name] > 0
            if case.said is not None:
                count.present += name in case.said.present
                count.absent += name in case.said.absent
                count.complete_points += name in case.said.complete_points
                count.complete_boxes += name in case.said.complete_boxes
    return list(counts.values())


def look_at_all(facts: DatasetFacts, cases: Sequence[CaseReport], classes: Sequence[ClassCounts]) -> list[Finding]:
    """Findings about all the cases together."""
    findings = [*_classes(cases, classes), *_twins(cases)]
    findings += _shifts(cases, axes="zyx")
    if facts.instances:
        findings += _background(cases)
    if facts.labels is not None and facts.labels.ignore_label is None:
        partial = [case.name for case in cases if case.said is not None and case.said.mask_labels is not None]
        if partial:
            text = f"dataset.json gets an ignore label, which the partial masks of {len(partial)} case(s) need."
            findings.append(Finding("unprepared", text))
    return findings


def _classes(cases: Sequence[CaseReport], classes: Sequence[ClassCounts]) -> list[Finding]:
    findings = []
    if not any(case.status != UNREADABLE for case in cases):
        return []
    masked = [case for case in cases if case.status in (MASKED, PARTIAL)]
    for count in classes:
        if count.number == 0:
            continue
        if not count.occurs:
            where = " (it is only ever tagged absent)" if count.absent else ""
            findings.append(Finding("never", f"{count.name!r} occurs in no mask, point, box or tag{where}."))
        elif not count.mask_cases and masked:
            findings.append(Finding("no-mask", f"{count.name!r} is in none of the {len(masked)} masks."))
        elif count.mask_cases == 1 and len(masked) > 1:
            name = next(case.name for case in masked if case.voxels.get(count.number)) if not count.region else "one"
            findings.append(Finding("rare", f"{count.name!r} is in the mask of one case only, {name}."))
    if cases and not masked:
        text = "No case has a mask, so nothing can be validated, and nnU-Net's Dice during training means nothing."
        findings.append(Finding("no-mask", text))
    return findings


def _background(cases: Sequence[CaseReport]) -> list[Finding]:
    """Whether instances come with background enough to learn the foreground from; as nnUNetTrainerCRAC has it."""
    background = sum(case.voxels.get(0, 0) for case in cases)
    labelled = sum(sum(case.voxels.values()) for case in cases)
    if not labelled or background > LEAST_BACKGROUND * labelled:
        return []
    return [Finding("no-background", f"{background} of {labelled} labelled voxels are background.")]


def _twins(cases: Sequence[CaseReport]) -> list[Finding]:
    same: defaultdict[str, list[str]] = defaultdict(list)
    for case in cases:
        if case.digest:
            same[f"{case.digest}{case.shape}"].append(case.name)
    pictures = {case.name: case.pictures[0] for case in cases if case.pictures}
    return [
        Finding(
            "twins", f"{_some(names)} are the same image, voxel by voxel.", names[0], picture=pictures.get(names[0])
        )
        for names in same.values()
        if len(names) > 1
    ]


def _shifts(cases: Sequence[CaseReport], axes: str) -> list[Finding]:
    """Offsets between boxes and their objects that most boxes share: off-by-one errors of whoever wrote them."""
    by_axes: defaultdict[int, list[tuple[tuple[int | None, ...], tuple[int | None, ...]]]] = defaultdict(list)
    for case in cases:
        for fit in case.fits:
            by_axes[len(fit.begins)].append((fit.begins, fit.ends))
    findings = []
    for number, fits in by_axes.items():
        for side, name in ((0, "start"), (1, "stop")):
            for axis in range(number):
                known = [offset for fit in fits if (offset := fit[side][axis]) is not None]
                if len(known) < _LEAST_BOXES:
                    continue
                (offset, count), *_ = Counter(known).most_common(1)
                if offset == 0 or count < _HABIT * len(known):
                    continue
                letter = axes[3 - number + axis]
                way = "after" if offset > 0 else "before"
                what = "begin" if side == 0 else "end"
                text = (
                    f"In {count} of {len(known)} tight boxes that could be compared with a mask, the objects {what} "
                    f"{abs(offset)} voxel(s) {way} the box's {name} along {letter}."
                )
                findings.append(Finding("shifted", text))
    return findings


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _plain(labels: LabelNames) -> Mapping[str, int]:
    return {name: value for name, value in zip(labels.names, labels.values, strict=True) if value is not None}
