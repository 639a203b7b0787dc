"""`nnunet_dsp check -d ID`: looks at a whole raw dataset and writes a report of what was understood of it.

The report is one HTML page that needs nothing else: counts for each class, kind of annotation and case; what is wrong
or doubtful, worst first, with pictures; every case with all that was drawn in it; with --batches, training batches as
the network will get them. Nothing in nnU-Net's folders is changed.

Exit status: 0, or 1 if something is wrong that would stop the training. The report is written in both cases.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_dsp.report.case_checks import CaseJob, CaseReport
    from nnunet_dsp.report.dataset_checks import DatasetFacts
    from nnunet_dsp.report.findings import Finding
    from nnunet_dsp.report.page import Report

JSON_FORMAT = "nnunet_dsp.check"
JSON_VERSION = 1
DEFAULT_MEGABYTES = 64
_SHOWN = 8  # findings printed
_RGB = frozenset({"r", "g", "b", "red", "green", "blue", "rgb_to_0_1"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nnunet_dsp.dataset_conversion.arguments import add_processes_argument

    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-d", dest="dataset", metavar="ID", required=True, help="id or name of a raw dataset")
    parser.add_argument(
        "-o", dest="output", metavar="DIR", type=Path, default=Path(), help="where the page is written (default: here)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the findings and counts as JSON, too")
    parser.add_argument(
        "--slices", metavar="N", type=int, help="slices of a volume that are shown (default: 6, of many cases fewer)"
    )
    parser.add_argument(
        "--channel", metavar="N", type=int, default=0, help="channel that is shown, from 0 on (default: 0)"
    )
    parser.add_argument(
        "--max-megabytes",
        metavar="MB",
        type=int,
        default=DEFAULT_MEGABYTES,
        help="size that the pictures of the page may have; beyond it cases without findings go without "
        "(default: %(default)s)",
    )
    add_processes_argument(parser)
    batches = parser.add_argument_group(
        "training batches", "The dataset must be preprocessed; the flags are those of nnUNetv2_train."
    )
    batches.add_argument("--batches", metavar="N", type=int, default=0, help="draw and show N training batches")
    batches.add_argument("-p", dest="plans", metavar="PLANS", default="nnUNetPlans", help="(default: %(default)s)")
    batches.add_argument("-c", dest="configuration", metavar="CONFIGURATION", help="(default: the one preprocessed)")
    batches.add_argument("-f", dest="fold", metavar="FOLD", default="0", help="(default: %(default)s)")
    batches.add_argument("-tr", dest="trainer", metavar="TRAINER", default="nnUNetTrainerDSP", help="(%(default)s)")
    batches.add_argument("--seed", metavar="N", type=int, default=0, help="same seed, same batches (default: 0)")


def run(args: argparse.Namespace) -> int:
    from nnunet_dsp.dataset_conversion import raw_dataset

    for name, least in (("num_processes", 1), ("max_megabytes", 1), ("batches", 0), ("channel", 0), ("slices", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"Expected {flag} to be at least {least}, but got {value}.")
    folder = raw_dataset.environment_folder("nnUNet_raw") / raw_dataset.dataset_name(args.dataset)
    if args.batches:
        from nnunet_dsp.report.batches import choose_configuration

        args.configuration = args.configuration or choose_configuration(folder.name, args.plans)
        if args.fold != "all" and not args.fold.isdigit():
            raise ValueError(f"Expected -f to be a number or 'all', but got {args.fold!r}.")
    report = check(folder, args)
    page = write(report, args.output, args.max_megabytes * 10**6)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        raw_dataset.write_json(args.json, to_json(report))
    _print_summary(report, page)
    return 1 if report.errors else 0


def check(folder: Path, options: argparse.Namespace) -> Report:
    """Look at a dataset; see add_arguments() for the options. Problems of the data become findings."""
    from nnunet_dsp.report.case_checks import look_at_case
    from nnunet_dsp.report.dataset_checks import count_classes, look_at_all, survey
    from nnunet_dsp.report.findings import worst_first
    from nnunet_dsp.report.page import Report
    from nnunet_dsp.report.workers import map_surviving

    facts = survey(folder)
    if "channel_names" in facts.json and options.channel >= facts.num_channels:
        raise ValueError(
            f"Expected --channel to be at most {facts.num_channels - 1}, for dataset.json names {facts.num_channels} "
            f"channel(s), counted from 0, but got {options.channel}."
        )
    cases: list[CaseReport] = []
    if facts.reader_writer is not None:
        cases = map_surviving(
            look_at_case,
            _jobs(facts, options),
            _dead,
            processes=options.num_processes,
            description="Checking cases",
        )
    classes = count_classes(facts.labels, cases, facts.json.get("labels"))
    findings = [*facts.findings, *(finding for case in cases for finding in case.findings)]
    findings += look_at_all(facts, cases, classes)
    report = Report(
        dataset=folder.name,
        description=str(facts.json.get("description") or ""),
        has_ignore=facts.labels is not None and facts.labels.ignore_label is not None,
        classes=classes,
        cases=cases,
        findings=findings,
        instances=facts.instances,
    )
    if options.batches:
        _add_batches(report, options)
    report.findings = worst_first(report.findings)
    return report


def _jobs(facts: DatasetFacts, options: argparse.Namespace) -> list[CaseJob]:
    from nnunet_dsp.report.case_checks import FOLDER, CaseJob

    number = len(facts.cases)
    names = [str(name).strip().lower() for name in dict(facts.json.get("channel_names", {})).values()]
    few, several = number <= 60, number <= 300
    return [
        CaseJob(
            case=case,
            annotations_folder=facts.folder / FOLDER,
            reader_writer=facts.reader_writer,
            labels=facts.labels,
            expected_labels=facts.expected_labels,
            channels=facts.num_channels,
            colours=len(names) == 3 and set(names) <= _RGB and options.channel == 0,
            channel=options.channel,
            slices=options.slices or (6 if few else 4 if several else 2),
            size=480 if few else 360 if several else 256,
            instances=facts.instances,
        )
        for case in facts.cases.values()
    ]


def _dead(job: CaseJob) -> CaseReport:
    """What stands for a case whose process was killed."""
    from nnunet_dsp.report.case_checks import CaseReport
    from nnunet_dsp.report.findings import Finding

    report = CaseReport(job.case.name, has_label_file=job.case.label.is_file())
    text = (
        f"{job.case.name}: the process that looked at it was killed, most likely for want of memory. "
        "Is the file damaged? Try fewer --num-processes."
    )
    report.findings.append(Finding("unreadable", text, job.case.name))
    return report


def _add_batches(report: Report, options: argparse.Namespace) -> None:
    from nnunet_dsp.report.batches import BatchOptions, draw_batches
    from nnunet_dsp.report.findings import Finding

    fold = options.fold if options.fold == "all" else int(options.fold)
    chosen = BatchOptions(options.batches, options.plans, options.configuration, fold, options.trainer, options.seed)
    report.batches_of = f"{options.trainer}, {options.configuration}, fold {fold}, {options.plans}"
    try:
        report.batches, report.batch_notes = draw_batches(report.dataset, chosen)
    except Exception as error:  # whatever would stop a training here belongs into the report
        text = f"No training batch could be drawn ({report.batches_of}): {error or type(error).__name__}"
        report.findings.append(Finding("training", text))


def write(report: Report, folder: Path, max_bytes: int) -> Path:
    """Write the page, at once or not at all; returns where it is."""
    from nnunet_dsp.dataset_conversion.raw_dataset import replacing
    from nnunet_dsp.report.page import render

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{report.dataset}_check.html"
    text = render(report, max_bytes)
    with replacing(file) as temporary:
        # a lone surrogate (JSON may hold one) cannot be encoded
        temporary.write_bytes(text.encode("utf-8", "replace"))
    return file


def to_json(report: Report) -> dict[str, Any]:
    """Findings and counts, without pictures."""
    return {
        "format": JSON_FORMAT,
        "version": JSON_VERSION,
        "dataset": report.dataset,
        "errors": report.errors,
        "doubtful": report.doubtful,
        "findings": [finding.to_json() for finding in report.findings],
        "classes": [
            {name: getattr(count, name) for name in count.__slots__ if name != "number"} for count in report.classes
        ],
        "cases": [
            {
                "case": case.name,
                "status": case.status,
                "shape": list(case.shape),
                "annotated": round(case.annotated, 6),
                "voxels": {str(value): count for value, count in case.voxels.items()},
                "points": dict(case.points),
                "tight_boxes": dict(case.tight_boxes),
                "loose_boxes": dict(case.loose_boxes),
                "instances": None if case.instances is None else len(case.instances),
                "present": list(case.said.present) if case.said else [],
                "absent": list(case.said.absent) if case.said else [],
            }
            for case in report.cases
        ],
    }


def _print_summary(report: Report, page: Path) -> None:
    statuses = Counter(case.status for case in report.cases)
    print(f"{report.dataset}: {len(report.cases)} cases" + "".join(f", {n} {s}" for s, n in statuses.items()))
    points = sum(count.points for count in report.classes)
    boxes = sum(count.tight_boxes + count.loose_boxes for count in report.classes)
    tags = sum(count.present + count.absent for count in report.classes)
    if report.instances:
        counts = sorted(len(case.instances) for case in report.cases if case.instances is not None)
        print(f"  {sum(counts)} labelled instances" + (f", {counts[0]} to {counts[-1]} in a case" if counts else ""))
    else:
        print(f"  {points} points, {boxes} boxes, {tags} tags")
    print(f"  {report.errors} error(s), {report.doubtful} doubtful, {report.notes} note(s)")
    _print_findings(report.findings)
    print(f"  Report: {page.resolve()}")


def _print_findings(findings: Sequence[Finding]) -> None:
    from nnunet_dsp.report.findings import Severity

    worth = [finding for finding in findings if finding.severity < Severity.NOTE]
    for finding in worth[:_SHOWN]:
        stream = sys.stderr if finding.severity == Severity.ERROR else sys.stdout
        print(f"  {finding.severity.word}: {finding.text}", file=stream)
    if len(worth) > _SHOWN:
        print(f"  ... and {len(worth) - _SHOWN} more in the report.")
