"""The command itself: reads DIR, decides what there is to do, does it, reports."""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_dsp.benchmark.accuracy import FIXED, HOW, LATER, SELECTION
from nnunet_dsp.benchmark.accuracy.arms import (
    PRETRAINED,
    Data,
    Facts,
    Grid,
    Row,
    Run,
    left_out_texts,
    make_grid,
    parse_arm,
    parse_custom_arm,
    parse_setting,
)
from nnunet_dsp.benchmark.accuracy.command_lines import command_line, flag_of, shown_value, with_call, with_definitions
from nnunet_dsp.benchmark.accuracy.cost import parse_prices
from nnunet_dsp.benchmark.accuracy.datasets import FULL, Datasets
from nnunet_dsp.benchmark.accuracy.pretraining import PretrainingFacts, look_at_pretraining
from nnunet_dsp.benchmark.accuracy.refusals import (
    check_numbers,
    refuse_changed_defaults,
    refuse_missing_gpu,
    refuse_unknown_trainers,
    refuse_unplanned,
)
from nnunet_dsp.benchmark.accuracy.source import SourceFacts, evaluation_files, survey, verify_source
from nnunet_dsp.benchmark.accuracy.training import Training, epochs_of, refuse_outdated, resolved_options
from nnunet_dsp.benchmark.accuracy.workplace import FORMAT, Workplace, say, stdout_to_stderr, write_json
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.parallel import default_num_processes
from nnunet_dsp.dataset_conversion.raw_dataset import RawDataset


@dataclass
class Wanted:
    """What a call asks for: what may not change in DIR, what is selected, how it is done; what was selected before."""

    fixed: dict[str, Any]
    selection: dict[str, Any]
    how: dict[str, Any]
    calls: list[Mapping[str, Any]]


def run_benchmark(args: argparse.Namespace) -> int:
    """`nnunet_dsp benchmark accuracy`."""
    folder = args.output
    stored = stored_config(folder)
    if stored is None and (args.run or args.report_only):
        raise FileNotFoundError(f"{folder} holds no benchmark (no benchmark.json). Is -o right?")
    wanted = merge(args, stored)
    check_numbers(wanted.fixed, wanted.selection, wanted.how, args)
    parse_prices(wanted.how["cost"])
    place = Workplace(
        folder,
        device=wanted.how["device"],
        threads=wanted.how["threads"],
        processes=wanted.how["num_processes"] or default_num_processes(),
    )
    if args.report_only:
        columns = {"arms": "arm", "settings": "setting", "masks": "masks", "weak": "weak", "seeds": "seed"}
        rows = [Row(*row)._asdict() for row in read_plan(place)["rows"]]
        refuse_unplanned(args, stored["selection"] if stored else {}, rows, columns)
        return _report(place, wanted)
    if not args.commands and (not args.plan or args.time):
        refuse_missing_gpu(place.device)
    if args.run:
        return _one_run(place, wanted, args.run, gpus_of(args)[0])
    if args.plan and not args.time:
        facts, source, evaluation = _facts(place, wanted, with_checksums=False)
        _pretraining_facts(place, wanted, facts, source, evaluation, with_checksums=False)
        grid = _grid(place, wanted, facts)
        return _say_plan(place, wanted, facts, grid, args)
    place.make()
    with (
        stdout_to_stderr() if args.commands else nullcontext(),  # there are only commands on stdout then
        place.lock("setup", f"Waiting for another process that sets {folder} up."),
        ending_children(place),
    ):
        wanted = merge(args, stored_config(folder))  # again: it may have been set up while this one waited
        facts, grid = _set_up(place, wanted)
    if args.plan:
        return _say_plan(place, wanted, facts, grid, args)
    if args.commands:
        _print_commands(place, grid)
        return 0
    failed = _train_all(place, wanted, facts, grid, args)
    _report(place, wanted)
    if failed:
        print(f"\n{len(failed)} run(s) failed; start again to try them anew:", file=sys.stderr)
        for run, error in failed.items():
            text = str(error)
            print("\n" + (text if text.startswith(run) else f"{run}: {text}"), file=sys.stderr)
        return 1
    return 0


# --- configuration


def stored_config(folder: Path) -> dict[str, Any] | None:
    """benchmark.json of DIR, None where there is none yet."""
    file = Workplace(folder).config_file
    return raw_dataset.read_json(file) if file.is_file() else None


def merge(args: argparse.Namespace, stored: Mapping[str, Any] | None) -> Wanted:
    """What was given now, else what DIR remembers, else the default.

    Raises:
        ValueError: something fixed differs from what DIR was begun with; the message says what.
    """
    if stored is not None and stored.get("benchmark", "accuracy") != "accuracy":
        raise ValueError(
            f"{args.output} belongs to `nnunet_dsp benchmark {stored['benchmark']}`. Choose a new folder with -o."
        )
    if stored is not None and stored.get("format") != FORMAT:
        raise ValueError(
            f"{args.output / 'benchmark.json'} is of format {stored.get('format')}, and this version writes {FORMAT}. "
            "Choose a new folder with -o."
        )
    place = Workplace(args.output)
    fixed: dict[str, Any] = {}
    differences = []
    if args.dataset is not None and (stored is None or not same_dataset(args.dataset, stored["fixed"]["dataset"])):
        args.dataset = raw_dataset.dataset_name(args.dataset)
    elif stored is not None:
        args.dataset = None
    if args.pretrain is not None:
        known = None if stored is None else stored["fixed"].get("pretrain")
        same = known is not None and same_dataset(args.pretrain, known)
        args.pretrain = known if same else raw_dataset.dataset_name(args.pretrain)
    later = stored is not None and stored["fixed"].get("pretrain") is None
    for name, default in FIXED.items():
        given = getattr(args, name)
        value = default if given is None else given
        if stored is not None:
            value = stored["fixed"].get(name, default)
            if later and name in LATER:
                value = given
            elif given is not None and given != value:
                differences.append(f"{flag_of(name)}: {shown_value(value)} there, {shown_value(given)} now")
        fixed[name] = value
    if differences:
        trained = any(place.runs.glob("*"))
        raise ValueError(
            f"{args.output} was begun with another configuration, and its runs could not be compared with new ones:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nLeave these options out to go on as it was begun, or choose a new folder with -o."
            + ("" if trained else f" Nothing has been trained there, so you can remove {place.folder}.")
        )
    if fixed["dataset"] is None:
        raise ValueError(f"-d is missing: which dataset? ({args.output} holds no benchmark yet.)")
    memory = {} if stored is None else {**stored["selection"], **stored["how"]}

    def remembered(defaults: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: getattr(args, name) if getattr(args, name) is not None else memory.get(name, default)
            for name, default in defaults.items()
        }

    selection = remembered(SELECTION)
    earlier = [] if stored is None else stored["selection"]["arm"]
    selection["arm"] = with_definitions(earlier, args.arm or [], _untrained(place, earlier))
    calls = [] if stored is None else stored.get("calls", [stored["selection"]])
    return Wanted(fixed, selection, remembered(HOW), calls)


def _defined_by(arm: str) -> str:
    """The name that --arm gives: without :pretrained and :second, and without what a text says after it."""
    return re.split("[: ]", arm, maxsplit=1)[0]


def _untrained(place: Workplace, definitions: Sequence[str]) -> set[str]:
    """Names of the user's arms that no run has finished for."""
    names = {text.partition("=")[0] for text in definitions}
    rows = (Row(*row) for row in read_plan(place)["rows"])
    return names - {_defined_by(row.arm) for row in rows if place.record_file(row.run).is_file()}


def _forget_redefined(place: Workplace, wanted: Wanted) -> set[str]:
    """Names of arms that are defined anew; the calls that named them by their earlier definition leave them out."""
    stored = stored_config(place.folder)
    earlier = [] if stored is None else stored["selection"]["arm"]
    names = {text.partition("=")[0] for text in earlier if text not in wanted.selection["arm"]}
    if names:
        wanted.calls = [
            {
                **call,
                "arms": [arm for arm in call["arms"] if _defined_by(arm) not in names],
                "arm": [text for text in call["arm"] if text.partition("=")[0] not in names],
            }
            for call in wanted.calls
        ]
        wanted.calls = [call for call in wanted.calls if call["arms"]]
    return names


def same_dataset(given: str, name: str) -> bool:
    """Whether what a user gave as -d, a number or a name, means the dataset of this name."""
    return given == name or (given.isdigit() and f"Dataset{int(given):03d}_" == name[:11])


def selected(selection: Mapping[str, Any], facts: Facts) -> Grid:
    """The grid of what is selected; ValueError where a name or an option of a trainer is unknown."""
    custom = {arm.name: arm for arm in map(parse_custom_arm, selection["arm"])}
    arms = [parse_arm(name, custom) for name in dict.fromkeys(selection["arms"])]
    settings = [parse_setting(name) for name in dict.fromkeys(selection["settings"])]
    masks, weak, seeds = (list(dict.fromkeys(selection[key])) for key in ("masks", "weak", "seeds"))
    grid = make_grid(arms, settings, masks, weak, seeds, facts)
    arm_of = {row.run: f"arm `{row.arm}`" for row in grid.rows}
    for run in grid.runs.values():
        try:
            resolved_options(run)
        except ValueError as error:
            raise ValueError(f"{arm_of.get(run.id, run.id)}: {error}") from None
    return grid


def _grid(place: Workplace, wanted: Wanted, facts: SourceFacts) -> Grid:
    """What is selected, on this dataset.

    Raises:
        ValueError: nothing of it can be trained, or defaults have changed since a run finished, or what it builds on.
    """
    grid = selected(wanted.selection, Facts(len(facts.training), facts.boxes_exclude(wanted.fixed)))
    if not grid.rows:
        raise ValueError("\n".join(["Nothing is left to train.", *left_out_texts(grid.left_out)]))
    refuse_changed_defaults(place, grid)
    refuse_outdated(place, grid.runs)
    return grid


# --- setting up


def _facts(
    place: Workplace, wanted: Wanted, *, with_checksums: bool = True
) -> tuple[SourceFacts, RawDataset, dict[str, Any]]:
    """The facts that DIR holds, verified, or else a look at every file; the source; the evaluation cases' files."""
    if place.source_file.is_file():
        facts = SourceFacts.read(place.source_file)
        folder = Path(facts.folder)
        source = raw_dataset.read_dataset(folder if folder.is_dir() else wanted.fixed["dataset"])
        if with_checksums:
            verify_source(facts, source)
        return facts, source, evaluation_files(source, wanted.fixed)
    selected(wanted.selection, Facts(10**6))  # names first: reading masks may take long
    source = raw_dataset.read_dataset(wanted.fixed["dataset"])
    facts, evaluation = survey(source, wanted.fixed, place.processes, with_checksums=with_checksums)
    facts.weak_options(wanted.fixed)
    return facts, source, evaluation


def _pretraining_facts(
    place: Workplace,
    wanted: Wanted,
    facts: SourceFacts,
    source: RawDataset,
    evaluation: dict[str, Any],
    *,
    with_checksums: bool = True,
) -> PretrainingFacts | None:
    """What DIR holds on the dataset of --pretrain, verified until it is preprocessed; or a first look at it.

    Raises:
        ValueError: an arm wants to be pre-trained, and no dataset is given.
    """
    custom = {arm.name: arm for arm in map(parse_custom_arm, wanted.selection["arm"])}
    arms = [arm.name for arm in (parse_arm(name, custom) for name in wanted.selection["arms"]) if arm.pretrained]
    dataset = wanted.fixed["pretrain"]
    if dataset is None:
        if arms:
            raise ValueError(f"arm `{arms[0]}`: pre-trained on what? Name a dataset with masks: --pretrain DATASET.")
        return None
    if not arms:
        say(f"No arm is pre-trained on {dataset}. Ask for some, such as --arms masks masks{PRETRAINED}.")
    if not place.pretraining_file.is_file():
        return look_at_pretraining(dataset, source, evaluation, facts.checksums, with_checksums=with_checksums)
    known = PretrainingFacts.read(place.pretraining_file)
    numbers, data = read_plan(place)["datasets"], Data("pretrain")
    made = data.name in numbers and Datasets(place, facts, wanted.fixed, numbers).ready(data) is not None
    if with_checksums and not made:
        verify_source(known, raw_dataset.read_dataset(Path(known.folder)))
    return known


def _set_up(place: Workplace, wanted: Wanted) -> tuple[SourceFacts, Grid]:
    """Look at the source, write down what is wanted, make the dataset of all masks."""
    facts, source, evaluation = _facts(place, wanted)
    other = _pretraining_facts(place, wanted, facts, source, evaluation)
    grid = _grid(place, wanted, facts)
    refuse_unknown_trainers(grid)
    for text in left_out_texts(grid.left_out):
        say(text)
    if any(row.masks == len(facts.training) for row in grid.rows):
        say(
            f"--masks {len(facts.training)}: every training case keeps its mask, so no weak annotations are left. Arms "
            "that differ in their annotations only are the same training then; `masks` is `full`."
        )
    if not place.source_file.is_file():
        write_json(place.source_file, asdict(facts))
    if other is not None and not place.pretraining_file.is_file():
        write_json(place.pretraining_file, asdict(other))
    numbers = _extend_plan(place, grid, _forget_redefined(place, wanted))
    wanted.calls = with_call(wanted.calls, wanted.selection)
    write_json(place.config_file, {"format": FORMAT, **asdict(wanted)})
    Datasets(place, facts, wanted.fixed, numbers).make_full(source, evaluation)
    return facts, grid


def read_plan(place: Workplace) -> dict[str, Any]:
    """plan.json, or an empty one."""
    if not place.plan_file.is_file():
        return {"datasets": {Data("full").name: FULL}, "runs": {}, "rows": []}
    return raw_dataset.read_json(place.plan_file)


def _extend_plan(place: Workplace, grid: Grid, redefined: Collection[str]) -> dict[str, int]:
    """Add what is asked for now to plan.json, without the earlier rows of redefined arms; dataset numbers by name."""
    plan = read_plan(place)
    for run in grid.runs.values():
        if run.data.name not in plan["datasets"]:
            plan["datasets"][run.data.name] = max(plan["datasets"].values()) + 1
        plan["runs"][run.id] = asdict(run)
    if max(plan["datasets"].values()) > 999:
        raise ValueError("nnU-Net knows 999 datasets, and this benchmark needs more. Split it over several folders.")
    earlier = (Row(*row) for row in plan["rows"])
    rows = {row[:-1]: row for row in earlier if _defined_by(row.arm) not in redefined}
    rows |= {row[:-1]: row for row in grid.rows}
    plan["rows"] = [list(row) for row in rows.values()]
    left_out = {what: why for what, why in plan.get("left_out", {}).items() if _defined_by(what) not in redefined}
    plan["left_out"] = {**left_out, **grid.left_out}
    write_json(place.plan_file, plan)
    return dict(plan["datasets"])


def runs_of(plan: Mapping[str, Any]) -> dict[str, Run]:
    """The runs in plan.json."""
    result = {}
    for name, content in plan["runs"].items():
        data = dict(content["data"])
        data.pop("extra", None)  # of earlier versions, never used
        for key in ("kinds", "dealt"):
            data[key] = tuple(data[key])
        options = tuple((key, value) for key, value in content["options"])
        trainer, seed, needs = (content[key] for key in ("trainer", "seed", "needs"))
        result[name] = Run(Data(**data), trainer, options, seed, needs, content.get("pretrained"))
    return result


def _training(place: Workplace, wanted: Wanted, facts: SourceFacts, grid: Grid | None = None) -> Training:
    plan = read_plan(place)
    datasets = Datasets(place, facts, wanted.fixed, plan["datasets"])
    return Training(place, wanted.fixed, datasets, {**runs_of(plan), **(grid.runs if grid else {})})


# --- doing it


def gpus_of(args: argparse.Namespace) -> list[str | None]:
    """What the jobs take turns on; CUDA_VISIBLE_DEVICES, None where it stays as it is."""
    return list(args.gpus or [None])


def jobs_of(args: argparse.Namespace) -> int:
    """How many trainings run side by side: one for each GPU unless --jobs says."""
    return args.jobs or len(gpus_of(args))


def _one_run(place: Workplace, wanted: Wanted, name: str, gpu: str | None) -> int:
    facts = SourceFacts.read(place.source_file)
    training = _training(place, wanted, facts)
    if name not in training.runs:
        raise ValueError(f"--run: {place.plan_file} knows no run {name!r}. `--commands` prints those there are.")
    if training.datasets.ready(Data("full")) is None:
        raise ValueError(f"{place.folder} is not set up yet. Call it with --commands first; that prepares the data.")
    with ending_children(place):
        record = training.execute(training.runs[name], gpu, progress=_print_progress(training))
    value = record["means"]["Dice"]["mean"]
    print(name if value is None else f"{name}: mean Dice {value:.3f}")
    return 0


def _print_progress(training: Training) -> Any:
    def progress(run: str, epoch: int, loss: float | None) -> None:
        epochs = epochs_of(training.fixed, training.runs[run])
        say(f"  {run}: epoch {epoch} of {epochs}" + ("" if loss is None else f", loss {loss:.3f}"))

    return progress


@contextmanager
def ending_children(place: Workplace) -> Iterator[None]:
    """A SIGTERM ends the commands too, as Ctrl-C does; nothing is left running."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except BaseException:
        place.stop()
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _train_all(
    place: Workplace, wanted: Wanted, facts: SourceFacts, grid: Grid, args: argparse.Namespace
) -> dict[str, BaseException]:
    """Every run that has no record, `--jobs` at a time, each on the GPU that has been free for longest; those that
    failed, with what went wrong."""
    from tqdm import tqdm

    training = _training(place, wanted, facts)
    waiting = [run for run in grid.runs.values() if place.record(run.id) is None]
    done = len(grid.runs) - len(waiting)
    say(f"{len(grid.runs)} runs, {done} of them finished, {len(waiting)} to do.")
    if not waiting:
        return {}
    epochs = {run.id: epochs_of(wanted.fixed, run) for run in grid.runs.values()}
    failed: dict[str, BaseException] = {}
    total = sum(epochs[run.id] for run in waiting)
    bar = tqdm(total=total, unit="epoch", desc="Training", mininterval=1.0, smoothing=0.05)
    seen: dict[str, int] = {}
    guard = threading.Lock()

    def progress(run: str, epoch: int, loss: float | None) -> None:
        with guard:
            bar.update(max(0, epoch - seen.get(run, 0)))
            seen[run] = max(epoch, seen.get(run, 0))
            text = "" if loss is None else f", loss {loss:.3f}"
            bar.write(f"  {run}: epoch {epoch} of {epochs[run]}{text}")

    gpus, jobs = gpus_of(args), jobs_of(args)
    with ending_children(place), ThreadPoolExecutor(jobs) as pool:
        slots = [gpus[number % len(gpus)] for number in range(max(jobs, len(gpus)))]
        active: dict[Future[Any], tuple[Run, str | None]] = {}
        try:
            while waiting or active:
                busy = {run.id for run, _ in active.values()} | {run.id for run in waiting}
                for run in [run for run in waiting if not busy & set(run.after)]:
                    if len(active) == jobs:
                        break
                    waiting.remove(run)
                    if broken := [name for name in run.after if name in failed]:
                        what = "predictions" if broken[0] == run.needs else "weights"
                        failed[run.id] = OSError(f"{broken[0]}, whose {what} it needs, failed.")
                        continue
                    gpu = slots.pop(0)
                    active[pool.submit(training.execute, run, gpu, progress)] = (run, gpu)
                if not active:
                    continue
                finished, _ = wait(active, return_when=FIRST_COMPLETED)
                for future in finished:
                    run, gpu = active.pop(future)
                    slots.append(gpu)
                    error = future.exception()
                    with guard:
                        bar.update(max(0, epochs[run.id] - seen.get(run.id, 0)))
                        if error is None:
                            value = future.result()["means"]["Dice"]["mean"]
                            bar.write(f"{run.id}: finished, mean Dice {'none' if value is None else f'{value:.3f}'}")
                        else:
                            failed[run.id] = error
                            bar.write(f"{run.id}: failed")
                    if error is not None and not isinstance(error, (OSError, ValueError)):
                        raise error
        except BaseException:
            place.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            bar.close()
    return failed


# --- saying it


def _print_commands(place: Workplace, grid: Grid) -> None:
    """One line a run. Those that need another's predictions or weights come after it."""
    for run in sorted(grid.runs.values(), key=grid.depth):
        if place.record(run.id) is None:
            print(shlex.join(["nnunet_dsp", "benchmark", "accuracy", "-o", str(place.folder), "--run", run.id]))


def _say_plan(place: Workplace, wanted: Wanted, facts: SourceFacts, grid: Grid, args: argparse.Namespace) -> int:
    from nnunet_dsp.benchmark.accuracy.estimate import estimate

    training = _training(place, wanted, facts, grid)
    with ending_children(place):
        print(estimate(training, grid, jobs=jobs_of(args), time_now=args.time, gpu=gpus_of(args)[0]))
    return 0


def _report(place: Workplace, wanted: Wanted) -> int:
    from nnunet_dsp.benchmark.accuracy.report import write_report

    facts = SourceFacts.read(place.source_file)
    order = {arm: number for number, arm in enumerate(wanted.selection["arms"])}
    plan = read_plan(place)
    rows = sorted((Row(*row) for row in plan["rows"]), key=lambda row: order.get(row.arm, len(order)))
    prices = parse_prices(wanted.how["cost"])
    commands = [
        command_line("accuracy", place.folder.name, ((wanted.fixed, FIXED), (selection, SELECTION), (wanted.how, HOW)))
        for selection in wanted.calls
    ]
    print(write_report(place, facts, wanted.fixed, rows, prices, commands, plan.get("left_out", {})))
    return 0


__all__: Sequence[str] = ("Wanted", "merge", "run_benchmark", "selected")
