"""The benchmark's folder: where what lies, who works on it, what it was made with, and how commands run in it.

DIR/benchmark.json           the configuration; a call that differs from it is refused
DIR/source.json              the cases, what they show, checksums
DIR/pretraining.json         the dataset of --pretrain, checksums
DIR/plan.json                datasets, runs and rows asked for so far
DIR/nnUNet_raw, _preprocessed, _results
DIR/runs/RUN/record.json     a finished run; log.txt, predictions/ beside it
DIR/trainers/                trainers with the benchmark's schedule, where nnunet_dsp has none ready
DIR/report.md, *.csv, *.png  see report.py
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_dsp.dataset_conversion.raw_dataset import read_json, replacing
from nnunet_dsp.environment import ENTRY_FOLDER, VARIABLE, with_our_folder

if TYPE_CHECKING:
    from filelock import BaseFileLock

FORMAT = 1
FINAL_CHECKPOINT = "checkpoint_final.pth"
TAIL = 40  # lines of a failed command's output that are shown
NOT_TRAINING = ("cli.py", "check.py", "environment.py", "pictures.py")  # modules that no result depends on
PLANS_BASE = "nnUNetPlansBenchmark"  # what nnU-Net planned, for all training cases with all their masks


class Workplace:
    """DIR, and the commands run in it.

    Args:
        folder: DIR, made if need be.
        device: cpu, cuda or mps.
        threads: of torch in a training; None lets nnU-Net decide.
        processes: worker processes for preprocessing, prediction and evaluation.
    """

    def __init__(self, folder: Path, *, device: str = "cuda", threads: int | None = None, processes: int = 1) -> None:
        self.folder = folder.resolve()
        self.raw = self.folder / "nnUNet_raw"
        self.preprocessed = self.folder / "nnUNet_preprocessed"
        self.results = self.folder / "nnUNet_results"
        self.runs = self.folder / "runs"
        self.trainers = self.folder / "trainers"
        self.device = device
        self.threads = threads
        self.processes = processes
        self._children: set[subprocess.Popen[str]] = set()
        self._children_lock = threading.Lock()
        self._stopped = False

    def make(self) -> None:
        for folder in (self.raw, self.preprocessed, self.results, self.runs, self.trainers, self.folder / "locks"):
            folder.mkdir(parents=True, exist_ok=True)

    # --- files

    @property
    def config_file(self) -> Path:
        return self.folder / "benchmark.json"

    @property
    def source_file(self) -> Path:
        return self.folder / "source.json"

    @property
    def pretraining_file(self) -> Path:
        return self.folder / "pretraining.json"

    @property
    def plan_file(self) -> Path:
        return self.folder / "plan.json"

    def run_folder(self, run: str) -> Path:
        return self.runs / run

    def record_file(self, run: str) -> Path:
        return self.runs / run / "record.json"

    def record(self, run: str) -> dict[str, Any] | None:
        """A finished run's record, None if it is not finished."""
        file = self.record_file(run)
        return read_json(file) if file.is_file() else None

    def model_checksum(self, run: str) -> str | None:
        """SHA-256 of a finished run's last checkpoint, None if it is not finished."""
        record = self.record(run)
        return None if record is None else record["checksums"].get(FINAL_CHECKPOINT)

    @contextlib.contextmanager
    def lock(self, name: str, waiting: str = "") -> Iterator[None]:
        """Alone with something, also among processes on other machines that share the folder.

        The operating system lets go of it when this process ends, however it ends.

        Args:
            waiting: what to say once where another process has it.

        Raises:
            InterruptedError: stop() was called while it waited.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / "locks" / f"{name}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting:
                say(waiting)
            self._wait_for(lock)
        try:
            yield
        finally:
            lock.release()

    def _wait_for(self, lock: BaseFileLock) -> None:
        """In short steps: only so does a thread notice Ctrl-C, which the main thread gets."""
        from filelock import Timeout

        while True:
            try:
                lock.acquire(timeout=1.0, poll_interval=0.5)
                return
            except Timeout:
                if self._stopped:
                    raise InterruptedError("stopped") from None

    # --- commands

    def environment(self, gpu: str | None = None) -> dict[str, str]:
        """The environment of a command: this process's, with DIR's three folders and our trainers."""
        result = dict(os.environ)
        result.update(
            nnUNet_raw=str(self.raw),
            nnUNet_preprocessed=str(self.preprocessed),
            nnUNet_results=str(self.results),
            PYTHONUNBUFFERED="1",
            PATH=str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", ""),
        )
        folders = with_our_folder(os.environ.get(VARIABLE), ENTRY_FOLDER)
        result[VARIABLE] = with_our_folder(folders, self.trainers)
        result.pop("nnUNet_dsp_seed", None)  # seeds come from the plans, run by run
        if self.device == "cpu":
            result.setdefault("nnUNet_n_proc_DA", "1")
            result.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow a busy machine down
        if self.threads is not None:
            result["nnUNet_dsp_threads"] = str(self.threads)
            result["OMP_NUM_THREADS"] = str(self.threads)
        result.setdefault("nnUNet_def_n_proc", str(self.processes))
        if gpu is not None:
            result["CUDA_VISIBLE_DEVICES"] = gpu
        return result

    def command(
        self,
        *words: object,
        log: Path,
        gpu: str | None = None,
        on_line: Callable[[str], None] | None = None,
        pid_file: Path | None = None,
    ) -> float:
        """Run one command and wait for it.

        Args:
            words: the command.
            log: where its output is appended.
            gpu: CUDA_VISIBLE_DEVICES for it.
            on_line: called with each line of its output.
            pid_file: where its process id stands while it runs.

        Returns:
            Seconds it took.

        Raises:
            OSError: it failed; the message ends with the end of its output.
        """
        line = [str(word) for word in words]
        started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        tail: deque[str] = deque(maxlen=TAIL)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ {shlex.join(line)}\n")
            file.flush()
            try:
                process = self._start(line, gpu)
            except FileNotFoundError:
                raise OSError(
                    f"{line[0]} was not found. It belongs to nnU-Net; is nnunetv2 installed in {sys.executable}'s "
                    "environment?"
                ) from None
            try:
                if pid_file is not None:
                    write_json(pid_file, {"pid": process.pid, "host": socket.gethostname()})
                if process.stdout is None:
                    raise OSError(f"{line[0]} was started without output.")
                for text in process.stdout:
                    file.write(text)
                    file.flush()
                    tail.append(text)
                    if on_line is not None:
                        on_line(text)
                status = process.wait()
            finally:
                _end(process)
                with self._children_lock:
                    self._children.discard(process)
                if pid_file is not None:
                    pid_file.unlink(missing_ok=True)
        if status != 0:
            raise OSError(
                f"`{line[0]}` failed with exit status {status}. Its output ended:\n{''.join(tail)}All of it: {log}"
            )
        return time.monotonic() - started

    def _start(self, line: list[str], gpu: str | None) -> subprocess.Popen[str]:
        with self._children_lock:
            if self._stopped:
                raise InterruptedError("stopped")
            process = subprocess.Popen(
                line,
                env=self.environment(gpu),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                start_new_session=True,  # its worker processes end with it
            )
            self._children.add(process)
            return process

    def stop(self) -> None:
        """End every command that runs, and start no more."""
        with self._children_lock:
            self._stopped = True
            children = list(self._children)
        for process in children:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End a command and its worker processes; nothing where it has ended well."""
    with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        os.killpg(process.pid, signal.SIGKILL)  # what is left of its group
    if process.poll() is None:  # no process groups on this system
        process.kill()
        process.wait()


def still_running(pid_file: Path) -> int | None:
    """The process id in a file that Workplace.command() wrote, if that process is still there, on this machine.

    A benchmark that was killed leaves its training running.
    """
    try:
        content = read_json(pid_file)
    except (FileNotFoundError, ValueError):
        return None
    pid = content.get("pid")
    if content.get("host") != socket.gethostname() or not isinstance(pid, int):
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError, OSError):
        return None
    command = Path(f"/proc/{pid}/cmdline")
    with contextlib.suppress(OSError):
        if b"nnUNet" not in command.read_bytes():
            return None  # the number has gone to another program
    return pid


# --- JSON


def plain(value: Any) -> Any:
    """Strict JSON: what is not a number becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        return plain(value.item())
    if isinstance(value, Path):
        return str(value)
    return value


def write_json(file: Path, content: Any) -> None:
    """Write strict JSON atomically."""
    text = json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(file, text)


def write_text(file: Path, text: str) -> None:
    """Write text atomically."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def checksum(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- what it was made with


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide on the numbers."""
    result = {"python": platform.python_version()}
    for package in ("nnunet-dsp", "nnunetv2", "torch", "numpy", "scipy", "batchgenerators", "batchgeneratorsv2"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            result[package] = metadata.version(package)
    return result


def code_state() -> dict[str, Any]:
    """The commit of nnunet_dsp's source where it is a git checkout, and a checksum of what trains in any case."""
    import importlib.util

    digest = hashlib.sha256()
    for package in ("nnunet_dsp", "nnunet_dsp.instances", "nnunet_dsp.trainers"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted(Path(folder).glob("*.py")):
                if file.name not in NOT_TRAINING:
                    digest.update(file.name.encode())
                    digest.update(file.read_bytes())
    state: dict[str, Any] = {"sha256": digest.hexdigest()[:16], "commit": None, "changed": None}
    root = Path(__file__).resolve().parents[3]
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit = _git(root, "rev-parse", "HEAD")
            state |= {"commit": commit, "changed": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}
    return state


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


def machine(device: str) -> dict[str, Any]:
    """Where a run was made."""
    state: dict[str, Any] = {"device": device, "system": platform.platform(), "cores": os.cpu_count()}
    if device == "cuda":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
            done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
            state["gpu"] = ", ".join(sorted(set(done.stdout.strip().splitlines())))
    return state


def say(text: str) -> None:
    """Tell how things go; on stderr, for stdout is for what was asked for."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What this process and its workers print goes to stderr, as nnU-Net's readers print warnings on some files."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
