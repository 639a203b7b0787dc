"""Tables of the benchmarks that train: for Markdown, for the terminal, as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nnunet_dsp.benchmark.accuracy.workplace import write_text


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """The first row is the heading; all columns but the first are aligned right."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "| --- |" + " ---: |" * (len(table[0]) - 1))
    return "\n".join(lines)


def plain_table(table: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need, all but the first aligned right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    )


def write_csv(file: Path, heading: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Atomically; NaN becomes an empty field."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(heading)
    for line in lines:
        writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in line])
    write_text(file, stream.getvalue())
