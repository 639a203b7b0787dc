"""Arms, sparse datasets and runs: what `benchmark accuracy` has, with instances in place of masks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_dsp.benchmark.accuracy import FIXED as ACCURACY_DEFAULTS
from nnunet_dsp.benchmark.accuracy.arms import Arm, Data, Grid, Run, parse_custom_arm
from nnunet_dsp.benchmark.accuracy.cost import Counts
from nnunet_dsp.benchmark.accuracy.datasets import Datasets
from nnunet_dsp.benchmark.accuracy.source import (
    SourceFacts,
    checksums_of,
    choose_cases,
    evaluation_files,
    read_evaluation_case,
)
from nnunet_dsp.benchmark.accuracy.training import Progress, Training, resolved_options, schedule
from nnunet_dsp.benchmark.accuracy.workplace import Workplace, checksum, code_state, write_json
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.instance_labels import check_instances, write_sparse_labels
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.raw_dataset import RawCase, RawDataset
from nnunet_dsp.instances.evaluate_command import measure_files
from nnunet_dsp.instances.measures import average

CRAC = "nnUNetTrainerCRAC"
LABELLED = "instances_labelled.json"  # in a raw dataset: by case how many instances are labelled, and of how many

ARMS: dict[str, Arm] = {
    "full": Arm("full", "full", f"{CRAC}_supervisedOnly"),
    "supervised": Arm("supervised", "weak", f"{CRAC}_supervisedOnly"),
    "crac": Arm("crac", "weak", CRAC),
    "entropy-filter": Arm("entropy-filter", "weak", f"{CRAC}_entropyFilter"),
    "error-predictor": Arm("error-predictor", "weak", f"{CRAC}_errorPredictor"),
    "soft": Arm("soft", "weak", f"{CRAC}_softPseudoLabels"),
    "released": Arm("released", "weak", f"{CRAC}_released"),
}


@dataclass(frozen=True)
class InstanceData(Data):
    """What a training sees: every instance, or a share of each image's; equal ones are one dataset."""

    share: float = 1.0

    @property
    def name(self) -> str:
        return "full" if self.source == "full" else f"i{self.share:g}_s{self.seed}".replace(".", "p")


class Row(NamedTuple):
    """A place in the tables: which run an arm has at this share, for this seed. `full` has the share 1."""

    arm: str
    share: float
    seed: int
    run: str


def make_grid(selection: Mapping[str, Any], optimizer: str | None) -> tuple[Grid, list[Row]]:
    """Every arm at every share for every seed.

    Args:
        selection: arms, arm (custom ones), share, seeds.
        optimizer: goes into the options of each arm that does not name one.

    Raises:
        ValueError: an unknown arm, or a share that is none.
    """
    custom = {arm.name: arm for arm in map(_custom, selection["arm"])}
    unknown = [name for name in selection["arms"] if name not in ARMS and name not in custom]
    if unknown:
        raise ValueError(f"There is no arm {unknown[0]!r}. Known: {', '.join([*ARMS, *custom])}.")
    for share in selection["share"]:
        if not 0 < share < 1:
            raise ValueError(f"--share: expected numbers between 0 and 1, but got {share:g}. The arm `full` has all.")
    grid, rows = Grid(), []
    arms = [{**ARMS, **custom}[name] for name in dict.fromkeys(selection["arms"])]
    for seed in dict.fromkeys(selection["seeds"]):  # seed by seed: a report of the first says something already
        for arm in arms:
            options = dict(arm.options)
            if optimizer is not None:
                options.setdefault("optimizer", optimizer)
            for share in [1.0] if arm.source == "full" else dict.fromkeys(selection["share"]):
                data = InstanceData("full") if arm.source == "full" else InstanceData("weak", seed=seed, share=share)
                run = Run(data, arm.trainer, tuple(sorted(options.items())), seed)
                resolved_options(run)  # unknown or impossible ones are refused before anything is trained
                grid.runs.setdefault(run.id, run)
                rows.append(Row(arm.name, share, seed, run.id))
    return grid, rows


def _custom(text: str) -> Arm:
    arm = parse_custom_arm(text)
    if arm.name in ARMS:
        raise ValueError(f"--arm {text}: the name {arm.name} belongs to one of the benchmark's own arms.")
    if arm.source not in ("weak", "full") or arm.kinds is not None:
        raise ValueError(f"--arm {text}: an arm has a share of the instances (say nothing) or all of them (@full).")
    if not arm.trainer.startswith(CRAC):
        raise ValueError(f"--arm {text}: expected a trainer named {CRAC}..., which predicts instances.")
    return arm


def survey(source: RawDataset, fixed: Mapping[str, Any], processes: int) -> tuple[SourceFacts, dict[str, Any]]:
    """Look at every file once: the facts, and the evaluation cases' files.

    Raises:
        ValueError: no instance dataset, labels are missing, there are no cases to evaluate on, or one of these has
            images of other channels than dataset.json names, or labels that cannot be read, do not fit the image or
            hold undeclared ids.
    """
    check_instances(source)
    split = choose_cases(source, fixed)
    evaluation = evaluation_files(source, fixed)
    (name,) = (name for name in source.json["labels"] if name not in ("background", "ignore"))
    jobs = [(case, source.reader_writer(), source.cases[case].label, source.ignore_label) for case in split.training]
    found = list(map_cases(_count, jobs, processes=processes, description="Reading labels"))
    to_check = [
        (RawCase(case, images, label), source.reader_writer(), source.ignore_label, len(source.json["channel_names"]))
        for case, (images, label) in evaluation.items()
    ]
    for _ in map_cases(_check_evaluation_case, to_check, processes=processes, description="Reading evaluation cases"):
        pass
    facts = SourceFacts(
        name=source.folder.name,
        folder=str(source.folder.resolve()),
        training=split.training,
        evaluation=tuple(evaluation),
        how=split.how,
        labels={"background": 0, name: 1},
        ignore=source.ignore_label,
        file_ending=source.file_ending,
        objects={case: {name: number} for case, number in found},
        not_boxed=(),
        checksums=checksums_of(source, split, evaluation),
    )
    return facts, evaluation


def _count(job: tuple[str, Any, Path, int | None]) -> tuple[str, int]:
    case, reader_writer, file, ignore = job
    values = np.unique(raw_dataset.read_label(reader_writer, file)[0])
    return case, int(((values > 0) & (values != (-1 if ignore is None else ignore))).sum())


def _check_evaluation_case(job: tuple[RawCase, Any, int | None, int]) -> None:
    """Refuse what the evaluation would stumble over, or take for `ignore`, once all is trained."""
    case, reader_writer, ignore, channels = job
    labels = read_evaluation_case(case, reader_writer, channels)
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    if low < 0 or (ignore is not None and high > ignore):
        raise ValueError(
            f"{case.label}: expected ids from 0 {'on' if ignore is None else f'to {ignore}'}, as dataset.json declares "
            f"them, but got {low} to {high}."
        )


class InstanceDatasets(Datasets):
    """The full dataset and, for each share and seed, one in which other instances are `ignore`."""

    def _raw(self, data: Data, folder: Path, name: str, needs: str | None, gpu: str | None) -> Counts:
        if not isinstance(data, InstanceData):
            raise TypeError(f"Expected InstanceData, but got {data}.")
        full = raw_dataset.read_dataset(self.place.raw / self.folder_name(InstanceData("full")))
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir()
        counted = write_sparse_labels(
            full,
            folder / "labelsTr",
            data.share,
            seed=data.seed,
            keep_background=self.fixed["keep_background"],
            processes=self.place.processes,
        )
        for case in full.cases.values():
            raw_dataset.link_case_images(case, folder / "imagesTr", full.file_ending)
        labels = {**full.json["labels"], "ignore": check_instances(full)}
        raw_dataset.write_json(folder / "dataset.json", {**full.json, "labels": labels, "name": name.split("_", 1)[1]})
        write_json(folder / LABELLED, counted)
        return Counts()

    def labelled(self, data: Data) -> dict[str, list[int]]:
        """By training case how many instances are labelled, and of how many."""
        if data.source == "full":
            return {case: [sum(found.values())] * 2 for case, found in self.facts.objects.items()}
        return raw_dataset.read_json(self.place.raw / self.folder_name(data) / LABELLED)


class InstanceTraining(Training):
    """Executes runs: nnUNetv2_train, `nnunet_dsp instances predict`, the measures of `nnunet_dsp instances evaluate`.

    Args:
        evaluation: how affinities become instances; a finished run that was evaluated otherwise is predicted anew with
            the network it has.
    """

    datasets: InstanceDatasets

    def __init__(
        self,
        place: Workplace,
        fixed: Mapping[str, Any],
        datasets: InstanceDatasets,
        runs: Mapping[str, Run],
        evaluation: Mapping[str, Any],
    ) -> None:
        # the optimiser is an option of the trainer here (make_grid), not of the schedule
        super().__init__(place, {**ACCURACY_DEFAULTS, **fixed, "optimizer": None}, datasets, runs)
        self.configuration = fixed
        self.evaluation = evaluation

    def finished(self, run: str) -> dict[str, Any] | None:
        """The run's record, if it was evaluated as is wanted now."""
        record = self.place.record(run)
        return record if record is not None and record["evaluation"] == self.evaluation else None

    def execute(self, run: Run, gpu: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
        record = self.finished(run.id)
        if record is None:
            with self.place.lock(run.id, f"Waiting for another process that works on {run.id}."):
                record = self.finished(run.id) or self._execute(run, gpu, progress)
        return record

    def _execute(self, run: Run, gpu: str | None, progress: Progress | None) -> dict[str, Any]:
        folder = self.place.run_folder(run.id)
        folder.mkdir(parents=True, exist_ok=True)
        dataset = self.datasets.make(run.data)
        plans = self._write_plans(run, dataset)
        trained = self._train(run, dataset, plans, gpu, progress)
        seconds = dict(trained["seconds"])
        full = self.place.raw / self.datasets.folder_name(InstanceData("full"))
        predictions = folder / "predictions"
        seconds["predict"] = self._predict(run, dataset, plans, full / "imagesTs", predictions, gpu)
        started = time.monotonic()
        facts = self.datasets.facts
        files = {case: predictions / f"{case}{facts.file_ending}" for case in facts.evaluation}
        jobs = [(case, full / "labelsTs" / file.name, file, facts.ignore) for case, file in files.items()]
        per_case = dict(map(measure_files, jobs))
        seconds["evaluate"] = time.monotonic() - started
        own = {
            "schedule": schedule(self.fixed, run.seed),
            "labelled": self.datasets.labelled(run.data),
            "configuration": dict(self.configuration),
            "evaluation": dict(self.evaluation),
            "evaluated_by": code_state(),
            "means": average(list(per_case.values())),
            "per_case": per_case,
            "checksums": {f"predictions/{file.name}": checksum(file) for file in files.values()},
        }
        return self._write_record(run, dataset, plans, trained, {"seconds": seconds, **own})

    def predict_command(self, dataset: str, trainer: str, plans: str, images: Path, output: Path) -> list[object]:
        """`nnunet_dsp instances predict` with a trained model; `trainer` is the class with the schedule."""
        model = self.place.results / dataset / f"{trainer}__{plans}__{self.fixed['configuration']}"
        how = self.evaluation
        words: list[object] = ["nnunet_dsp", "instances", "predict", "-i", images, "-o", output, "-m", model]
        words += ["-f", "all", "-device", self.place.device, "-step_size", how["step_size"], "--overwrite"]
        words += ["--decoder", how["decoder"], "--affinities", how["affinities"]]
        words += ["--threshold", how["threshold"]]
        if how["min_size"] is not None:
            words += ["--min-size", how["min_size"]]
        return words if how["foreground"] else [*words, "--no-foreground"]


__all__ = ["ARMS", "InstanceData", "InstanceDatasets", "InstanceTraining", "Row", "make_grid", "survey"]
