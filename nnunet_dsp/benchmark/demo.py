"""`make demo`: the whole way on a synthetic dataset, nnUNetTrainerDSP beside nnUNetTrainer, on two CPU cores.

Nothing here knows how anything is done: every step is a command that a user would type, and is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_dsp.environment import ENTRY_FOLDER

FULL, WEAK, MASKS = 900, 901, 902
PLANS = "nnUNetPlansDemo"
ARMS = (
    (MASKS, "nnUNetTrainer_demo", "nnU-Net, {masks} masks"),
    (WEAK, "nnUNetTrainerDSP_demo", "nnunet_dsp, {masks} masks + weak labels"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    parser.add_argument("--masks", type=int, default=3, help="images that keep their mask (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of our trainer (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    steps = Steps(args.output.resolve(), args.seed)
    seed = str(args.seed)
    masks = str(args.masks)
    steps.run("nnunet_dsp", "convert", "synthetic", "-d", str(FULL), "--seed", seed, "--overwrite")
    mixture = ("--masks", masks, "--seed", seed, "--overwrite")
    weak = ("--tags", "rest", "--points", "rest", "--boxes", "rest")
    steps.run("nnunet_dsp", "simulate", "-d", str(FULL), "-o", str(WEAK), "--name", "SyntheticWeak", *weak, *mixture)
    only = ("--name", "SyntheticMasks", "--masks-only")
    steps.run("nnunet_dsp", "simulate", "-d", str(FULL), "-o", str(MASKS), *only, *mixture)
    for dataset, trainer, _ in ARMS:
        steps.run("nnunet_dsp", "prepare", "-d", str(dataset))
        steps.run("nnUNetv2_plan_and_preprocess", "-d", str(dataset), "-c", "2d", "-npfp", "1", "-np", "1")
        shape = ("--patch", "128", "--batch-size", "4", "--features", "12", "24", "48", "96")
        steps.run("nnunet_dsp", "plans", "-d", str(dataset), "-o", PLANS, *shape)
        steps.train(dataset, trainer)
        model = ("-d", str(dataset), "-tr", trainer, "-p", PLANS, "-c", "2d", "-f", "all", "-device", "cpu")
        prediction = steps.prediction(dataset)
        images = ("-i", steps.raw(FULL) / "imagesTs", "-o", prediction, "-npp", "1", "-nps", "1")
        steps.run("nnUNetv2_predict", *images, *model)
        files = ("-djfile", prediction / "dataset.json", "-pfile", prediction / "plans.json", "-np", "1")
        steps.run("nnUNetv2_evaluate_folder", steps.raw(FULL) / "labelsTs", prediction, *files)
    table, picture = steps.report(args.masks)
    print(f"\n{table}\n")
    print(f"Picture: {picture}")
    print(f"Logs, models and predictions: {steps.folder}   ({time.monotonic() - started:.0f} s in all)")
    return 0


class Steps:
    """The demonstration's folder and the commands run in it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.log = folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        self.environment = dict(os.environ)
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (folder / name).mkdir(exist_ok=True)
            self.environment[name] = str(folder / name)
        here = str(Path(sys.executable).parent)
        self.environment.update(
            nnUNet_extTrainer=str(ENTRY_FOLDER),
            nnUNet_n_proc_DA="1",
            nnUNet_def_n_proc="1",
            nnUNet_dsp_seed=str(seed),
            PYTHONUNBUFFERED="1",
            PYTHONWARNINGS="ignore",
            OMP_WAIT_POLICY="PASSIVE",  # threads that spin while they wait slow a busy machine of two cores down
            PATH=here + os.pathsep + os.environ.get("PATH", ""),
        )

    def run(self, *command: str | Path) -> None:
        """Runs one command; its output goes to the log, an epoch's loss to the screen, and if it fails, its end too."""
        words = [str(word) for word in command]
        print("$ " + shlex.join(words), flush=True)
        started = time.monotonic()
        lines: list[str] = []
        epoch = 0
        with self.log.open("a") as log:
            log.write(f"\n$ {shlex.join(words)}\n")
            process = subprocess.Popen(
                words, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert process.stdout is not None  # noqa: S101 (PIPE was asked for)
            for line in process.stdout:
                log.write(line)
                lines.append(line)
                if found := re.search(r"train_loss (\S+)", line):
                    epoch += 1
                    print(f"  epoch {epoch}: loss {found[1]}, {time.monotonic() - started:.0f} s", flush=True)
        if process.wait() != 0:
            sys.stderr.write("".join(lines[-40:]))
            raise OSError(f"`{words[0]}` failed with exit status {process.returncode}; all of its output: {self.log}")
        print(f"  {time.monotonic() - started:.0f} s", flush=True)

    def train(self, dataset: int, trainer: str) -> None:
        self.run("nnUNetv2_train", str(dataset), "2d", "all", "-tr", trainer, "-p", PLANS, "-device", "cpu")

    def raw(self, dataset: int) -> Path:
        return next((self.folder / "nnUNet_raw").glob(f"Dataset{dataset:03d}_*"))

    def prediction(self, dataset: int) -> Path:
        return self.folder / f"predicted_{dataset:03d}"

    def report(self, masks: int) -> tuple[str, Path]:
        """The table of both Dice, and the picture of all of it."""
        names = read_json(self.raw(FULL) / "dataset.json")["labels"]
        headings = {arm[0]: arm[2].format(masks=masks) for arm in ARMS}
        summaries = {arm: read_json(self.prediction(arm) / "summary.json") for arm in headings}
        table = dice_table({headings[arm]: summary for arm, summary in summaries.items()}, names)
        (self.folder / "dice.txt").write_text(table + "\n")
        return table, self._picture(names, headings, summaries)

    def _picture(self, labels: Mapping[str, int], headings: Mapping[int, str], summaries: Mapping[int, Any]) -> Path:
        from skimage.io import imread

        from nnunet_dsp.annotations import LabelNames, read_annotations
        from nnunet_dsp.pictures import comparison

        names = [name for name, _ in sorted(labels.items(), key=lambda item: item[1])]
        weak = self.raw(WEAK)
        known = LabelNames.from_dataset_json(read_json(weak / "dataset.json"))
        examples = sorted((weak / "annotationsTr").glob("*.json"))[:3]
        cases = sorted(path.stem for path in (self.raw(FULL) / "labelsTs").glob("*.png"))[:3]
        rows = []
        for example, case in zip(examples, cases, strict=False):
            test = imread(self.raw(FULL) / "imagesTs" / f"{case}_0000.png")
            row: dict[str, Any] = {
                "training image, annotated": {
                    "image": imread(weak / "imagesTr" / f"{example.stem}_0000.png"),
                    "annotations": read_annotations(example, known),
                },
                "test image": {"image": test},
                "truth": {"image": test, "mask": imread(self.raw(FULL) / "labelsTs" / f"{case}.png")},
            }
            for arm, heading in headings.items():
                row[heading] = {
                    "image": test,
                    "mask": imread(self.prediction(arm) / f"{case}.png"),
                    "caption": f"mean Dice {case_dice(summaries[arm], case):.3f}",
                }
            rows.append(row)
        file = self.folder / "comparison.png"
        comparison(rows, names, file, title="Same network, same masks, same number of iterations")
        return file


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def case_dice(summary: Mapping[str, Any], case: str) -> float:
    """Mean Dice over the classes that a case of nnU-Net's summary shows."""
    for entry in summary["metric_per_case"]:
        if Path(entry["prediction_file"]).name.startswith(case + "."):
            values = [m["Dice"] for m in entry["metrics"].values() if m["Dice"] is not None and m["Dice"] == m["Dice"]]
            return sum(values) / max(1, len(values))
    raise ValueError(f"The summary does not list case {case}.")


def dice_table(summaries: Mapping[str, Mapping[str, Any]], labels: Mapping[str, int]) -> str:
    """A plain table of mean Dice, classes down, models across."""
    classes = [(name, str(value)) for name, value in labels.items() if value != 0]
    rows: list[Sequence[str]] = [("mean Dice on the test images", *summaries)]
    for name, value in classes:
        rows.append((name, *(f"{summary['mean'][value]['Dice']:.3f}" for summary in summaries.values())))
    rows.append(("mean", *(f"{summary['foreground_mean']['Dice']:.3f}" for summary in summaries.values())))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nnunet_dsp.benchmark.demo", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
