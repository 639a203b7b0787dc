"""Pictures of what was said and what came out: image, annotations, truth and predictions beside each other.

Matplotlib only, on arrays; nothing here reads nnU-Net's folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_dsp.annotations import Annotations

# Okabe and Ito, Color Universal Design (2008): told apart by the colour-blind too; black is left to the background
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
_TINT = 0.55


def class_colour(index: int) -> str:
    """Colour of the index-th foreground class, from 1 on; repeats after eight."""
    return PALETTE[(index - 1) % len(PALETTE)]


def overlay(
    image: npt.NDArray[Any], mask: npt.NDArray[Any] | None, ignore_label: int | None = None
) -> npt.NDArray[np.uint8]:
    """A grey image with its classes tinted.

    Args:
        image: (y, x), any numbers; stretched between its 1st and 99th percentile.
        mask: (y, x) class map or None. Ignored voxels are hatched.

    Returns:
        (y, x, 3) uint8.
    """
    from matplotlib.colors import to_rgb

    low, high = np.percentile(image, (1, 99))
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    colour = np.repeat(grey[..., None], 3, axis=-1)
    if mask is not None:
        for label in np.unique(mask):
            where = mask == label
            if ignore_label is not None and label == ignore_label:
                stripes = (np.add(*np.indices(mask.shape)) // 4) % 2 == 0
                colour[where & stripes] *= 0.6
            elif label > 0:
                colour[where] = (1 - _TINT) * colour[where] + _TINT * np.asarray(to_rgb(class_colour(int(label))))
    return np.asarray(np.round(colour * 255), dtype=np.uint8)


def draw_annotations(axes: Any, said: Annotations, names: Sequence[str], slice_index: int | None = None) -> None:
    """Points, boxes and tags of one image on matplotlib axes that show it (or, in 3D, one slice of it)."""
    from matplotlib.patches import Rectangle

    def colour(label: str) -> str:
        index = list(names).index(label)
        return class_colour(index) if index else "white"

    for box in said.boxes:
        start, stop = box.start, box.stop
        if len(start) == 3:
            if slice_index is not None and not start[0] <= slice_index < stop[0]:
                continue
            start, stop = start[1:], stop[1:]
        (y0, x0), (y1, x1) = start, stop
        style = "-" if box.tight else "--"
        axes.add_patch(
            Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, ec=colour(box.label), lw=1.3, ls=style)
        )
    for point in said.points:
        at = point.at
        if len(at) == 3:
            if slice_index is not None and round(at[0]) != slice_index:
                continue
            at = at[1:]
        axes.plot(at[1], at[0], "o", ms=4, mfc=colour(point.label), mec="black", mew=0.6)
    tags = [f"+{name}" for name in said.present] + [f"\N{MINUS SIGN}{name}" for name in said.absent]
    if tags:
        axes.set_xlabel("tags: " + " ".join(tags), fontsize=7)


def comparison(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    file: Path,
    *,
    ignore_label: int | None = None,
    title: str = "",
) -> None:
    """Writes a grid of pictures.

    Args:
        rows: one mapping a row, of column title to what is shown there: a dict with `image` (y, x), and as wanted
            `mask` (y, x), `annotations` (Annotations) and `caption`.
        names: class names, background first.
        file: the PNG to write.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    columns = max(len(row) for row in rows)
    figure, grid = plt.subplots(
        len(rows), columns, figsize=(3 * columns, 3.3 * len(rows) + 0.6), squeeze=False, layout="constrained"
    )
    for axes_row, row in zip(grid, rows, strict=True):
        for axes in axes_row:
            axes.set_axis_off()
        for axes, (heading, cell) in zip(axes_row, row.items(), strict=False):
            axes.set_axis_on()
            axes.set_xticks([])
            axes.set_yticks([])
            axes.imshow(overlay(cell["image"], cell.get("mask"), ignore_label), interpolation="nearest")
            axes.set_title(heading, fontsize=9)
            if cell.get("annotations") is not None:
                draw_annotations(axes, cell["annotations"], names)
            if cell.get("caption"):
                axes.set_xlabel(cell["caption"], fontsize=7)
    patches = [Patch(color=class_colour(i), label=name) for i, name in enumerate(names) if i]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 6), fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    temporary = file.with_name(f".{file.name}")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    temporary.replace(file)
