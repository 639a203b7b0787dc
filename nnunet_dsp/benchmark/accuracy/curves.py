"""Curves of Dice over masks, over weak cases and over expert time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nnunet_dsp.benchmark.tables import write_csv


class Curve(NamedTuple):
    """A line of a figure: an arm in a setting, with the second count fixed.

    Attributes:
        other: the second count in words, "3 other cases"; empty where the arm has one line only.
        points: (x, mean Dice, its deviation, 0 where it has none), by x.
    """

    setting: str
    arm: str
    other: str
    points: tuple[tuple[float, float, float], ...]

    @property
    def label(self) -> str:
        return f"{self.arm}, {self.other}" if self.other else self.arm


class Point(NamedTuple):
    """A line of curves.csv, and the runs it comes from."""

    setting: str
    masks: int
    weak: int
    arm: str
    minutes: float
    dice: float
    deviation: float
    number: int
    runs: frozenset[str]


def write_curves(folder: Path, points: Sequence[Point], cases: int) -> list[str]:
    """curves.csv and a figure of each axis along which something varies; the names of the figures.

    Args:
        cases: number of training cases.
    """
    heading = ["setting", "masks", "weak", "arm", "minutes", "Dice", "Dice_sd", "runs"]
    write_csv(folder / "curves.csv", heading, [list(point[:-1]) for point in points])
    names = []
    for axis, label in (
        ("masks", "masked cases"),
        ("weak", "weakly annotated cases"),
        ("minutes", "expert time in minutes"),
    ):
        name = f"curve_{axis}.png"
        curves = curves_of(points, axis, cases)
        told = {x for curve in curves for x, *_ in curve.points} if axis == "minutes" else ()
        if len(told) > 1 or (axis != "minutes" and any(len(curve.points) > 1 for curve in curves)):
            _plot(folder / name, curves, label, logarithmic=axis == "minutes")
            names.append(name)
        else:
            (folder / name).unlink(missing_ok=True)
    return names


def curves_of(points: Sequence[Point], axis: str, cases: int) -> list[Curve]:
    """The lines of a figure, none of which mixes two series of counts.

    Over masks there is a line for each weak count; all other cases ("rest") are one such count, though their number
    changes with the masks. Over weak cases there is one for each mask count, and over minutes those over masks, or over
    weak cases where the masks do not vary. Lines of an arm that come from the same runs are one: `masks` has no weak
    cases.

    Args:
        axis: masks, weak or minutes.
        cases: number of training cases.
    """
    found = []
    for setting in dict.fromkeys(point.setting for point in points):
        here = [point for point in points if point.setting == setting]
        over_masks = axis == "masks" or (axis == "minutes" and len({point.masks for point in here}) > 1)
        for arm in dict.fromkeys(point.arm for point in here):
            own = [point for point in here if point.arm == arm]
            series = _over_masks(own, cases) if over_masks else _over_weak(own)
            if len({point.runs for point in own}) == 1:  # `full`, whatever the counts
                series = {"": own}
            found += _without_repetitions(series, axis)
    several = {arm for (_, arm), number in Counter((c.setting, c.arm) for c in found).items() if number > 1}
    return [curve if curve.arm in several else curve._replace(other="") for curve in found]


def _over_masks(points: Sequence[Point], cases: int) -> dict[str, list[Point]]:
    """Points with the same weak count, and those with all other cases; a point may be on a line of each."""
    numbers = sorted({point.weak for point in points})
    series = {f"{number} other cases": [point for point in points if point.weak == number] for number in numbers}
    rest = [point for point in points if point.masks + point.weak == cases]
    return {**series, "all other cases": rest} if len(rest) > 1 else series


def _over_weak(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points with the same number of masks."""
    numbers = sorted({point.masks for point in points})
    return {f"{number} masks": [point for point in points if point.masks == number] for number in numbers}


def _without_repetitions(series: Mapping[str, Sequence[Point]], axis: str) -> list[Curve]:
    """A curve for each series but those whose points another one has, too."""
    known: dict[str, dict[tuple[float, frozenset[str]], Point]] = {}
    for other, points in series.items():
        own = {(getattr(point, axis), point.runs): point for point in points}
        if not any(own.keys() <= more.keys() for more in known.values()):
            known = {name: less for name, less in known.items() if not less.keys() < own.keys()}
            known[other] = own
    curves = []
    for other, own in known.items():
        places = sorted(
            (x, point.dice, 0.0 if math.isnan(point.deviation) else point.deviation) for (x, _), point in own.items()
        )
        first = next(iter(own.values()))
        curves.append(Curve(first.setting, first.arm, other, tuple(places)))
    return curves


def _plot(file: Path, curves: Sequence[Curve], label: str, *, logarithmic: bool) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    from nnunet_dsp.pictures import PALETTE

    settings = list(dict.fromkeys(curve.setting for curve in curves))
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    others = list(dict.fromkeys(curve.other for curve in curves if curve.other))
    figure, grid = plt.subplots(
        1, len(settings), figsize=(1.2 + 4.4 * len(settings), 4.2), squeeze=False, sharey=True, layout="constrained"
    )
    markers, strokes = "osD^vP*X", ("-", "--", ":", "-.")
    for axes, setting in zip(grid[0], settings, strict=True):
        for curve in curves:
            if curve.setting != setting:
                continue
            index = arms.index(curve.arm)
            style = {
                "color": PALETTE[index % len(PALETTE)],
                "marker": markers[(index + index // len(PALETTE)) % len(markers)],  # as many as colours: no pair twice
                "ls": strokes[others.index(curve.other) % len(strokes)] if curve.other else "-",
                "ms": 5,
                "lw": 1.4,
            }
            x, y, deviation = zip(*curve.points, strict=True)
            axes.errorbar(x, y, yerr=deviation, capsize=2, label=curve.label, **style)
        axes.set_title(setting, fontsize=10)
        axes.set_xlabel(label)
        if logarithmic and min(x for curve in curves for x, *_ in curve.points) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(ScalarFormatter())
            axes.tick_params(axis="x", which="both", labelsize=7)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("mean Dice")
    handles: dict[str, Any] = {}
    for axes in grid[0]:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    columns = int(14 * figure.get_figwidth()) // (max(map(len, handles)) + 7)  # letters, and a handle's width
    columns = max(1, min(len(handles), columns, 6))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    temporary = file.with_name(f".{file.name}")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    temporary.replace(file)


# --- pictures
