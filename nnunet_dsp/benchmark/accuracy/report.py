"""What came out: tables (Markdown, CSV), curves and pictures (PNG), from the records of the runs that have finished.

report.md         all of it
table.csv         a line for each arm, setting and counts: means and spread over seeds
results.csv       a line for each run and class
per_case.csv      a line for each run, case and class
tests.csv         paired tests
curve_*.png       Dice over masks, weak cases and expert time; curves.csv holds their numbers
cases_*.png       best, median and worst case
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_dsp.benchmark.accuracy.annotators import order_of_masks
from nnunet_dsp.benchmark.accuracy.arms import PRETRAINED, SECOND, Data, Row, left_out_texts
from nnunet_dsp.benchmark.accuracy.cost import Counts, Price, minutes
from nnunet_dsp.benchmark.accuracy.curves import Point, write_curves
from nnunet_dsp.benchmark.accuracy.datasets import FULL
from nnunet_dsp.benchmark.accuracy.measures import (
    METRICS,
    PairedTest,
    case_means,
    gap_closed,
    holm,
    mean,
    number,
    paired_test,
    spread,
)
from nnunet_dsp.benchmark.accuracy.source import SourceFacts
from nnunet_dsp.benchmark.accuracy.training import outdated
from nnunet_dsp.benchmark.accuracy.workplace import Workplace, say, write_text
from nnunet_dsp.benchmark.tables import markdown_table, plain_table, write_csv
from nnunet_dsp.dataset_conversion import raw_dataset

Records = Mapping[str, Mapping[str, Any]]


class Place(NamedTuple):
    """One table of the report: a setting at its counts."""

    setting: str
    masks: int
    weak: int

    def __str__(self) -> str:
        return f"{self.setting}: {self.masks} masks, {self.weak} other cases"

    @property
    def file_name(self) -> str:
        return f"{self.setting.replace(':', '-').replace('+', '-')}_m{self.masks}_w{self.weak}"


@dataclass
class Line:
    """An arm in a table: its finished runs by seed."""

    arm: str
    place: Place
    records: dict[int, Mapping[str, Any]]
    expected: int

    def values(self, metric: str, name: str = "mean") -> dict[int, float]:
        """By seed."""
        return {seed: number(record["means"][metric].get(name)) for seed, record in self.records.items()}

    def mean(self, metric: str = "Dice", name: str = "mean") -> float:
        return mean(list(self.values(metric, name).values()))

    def spread(self, metric: str = "Dice", name: str = "mean") -> float:
        return spread(list(self.values(metric, name).values()))

    def minutes(self, prices: Mapping[str, Price]) -> float:
        return mean([minutes(Counts(**record["counts"]), prices) for record in self.records.values()])

    def cases(self, seeds: Iterable[int], metric: str = "Dice") -> dict[str, list[float]]:
        """By test case the values of the given seeds, in their order."""
        result: dict[str, list[float]] = {}
        for seed in seeds:
            for case, value in case_means(self.records[seed]["per_case"], metric).items():
                result.setdefault(case, []).append(value)
        return result


def lines_of(rows: Sequence[Row], records: Records) -> dict[Place, dict[str, Line]]:
    """Finished runs by place and arm, in the order in which they were asked for."""
    result: dict[Place, dict[str, Line]] = {}
    for row in rows:
        place = Place(row.setting, row.masks, row.weak)
        line = result.setdefault(place, {}).setdefault(row.arm, Line(row.arm, place, {}, 0))
        line.expected += 1
        if row.run in records:
            line.records[row.seed] = records[row.run]
    return dict(sorted(result.items(), key=lambda item: (item[0].setting, item[0].weak, item[0].masks)))


def gap_of(line: Line, lines: Mapping[str, Line]) -> float:
    """Share of the gap between `masks` and `full` closed, on the seeds that all three have."""
    if not {"masks", "full"} <= set(lines):
        return math.nan
    three = (line, lines["masks"], lines["full"])
    seeds = set.intersection(*(set(each.records) for each in three))
    values = [mean([each.values("Dice")[seed] for seed in seeds]) for each in three]
    return gap_closed(*values)


def predicted_only(lines: Mapping[str, Line], classes: Sequence[str]) -> dict[str, list[str]]:
    """By class that no test case shows the arms ("ARM with seed 1" where not all its runs) that predict it all the
    same, where other runs do not."""
    result = {}
    for name in classes:
        entries = {
            (arm, seed): [case.get(name, {}) for case in record["per_case"].values()]
            for arm, line in lines.items()
            for seed, record in line.records.items()
        }
        shown = any(entry.get("TP", 0) + entry.get("FN", 0) for found in entries.values() for entry in found)
        runs = [run for run, found in entries.items() if any(entry.get("FP", 0) for entry in found)]
        if not shown and 0 < len(runs) < len(entries):
            seeds = {arm: [str(seed) for other, seed in runs if other == arm] for arm, _ in runs}
            every = {arm: len(known) == len(lines[arm].records) for arm, known in seeds.items()}
            result[name] = [arm + ("" if every[arm] else f" with seed {' and '.join(seeds[arm])}") for arm in seeds]
    return result


def tests_of(lines: Mapping[str, Line]) -> list[tuple[str, str, PairedTest]]:
    """Pairs of arms on the seeds that both have: each with `masks`, `dsp` with each other one, pre-trained ones with
    masks:pretrained, and prompts with nnU-Net's ignore label, which has the same annotations."""
    pairs = [(arm, "masks") for arm in lines if arm != "masks"]
    pairs += [("dsp", arm) for arm in lines if arm not in ("dsp", "masks")]
    pairs += [(arm, f"masks{PRETRAINED}") for arm in lines if PRETRAINED in arm and arm != f"masks{PRETRAINED}"]
    for arm in lines:
        if match := re.match("prompt:(oneshot|partial)", arm):
            pairs += [(arm, "ignore"), (arm, "ignore" + arm[match.end() :])]
    result = []
    for first, second in dict.fromkeys(pairs):
        if first not in lines or second not in lines:
            continue
        seeds = sorted(set(lines[first].records) & set(lines[second].records))
        same = all(lines[first].records[s]["run"] == lines[second].records[s]["run"] for s in seeds)
        if seeds and not same:
            test = paired_test(lines[first].cases(seeds), lines[second].cases(seeds))
            result.append((first, second, test))
    return result


def write_report(
    place: Workplace,
    facts: SourceFacts,
    fixed: Mapping[str, Any],
    rows: Sequence[Row],
    prices: Mapping[str, Price],
    commands: Sequence[str],
    left_out: Mapping[str, str],
) -> str:
    """Write every file of the report into DIR; returns what to print.

    Args:
        rows: what was asked for, in the order in which the arms are to be shown.
        commands: what was typed.
        left_out: why, by which arm and where; see Grid.
    """
    wanted = {row.run for row in rows}
    records = {run: record for run in sorted(wanted) if (record := place.record(run)) is not None}
    started_from = sorted({record["pretrained"] for record in records.values() if record.get("pretrained")})
    pretraining = {run: record for run in started_from if (record := place.record(run)) is not None}
    tables = lines_of(rows, records)
    folder = place.folder
    _write_csvs(folder, rows, records, tables, prices)
    curves = write_curves(folder, points_of(tables, prices), len(facts.training))
    pictures = write_pictures(place, facts, tables)
    notes = [*left_out_texts(left_out), *(f"**{text}**" for text in outdated(place, records))]
    text = markdown(facts, fixed, rows, records, tables, prices, curves, pictures, commands, pretraining, notes)
    write_text(folder / "report.md", text)
    short = "\n\n".join(
        f"{where}\n{plain_table(main_table(lines, prices))}" for where, lines in tables.items() if _any(lines)
    )
    status = _status(rows, records)
    return f"\n{short or 'No run has finished yet.'}\n\n{status}\nReport: {folder / 'report.md'}"


def _any(lines: Mapping[str, Line]) -> bool:
    return any(line.records for line in lines.values())


def _status(rows: Sequence[Row], records: Records) -> str:
    wanted = {row.run for row in rows}
    if len(records) == len(wanted):
        return f"All {len(wanted)} runs have finished."
    return f"PARTIAL: {len(records)} of {len(wanted)} runs have finished."


# --- tables


def _with_spread(line: Line, metric: str, name: str = "mean", digits: int = 3) -> str:
    value, deviation = line.mean(metric, name), line.spread(metric, name)
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def main_table(lines: Mapping[str, Line], prices: Mapping[str, Price]) -> list[list[str]]:
    """Heading and one row an arm."""
    table = [["arm", "runs", "Dice", "gap closed", "IoU", "NSD", "HD95", "expert min"]]
    for arm, line in lines.items():
        if not line.records:
            table.append([arm, f"0/{line.expected}", *["-"] * 6])
            continue
        gap = gap_of(line, lines)
        cost = line.minutes(prices)
        table.append(
            [
                arm,
                f"{len(line.records)}/{line.expected}",
                _with_spread(line, "Dice"),
                "-" if math.isnan(gap) else f"{gap:.0%}",
                _with_spread(line, "IoU"),
                _with_spread(line, "NSD"),
                _with_spread(line, "HD95", digits=1),
                f"{cost:.1f}",
            ]
        )
    return table


def class_table(lines: Mapping[str, Line], classes: Sequence[str], metric: str) -> list[list[str]]:
    table = [["arm", *classes]]
    for arm, line in lines.items():
        if line.records:
            digits = 1 if metric == "HD95" else 3
            table.append([arm, *(_with_spread(line, metric, name, digits) for name in classes)])
    return table


def test_table(lines: Mapping[str, Line]) -> list[list[str]]:
    tests = tests_of(lines)
    table = [["arms", "mean difference in Dice", "cases", "p", "p, Holm"]]
    for (first, second, test), corrected in zip(tests, holm([test.p for *_, test in tests]), strict=True):
        row = [f"{first} - {second}", f"{test.difference:+.3f}", str(test.cases), _p(test.p), _p(corrected)]
        table.append(row)
    return table


def _p(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def markdown(
    facts: SourceFacts,
    fixed: Mapping[str, Any],
    rows: Sequence[Row],
    records: Records,
    tables: Mapping[Place, Mapping[str, Line]],
    prices: Mapping[str, Price],
    curves: Sequence[str],
    pictures: Mapping[Place, str],
    commands: Sequence[str],
    pretraining: Records,
    notes: Sequence[str],
) -> str:
    """The report."""
    schedule = f"{fixed['epochs']} epochs of {fixed['iterations_per_epoch']} iterations"
    on = {"test": "test cases", "val": "validation cases"}[fixed["evaluate_on"]]
    parts = [
        f"# Accuracy benchmark on {facts.name}",
        f"**{_status(rows, records)}**",
        "\n".join(f"    {command}" for command in commands),
        f"{len(facts.training)} training cases, {len(facts.evaluation)} {on} ({facts.how}). Every arm trains "
        f"{schedule} of configuration {fixed['configuration']} with the same plans"
        + (" (selftrain and second networks: in each of two rounds)" if any(map(_in_two_rounds, rows)) else "")
        + f", and is evaluated on the {on} after the last iteration"
        + ("." if fixed["tta"] else ", without mirroring."),
        "Dice and IoU are nnU-Net's: by class the mean over the cases that show or predict it, and the mean of these. "
        "NSD is the surface Dice and HD95 the 95th percentile of the surface distance, in the image's unit. ± is the "
        "standard deviation over seeds. *Gap closed* is (arm - masks) / (full - masks) in mean Dice. *Expert min* is "
        "the annotation of the training cases, at " + ", ".join(f"{what} {price}" for what, price in prices.items())
        + ".",
    ]  # fmt: skip
    if facts.not_boxed and fixed["box_classes"] is None:
        parts.append(f"Not boxed, since their boxes would cover most of the image: {', '.join(facts.not_boxed)}.")
    parts += notes
    if pretraining:
        parts.append(_about_pretraining(fixed, pretraining))
    parts += [f"![{Path(name).stem}]({name})" for name in curves]
    for where, lines in tables.items():
        parts.append(f"## {where}")
        if not _any(lines):
            parts.append("No run has finished yet.")
            continue
        parts += [markdown_table(main_table(lines, prices)), "Dice by class:"]
        parts.append(markdown_table(class_table(lines, facts.foreground, "Dice")))
        for name, arms in predicted_only(lines, facts.foreground).items():
            parts.append(
                f"No test case shows {name}. In the mean of arms that predict it, it counts as 0 "
                f"({', '.join(arms)}); in that of others it does not count. So these means, the gap closed and the "
                "tests compare unequal classes."
            )
        tests = test_table(lines)
        if len(tests) > 1:
            parts += [
                "Paired by test case (mean over classes, seeds averaged), Wilcoxon's signed-rank test, two-sided; Holm "
                "corrects for the tests of this table. The spread over seeds (which cases have masks) is not in it.",
                markdown_table(tests),
            ]
        if where in pictures:
            parts.append(f"![best, median and worst case]({pictures[where]})")
    parts.append(_provenance(facts, {**pretraining, **records}))
    return "\n\n".join(parts) + "\n"


def _in_two_rounds(row: Row) -> bool:
    return row.arm.startswith("selftrain") or row.arm.endswith(SECOND)


def _about_pretraining(fixed: Mapping[str, Any], pretraining: Records) -> str:
    trainers = ", ".join(dict.fromkeys(record["trainer"] for record in pretraining.values()))
    epochs = fixed["pretrain_epochs"] or fixed["epochs"]
    return (
        f"Arms named {PRETRAINED} start from weights of a training on all masks of {fixed['pretrain']} by the plans of "
        f"this dataset, {epochs} epochs of {trainers} (nnUNetTrainerPrompt for prompts). It is done once, not for each "
        "seed, and its masks are not in the expert minutes."
    )


def _provenance(facts: SourceFacts, records: Records) -> str:
    lines = ["## Runs", ""]
    states = [s for r in records.values() for s in (r["code"], *r.get("code_before_interruption", ()))]
    code = sorted({code_state(state) for state in states})
    if len(code) > 1:
        lines.append("**The runs were not all trained by the same code of nnunet_dsp.**")
    lines += [f"- nnunet_dsp {state}" for state in code]
    for key in ("versions", "machine"):
        for text in sorted({", ".join(f"{k} {v}" for k, v in record[key].items()) for record in records.values()}):
            lines.append(f"- {text}")
    for seed, cases in sorted(_masked(facts, records).items()):
        lines.append(f"- seed {seed}, masked cases in the order in which they get their mask: {', '.join(cases)}")
    lines += ["", markdown_table(run_table(records))]
    return "\n".join(lines)


def _masked(facts: SourceFacts, records: Records) -> dict[int, list[str]]:
    """By seed the masked cases, in the order in which they get their mask."""
    masked: dict[int, set[str]] = {}
    for record in records.values():
        if record["data"]["source"] not in ("full", "pretrain"):
            known = masked.setdefault(record["data"]["seed"], set())
            known |= {case for case, kinds in record.get("cases", {}).items() if "mask" in kinds}
    return {
        seed: [case for case in order_of_masks(facts.shown, seed, facts.groups) if case in known]
        for seed, known in masked.items()
    }


def run_table(records: Records) -> list[list[str]]:
    """One row a run: time and result."""
    table = [["run", "Dice", "training min", "interrupted", "finished"]]
    for run, record in records.items():
        value = number(record["means"]["Dice"]["mean"])
        dice = "-" if math.isnan(value) else f"{value:.3f}"
        spent = f"{record['seconds']['train'] / 60:.1f}"
        table.append([f"`{run}`", dice, spent, str(record["interruptions"]), record["finished"]])
    return table


def code_state(state: Mapping[str, Any]) -> str:
    """Which code made a record, in words."""
    commit = f"commit {state['commit'][:12]}" if state["commit"] else "no commit"
    return f"{commit}{', changed' if state['changed'] else ''}, source {state['sha256']}"


# --- CSV


def _write_csvs(
    folder: Path,
    rows: Sequence[Row],
    records: Records,
    tables: Mapping[Place, Mapping[str, Line]],
    prices: Mapping[str, Price],
) -> None:
    table, tests = [], []
    for where, lines in tables.items():
        for arm, line in lines.items():
            if line.records:
                values = [v for metric in METRICS for v in (line.mean(metric), line.spread(metric))]
                cost = [gap_of(line, lines), line.minutes(prices)]
                table.append([*where, arm, len(line.records), line.expected, *values, *cost])
        found = tests_of(lines)
        corrected = holm([test.p for *_, test in found])
        tests += [[*where, a, b, *test, p] for (a, b, test), p in zip(found, corrected, strict=True)]
    heading = [f"{metric}{what}" for metric in METRICS for what in ("", "_sd")]
    where_heading = ["setting", "masks", "weak"]
    write_csv(folder / "table.csv", [*where_heading, "arm", "runs", "wanted", *heading, "gap_closed", "minutes"], table)
    write_csv(folder / "tests.csv", [*where_heading, "first", "second", "difference", "cases", "p", "p_holm"], tests)
    results, cases = [], []
    for row in rows:
        record = records.get(row.run)
        if record is None:
            continue
        start = [row.arm, row.setting, row.masks, row.weak, row.seed]
        for name in record["means"]["Dice"]:
            results.append([*start, name, *(number(record["means"][m].get(name)) for m in METRICS), row.run])
        for case, classes in record["per_case"].items():
            cases += [
                [*start, case, n, *(number(values[m]) for m in METRICS), row.run] for n, values in classes.items()
            ]
    start_heading = ["arm", "setting", "masks", "weak", "seed"]
    write_csv(folder / "results.csv", [*start_heading, "class", *METRICS, "run"], results)
    write_csv(folder / "per_case.csv", [*start_heading, "case", "class", *METRICS, "run"], cases)


# --- curves


def points_of(tables: Mapping[Place, Mapping[str, Line]], prices: Mapping[str, Price]) -> list[Point]:
    """What the curves are drawn from."""
    points = []
    for where, lines in tables.items():
        for arm, line in lines.items():
            if line.records:
                runs = frozenset(record["run"] for record in line.records.values())
                cost, dice, deviation = line.minutes(prices), line.mean(), line.spread()
                points.append(Point(*where, arm, cost, dice, deviation, len(line.records), runs))
    return points


def write_pictures(
    place: Workplace, facts: SourceFacts, tables: Mapping[Place, Mapping[str, Line]]
) -> dict[Place, str]:
    """Best, median and worst test case of each place, by the Dice of `dsp` (or its first arm); file names."""
    result = {}
    for where, lines in tables.items():
        finished = {arm: line for arm, line in lines.items() if line.records}
        if not finished:
            continue
        judge = finished.get("dsp") or next((f for arm, f in finished.items() if arm != "masks"), None)
        judge = judge or next(iter(finished.values()))
        seed = min(judge.records)
        usual: tuple[str, ...] = ("masks", "ignore", "dsp")
        usual += tuple(arm for arm in finished if arm.startswith("prompt:"))[:2]
        shown = [arm for arm in usual if arm in finished and seed in finished[arm].records]
        shown = list(dict.fromkeys([*shown, judge.arm]))
        name = f"cases_{where.file_name}.png"
        if _picture(place, facts, place.folder / name, {arm: finished[arm].records[seed] for arm in shown}, judge.arm):
            result[where] = name
    return result


def _picture(
    place: Workplace, facts: SourceFacts, file: Path, records: Mapping[str, Mapping[str, Any]], judge: str
) -> bool:
    from nnunet_dsp.pictures import comparison

    dice = {case: value for case, value in case_means(records[judge]["per_case"], "Dice").items() if value == value}
    ranked = sorted(dice, key=lambda case: dice[case], reverse=True)
    if not ranked:
        return False
    chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    folders = {record["run"]: place.run_folder(record["run"]) / "predictions" for record in records.values()}
    wanted = [f"{case}{facts.file_ending}" for case in chosen.values()]
    gone = [run for run, folder in folders.items() if not all((folder / name).is_file() for name in wanted)]
    if gone:
        say(f"{file.name} is not drawn, for predictions are gone of {', '.join(gone)}.")
        return False
    full = place.raw / f"Dataset{FULL:03d}_{Data('full').name}"
    dataset = raw_dataset.read_dataset(full)
    reader = dataset.reader_writer()()
    ending = facts.file_ending
    images_ts = {
        case: sorted((full / "imagesTs").glob(f"{_escaped(case)}_[0-9][0-9][0-9][0-9]{ending}")) for case in ranked
    }
    rows = []
    for case in dict.fromkeys(chosen.values()):
        ranks = " and ".join(rank for rank, name in chosen.items() if name == case)
        image = reader.read_images([str(path) for path in images_ts[case]])[0][0]
        truth = reader.read_seg(str(full / "labelsTs" / f"{case}{ending}"))[0][0]
        plane = int(np.argmax((truth > 0).sum(axis=(1, 2))))
        row: dict[str, Any] = {
            f"{ranks}: {case}": {"image": image[plane]},
            "truth": {"image": image[plane], "mask": truth[plane]},
        }
        for arm, record in records.items():
            predicted = reader.read_seg(str(folders[record["run"]] / f"{case}{ending}"))[0][0]
            value = case_means({case: record["per_case"][case]}, "Dice")[case]
            caption = "no class shown or predicted" if math.isnan(value) else f"mean Dice {value:.3f}"
            row[arm] = {"image": image[plane], "mask": predicted[plane], "caption": caption}
        rows.append(row)
    names = sorted(facts.labels, key=lambda name: facts.labels[name])
    comparison(rows, names, file, ignore_label=facts.ignore, title=f"Best, median and worst test case of {judge}")
    return True


def _escaped(name: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", name)


__all__ = ["Line", "Place", "lines_of", "write_report"]
