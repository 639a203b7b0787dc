"""Geometry that several tools need: rotated boxes, ellipses, rectangles among polygons, areas in one slice of a volume.

Nothing here knows a format or reads a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial

import numpy as np

from nnunet_dsp.dataset_conversion.imported import RasterMask, Region, fail
from nnunet_dsp.dataset_conversion.rasterise import fill_rings

Ring = tuple[tuple[float, float], ...]

MAX_RING = 1_000_000  # vertices
IN_ONE_SLICE = "rectangles in one slice of a volume: boxes one voxel thick, so boxes of their class are not complete"


def around_rotated(
    start: Sequence[float], stop: Sequence[float], degrees: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Start and stop of the upright box around a box that is turned about its centre, either way round.

    Args:
        start, stop: (y, x) of two opposite corners before the turn, stop >= start.
    """
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    half_y, half_x = ((b - a) / 2 for a, b in zip(start, stop, strict=True))
    half = (half_y * cos + half_x * sin, half_y * sin + half_x * cos)
    center = [(a + b) / 2 for a, b in zip(start, stop, strict=True)]
    outer_start = tuple(round(c - h, 9) for c, h in zip(center, half, strict=True))  # a quarter turn is exact
    return outer_start, tuple(round(c + h, 9) for c, h in zip(center, half, strict=True))


def ellipse_ring(center: Sequence[float], radii: Sequence[float], degrees: float = 0.0) -> Ring:
    """An ellipse as a polygon that is nowhere farther than a hundredth of a voxel from it (or has 4096 corners).

    Args:
        center, radii: (y, x); radii along y and x before the turn.
        degrees: clockwise as seen on a screen.
    """
    largest = max(radii)
    # A chord of n leaves r * (1 - cos(pi / n)) to the circle, about r * (pi / n)^2 / 2
    count = min(4096, max(16, math.ceil(math.pi * math.sqrt(max(largest, 0.0) / 0.02))))
    t = np.arange(count) * (2 * math.pi / count)
    dy, dx = radii[0] * np.sin(t), radii[1] * np.cos(t)
    angle = math.radians(degrees)
    y = center[0] + dx * math.sin(angle) + dy * math.cos(angle)
    x = center[1] + dx * math.cos(angle) - dy * math.sin(angle)
    return tuple(zip(y.tolist(), x.tolist(), strict=True))


def hull(points: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Smallest and largest coordinate on each axis."""
    columns = list(zip(*points, strict=True))
    return tuple(min(c) for c in columns), tuple(max(c) for c in columns)


def is_upright_rectangle(ring: Sequence[Sequence[float]], tolerance: float = 1e-6) -> bool:
    """Whether a ring is a rectangle along the axes: its four corners in order, the first perhaps again."""
    corners = [tuple(p) for p in ring]
    if len(corners) == 5 and corners[0] == corners[-1]:
        corners.pop()
    if len(corners) != 4:
        return False
    for i in range(4):  # each side changes one coordinate, and sides alternate between the axes
        change = [abs(a - b) > tolerance for a, b in zip(corners[i], corners[(i + 1) % 4], strict=True)]
        following = [abs(a - b) > tolerance for a, b in zip(corners[(i + 1) % 4], corners[(i + 2) % 4], strict=True)]
        if sum(change) != 1 or sum(following) != 1 or change == following:
            return False
    return True


def flat_area(
    vertices: Sequence[Sequence[float]],
    label: str,
    shape: tuple[int, ...],
    tolerance: float,
    source: str | os.PathLike[str],
    entry: str,
) -> Region | RasterMask:
    """A polygon (centres) that fills an area of a 2D image, or of one slice of a 3D image across any of its axes.

    Args:
        shape: of the image, as many axes as the vertices have.
        tolerance: voxels by which the vertices may differ across the slice.

    Raises:
        AnnotationError: the polygon lies in no slice, or outside the image.
    """
    if len(shape) == 2:
        return Region(label, (tuple((y + 0.5, x + 0.5) for y, x in vertices),), None, entry)
    low, high = hull(vertices)
    extent = [b - a for a, b in zip(low, high, strict=True)]
    axis = extent.index(min(extent))
    if extent[axis] > tolerance:
        fail(source, entry, "the area lies across the slices, in none of them", "Draw it in one slice.")
    plane = (low[axis] + high[axis]) / 2
    if not -0.5 <= plane < shape[axis] - 0.5:
        fail(source, entry, f"it lies at {plane:g} on axis {axis}, outside the image of shape {shape}")
    if axis == 0:
        return Region(label, (tuple((y + 0.5, x + 0.5) for _, y, x in vertices),), plane, entry)
    # A Region's plane is a slice of the array's first axis: these are voxels from the start
    others = [a for a in range(3) if a != axis]
    start = [max(0, math.floor(low[a])) for a in others]
    stop = [min(shape[a], math.ceil(high[a]) + 1) for a in others]
    offset, size = [0, 0, 0], [1, 1, 1]
    offset[axis] = math.floor(plane + 0.5)
    for a, first, last in zip(others, start, stop, strict=True):
        if last <= first:
            fail(source, entry, f"it lies outside the image of shape {shape}")
        offset[a], size[a] = first, last - first
    corners = tuple(tuple(float(p[a]) - offset[a] + 0.5 for a in others) for p in vertices)
    return RasterMask(label, partial(_fill, corners, tuple(size)), tuple(offset), entry)


def _fill(ring: tuple[tuple[float, ...], ...], shape: tuple[int, ...]) -> np.ndarray:
    """Voxels within a ring (faces), bool, of `shape`, which has one axis of size 1."""
    flat = [size for axis, size in enumerate(shape) if axis != shape.index(1)]
    inside = np.zeros(flat, bool)
    patch = fill_rings([ring], (flat[0], flat[1]))
    if patch is not None:
        inside[patch[0]] = patch[1]
    return inside.reshape(shape)
