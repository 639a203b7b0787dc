"""A workspace with a dataset made by our own commands, and a way to run nnU-Net's commands in it as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import nnunet_dsp

QUICK = Path(__file__).parent / "quick_trainers"
ROOT = Path(__file__).resolve().parents[2]


class Workspace:
    """Three nnU-Net folders and the environment that names them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        entry = Path(nnunet_dsp.__file__).parent / "nnunet_entry"
        self.environment = {
            **os.environ,
            "nnUNet_extTrainer": os.pathsep.join([str(entry), str(QUICK)]),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
            "PYTHONUNBUFFERED": "1",  # what a killed training had said is not lost with its buffer
            "OMP_WAIT_POLICY": "PASSIVE",  # on two busy cores, threads that spin while they wait slow everything down
            "PYTHONPATH": os.pathsep.join(filter(None, [str(link_source(root)), os.environ.get("PYTHONPATH")])),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        for name in ("raw", "preprocessed", "results"):
            (root / f"nnUNet_{name}").mkdir()
            self.environment[f"nnUNet_{name}"] = str(root / f"nnUNet_{name}")

    def __call__(self, *command: object, code: int | None = 0, **environment: str) -> str:
        """Runs a command; the exit status must be `code` (None: any but 0). Returns stdout and stderr."""
        words = [str(word) for word in command]
        if words[0] == "nnunet_dsp":
            words = [sys.executable, "-c", "import sys; from nnunet_dsp.cli import main; sys.exit(main())", *words[1:]]
        with tempfile.TemporaryFile("w+") as output:  # a file: the workers of a killed training would hold a pipe open
            process = subprocess.Popen(
                words,
                cwd=self.root,  # in the source tree's root, `python -c` would find that before the link to it
                env={**self.environment, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(timeout=600)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            output.seek(0)
            said = output.read()
        good = status == code if code is not None else status != 0
        assert good, f"{' '.join(words)} exited with {status}:\n{said[-6000:]}"
        return said

    def dataset(self, kind: str, number: int) -> Path:
        return next((self.root / f"nnUNet_{kind}").glob(f"Dataset{number:03d}_*"))

    def model(self, number: int, trainer: str, plans: str = "Small", configuration: str = "2d") -> Path:
        return self.dataset("results", number) / f"{trainer}__{plans}__{configuration}"


def link_source(root: Path) -> Path:
    """A folder to put on PYTHONPATH in which the source tree looks as it does when installed."""
    package = root / "link" / "nnunet_dsp"
    package.mkdir(parents=True)
    for entry in (ROOT / "nnunet_dsp").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in ("trainers", "dataset_conversion"):
        (package / name).symlink_to(ROOT / name)
    return package.parent


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Dataset 1: synthetic, 2D, full masks. Dataset 2: three masks, the rest tags, points and boxes; planned, small."""
    run = Workspace(tmp_path_factory.mktemp("e2e"))
    run("nnunet_dsp", "convert", "synthetic", "-d", 1, "--cases", 8, "--test", 2, "--size", 64)
    weak = ("--tags", "rest", "--points", "rest", "--boxes", "rest")
    run("nnunet_dsp", "simulate", "-d", 1, "-o", 2, "--name", "Weak", "--masks", 3, *weak)
    splits = run.dataset("raw", 2) / "splits_final.json"
    folds = json.loads(splits.read_text())
    masked = [case for fold in folds for case in fold["val"]]  # together they show every class, so no Dice is NaN
    splits.write_text(json.dumps([{**fold, "val": masked} for fold in folds]))
    run("nnunet_dsp", "prepare", "-d", 2)
    run("nnUNetv2_plan_and_preprocess", "-d", 2, "-c", "2d", "-npfp", 1, "-np", 1, "--verify_dataset_integrity")
    small = ("--patch", 32, "--features", 4, 6, 8, "--batch-size", 2)
    run("nnunet_dsp", "plans", "-d", 2, "-o", "Small", *small)
    return run
