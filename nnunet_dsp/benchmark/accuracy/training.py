"""One run from its data to its record: plans, training (taken up where it stopped), prediction, evaluation."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dsp.benchmark.accuracy.annotators import deal
from nnunet_dsp.benchmark.accuracy.arms import DSP, Data, Run
from nnunet_dsp.benchmark.accuracy.cost import Counts
from nnunet_dsp.benchmark.accuracy.datasets import Datasets
from nnunet_dsp.benchmark.accuracy.measures import METRICS, SurfaceJob, class_means, mean, measure_case
from nnunet_dsp.benchmark.accuracy.workplace import (
    FINAL_CHECKPOINT,
    FORMAT,
    Workplace,
    checksum,
    code_state,
    machine,
    now,
    still_running,
    versions,
    write_json,
    write_text,
)
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.settings import PLANS_KEY, DSPSettings

SCHEDULE_KEY = "nnunet_dsp_benchmark"
OPTION_KEYS = {"nnUNetTrainerPrompt": "nnunet_dsp_prompt", "nnUNetTrainerCRAC": "nnunet_dsp_crac"}
PREDICTION_WORKERS = 3  # nnU-Net's own number: each holds an image and its probabilities
CHECKPOINTS = (FINAL_CHECKPOINT, "checkpoint_latest.pth", "checkpoint_best.pth")
Progress = Callable[[str, int, float | None], None]
"""Called as progress(run id, epochs done, loss or None)."""


def options_key(trainer: str) -> str:
    """Where in the plans a trainer looks for its options."""
    return next((key for prefix, key in OPTION_KEYS.items() if trainer.startswith(prefix)), PLANS_KEY)


def resolved_options(run: Run) -> dict[str, Any]:
    """All options of nnunet_dsp's own trainers, defaults included; of other trainers those that were given."""
    options = dict(run.options)
    if run.trainer == DSP:  # without importing torch
        default: Any = DSPSettings()
    else:
        default = None
        if run.trainer.startswith(("nnUNetTrainerDSP", *OPTION_KEYS)):
            import nnunet_dsp.trainers

            trainer = getattr(nnunet_dsp.trainers, run.trainer, None)
            default = getattr(trainer, "default_settings", None)
    if default is None:
        return options
    if hasattr(default, "seed"):
        options["seed"] = run.seed
    settings: dict[str, Any] = type(default).from_plans({options_key(run.trainer): options}, default).to_plans()
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # tuples as they come back from a file
    return plain


def epochs_of(fixed: Mapping[str, Any], run: Run) -> int:
    """How many epochs a run trains."""
    epochs: int = (run.is_pretraining and fixed["pretrain_epochs"]) or fixed["epochs"]
    return epochs


def schedule(fixed: Mapping[str, Any], seed: int, epochs: int | None = None) -> dict[str, Any]:
    """What the plans say under "nnunet_dsp_benchmark"; `epochs` are the configuration's unless given."""
    return {
        "num_epochs": epochs or fixed["epochs"],
        "iterations_per_epoch": fixed["iterations_per_epoch"],
        "val_iterations": fixed["val_iterations"],
        "seed": seed,
        "optimizer": fixed["optimizer"],
        "initial_lr": fixed["lr"],
        "precision": fixed["precision"],
    }


def plans_name(run: Run, options: Mapping[str, Any]) -> str:
    """A name that differs wherever seed, options or first weights do."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    name = f"Benchmark-s{run.seed}" + (f"-{digest}" if options else "")
    return name if run.pretrained is None else f"{name}-pretrained"


def outdated(place: Workplace, runs: Iterable[str]) -> list[str]:
    """A sentence for each of these runs that has finished and builds on a training that is gone, or was done anew.

    Records of earlier versions do not say what they build on; they are taken as they are.
    """
    found = []
    for run in runs:
        record = place.record(run) or {}
        for first, checkpoint in record.get("built_on", {}).items():
            if checkpoint is not None and place.model_checksum(first) != checkpoint:
                found.append(f"{run} builds on an earlier training of {first}.")
    return found


def refuse_outdated(place: Workplace, runs: Iterable[str]) -> None:
    """
    Raises:
        ValueError: one of these runs is outdated().
    """
    if found := outdated(place, runs):
        raise ValueError(
            "Finished runs build on trainings that were removed, or done anew, since:\n"
            + "\n".join(f"  {text}" for text in found[:20])
            + f"\nRemove their folders from {place.runs}, and their models from {place.results}, to train them anew."
        )


class Training:
    """Executes runs of one benchmark.

    Args:
        place: DIR.
        fixed: the configuration.
        datasets: makes what they train on.
        runs: all runs by id, those that others need among them.
    """

    def __init__(self, place: Workplace, fixed: Mapping[str, Any], datasets: Datasets, runs: Mapping[str, Run]) -> None:
        self.place, self.fixed, self.datasets, self.runs = place, fixed, datasets, runs
        datasets.predict = self._predict_with
        datasets.data_of = lambda name: self.runs[name].data

    def execute(self, run: Run, gpu: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
        """The run's record; whatever is missing of it is done."""
        for name in run.after:
            self.execute(self.runs[name], gpu, progress)
        record = self.place.record(run.id)
        if record is not None:
            refuse_outdated(self.place, [run.id])
            return record
        with self.place.lock(run.id, f"Waiting for another process that works on {run.id}."):
            record = self.place.record(run.id)
            if record is None:
                record = self._execute(run, gpu, progress)
        return record

    def _execute(self, run: Run, gpu: str | None, progress: Progress | None) -> dict[str, Any]:
        folder = self.place.run_folder(run.id)
        folder.mkdir(parents=True, exist_ok=True)
        dataset = self.datasets.make(run.data, run.needs, gpu)
        plans = self._write_plans(run, dataset)
        trained = self._train(run, dataset, plans, gpu, progress)
        seconds = {**trained["seconds"], "predict": 0.0, "evaluate": 0.0}
        model = self._model(run, dataset, plans)
        files = {
            CHECKPOINTS[0]: checksum(model / "fold_all" / CHECKPOINTS[0]),
            "plans.json": checksum(model / "plans.json"),
        }
        per_case: dict[str, Any] = {}
        if not run.is_pretraining:  # of which only the weights are used: it may not even know the same classes
            predictions = folder / "predictions"
            shutil.rmtree(predictions, ignore_errors=True)
            images = self.place.raw / self.datasets.folder_name(Data("full")) / "imagesTs"
            seconds["predict"] = self._predict(run, dataset, plans, images, predictions, gpu)
            started = time.monotonic()
            per_case = self._evaluate(run, dataset, plans, predictions)
            seconds["evaluate"] = time.monotonic() - started
            for file in sorted(predictions.iterdir()):
                if file.name.endswith(self.datasets.facts.file_ending) or file.name == "summary.json":
                    files[f"predictions/{file.name}"] = checksum(file)
        means = {metric: class_means(per_case, metric) for metric in METRICS}
        facts = self.datasets.facts
        own = {
            "schedule": schedule(self.fixed, run.seed, epochs_of(self.fixed, run)),
            "needs": run.needs,
            "pretrained": run.pretrained,
            "built_on": {name: self.place.model_checksum(name) for name in run.after},
            "cases": deal(run.data, facts.shown, facts.groups),
            "configuration": dict(self.fixed),
            "counts": asdict(self.datasets.counts(run.data) or Counts()),
            "means": {metric: {**values, "mean": mean(list(values.values()))} for metric, values in means.items()},
            "per_case": per_case,
            "checksums": files,
        }
        return self._write_record(run, dataset, plans, trained, {"seconds": seconds, **own})

    def _write_record(
        self, run: Run, dataset: str, plans: str, trained: Mapping[str, Any], own: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write the run's record, from which its report is made: what every benchmark notes, and its `own` facts."""
        record = {
            "format": FORMAT,
            "run": run.id,
            "data": asdict(run.data),
            "dataset": dataset,
            "trainer": run.trainer,
            "trainer_class": trained["trainer_class"],
            "plans": plans,
            "options": resolved_options(run),
            "seed": run.seed,
            "finished": now(),
            "interruptions": trained["interruptions"],
            "versions": versions(),
            "code": trained["code"],
            "code_before_interruption": trained.get("code_before_interruption", []),
            "machine": machine(self.place.device),
            **own,
        }
        write_json(self.place.record_file(run.id), record)
        return record

    # --- steps

    def _write_plans(self, run: Run, dataset: str) -> str:
        """This run's own plans: those of every arm, with its schedule and options. Returns their name."""
        options = resolved_options(run)
        name = plans_name(run, options)
        content = {**self.datasets.base_plans(dataset), "plans_name": name}
        content[SCHEDULE_KEY] = schedule(self.fixed, run.seed, epochs_of(self.fixed, run))
        if options:
            content[options_key(run.trainer)] = options
        write_json(self.place.preprocessed / dataset / f"{name}.json", content)
        return name

    def _model(self, run: Run, dataset: str, plans: str) -> Path:
        trainer = f"{run.trainer}_benchmark"
        return self.place.results / dataset / f"{trainer}__{plans}__{self.fixed['configuration']}"

    def _weights(self, run: Run) -> Path:
        """The last checkpoint of a run that has finished."""
        model = self._model(run, self.datasets.folder_name(run.data), plans_name(run, resolved_options(run)))
        return model / "fold_all" / CHECKPOINTS[0]

    def trainer_class(self, trainer: str) -> str:
        """The trainer with the benchmark's schedule, written into DIR/trainers unless nnunet_dsp brings it."""
        import nnunet_dsp.trainers

        name = f"{trainer}_benchmark"
        if name not in nnunet_dsp.trainers.__all__:
            text = TRAINER_MODULE.format(trainer=trainer)
            file = self.place.trainers / f"{name}.py"
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                write_text(file, text)
        return name

    def _train(self, run: Run, dataset: str, plans: str, gpu: str | None, progress: Progress | None) -> dict[str, Any]:
        """Train unless that is done; a training that was interrupted goes on where its last checkpoint is."""
        folder = self.place.run_folder(run.id)
        done = folder / "trained.json"
        output = self._model(run, dataset, plans) / "fold_all"
        if done.is_file() and (output / CHECKPOINTS[0]).is_file():
            return raw_dataset.read_json(done)
        pid_file = folder / "training.pid"
        if (pid := still_running(pid_file)) is not None:
            raise OSError(
                f"{run.id}: its training still runs as process {pid}, left behind by a benchmark that was killed. Wait "
                f"for it to end, or end it, and start again (or remove {pid_file} if that is no training)."
            )
        trainer = self.trainer_class(run.trainer)
        spent_file = folder / "interrupted.json"
        spent: dict[str, Any] = {"seconds": 0.0, "times": 0, "code": []}
        if spent_file.is_file():
            spent = raw_dataset.read_json(spent_file)
        words = ["nnUNetv2_train", dataset, self.fixed["configuration"], "all", "-tr", trainer, "-p", plans]
        words += ["-device", self.place.device]
        for name in CHECKPOINTS:
            if (output / name).is_file() and not zipfile.is_zipfile(output / name):
                (output / name).unlink()  # cut off while it was written
        if any((output / name).is_file() for name in CHECKPOINTS):
            words.append("--c")
        else:
            shutil.rmtree(output, ignore_errors=True)
            if run.pretrained is not None:
                words += ["-pretrained_weights", str(self._weights(self.runs[run.pretrained]))]
        code = code_state()
        before = [state for state in spent["code"] if state != code]
        started = time.monotonic()
        watch = EpochWatch(run.id, progress)
        try:
            self.place.command(*words, log=folder / "log.txt", gpu=gpu, on_line=watch, pid_file=pid_file)
        except BaseException:
            so_far = spent["seconds"] + time.monotonic() - started
            with contextlib.suppress(OSError):
                write_json(spent_file, {"seconds": so_far, "times": spent["times"] + 1, "code": [*before, code]})
            raise
        if not (output / CHECKPOINTS[0]).is_file():
            raise OSError(f"{run.id}: the training ended well but left no {CHECKPOINTS[0]} in {output}.")
        if watch.loss is not None and math.isnan(watch.loss):
            shutil.rmtree(output)  # going on from there would make it no better
            raise OSError(
                f"{run.id}: the loss is nan, so the network has learnt nothing, and its checkpoints are removed. "
                f"{folder / 'log.txt'} shows from which epoch on. A smaller --lr or --precision float32, in a new "
                "folder, may help."
            )
        train_seconds = spent["seconds"] + time.monotonic() - started
        seconds = {"train": train_seconds, "median_epoch": float(np.median(watch.epoch_times or [0.0]))}
        times = max(spent["times"], int("--c" in words))  # one that was killed outright could not write it down
        content = {"trainer_class": trainer, "seconds": seconds, "interruptions": times}
        content |= {"code": code, "code_before_interruption": before}
        write_json(done, content)
        spent_file.unlink(missing_ok=True)
        return content

    def predict_command(self, dataset: str, trainer: str, plans: str, images: Path, output: Path) -> list[object]:
        """nnUNetv2_predict with a trained model; `trainer` is the class with the schedule."""
        workers = min(self.place.processes, PREDICTION_WORKERS)
        words = ["nnUNetv2_predict", "-i", images, "-o", output, "-d", dataset, "-c", self.fixed["configuration"]]
        words += ["-f", "all", "-tr", trainer, "-p", plans, "-device", self.place.device, "-npp", workers]
        words += ["-nps", workers, "-step_size", self.fixed["step_size"], "--disable_progress_bar"]
        return words if self.fixed["tta"] else [*words, "--disable_tta"]

    def _predict(self, run: Run, dataset: str, plans: str, images: Path, output: Path, gpu: str | None = None) -> float:
        words = self.predict_command(dataset, self.trainer_class(run.trainer), plans, images, output)
        return self.place.command(*words, log=self.place.run_folder(run.id) / "log.txt", gpu=gpu)

    def _predict_with(self, run_id: str, images: Path, output: Path, gpu: str | None) -> None:
        run = self.runs[run_id]
        dataset = self.datasets.make(run.data, run.needs, gpu)
        self._predict(run, dataset, plans_name(run, resolved_options(run)), images, output, gpu)

    def _evaluate(self, run: Run, dataset: str, plans: str, predictions: Path) -> dict[str, Any]:
        """nnU-Net's Dice and IoU and our surface measures, by case and class name."""
        facts = self.datasets.facts
        full = self.place.raw / self.datasets.folder_name(Data("full"))
        truth = full / "labelsTs"
        words = ["nnUNetv2_evaluate_folder", truth, predictions, "-djfile", full / "dataset.json"]
        words += ["-pfile", predictions / "plans.json", "-np", self.place.processes]
        self.place.command(*words, log=self.place.run_folder(run.id) / "log.txt")
        summary = raw_dataset.read_json(predictions / "summary.json")
        reader_writer = raw_dataset.read_dataset(full).reader_writer()
        cases = list(facts.evaluation)
        ending, tolerance = facts.file_ending, self.fixed["tolerance"]
        jobs = [
            SurfaceJob(
                case,
                truth / f"{case}{ending}",
                predictions / f"{case}{ending}",
                reader_writer,
                facts.labels,
                facts.ignore,
                tolerance,
            )
            for case in cases
        ]
        if self.place.processes > 1:
            surfaces = dict(map_cases(measure_case, jobs, processes=self.place.processes, description="Surfaces"))
        else:  # a second bar would tear the first one apart
            surfaces = dict(map(measure_case, jobs))
        names = {str(value): name for name, value in facts.labels.items() if value != 0}
        by_case = {Path(entry["prediction_file"]).name: entry["metrics"] for entry in summary["metric_per_case"]}
        result: dict[str, Any] = {}
        for case in cases:
            found = by_case.get(f"{case}{facts.file_ending}")
            if found is None:
                raise ValueError(f"{predictions / 'summary.json'} holds nothing on case {case}.")
            result[case] = {}
            for value, name in names.items():
                entry, surface = found[value], surfaces[case][name]
                result[case][name] = {
                    "Dice": entry["Dice"],
                    "IoU": entry["IoU"],
                    "NSD": surface.nsd,
                    "HD95": surface.hd95,
                    **{key: entry[key] for key in ("TP", "FP", "FN")},
                }
        return result


class EpochWatch:
    """Reads epochs off nnUNetv2_train's output."""

    def __init__(self, run: str, progress: Progress | None) -> None:
        self.run, self.progress = run, progress
        self.epoch = 0
        self.loss: float | None = None
        self.epoch_times: list[float] = []

    def __call__(self, line: str) -> None:
        if found := re.search(r": Epoch (\d+)\s*$", line):
            self.epoch = int(found[1])
        elif found := re.search(r"train_loss (\S+)", line):
            with contextlib.suppress(ValueError):
                self.loss = float(found[1])
        elif found := re.search(r"Epoch time: ([\d.]+) s", line):
            self.epoch_times.append(float(found[1]))
            if self.progress is not None:
                self.progress(self.run, self.epoch + 1, self.loss)


TRAINER_MODULE = '''"""{trainer} for as long as the plans say; written by `nnunet_dsp benchmark accuracy`."""

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_dsp.trainers.benchmark_schedule import BenchmarkSchedule

Trainer = recursive_find_trainer_class_by_name("{trainer}")


class {trainer}_benchmark(BenchmarkSchedule, Trainer):
    """{trainer} for as long as the plans say."""
'''
