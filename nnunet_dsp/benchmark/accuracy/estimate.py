"""`--plan`: what there is to do, and how long it takes, by finished runs or by a few timed iterations."""

from __future__ import annotations

import shutil
import time
from typing import Any

from nnunet_dsp.benchmark.accuracy.arms import Data, Grid, Run, left_out_texts
from nnunet_dsp.benchmark.accuracy.measures import mean
from nnunet_dsp.benchmark.accuracy.training import (
    SCHEDULE_KEY,
    EpochWatch,
    Training,
    epochs_of,
    options_key,
    resolved_options,
    schedule,
)
from nnunet_dsp.benchmark.accuracy.workplace import say, write_json
from nnunet_dsp.dataset_conversion import raw_dataset

TIMED_ITERATIONS = 10


def estimate(training: Training, grid: Grid, *, jobs: int = 1, time_now: bool = False, gpu: str | None = None) -> str:
    """The runs to do and the time they take.

    Args:
        jobs: how many run side by side. They are taken to be as fast as alone, which holds where each has its own
            GPU or cores.
        time_now: time a few iterations of each trainer that no finished run tells about.
        gpu: on which; CUDA_VISIBLE_DEVICES.
    """
    waiting = [run for run in grid.runs.values() if training.place.record(run.id) is None]
    known = _known_seconds(training)
    if time_now:
        for run in waiting:
            if run.trainer not in known and run.needs is None:
                known[run.trainer] = _time(training, run, gpu)
    lines = [f"{len(grid.runs)} runs, {len(grid.runs) - len(waiting)} of them finished. To do:"]
    seconds: list[float | None] = []
    for run in waiting:
        expected = known.get(run.trainer)
        if expected is not None:
            expected *= epochs_of(training.fixed, run) / training.fixed["epochs"]
        seconds.append(expected)
        then = f", after {' and '.join(run.after)}" if run.after else ""
        lines.append(f"  {run.id}{then}   {'time unknown' if expected is None else duration(expected)}")
    if not waiting:
        lines = [f"All {len(grid.runs)} runs have finished."]
    lines += left_out_texts(grid.left_out)
    told = [value for value in seconds if value is not None]
    if told:
        unknown = len(seconds) - len(told)
        guessed = sum(told) + unknown * sum(told) / len(told)
        lines.append(
            f"About {duration(guessed / min(jobs, len(waiting)))}"
            + (f" with {jobs} side by side" if jobs > 1 else "")
            + (f", {unknown} of them guessed by the others" if unknown else "")
            + "."
        )
    elif waiting:
        lines.append("How long is not known before a run has finished; --plan --time times a few iterations.")
    return "\n".join(lines)


def _known_seconds(training: Training) -> dict[str, float]:
    """Seconds a run takes, by trainer: mean of the finished runs, else of the timing; of pre-training nothing is
    predicted, so it does not count."""
    found: dict[str, list[float]] = {}
    for run in training.runs.values():
        record = None if run.is_pretraining else training.place.record(run.id)
        if record is not None:
            parts = (record["seconds"][key] for key in ("train", "predict", "evaluate"))
            found.setdefault(run.trainer, []).append(sum(parts))
    file = training.place.folder / "timing.json"
    timed: dict[str, Any] = raw_dataset.read_json(file) if file.is_file() else {}
    return {**timed, **{trainer: mean(values) for trainer, values in found.items()}}


def _time(training: Training, run: Run, gpu: str | None) -> float:
    """Seconds that a run like this one takes: two short epochs of it, its prediction, and the rest by proportion."""
    place, fixed = training.place, training.fixed
    iterations = min(TIMED_ITERATIONS, fixed["iterations_per_epoch"])
    say(f"Timing {iterations} iterations of {run.trainer}.")
    dataset = training.datasets.make(run.data, run.needs, gpu)
    options = resolved_options(run)
    plans = f"Timing-{run.trainer}"
    content = {**training.datasets.base_plans(dataset), "plans_name": plans}
    content[SCHEDULE_KEY] = {**schedule(fixed, run.seed), "num_epochs": 2, "iterations_per_epoch": iterations}
    if options:
        content[options_key(run.trainer)] = options
    write_json(place.preprocessed / dataset / f"{plans}.json", content)
    trainer = training.trainer_class(run.trainer)
    log = place.folder / "timing" / "log.txt"
    model = place.results / dataset / f"{trainer}__{plans}__{fixed['configuration']}"
    shutil.rmtree(model, ignore_errors=True)
    watch = EpochWatch(run.id, None)
    words = ["nnUNetv2_train", dataset, fixed["configuration"], "all", "-tr", trainer, "-p", plans]
    total = place.command(*words, "-device", place.device, log=log, gpu=gpu, on_line=watch)
    started = time.monotonic()
    images = place.raw / training.datasets.folder_name(Data("full")) / "imagesTs"
    predicted = place.folder / "timing" / "predicted"
    place.command(*training.predict_command(dataset, trainer, plans, images, predicted), log=log, gpu=gpu)
    prediction = time.monotonic() - started
    shutil.rmtree(predicted, ignore_errors=True)
    shutil.rmtree(model, ignore_errors=True)
    epoch = watch.epoch_times[-1]  # the first one waits for the loader and warms up
    start = max(0.0, total - sum(watch.epoch_times))
    seconds = start + fixed["epochs"] * epoch * fixed["iterations_per_epoch"] / iterations + prediction
    file = place.folder / "timing.json"
    timed = raw_dataset.read_json(file) if file.is_file() else {}
    write_json(file, {**timed, run.trainer: seconds})
    return seconds


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"
