"""The command itself: reads DIR, decides what there is to do, does it, reports."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_dsp.benchmark.accuracy.arms import Grid
from nnunet_dsp.benchmark.accuracy.benchmark import ending_children, same_dataset, stored_config
from nnunet_dsp.benchmark.accuracy.command_lines import command_line, flag_of, shown_value, with_call, with_definitions
from nnunet_dsp.benchmark.accuracy.datasets import FULL
from nnunet_dsp.benchmark.accuracy.estimate import estimate
from nnunet_dsp.benchmark.accuracy.refusals import (
    check_least,
    check_training,
    refuse_changed_defaults,
    refuse_missing_gpu,
    refuse_unplanned,
)
from nnunet_dsp.benchmark.accuracy.source import SourceFacts, evaluation_files, verify_source
from nnunet_dsp.benchmark.accuracy.workplace import FORMAT, Workplace, say, write_json
from nnunet_dsp.benchmark.instances import EVALUATION, FIXED, HOW, SELECTION
from nnunet_dsp.benchmark.instances.report import write_report
from nnunet_dsp.benchmark.instances.runs import InstanceData, InstanceDatasets, InstanceTraining, Row, make_grid, survey
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.parallel import default_num_processes
from nnunet_dsp.dataset_conversion.raw_dataset import RawDataset
from nnunet_dsp.instances.decoders import EXTRA, available


@dataclass
class Wanted:
    """What a call asks for; see FIXED, EVALUATION, SELECTION and HOW. Calls: what was selected before."""

    fixed: dict[str, Any]
    evaluation: dict[str, Any]
    selection: dict[str, Any]
    how: dict[str, Any]
    calls: list[Mapping[str, Any]]


def run_benchmark(args: argparse.Namespace) -> int:
    """`nnunet_dsp benchmark instances`."""
    stored = stored_config(args.output)
    if stored is None and args.report_only:
        raise FileNotFoundError(f"{args.output} holds no benchmark (no benchmark.json). Is -o right?")
    wanted = merge(args, stored)
    check(wanted, args)
    grid, rows = make_grid(wanted.selection, wanted.fixed["optimizer"])
    place = Workplace(
        args.output,
        device=wanted.how["device"],
        threads=wanted.how["threads"],
        processes=wanted.how["num_processes"] or default_num_processes(),
    )
    if args.report_only:
        asked = [Row(*row)._asdict() for row in raw_dataset.read_json(place.plan_file)["rows"]]
        columns = {"arms": "arm", "share": "share", "seeds": "seed"}
        refuse_unplanned(args, stored["selection"] if stored else {}, asked, columns)
        return _report(place, wanted)
    if not args.plan or args.time:
        refuse_missing_gpu(place.device)
        if not available(wanted.evaluation["decoder"]):
            extra = EXTRA[wanted.evaluation["decoder"]]
            raise ImportError(
                f"--decoder {wanted.evaluation['decoder']} is not installed. Install it with `pip install "
                f"nnunet-dsp[{extra}]`, or choose --decoder components"
            )
    if args.plan and not args.time:
        facts = _facts(place, wanted)[0]
        refuse_changed_defaults(place, grid)
        print(_data(facts, wanted))
        print(estimate(_training(place, wanted, facts, grid, _plan(place, grid, rows)), grid, jobs=args.jobs or 1))
        return 0
    place.make()
    with place.lock("setup", f"Waiting for another process that sets {args.output} up."), ending_children(place):
        wanted = merge(args, stored_config(args.output))  # again: it may have been set up while this one waited
        grid, rows = make_grid(wanted.selection, wanted.fixed["optimizer"])
        training = _set_up(place, wanted, grid, rows)
    if args.plan:
        print(_data(training.datasets.facts, wanted))
        with ending_children(place):
            print(estimate(training, grid, jobs=args.jobs or 1, time_now=True))
        return 0
    failed = _train_all(training, grid, args.jobs or 1)
    _report(place, wanted)
    for run, error in failed.items():
        print(f"\n{run} failed; start again to try it anew:\n{error}", file=sys.stderr)
    return 1 if failed else 0


# --- configuration


def merge(args: argparse.Namespace, stored: Mapping[str, Any] | None) -> Wanted:
    """What was given now, else what DIR remembers, else the default.

    Raises:
        ValueError: something fixed differs from what DIR was begun with, or DIR belongs to another benchmark.
    """
    if stored is not None and (stored.get("format") != FORMAT or stored.get("benchmark") != "instances"):
        raise ValueError(
            f"{args.output / 'benchmark.json'} was not written by this version of `nnunet_dsp benchmark instances`. "
            "Choose a new folder with -o."
        )
    if args.dataset is not None:
        if stored is not None and same_dataset(args.dataset, stored["fixed"]["dataset"]):
            args.dataset = None
        else:
            args.dataset = raw_dataset.dataset_name(args.dataset)

    def remembered(part: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        memory = {} if stored is None else stored[part]
        given = {name: getattr(args, name) for name in defaults}
        return {
            name: memory.get(name, default) if given[name] is None else given[name]
            for name, default in defaults.items()
        }

    fixed = remembered("fixed", FIXED)
    if stored is not None:
        begun = {name: stored["fixed"].get(name, default) for name, default in FIXED.items()}
        differences = [n for n in FIXED if fixed[n] != begun[n]]
        if differences:
            told = [f"  {flag_of(n)}: {shown_value(begun[n])} there, {shown_value(fixed[n])} now" for n in differences]
            raise ValueError(
                f"{args.output} was begun with another configuration, and its runs could not be compared with new "
                "ones:\n" + "\n".join(told) + "\n"
                "Leave these options out to go on as it was begun, or choose a new folder with -o."
            )
    if fixed["dataset"] is None:
        raise ValueError(f"-d is missing: which dataset? ({args.output} holds no benchmark yet.)")
    selection = remembered("selection", SELECTION)
    selection["arm"] = with_definitions([] if stored is None else stored["selection"]["arm"], args.arm or [])
    calls = [] if stored is None else stored.get("calls", [stored["selection"]])
    return Wanted(fixed, remembered("evaluation", EVALUATION), selection, remembered("how", HOW), calls)


def check(wanted: Wanted, args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be meant; ValueError."""
    check_training({**wanted.fixed, **wanted.how}, wanted.selection["seeds"], args)
    check_least(wanted.evaluation, {"min_size": 0})
    step_size, threshold = wanted.evaluation["step_size"], wanted.evaluation["threshold"]
    if not 0 < step_size <= 0.5:
        raise ValueError(f"--step-size: expected a number above 0, up to 0.5, but got {step_size}.")
    if not 0 < threshold < 1:
        raise ValueError(f"--threshold: expected a number between 0 and 1, but got {threshold}.")


# --- setting up


def _facts(place: Workplace, wanted: Wanted) -> tuple[SourceFacts, RawDataset, dict[str, Any]]:
    """The facts that DIR holds, verified, or else a look at every file; the source; the evaluation cases' files."""
    if place.source_file.is_file():
        facts = SourceFacts.read(place.source_file)
        folder = Path(facts.folder)
        source = raw_dataset.read_dataset(folder if folder.is_dir() else wanted.fixed["dataset"])
        verify_source(facts, source)
        return facts, source, evaluation_files(source, wanted.fixed)
    source = raw_dataset.read_dataset(wanted.fixed["dataset"])
    facts, evaluation = survey(source, wanted.fixed, place.processes)
    return facts, source, evaluation


def _set_up(place: Workplace, wanted: Wanted, grid: Grid, rows: Sequence[Row]) -> InstanceTraining:
    """Look at the source, write down what is wanted, make the dataset of all instances."""
    facts, source, evaluation = _facts(place, wanted)
    refuse_changed_defaults(place, grid)
    if not place.source_file.is_file():
        write_json(place.source_file, asdict(facts))
    plan = _plan(place, grid, rows)
    write_json(place.plan_file, plan)
    wanted.calls = with_call(wanted.calls, wanted.selection)
    write_json(place.config_file, {"format": FORMAT, "benchmark": "instances", **asdict(wanted)})
    training = _training(place, wanted, facts, grid, plan)
    training.datasets.make_full(source, evaluation)
    return training


def _plan(place: Workplace, grid: Grid, rows: Sequence[Row]) -> dict[str, Any]:
    """plan.json with what is asked for now: dataset numbers by name, and all rows asked for so far."""
    plan: dict[str, Any] = {"datasets": {InstanceData("full").name: FULL}, "rows": []}
    if place.plan_file.is_file():
        plan = raw_dataset.read_json(place.plan_file)
    for run in grid.runs.values():
        plan["datasets"].setdefault(run.data.name, max(plan["datasets"].values()) + 1)
    if max(plan["datasets"].values()) > 999:
        raise ValueError("nnU-Net knows 999 datasets, and this benchmark needs more. Split it over several folders.")
    known = {row[:-1]: row for row in (Row(*row) for row in plan["rows"])}
    known |= {row[:-1]: row for row in rows}
    return {**plan, "rows": [list(row) for row in known.values()]}


def _training(
    place: Workplace, wanted: Wanted, facts: SourceFacts, grid: Grid, plan: Mapping[str, Any]
) -> InstanceTraining:
    datasets = InstanceDatasets(place, facts, wanted.fixed, plan["datasets"])
    return InstanceTraining(place, wanted.fixed, datasets, grid.runs, wanted.evaluation)


# --- doing it


def _train_all(training: InstanceTraining, grid: Grid, jobs: int) -> dict[str, BaseException]:
    """Every run without a record, `jobs` at a time; those that failed, with what went wrong."""
    from tqdm import tqdm

    waiting = [run for run in grid.runs.values() if training.finished(run.id) is None]
    say(f"{len(grid.runs)} runs, {len(grid.runs) - len(waiting)} of them finished, {len(waiting)} to do.")
    epochs = training.fixed["epochs"]
    failed: dict[str, BaseException] = {}
    seen: dict[str, int] = {}
    guard = threading.Lock()
    bar = tqdm(total=len(waiting) * epochs, unit="epoch", desc="Training", mininterval=1.0, disable=not waiting)

    def progress(run: str, epoch: int, loss: float | None = None) -> None:
        with guard:
            bar.update(max(0, epoch - seen.get(run, 0)))
            seen[run] = max(epoch, seen.get(run, 0))
            if loss is not None:
                bar.write(f"  {run}: epoch {epoch} of {epochs}, loss {loss:.3f}")

    with bar, ending_children(training.place), ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(training.execute, run, None, progress): run.id for run in waiting}
        try:
            for future in as_completed(futures):
                run, error = futures[future], future.exception()
                progress(run, epochs)
                if error is None:
                    arand = future.result()["means"]["arand"]
                    bar.write(f"{run}: finished, ARAND {'none' if arand is None else f'{arand:.3f}'}")
                elif isinstance(error, (OSError, ValueError)):
                    failed[run] = error
                    bar.write(f"{run}: failed")
                else:
                    raise error
        except BaseException:
            training.place.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


# --- saying it


def _data(facts: SourceFacts, wanted: Wanted) -> str:
    counts = sorted(sum(found.values()) for found in facts.objects.values())
    shares = ", ".join(f"{share:g}" for share in wanted.selection["share"])
    return (
        f"{facts.name}: {len(facts.training)} training cases with {counts[0]} to {counts[-1]} instances, of which a "
        f"share of {shares} is labelled; {len(facts.evaluation)} cases to evaluate on ({facts.how})."
    )


def _report(place: Workplace, wanted: Wanted) -> int:
    facts = SourceFacts.read(place.source_file)
    order = {arm: number for number, arm in enumerate(wanted.selection["arms"])}
    rows = [Row(*row) for row in raw_dataset.read_json(place.plan_file)["rows"]]
    rows.sort(key=lambda row: (-row.share if row.share == 1 else row.share, order.get(row.arm, len(order))))
    fixed, evaluation, how = (wanted.fixed, FIXED), (wanted.evaluation, EVALUATION), (wanted.how, HOW)
    commands = [
        command_line("instances", place.folder.name, (fixed, evaluation, (selection, SELECTION), how))
        for selection in wanted.calls
    ]
    print(write_report(place, facts, wanted.fixed, wanted.evaluation, rows, commands))
    return 0


__all__ = ["Wanted", "merge", "run_benchmark"]
