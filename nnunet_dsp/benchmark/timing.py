"""How the timing benchmarks measure: warm-up, rotation, medians and spread, peak memory, one table and one JSON.

What is measured stands in loss.py, head.py, filter.py, loader.py and step.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

PACKAGES = ("nnunetv2", "torch", "numpy", "batchgenerators", "batchgeneratorsv2")


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's result.

    Attributes:
        name: what was measured.
        median_s, iqr_s: seconds, median and interquartile range over the repeats; None where only memory was measured.
        peak_bytes: the most memory allocated beyond what was there before; None where it was not measured.
        baseline: name of the row it is compared with; None for a baseline itself.
        ratio: of the compared quantity to the baseline's.
        limit: the ratio it must not exceed (or, for `at_least`, fall below); None where there is none.
        at_least: the ratio is a rate and must not be smaller.
        quantity: what `ratio` compares: "time", "memory", "rate" or "time per class"; "seconds": the limit is one of
            `median_s` itself.
    """

    name: str
    median_s: float | None = None
    iqr_s: float | None = None
    peak_bytes: int | None = None
    baseline: str | None = None
    ratio: float | None = None
    limit: float | None = None
    at_least: bool = False
    quantity: str = "time"

    @property
    def within_limit(self) -> bool | None:
        """Whether the limit holds; None where there is none."""
        if self.limit is None:
            return None
        if self.quantity == "seconds":
            return self.median_s is not None and self.median_s <= self.limit
        if self.ratio is None:
            return None
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "median_s": self.median_s,
            "iqr_s": self.iqr_s,
            "peak_bytes": self.peak_bytes,
            "baseline": self.baseline,
            "ratio": self.ratio,
            "limit": self.limit,
            "limit_kind": None if self.limit is None else "at_least" if self.at_least else "at_most",
            "quantity": self.quantity,
            "within_limit": self.within_limit,
        }


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def iqr(self) -> float:
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low)


def synchronise(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(
    candidates: dict[str, Callable[[], Any]], device: torch.device, *, warmup: int, repeats: int
) -> dict[str, Timing]:
    """Time each candidate `repeats` times, one after another in every round.

    Rounds rather than one candidate after the other: what else the machine does slows all of them alike, so ratios
    hold where seconds do not. The device is synchronised before each clock reading.
    """
    for run in candidates.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    collecting = gc.isenabled()
    gc.disable()  # a collection in one candidate's turn is not its cost
    try:
        for turn in tqdm(range(repeats), desc="Measuring", leave=False, disable=repeats < 3):
            gc.collect()
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                synchronise(device)
                start = time.perf_counter()
                candidates[name]()
                synchronise(device)
                seconds[name].append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def median_ratio(timing: Timing, baseline: Timing) -> float:
    """Median over the rounds of the ratio to the baseline in the same round."""
    return float(np.median(np.divide(timing.seconds, baseline.seconds)))


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most memory that tensors take during `run`, beyond what is allocated when it starts.

    On CUDA by the allocator's own count. On a CPU by torch's profiler, which sees every allocation and release.
    """
    run()  # what is made once and kept is not part of it
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronise(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    allocated = highest = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        allocated += int(event.nbytes())
        highest = max(highest, allocated)
    return highest


def add_timing_arguments(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """The options that all timing benchmarks share."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file as JSON")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help="timed rounds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="rounds before those (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random inputs (default: %(default)s)")


def check_timing_arguments(args: argparse.Namespace) -> torch.device:
    """The device asked for.

    Raises:
        ValueError: it is not there, or a number makes no sense.
    """
    if args.repeats < 1 or args.warmup < 0:
        raise ValueError(f"Expected --repeats of at least 1 and --warmup of at least 0, but got {args.repeats} and "
                         f"{args.warmup}.")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"Expected --device to be cpu or cuda, but got {args.device!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here.")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Expected --device to be cpu or cuda, but got {args.device!r}.")
    return device


def metadata_of_run(benchmark: str, device: torch.device, args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What someone needs to judge the figures: versions, commit, device, threads, options."""
    from nnunet_dsp import __version__

    versions = {"nnunet_dsp": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "benchmark": benchmark,
        "command": " ".join(["nnunet_dsp", *sys.argv[1:]]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu: {processor()}",
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "warmup": args.warmup,
        "repeats": args.repeats,
        "seed": args.seed,
        **more,
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source tree this runs from, "+changes" where it was edited since; None outside of one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(folder)]
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        head = subprocess.run([*git, "rev-parse", "HEAD"], **options)
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def format_table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    head = ("", "median", "IQR", "peak", "ratio", "limit", "")
    lines = [head]
    for row in rows:
        verdict = {None: "", True: "ok", False: "MISSED"}[row.within_limit]
        sign = ">=" if row.at_least else "<="
        lines.append(
            (
                row.name,
                _seconds(row.median_s),
                _seconds(row.iqr_s),
                "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB",
                "" if row.ratio is None else f"{row.ratio:.2f} x {row.baseline} ({row.quantity})",
                "" if row.limit is None else f"{sign} {row.limit:g}",
                verdict,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1e3:.1f} ms" if value < 10 else f"{value:.1f} s"


def report(meta: dict[str, Any], rows: Sequence[Row], file: Path | None) -> int:
    """Print the table, write the JSON if asked for; the exit status: 0, whether or not a limit was missed."""
    print(f"{meta['benchmark']}: {meta['device']}, {meta['threads']} threads, median of {meta['repeats']} rounds\n")
    print(format_table(rows))
    missed = [row.name for row in rows if row.within_limit is False]
    print(f"\n{len(missed)} beyond the limit: {', '.join(missed)}" if missed else "\nEvery limit holds.")
    if file is not None:
        text = json.dumps({"meta": meta, "rows": [row.to_json() for row in rows]}, indent=2, allow_nan=False)
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, file)
        print(f"Written: {file}")
    return 0
