"""What came out, from the records of the runs that have finished.

report.md      tables and pictures
table.csv      a line for each arm and share: means and spread over seeds, difference to full labels
results.csv    a line for each run
per_case.csv   a line for each run and case
cases_*.png    a training image with its labels, and the median case as every arm sees it
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dsp.benchmark.accuracy.datasets import FULL
from nnunet_dsp.benchmark.accuracy.measures import mean, number, spread
from nnunet_dsp.benchmark.accuracy.report import code_state
from nnunet_dsp.benchmark.accuracy.workplace import Workplace, write_text
from nnunet_dsp.benchmark.instances.runs import InstanceData, Row
from nnunet_dsp.benchmark.tables import markdown_table, plain_table, write_csv
from nnunet_dsp.dataset_conversion import raw_dataset

Records = Mapping[str, Mapping[str, Any]]
MEASURES = {
    "arand": "ARAND",
    "voi_split": "VOI split",
    "voi_merge": "VOI merge",
    "voi": "VOI",
    "ap_50": "AP50",
    "ap": "AP",
    "pq": "PQ",
}
COMPARED = ("arand", "voi", "ap_50", "pq")
LOWER_IS_BETTER = ("arand", "voi")


@dataclass
class Line:
    """An arm at a share: its finished runs by seed, and how many there are to be."""

    arm: str
    share: float
    records: dict[int, Mapping[str, Any]]
    expected: int

    def values(self, measure: str) -> dict[int, float]:
        return {seed: number(record["means"].get(measure)) for seed, record in self.records.items()}

    def mean(self, measure: str) -> float:
        return mean(list(self.values(measure).values()))

    def text(self, measure: str) -> str:
        value, deviation = self.mean(measure), spread(list(self.values(measure).values()))
        if math.isnan(value):
            return "-"
        return f"{value:.3f}" + ("" if math.isnan(deviation) else f" ± {deviation:.3f}")


def lines_of(rows: Sequence[Row], records: Records) -> list[Line]:
    """The finished runs by arm and share, in the order of the rows."""
    found: dict[tuple[str, float], Line] = {}
    for row in rows:
        line = found.setdefault((row.arm, row.share), Line(row.arm, row.share, {}, 0))
        line.expected += 1
        if row.run in records:
            line.records[row.seed] = records[row.run]
    return list(found.values())


def relative_difference(line: Line, other: Line, measure: str) -> float:
    """(line - other) / other, of the means over the seeds that both have; NaN where there is none, or no other."""
    seeds = sorted(set(line.records) & set(other.records))
    mine, theirs = (mean([each.values(measure)[seed] for seed in seeds]) for each in (line, other))
    return (mine - theirs) / theirs if seeds and theirs else math.nan


def better_seeds(line: Line, other: Line, measure: str) -> tuple[int, int]:
    """In how many seeds `line` is better than `other`, and how many both have."""
    seeds = set(line.records) & set(other.records)
    both = [(line.values(measure)[seed], other.values(measure)[seed]) for seed in seeds]
    both = [pair for pair in both if not any(map(math.isnan, pair))]
    sign = -1 if measure in LOWER_IS_BETTER else 1
    return sum(sign * (a - b) > 0 for a, b in both), len(both)


def write_report(
    place: Workplace,
    facts: Any,
    fixed: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    rows: Sequence[Row],
    commands: Sequence[str],
) -> str:
    """Write every file of the report into DIR; returns what to print. Runs evaluated otherwise count as missing."""
    found = {run: place.record(run) for run in sorted({row.run for row in rows})}
    records = {run: r for run, r in found.items() if r is not None and r["evaluation"] == dict(evaluation)}
    lines = lines_of(rows, records)
    _write_csvs(place.folder, rows, records, lines)
    pictures = write_pictures(place, facts, lines)
    status = (
        f"All {len(found)} runs have finished."
        if len(records) == len(found)
        else f"PARTIAL: {len(records)} of {len(found)} runs have finished."
    )
    parts = [
        f"# Instance benchmark on {facts.name}",
        f"**{status}**",
        "\n".join(f"    {command}" for command in commands),
        f"{len(facts.training)} training case(s), {len(facts.evaluation)} to evaluate on ({facts.how}). Every arm "
        f"trains {fixed['epochs']} epochs of {fixed['iterations_per_epoch']} iterations of configuration "
        f"{fixed['configuration']} with the same plans, and is evaluated after the last one. Instances by the decoder "
        f"{evaluation['decoder']} from the {evaluation['affinities']} affinities.",
        "Means over cases, then over seeds; ± is the standard deviation over seeds, which choose the labelled "
        "instances and the initialisation. ARAND and VOI (bits): 0 is perfect; AP50, AP and PQ: 1 is. *Labelled*: "
        "how many instances of the training cases are.",
        markdown_table(main_table(lines)),
    ]
    for title, table in (
        ("Relative difference to `full`, on the same seeds:", against_full(lines)),
        ("Against `supervised` at the same share: relative difference, and in how many seeds it is better:",
         against_supervised(lines)),
    ):  # fmt: skip
        if len(table) > 1:
            parts += [title, markdown_table(table)]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    parts.append(_provenance(records))
    write_text(place.folder / "report.md", "\n\n".join(parts) + "\n")
    return f"\n{plain_table(main_table(lines))}\n\n{status}\nReport: {place.folder / 'report.md'}"


# --- tables


def main_table(lines: Sequence[Line]) -> list[list[str]]:
    table = [["arm", "share", "runs", "labelled", *MEASURES.values()]]
    for line in lines:
        runs = f"{len(line.records)}/{line.expected}"
        table.append([line.arm, f"{line.share:g}", runs, _labelled(line), *(line.text(m) for m in MEASURES)])
    return table


def _labelled(line: Line) -> str:
    counts = sorted({sum(kept for kept, _ in r["labelled"].values()) for r in line.records.values()})
    of = {sum(among for _, among in r["labelled"].values()) for r in line.records.values()}
    return f"{'-'.join(map(str, counts[:: max(1, len(counts) - 1)]))} of {max(of)}" if counts else "-"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:+.1f} %"


def against_full(lines: Sequence[Line]) -> list[list[str]]:
    table = [["arm", "share", *(MEASURES[m] for m in COMPARED)]]
    full = next((line for line in lines if line.arm == "full" and line.records), None)
    for line in lines:
        if full is not None and line.arm != "full" and line.records:
            cells = [_percent(relative_difference(line, full, m)) for m in COMPARED]
            table.append([line.arm, f"{line.share:g}", *cells])
    return table


def against_supervised(lines: Sequence[Line]) -> list[list[str]]:
    table = [["arm", "share", *(MEASURES[m] for m in COMPARED)]]
    base = {line.share: line for line in lines if line.arm == "supervised" and line.records}
    for line in lines:
        other = base.get(line.share)
        if other is not None and other is not line and line.records:
            cells = []
            for measure in COMPARED:
                better, among = better_seeds(line, other, measure)
                cells.append(f"{_percent(relative_difference(line, other, measure))} ({better}/{among})")
            table.append([line.arm, f"{line.share:g}", *cells])
    return table


def _provenance(records: Records) -> str:
    lines = ["## Runs", ""]
    code = sorted({code_state(s) for r in records.values() for s in (r["code"], *r["code_before_interruption"])})
    if len(code) > 1:
        lines.append("**The runs were not all trained by the same code of nnunet_dsp.**\n")
    lines += [f"- nnunet_dsp {state}" for state in code]
    for key in ("versions", "machine"):
        said = {", ".join(f"{name} {value}" for name, value in r[key].items()) for r in records.values()}
        lines += [f"- {text}" for text in sorted(said)]
    table = [["run", "ARAND", "VOI", "training min", "interrupted", "finished"]]
    for run, record in records.items():
        values = [f"{number(record['means'].get(m)):.3f}" for m in ("arand", "voi")]
        spent = f"{record['seconds']['train'] / 60:.1f}"
        table.append([f"`{run}`", *values, spent, str(record["interruptions"]), record["finished"]])
    return "\n".join([*lines, "", markdown_table(table)])


def _write_csvs(folder: Path, rows: Sequence[Row], records: Records, lines: Sequence[Line]) -> None:
    full = next((line for line in lines if line.arm == "full" and line.records), None)
    table = []
    for line in lines:
        values = [v for m in MEASURES for v in (line.mean(m), spread(list(line.values(m).values())))]
        to_full = [math.nan if full is None else relative_difference(line, full, m) for m in COMPARED]
        table.append([line.arm, line.share, len(line.records), line.expected, *values, *to_full])
    heading = [f"{m}{what}" for m in MEASURES for what in ("", "_sd")] + [f"{m}_to_full" for m in COMPARED]
    write_csv(folder / "table.csv", ["arm", "share", "runs", "wanted", *heading], table)
    done = [(row, records[row.run]) for row in rows if row.run in records]
    names = list(dict.fromkeys(name for _, record in done for name in record["means"]))
    results = [
        [*row[:3], *(number(record["means"].get(n)) for n in names), record["seconds"]["train"], row.run]
        for row, record in done
    ]
    cases = [
        [*row[:3], case, *(number(values.get(n)) for n in names), row.run]
        for row, record in done
        for case, values in record["per_case"].items()
    ]
    write_csv(folder / "results.csv", ["arm", "share", "seed", *names, "train_seconds", "run"], results)
    write_csv(folder / "per_case.csv", ["arm", "share", "seed", "case", *names, "run"], cases)


# --- pictures


def write_pictures(place: Workplace, facts: Any, lines: Sequence[Line]) -> list[str]:
    """One picture for each share: what was labelled, and the median case; the names of the files written."""
    names = []
    for share in sorted({line.share for line in lines if line.share < 1 and line.records}):
        here = [line for line in lines if line.records and line.share in (share, 1.0)]
        judge = next((line for line in here if line.arm == "crac"), None)
        judge = judge or next(line for line in here if line.share < 1)
        name = f"cases_{share:g}.png"
        _picture(place, facts, place.folder / name, here, judge)
        names.append(name)
    return names


def _picture(place: Workplace, facts: Any, file: Path, lines: Sequence[Line], judge: Line) -> None:
    seed = min(judge.records)
    measured = {case: number(values.get("arand")) for case, values in judge.records[seed]["per_case"].items()}
    ranked = sorted(measured, key=lambda case: (math.isnan(measured[case]), measured[case]))
    case = ranked[(len(ranked) - 1) // 2]
    dataset = raw_dataset.read_dataset(place.raw / f"Dataset{FULL:03d}_{InstanceData('full').name}")
    reader, ending = dataset.reader_writer()(), facts.file_ending
    train = min(judge.records[seed]["labelled"])

    def image(paths: Sequence[Path]) -> Any:
        return reader.read_images([str(path) for path in paths])[0][0]

    def labels(path: Path) -> Any:
        return reader.read_seg(str(path))[0][0]

    test = dataset.folder / "imagesTs"
    files = sorted(f for f in test.iterdir() if f.name[: -len(ending) - 5] == case and f.name.endswith(ending))
    seen, truth = image(files), labels(dataset.folder / "labelsTs" / f"{case}{ending}")
    plane = seen.shape[0] // 2
    learnt_image = image(dataset.cases[train].images)
    middle = learnt_image.shape[0] // 2
    sparse = place.raw / judge.records[seed]["dataset"] / "labelsTr" / f"{train}{ending}"
    cells: list[tuple[str, Any, Any]] = [
        (f"labelled in {train}", learnt_image[middle], labels(sparse)[middle]),
        (f"{case} (median)", seen[plane], None),
        ("truth", seen[plane], truth[plane]),
    ]
    for line in lines:
        record = line.records.get(seed) or line.records[min(line.records)]
        found = labels(place.run_folder(record["run"]) / "predictions" / f"{case}{ending}")
        title = f"{line.arm}\nARAND {number(record['per_case'][case].get('arand')):.3f}"
        cells.append((title, seen[plane], np.where(truth[plane] == facts.ignore, 0, found[plane])))
    _draw(file, cells, facts.ignore)


def _draw(file: Path, cells: Sequence[tuple[str, Any, Any]], ignore: int | None) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from nnunet_dsp.instances.pictures import instance_overlay

    columns = min(4, len(cells))
    count = -(-len(cells) // columns)
    figure, grid = plt.subplots(count, columns, figsize=(3 * columns, 3.3 * count), squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (title, image, labels) in zip(grid.flat, cells, strict=False):
        axes.imshow(instance_overlay(image, labels, ignore), interpolation="nearest")
        axes.set_title(title, fontsize=9)
    temporary = file.with_name(f".{file.name}")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    temporary.replace(file)


__all__ = ["Line", "lines_of", "relative_difference", "write_report"]
