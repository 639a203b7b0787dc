"""Painting regions, lines and raster masks into a label map. Voxel i of an axis reaches from i to i + 1 in faces, and
its centre lies at i in centres. Numpy only; nothing here knows files or classes.

Own code rather than scikit-image's polygon: that takes time in proportion to area x vertices (minutes for an outline of
ten thousand vertices), and counts centres on an edge as inside of both neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MAX_LINE = 2e7  # voxels that one line may be long
_CHUNK = 1 << 22
_PIECE = 24.0

Patch = tuple[tuple[slice, ...], npt.NDArray[np.bool_]]
"""Where in the image, and which voxels there."""


def fill_rings(rings: Sequence[Sequence[Sequence[float]]], shape: tuple[int, int]) -> Patch | None:
    """The voxels whose centres lie inside rings of (y, x) in faces, by the even-odd rule.

    A centre exactly on an edge belongs to the side below and right of it, so that neighbours share no voxel and leave
    none out; a rectangle holds the rows start <= centre < stop.

    Args:
        rings: each closed by itself, at least one vertex.
        shape: of the image, (y, x); what lies outside of it is left out.

    Returns:
        None if no centre lies inside.
    """
    y0, x0, y1, x1 = (np.concatenate(parts) for parts in zip(*map(_edges, rings), strict=True))
    low, high = np.minimum(y0, y1), np.maximum(y0, y1)
    first = np.clip(np.ceil(low - 0.5), 0, shape[0]).astype(np.int64)  # rows whose centre an edge crosses
    after = np.clip(np.ceil(high - 0.5), 0, shape[0]).astype(np.int64)
    rows = after - first
    used = rows > 0
    if not used.any():
        return None
    y0, x0, y1, x1, first, rows = (v[used] for v in (y0, x0, y1, x1, first, rows))
    top, bottom = int(first.min()), int((first + rows).max())
    left = int(np.clip(np.floor(min(x0.min(), x1.min())), 0, shape[1]))
    right = int(np.clip(np.ceil(max(x0.max(), x1.max())), 0, shape[1]))
    if right <= left:
        return None
    width = right - left + 1
    toggles = np.zeros((bottom - top) * width, np.uint8)  # only odd or even matters, so it may run over
    ends = np.cumsum(rows)
    begin = 0
    while begin < len(rows):
        base = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, base + _CHUNK, side="right")))
        part = slice(begin, end)
        edge = np.repeat(np.arange(begin, end), rows[part])
        row = first[edge] + np.arange(len(edge)) - (ends[edge] - rows[edge] - base)
        slope = (x1[part] - x0[part]) / (y1[part] - y0[part])
        x = x0[edge] + (row + 0.5 - y0[edge]) * slope[edge - begin]
        column = np.clip(np.ceil(x - 0.5), left, right).astype(np.int64) - left
        np.add.at(toggles, (row - top) * width + column, 1)
        begin = end
    inside = np.bitwise_xor.accumulate(toggles.reshape(-1, width) & 1, axis=1).astype(bool)[:, :-1]
    if not inside.any():
        return None
    return (slice(top, bottom), slice(left, right)), inside


def _edges(ring: Sequence[Sequence[float]]) -> tuple[npt.NDArray[np.float64], ...]:
    y, x = np.asarray(ring, np.float64).reshape(-1, 2).T
    return y, x, np.roll(y, -1), np.roll(x, -1)


def draw_line(vertices: Sequence[Sequence[float]], width: float, shape: tuple[int, ...]) -> Patch | None:
    """The voxels of a line of this width (voxels) through vertices (centres), in 2D or 3D, with round ends.

    They are those whose centre lies within width / 2 of the line, and those that the line itself passes through.

    Returns:
        None if none of them lies in the image.

    Raises:
        ValueError: a line of more than twenty million voxels.
    """
    points = np.asarray(vertices, np.float64).reshape(-1, len(shape))
    radius = max(width, 1.0) / 2
    size = np.asarray(shape)
    starts, stops = (points, points) if len(points) == 1 else (points[:-1], points[1:])
    starts, stops = _clip_segments(starts, stops, -radius - 1, size + radius)
    if len(starts) == 0:
        return None
    length = np.linalg.norm(stops - starts, axis=1)
    if length.sum() * max(1.0, width) > MAX_LINE:
        raise ValueError(f"a line of {length.sum():.3g} voxels length and {width:g} width is too much")
    low = np.maximum(np.floor(np.minimum(starts, stops).min(0) - radius), 0).astype(int)
    high = np.minimum(np.ceil(np.maximum(starts, stops).max(0) + radius) + 1, size).astype(int)
    if (high <= low).any():
        return None
    drawn = np.zeros(high - low, bool)
    for start, stop, long in zip(starts, stops, length, strict=True):
        pieces = max(1, int(np.ceil(long / _PIECE)))
        steps = np.linspace(0, 1, pieces + 1)[:, None]
        corners = start + (stop - start) * steps
        for a, b in zip(corners[:-1], corners[1:], strict=True):
            _capsule(drawn, a - low, b - low, radius)
        count = int(np.ceil(long * 2)) + 1
        through = np.ceil(start + (stop - start) * np.linspace(0, 1, count)[:, None] - 0.5).astype(int) - low
        through = through[((through >= 0) & (through < drawn.shape)).all(1)]
        drawn[tuple(through.T)] = True
    if not drawn.any():
        return None
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)), drawn


def _capsule(drawn: npt.NDArray[np.bool_], a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], r: float) -> None:
    """Mark the voxels within r of the segment from a to b."""
    low = np.maximum(np.floor(np.minimum(a, b) - r), 0).astype(int)
    high = np.minimum(np.ceil(np.maximum(a, b) + r) + 1, drawn.shape).astype(int)
    if (high <= low).any():
        return
    axes = np.ogrid[tuple(slice(p, q) for p, q in zip(low, high, strict=True))]
    along = b - a
    square = float(along @ along)
    t = sum((g - s) * d for g, s, d in zip(axes, a, along, strict=True)) / square if square else np.zeros(1)
    t = np.clip(t, 0, 1)
    distance = sum((g - s - t * d) ** 2 for g, s, d in zip(axes, a, along, strict=True))
    drawn[tuple(slice(p, q) for p, q in zip(low, high, strict=True))] |= distance <= r * r + 1e-9


def _clip_segments(
    starts: npt.NDArray[np.float64], stops: npt.NDArray[np.float64], low: float, high: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The parts of segments inside a box (Liang and Barsky); segments wholly outside vanish."""
    along = stops - starts
    enter, leave = np.zeros(len(starts)), np.ones(len(starts))
    for axis in range(starts.shape[1]):
        d, s = along[:, axis], starts[:, axis]
        with np.errstate(divide="ignore", invalid="ignore"):
            one, two = (low - s) / d, (high[axis] - s) / d
        still = d == 0
        inside = (s >= low) & (s <= high[axis])
        enter = np.where(still, np.where(inside, enter, 2.0), np.maximum(enter, np.minimum(one, two)))
        leave = np.where(still, leave, np.minimum(leave, np.maximum(one, two)))
    kept = enter <= leave
    return starts[kept] + along[kept] * enter[kept, None], starts[kept] + along[kept] * leave[kept, None]
