"""`nnunet_dsp instances evaluate TRUTH PREDICTION`: compare instance label images, case by case, with the truth.

TRUTH and PREDICTION are folders with label images of the same names (or two files). Measured: adapted Rand error
(ARAND) and variation of information (VOI split and merge, bits), 0 is perfect; AP at intersections over union of 0.5
to 0.95 (TP / (TP + FP + FN)) and panoptic quality (PQ), 1 is perfect. Voxels that the truth does not label (`ignore`
in the dataset.json beside TRUTH, or --ignore) count nowhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TABLE = ("arand", "voi_split", "voi_merge", "ap_50", "ap_75", "ap", "pq", "num_truth", "num_prediction")


def _ignore(text: str) -> int | str:
    if text in ("auto", "none"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a label value, 'auto' or 'none', but got {text!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("truth", metavar="TRUTH", type=Path, help="folder of true label images, or one file")
    parser.add_argument("prediction", metavar="PREDICTION", type=Path, help="folder of predicted ones, or one file")
    parser.add_argument(
        "-o", dest="output", metavar="FILE", type=Path, help="JSON (default: instances_summary.json in PREDICTION)"
    )
    parser.add_argument(
        "--ignore",
        metavar="VALUE",
        type=_ignore,
        default="auto",
        help="value in the truth of what nobody labelled; 'none' if there is none (default: as in the dataset.json in "
        "the folder above TRUTH, if there is one)",
    )
    parser.add_argument("--num-processes", metavar="N", type=int, default=1)


def find_ignore_label(truth: Path) -> int | None:
    """The ignore label of the dataset.json beside the folder of the truth (or in it), if there is one."""
    from nnunet_dsp.dataset_conversion.raw_dataset import read_json

    folder = truth if truth.is_dir() else truth.parent
    for file in (folder / "dataset.json", folder.parent / "dataset.json"):
        if file.is_file():
            labels = read_json(file).get("labels", {})
            value = labels.get("ignore") if isinstance(labels, dict) else labels
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(
                    f"{file}: its labels do not name one whole number as `ignore`. Say with --ignore which value in "
                    "the truth is what nobody labelled, or --ignore none."
                )
            return value
    return None


def _label_images(folder: Path) -> dict[str, Path]:
    """The label images of a folder by their names without ending.

    Raises:
        ValueError: two differ in their endings only.
    """
    from nnunet_dsp.dataset_conversion.instance_labels import is_label_file, name_of

    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if is_label_file(file):
            other = found.setdefault(name_of(file), file)
            if other != file:
                raise ValueError(
                    f"{folder} holds both {other.name} and {file.name}, labels of the same case. Keep one of them."
                )
    return found


def _pairs(truth: Path, prediction: Path) -> dict[str, tuple[Path, Path]]:
    from nnunet_dsp.dataset_conversion.instance_labels import name_of

    for path in (truth, prediction):
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {path}.")
    if truth.is_file() != prediction.is_file():
        raise ValueError(f"Expected two folders or two files, but got {truth} and {prediction}.")
    if truth.is_file():
        return {name_of(truth): (truth, prediction)}
    true, predicted = _label_images(truth), _label_images(prediction)
    if not true:
        raise FileNotFoundError(f"{truth} holds no label image.")
    missing = sorted(set(true) - set(predicted))
    if missing:
        raise FileNotFoundError(
            f"{prediction} lacks {len(missing)} of {len(true)} label images of {truth}: {', '.join(missing[:10])}."
        )
    return {name: (file, predicted[name]) for name, file in true.items()}


def measure_files(job: tuple[str, Path, Path, int | None]) -> tuple[str, dict[str, Any]]:
    """Measures of one case: its name, the true and the predicted label image, the ignore label.

    Raises:
        ValueError: a file cannot be read, or the two do not fit; the message names them.
    """
    import numpy as np

    from nnunet_dsp.dataset_conversion.instance_labels import read_labels
    from nnunet_dsp.instances.measures import measure

    name, true, predicted, ignore = job
    try:
        truth, prediction = read_labels(true, ignore=ignore).squeeze(), read_labels(predicted).squeeze()
        if ignore is not None and ignore < 0:
            unlabelled, ignore = truth == ignore, int(truth.max(initial=0)) + 1
            truth = np.where(unlabelled, ignore, truth.astype(np.int64))
        return name, measure(truth, prediction, ignore)
    except ValueError as error:
        raise ValueError(f"{name}: {error} ({true} against {predicted})") from error


def evaluate(
    truth: Path, prediction: Path, ignore_label: int | None, *, processes: int = 1
) -> dict[str, dict[str, Any]]:
    """Measures of every case under "cases", their mean over cases under "mean"; JSON as it stands."""
    from nnunet_dsp.dataset_conversion.parallel import map_cases
    from nnunet_dsp.instances.measures import average

    jobs = [(name, *files, ignore_label) for name, files in _pairs(truth, prediction).items()]
    cases = dict(map_cases(measure_files, jobs, processes=processes, description="Evaluating"))
    return {"mean": average(list(cases.values())), "cases": cases}


def table(summary: Mapping[str, Any]) -> str:
    """The main measures as a table, one line a case, the mean last."""
    rows: list[tuple[str, ...]] = [("case", *TABLE)]
    for name, values in [*summary["cases"].items(), ("mean", summary["mean"])]:
        rows.append((name, *(_number(values.get(key), key) for key in TABLE)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _number(value: float | int | None, key: str) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if key.startswith("num_") else f"{value:.4f}"


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write the JSON."""
    from nnunet_dsp.dataset_conversion.raw_dataset import write_json

    if not args.truth.exists():
        raise FileNotFoundError(f"There is no file or folder {args.truth}.")
    if args.output is not None and args.output.is_dir():
        raise ValueError(f"-o: expected a JSON file to write, but {args.output} is a folder.")
    ignore = find_ignore_label(args.truth) if args.ignore == "auto" else None if args.ignore == "none" else args.ignore
    summary = evaluate(args.truth, args.prediction, ignore, processes=args.num_processes)
    if args.prediction.is_dir():
        left_out = sorted(_label_images(args.prediction).keys() - summary["cases"].keys())
        if left_out:
            shown = ", ".join(left_out[:10]) + (", ..." if len(left_out) > 10 else "")
            print(f"{len(left_out)} prediction(s) have no truth in {args.truth} and were left out: {shown}")
    folder = args.prediction if args.prediction.is_dir() else args.prediction.parent
    output = args.output or folder / "instances_summary.json"
    write_json(output, {"ignore_label": ignore, **summary})
    print(table(summary))
    print(f"Ignored in the truth: {'nothing' if ignore is None else f'label {ignore}'}. Written: {output}")
    return 0
