"""The datasets that the arms train on: which cases, what is said about them, and nnU-Net's preprocessing of them.

All of them come from the source's training cases, with the source's masks. They share one planning (of all these
cases with all their masks) so that arms differ in labels and trainer only.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nnunet_dsp.annotations import Annotations, LabelNames, case_file, write_annotations
from nnunet_dsp.benchmark.accuracy.arms import Data
from nnunet_dsp.benchmark.accuracy.cost import Counts, total
from nnunet_dsp.benchmark.accuracy.pretraining import (
    PROMPT_KEY,
    PretrainingFacts,
    link_pretraining,
    preprocess_pretraining,
)
from nnunet_dsp.benchmark.accuracy.workplace import PLANS_BASE, Workplace, checksum, say, write_json
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.fingerprint import FILE as FINGERPRINT
from nnunet_dsp.dataset_conversion.fingerprint import MARK, MARK_VERSION
from nnunet_dsp.dataset_conversion.mixture import assign
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.prepare import sync_annotations
from nnunet_dsp.dataset_conversion.raw_dataset import RawCase, RawDataset
from nnunet_dsp.dataset_conversion.simulate import net_like_classes
from nnunet_dsp.dataset_conversion.splits import SPLITS_FILE, read_splits
from nnunet_dsp.dataset_conversion.weak_labels import (
    WeakOptions,
    annotate,
    box_coverage,
    find_objects,
    rectangle,
    scribble,
)
from nnunet_dsp.plans import shrink_plans

COUNTS = "benchmark_counts.json"  # in a raw folder: what was annotated
READY = "benchmark_ready.json"  # in a preprocessed folder: it is complete
FULL = 1  # number of the dataset with all masks
PLANS = "Benchmark"  # the plans that every arm starts from


# --- which cases


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
    own_test = (source.folder / "imagesTs").is_dir() and (source.folder / "labelsTs").is_dir()
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
        fold = 0 if fold is None else fold
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
    groups: dict[str, list[str]] = {}
    for case in cases:
        key = case
        if fixed["group"] is not None:
            match = re.search(fixed["group"], case)
            if match is None:
                raise ValueError(f"--group: {fixed['group']!r} finds nothing in the case name {case!r}.")
            key = match.group(1) if match.groups() else match.group(0)
        groups.setdefault(key, []).append(case)
    names = sorted(groups)
    random = np.random.default_rng([fixed["split_seed"], {"test": 0, "val": 1}[part]])
    out: set[str] = set()
    for index in random.permutation(len(names)):
        if len(out) >= max(1, round(share * len(cases))):
            break
        out |= set(groups[names[index]])
    return out


def order_of_masks(shown: Mapping[str, Collection[str]], seed: int) -> list[str]:
    """All cases, in the order in which they get a mask: the first N keep theirs where N do, so counts are nested.

    Each next case is the one that adds most classes not shown yet, as one would choose who annotates; among equals,
    and once every class is shown, a random order decides.
    """
    names = sorted(shown)
    random = np.random.default_rng([seed, 0])
    left = [names[i] for i in random.permutation(len(names))]
    missing = set().union(*shown.values()) if shown else set()
    order = []
    while left:
        best = max(left, key=lambda name: len(missing & set(shown[name]))) if missing else left[0]
        order.append(best)
        left.remove(best)
        missing -= set(shown[best])
    return order


def order_of_weak(cases: Collection[str], seed: int) -> list[str]:
    """All cases in the order in which they get weak annotations; masked ones are passed over."""
    names = sorted(cases)
    return [names[i] for i in np.random.default_rng([seed, 1]).permutation(len(names))]


def deal(data: Data, shown: Mapping[str, Collection[str]]) -> dict[str, tuple[str, ...]]:
    """For each case of a dataset ("mask",), or its weak kinds, or (); cases that are not in it are left out."""
    if data.source == "full":
        return dict.fromkeys(shown, ("mask",))
    if data.source == "pretrain":
        return {}
    masked = order_of_masks(shown, data.seed)[: data.masks]
    weak = [case for case in order_of_weak(shown, data.seed) if case not in masked][: data.weak]
    chosen = {case: shown[case] for case in shown if case in {*masked, *weak}}
    kinds: dict[str, Any] = dict.fromkeys(data.kinds, "rest")
    if data.dealt:
        number, further = divmod(len(weak), len(data.dealt))
        kinds = {kind: number + (position < further) for position, kind in enumerate(data.dealt)}
    dealt = assign(chosen, masks=len(masked), kinds=kinds, masked_cases=masked, seed=data.seed)
    keep = {"mask", *data.kinds}
    return {case: tuple(kind for kind in given if kind in keep) for case, given in dealt.items()}


# --- a look at the source


class _SurveyJob(NamedTuple):
    case: RawCase
    reader_writer: Any
    labels: dict[str, int]
    ignore: int | None


def _survey_case(job: _SurveyJob) -> tuple[str, dict[str, int], dict[str, float], bool]:
    """Case, objects by class shown, share of the image in boxes by class, whether every voxel is annotated."""
    mask, _ = raw_dataset.read_label(job.reader_writer, job.case.label)
    flat = mask[0] if mask.shape[0] == 1 else mask
    values = set(np.unique(flat).tolist())
    unknown = sorted(values - set(job.labels.values()) - {job.ignore})
    if unknown:
        raise ValueError(f"{job.case.label}: value(s) {unknown} are no label of dataset.json, which has {job.labels}.")
    names = tuple(name for name in job.labels if name != "background")
    objects: dict[str, int] = {}
    for item in find_objects(flat, job.labels, names):
        objects[item.label] = objects.get(item.label, 0) + 1
    options = WeakOptions(box_classes=names)
    coverage = box_coverage(annotate(flat, job.labels, ("boxes",), options, (0,)))
    return job.case.name, objects, coverage, job.ignore is None or job.ignore not in values


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

    @classmethod
    def read(cls, file: Path) -> SourceFacts:
        content = raw_dataset.read_json(file)
        for key in ("training", "evaluation", "not_boxed"):
            content[key] = tuple(content[key])
        return cls(**content)

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
        ValueError: masks that are missing or not complete; test cases without a mask.
    """
    labels = source.labels
    split = choose_cases(source, fixed)
    missing = [case.name for case in source.cases.values() if not case.label.is_file()]
    if missing:
        raise ValueError(
            f"{source.folder}: the benchmark needs a mask for every training case, but {len(missing)} have none: "
            f"{', '.join(missing[:10])}."
        )
    evaluation = _evaluation_files(source, split)
    reader_writer = source.reader_writer()
    jobs = [_SurveyJob(source.cases[name], reader_writer, labels, source.ignore_label) for name in split.training]
    objects: dict[str, dict[str, int]] = {}
    coverages = []
    partly = []
    for name, found, coverage, whole in map_cases(_survey_case, jobs, processes=processes, description="Reading masks"):
        objects[name] = found
        coverages.append(coverage)
        if not whole:
            partly.append(name)
    if partly:
        raise ValueError(
            f"{source.folder}: {len(partly)} training cases have voxels labelled 'ignore', so what they show is not "
            f"known: {', '.join(partly[:10])}. The benchmark takes annotations away from full masks."
        )
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
        checksums=_checksums(source, split, evaluation) if with_checksums else {},
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


def _checksums(source: RawDataset, split: Split, evaluation: Mapping[str, Any]) -> dict[str, str]:
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


# --- painting weak labels into a mask


def rasterise(
    annotations: Annotations,
    shape: tuple[int, ...],
    labels: Mapping[str, int],
    ignore: int,
    *,
    radius: float = 0,
    strokes: np.ndarray | None = None,
) -> np.ndarray:
    """What nnU-Net's ignore label can hold of weak annotations.

    - Boxes: where they are complete for every foreground class, what lies outside all of them is background; inside
      stays `ignore`, for a box does not say which of its voxels show the object. Otherwise boxes say nothing.
    - Strokes are taken as they are.
    - Points: the nearest voxel, or all within `radius` (in voxels). They are painted last.
    - Tags cannot be painted.

    Args:
        annotations: coordinates in voxels, array order.
        shape: (y, x) or (z, y, x).
        labels: value by class name, with background.
        ignore: value of voxels about which nothing is known.
        radius: of the disc or ball around a point. Above 0 it may cover other classes.
        strokes: same shape, `ignore` where nothing was drawn (partial masks as well as strokes).

    Returns:
        Integer, of that shape.
    """
    result = np.full(shape, ignore, np.int16)
    foreground = {name for name in labels if name != "background"}
    if foreground and foreground <= set(annotations.complete_boxes):
        inside = np.zeros(shape, bool)
        for box in annotations.boxes:
            where = tuple(
                slice(max(int(np.floor(a)), 0), max(int(np.ceil(b)), 0))
                for a, b in zip(box.start, box.stop, strict=True)
            )
            inside[where] = True
        result[~inside] = labels["background"]
    if strokes is not None:
        result = np.where(strokes != ignore, strokes, result)
    reach = int(np.floor(radius))
    for point in annotations.points:
        at = [min(max(round(v), 0), size - 1) for v, size in zip(point.at, shape, strict=True)]
        where = tuple(slice(max(a - reach, 0), a + reach + 1) for a in at)
        axes = (np.arange(s.start, min(s.stop, size)) for s, size in zip(where, shape, strict=True))
        grid = np.meshgrid(*axes, indexing="ij")
        distance = sum((g - a) ** 2 for g, a in zip(grid, at, strict=True))
        result[where][distance <= radius**2] = labels[point.label]
    return result


# --- making them


class _CaseJob(NamedTuple):
    case: RawCase
    label_file: Path
    kinds: tuple[str, ...]
    source: str
    reader_writer: Any
    labels: dict[str, int]
    ignore: int
    options: WeakOptions
    seed: int
    radius: float


def _make_case(job: _CaseJob) -> tuple[str, Annotations, Counts, bool]:
    """Write a weak case's label file; its annotations, what was annotated, whether any voxel has a label."""
    mask, properties = raw_dataset.read_label(job.reader_writer, job.case.label)
    flat = mask[0] if mask.shape[0] == 1 else mask
    seed = (job.seed, *job.case.name.encode())
    spacing = tuple(float(s) for s in properties["spacing"])[-flat.ndim :]
    said = annotate(flat, job.labels, job.kinds, job.options, seed, spacing)
    strokes = scribble(flat, job.labels, job.ignore, job.options, seed) if "scribbles" in job.kinds else None
    drawn, part = strokes, None
    if "rectangles" in job.kinds:
        part, where = rectangle(flat, job.ignore, job.options.rectangle, seed)
        drawn = np.full_like(flat, job.ignore) if strokes is None else strokes.copy()
        drawn[where] = part[where]
    counts = count(said, strokes, part, job.labels)
    if job.source == "ignore":
        label = rasterise(said, flat.shape, job.labels, job.ignore, radius=job.radius, strokes=drawn)
        said = Annotations()
    else:
        label = np.full_like(flat, job.ignore) if drawn is None else drawn
    raw_dataset.write_label(job.reader_writer, label.reshape(mask.shape), job.label_file, properties)
    return job.case.name, said, counts, bool((label != job.ignore).any())


def count(said: Annotations, strokes: np.ndarray | None, part: np.ndarray | None, labels: Mapping[str, int]) -> Counts:
    """What was annotated in one case: said of it, scribbled on it, drawn in full on part of it."""
    tags = len(said.present) + len(said.absent)
    points = {point.label for point in said.points}
    boxes = {box.label for box in said.boxes}
    drawn = classes = 0
    if strokes is not None:
        for plane in strokes if strokes.ndim == 3 else strokes[None]:
            found = find_objects(plane, labels, tuple(labels))
            drawn += len(found)
            classes += len({item.label for item in found})
    foreground = tuple(name for name in labels if name != "background")
    seen = [] if part is None else find_objects(part, labels, foreground)
    return Counts(
        rectangle_images=int(part is not None),
        rectangle_classes=len({item.label for item in seen}),
        rectangle_objects=len(seen),
        tag_images=int(tags > 0),
        tags=tags,
        point_images=int(bool(points)),
        point_classes=len(points),
        points=len(said.points),
        box_images=int(bool(boxes)),
        box_classes=len(boxes),
        boxes=len(said.boxes),
        scribble_images=int(drawn > 0),
        scribble_classes=classes,
        scribbles=drawn,
    )


def mask_counts(objects: Mapping[str, int]) -> Counts:
    """What was annotated in one masked case."""
    return Counts(mask_images=1, mask_classes=len(objects), mask_objects=sum(objects.values()))


class Datasets:
    """Makes datasets in DIR, each once, whoever asks first.

    Args:
        place: DIR.
        facts: source.json.
        fixed: the configuration.
        numbers: dataset number by name of the data.
        predict: predicts images for pseudo-labels: (run id, folder of images, folder for the result).
        data_of: what a run trains on, by its id.
    """

    def __init__(
        self,
        place: Workplace,
        facts: SourceFacts,
        fixed: Mapping[str, Any],
        numbers: Mapping[str, int],
        predict: Callable[[str, Path, Path], None] | None = None,
        data_of: Callable[[str], Data] | None = None,
    ) -> None:
        self.place, self.facts, self.fixed, self.numbers = place, facts, fixed, numbers
        self.predict, self.data_of = predict, data_of

    def folder_name(self, data: Data) -> str:
        return f"Dataset{self.numbers[data.name]:03d}_{data.name}"

    def ready(self, data: Data) -> dict[str, Any] | None:
        """What the dataset's ready file says, None if it is not made yet."""
        file = self.place.preprocessed / self.folder_name(data) / READY
        return raw_dataset.read_json(file) if file.is_file() else None

    def counts(self, data: Data) -> Counts | None:
        """What was annotated in a dataset, None if it is not made yet."""
        content = self.ready(data)
        return None if content is None else Counts(**content["counts"])

    def make(self, data: Data, needs: str | None = None) -> str:
        """The name of the dataset, which is made and preprocessed if it is not yet.

        Args:
            needs: the run that predicts its pseudo-labels.
        """
        name = self.folder_name(data)
        if self.ready(data) is None:
            with self.place.lock(name, f"Waiting for another process that makes {name}."):
                if self.ready(data) is None:
                    self._make(data, name, needs)
        return name

    # --- all masks, and planning

    def make_full(self, source: RawDataset, evaluation: Mapping[str, tuple[tuple[Path, ...], Path]]) -> None:
        """The dataset of all training cases with their masks, the evaluation cases, and the plans for every arm."""
        name = self.folder_name(Data("full"))
        target = self.place.raw / name
        if not target.is_dir():
            with raw_dataset.building(target) as folder:
                self._link_full(source, evaluation, folder, name)
        preprocessed = self.place.preprocessed / name
        if (preprocessed / READY).is_file():
            return
        shutil.rmtree(preprocessed, ignore_errors=True)
        processes, configuration = self.place.processes, self.fixed["configuration"]
        command = ["nnUNetv2_plan_and_preprocess", "-d", FULL, "-c", configuration, "-npfp", processes]
        command += ["-np", processes, "--verify_dataset_integrity", "-overwrite_plans_name", PLANS_BASE]
        command += ["-pl", self.fixed["planner"]] if self.fixed["planner"] else []
        say("Planning and preprocessing all training cases.")
        self.place.command(*command, log=self.place.folder / "log.txt")
        planned = raw_dataset.read_json(preprocessed / f"{PLANS_BASE}.json")
        write_json(preprocessed / f"{PLANS}.json", self._plans(planned))
        counts = total(mask_counts(self.facts.objects[case]) for case in self.facts.training)
        self._write_ready(name, counts, list(self.facts.training))

    def _link_full(self, source: RawDataset, evaluation: Mapping[str, Any], folder: Path, name: str) -> None:
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (folder / part).mkdir()
        ending = source.file_ending
        for case in self.facts.training:
            raw_dataset.link_case_images(source.cases[case], folder / "imagesTr", ending)
            for file, new_name in raw_dataset.label_files(source.cases[case].label, f"{case}{ending}"):
                raw_dataset.link_file(file, folder / "labelsTr" / new_name)
        for case, (images, label) in evaluation.items():
            raw_dataset.link_case_images(RawCase(case, images, label), folder / "imagesTs", ending)
            for file, new_name in raw_dataset.label_files(label, f"{case}{ending}"):
                raw_dataset.link_file(file, folder / "labelsTs" / new_name)
        content = {key: value for key, value in source.json.items() if key != "dataset"}
        content |= {"numTraining": len(self.facts.training), "name": name.split("_", 1)[1]}
        raw_dataset.write_json(folder / "dataset.json", content)

    def _plans(self, planned: dict[str, Any]) -> dict[str, Any]:
        configuration = planned["configurations"].get(self.fixed["configuration"])
        if configuration is None:
            raise ValueError(
                f"-c {self.fixed['configuration']}: nnU-Net planned {', '.join(planned['configurations'])} for this "
                "dataset."
            )
        if configuration.get("previous_stage"):
            raise ValueError(f"-c {self.fixed['configuration']}: the benchmark does not train cascades.")
        if self.fixed["plans"] == "small":
            patch, features = self.fixed["patch"], self.fixed["features"]
            more = {} if features is None else {"features": tuple(features)}
            size = patch[0] if patch is not None and len(patch) == 1 else patch
            return shrink_plans(planned, PLANS, patch=size, batch_size=self.fixed["batch_size"], **more)
        return {**planned, "plans_name": PLANS}

    # --- parts of them

    def _make(self, data: Data, name: str, needs: str | None) -> None:
        say(f"Making {name}.")
        target = self.place.raw / name
        if not (target / "dataset.json").is_file():
            shutil.rmtree(target, ignore_errors=True)
            if data.source == "second":
                self._relabelled(name, needs)
            else:
                with raw_dataset.building(target) as folder:
                    counts = self._raw(data, folder, name, needs)
                    write_json(folder / COUNTS, asdict(counts))
        if data.source == "second":
            counts = self._first_data(needs)[1]
        else:
            counts = Counts(**raw_dataset.read_json(target / COUNTS))
        if data.source == "pretrain":
            preprocess_pretraining(self.place, name, FULL, (PLANS_BASE, PLANS), self.fixed["configuration"])
        else:
            self._preprocess(name)
        dataset = raw_dataset.read_dataset(target)
        self._write_ready(name, counts, list(dataset.cases))

    def _raw(self, data: Data, folder: Path, name: str, needs: str | None) -> Counts:
        if data.source == "pretrain":
            link_pretraining(PretrainingFacts.read(self.place.pretraining_file), folder, name)
            return Counts()
        full = raw_dataset.read_dataset(self.place.raw / self.folder_name(Data("full")))
        reader_writer, ending = full.reader_writer(), full.file_ending
        ignore = max(self.facts.labels.values()) + 1 if self.facts.ignore is None else self.facts.ignore
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir()
        kinds_of = deal(data, {case: set(self.facts.objects[case]) for case in self.facts.training})
        counts = []
        jobs = []
        for case, kinds in kinds_of.items():
            if "mask" in kinds:
                for file, new_name in raw_dataset.label_files(full.cases[case].label, f"{case}{ending}"):
                    shutil.copyfile(file, folder / "labelsTr" / new_name)
                counts.append(mask_counts(self.facts.objects[case]))
            elif data.source in ("weak", "ignore"):
                jobs.append(
                    _CaseJob(
                        full.cases[case],
                        folder / "labelsTr" / f"{case}{ending}",
                        kinds,
                        data.source,
                        reader_writer,
                        self.facts.labels,
                        ignore,
                        self.facts.weak_options(self.fixed),
                        data.seed,
                        self.fixed["point_radius"],
                    )
                )
        said: dict[str, Annotations] = {}
        for case, about_case, number, labelled in map_cases(
            _make_case, jobs, processes=self.place.processes, description="Annotating"
        ):
            said[case] = about_case
            counts.append(number)
            if data.source == "ignore" and not labelled:  # nothing to learn from: nnU-Net would draw it all the same
                (folder / "labelsTr" / f"{case}{ending}").unlink()
                del kinds_of[case]
        for case in kinds_of:
            raw_dataset.link_case_images(full.cases[case], folder / "imagesTr", ending)
        if data.source == "pseudo":
            self._pseudo_labels([c for c, kinds in kinds_of.items() if "mask" not in kinds], full, folder, needs)
        content = dict(full.json)
        if data.source in ("weak", "ignore"):
            content["labels"] = {**full.json["labels"], "ignore": ignore}
        content |= {"numTraining": len(kinds_of), "name": name.split("_", 1)[1]}
        if data.prompt_from:
            content[PROMPT_KEY] = self._prompt(data, kinds_of, full, folder)
        raw_dataset.write_json(folder / "dataset.json", content)
        if data.source == "weak":
            (folder / "annotationsTr").mkdir()
            known = LabelNames.from_dataset_json(content)
            for case, about_case in said.items():
                if not about_case.is_empty:
                    write_annotations(case_file(folder / "annotationsTr", case), about_case, known)
        raw_dataset.write_record(
            folder,
            "nnunet_dsp benchmark accuracy",
            asdict(data),
            source=self.facts.name,
            not_boxed=list(self.facts.not_boxed),
            assignment={case: list(kinds) for case, kinds in kinds_of.items()},
        )
        return total(counts)

    def _prompt(
        self, data: Data, kinds_of: Mapping[str, Collection[str]], full: RawDataset, folder: Path
    ) -> dict[str, Any]:
        """dataset.json's prompt: of a one-shot training's two cases the one that it is not trained on, or the rectangle
        that is labelled in it."""
        if data.prompt_from == "mask":
            shown = {case: set(self.facts.objects[case]) for case in self.facts.training}
            return {"case": order_of_masks(shown, data.seed)[1]}
        case = next(case for case, kinds in kinds_of.items() if "mask" not in kinds)
        label, _ = raw_dataset.read_label(full.reader_writer(), folder / "labelsTr" / f"{case}{full.file_ending}")
        known = np.nonzero((label[0] if label.shape[0] == 1 else label) <= max(self.facts.labels.values()))
        return {"case": case, "bbox": [[int(axis.min()), int(axis.max()) + 1] for axis in known]}

    def _first_data(self, needs: str | None) -> tuple[str, Counts]:
        """Dataset of the run whose predictions a second network learns, and what was annotated in it."""
        if needs is None or self.data_of is None:
            raise ValueError("There is no training whose predictions a second network could learn.")
        data = self.data_of(needs)
        return self.folder_name(data), self.counts(data) or Counts()

    def _relabelled(self, name: str, needs: str | None) -> None:
        """The first network labels its training images; what was annotated in them stays."""
        first = self._first_data(needs)[0]
        predicted = self.place.run_folder(needs or "") / "predicted_training"
        if self.predict is not None and needs is not None:
            shutil.rmtree(predicted, ignore_errors=True)
            self.predict(needs, self.place.raw / first / "imagesTr", predicted)
        command = ["nnunet_dsp", "pseudo-dataset", "-d", first, "-i", predicted, "-o", name]
        command += ["--num-processes", self.place.processes]
        self.place.command(*command, log=self.place.folder / "log.txt")
        shutil.rmtree(predicted, ignore_errors=True)

    def _pseudo_labels(self, cases: Sequence[str], full: RawDataset, folder: Path, needs: str | None) -> None:
        """Predictions of the first round become the labels."""
        if self.predict is None or needs is None:
            raise ValueError(f"{folder}: there is no training that could predict its pseudo-labels.")
        images, predicted = folder / "to_predict", folder / "predicted"
        images.mkdir()
        for case in cases:
            raw_dataset.link_case_images(full.cases[case], images, full.file_ending)
        self.predict(needs, images, predicted)
        for case in cases:
            file = predicted / f"{case}{full.file_ending}"
            for path, new_name in raw_dataset.label_files(file, file.name):
                os.replace(path, folder / "labelsTr" / new_name)
        shutil.rmtree(images)
        shutil.rmtree(predicted)

    def _preprocess(self, name: str) -> None:
        raw, target = self.place.raw / name, self.place.preprocessed / name
        full = self.place.preprocessed / self.folder_name(Data("full"))
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        shutil.copyfile(raw / "dataset.json", target / "dataset.json")
        fingerprint = raw_dataset.read_json(full / FINGERPRINT)
        # of masks without ignore, so nnUNetTrainerDSP need not warn of nnU-Net #3055
        fingerprint[MARK] = {"ignore_excluded": True, "format": MARK_VERSION, "foreground": "masks"}
        write_json(target / FINGERPRINT, fingerprint)
        for plans in (PLANS_BASE, PLANS):
            content = raw_dataset.read_json(full / f"{plans}.json")
            write_json(target / f"{plans}.json", {**content, "dataset_name": name})
        sync_annotations(raw, target)
        configuration = self.fixed["configuration"]
        planned = raw_dataset.read_json(full / f"{PLANS_BASE}.json")
        data = planned["configurations"][configuration]["data_identifier"]
        if not self._link_equal(name, data):
            number = int(name[7:10])
            command = ["nnUNetv2_preprocess", "-d", number, "-plans_name", PLANS_BASE, "-c", configuration]
            self.place.command(*command, "-np", self.place.processes, log=self.place.folder / "log.txt")
            for file in (target / data).glob("*.b2nd"):  # the images are those of the full dataset: keep them once
                original = full / data / file.name
                if not file.name.endswith("_seg.b2nd") and original.is_file():
                    if filecmp.cmp(file, original, shallow=False):
                        _link_or_keep(original, file)

    def _link_equal(self, name: str, data: str) -> bool:
        """Take the preprocessed cases of a dataset that has the same labels for them; False where there is none."""
        mine = self._identity(name)
        for folder in sorted(self.place.preprocessed.iterdir()):
            if folder.name in (name, self._pretraining_name()) or not (folder / READY).is_file():
                continue
            other = raw_dataset.read_json(folder / READY)
            if other["classes"] != mine["classes"]:
                continue
            if any(other["labels"].get(case) != label for case, label in mine["labels"].items()):
                continue
            target = self.place.preprocessed / name
            ending = self.facts.file_ending
            for part, wanted in (
                (data, [f"{case}{end}" for case in mine["labels"] for end in (".b2nd", "_seg.b2nd", ".pkl")]),
                ("gt_segmentations", [f"{case}{ending}" for case in mine["labels"]]),
            ):
                if not all((folder / part / file).is_file() for file in wanted):
                    return False
                (target / part).mkdir(exist_ok=True)
                for file in wanted:
                    try:
                        os.link(folder / part / file, target / part / file)
                    except OSError:
                        shutil.copyfile(folder / part / file, target / part / file)
            return True
        return False

    def _pretraining_name(self) -> str | None:
        """Its cases may have names of this dataset's, but they are other images."""
        data = Data("pretrain")
        return self.folder_name(data) if data.name in self.numbers else None

    def _identity(self, name: str) -> dict[str, Any]:
        dataset = raw_dataset.read_dataset(self.place.raw / name)
        labels = {case.name: checksum(case.label) for case in dataset.cases.values()}
        return {"classes": dataset.json["labels"], "labels": labels}

    def _write_ready(self, name: str, counts: Counts, cases: list[str]) -> None:
        content = {**self._identity(name), "counts": asdict(counts), "cases": cases}
        write_json(self.place.preprocessed / name / READY, content)

    def base_plans(self, name: str) -> dict[str, Any]:
        """The plans that every arm of a dataset starts from."""
        return raw_dataset.read_json(self.place.preprocessed / name / f"{PLANS}.json")


def _link_or_keep(original: Path, file: Path) -> None:
    """Replace `file` by a hard link to the equal `original`, where the file system has them."""
    temporary = file.with_name(f".{file.name}.link")
    try:
        os.link(original, temporary)
    except OSError:
        return
    os.replace(temporary, file)


__all__ = ["Datasets", "SourceFacts", "choose_cases", "deal", "order_of_masks", "order_of_weak", "rasterise", "survey"]
