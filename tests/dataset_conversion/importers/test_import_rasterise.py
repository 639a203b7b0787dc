"""Polygons and lines as voxels, against loops over every voxel's centre."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_dsp.dataset_conversion.rasterise import draw_line, fill_rings

COORDINATE = st.floats(-8, 30, allow_nan=False).map(lambda v: round(v * 4) / 4)
RING = st.lists(st.tuples(COORDINATE, COORDINATE), min_size=1, max_size=9)


def whole(patch, shape):
    """A patch in an image of zeros."""
    image = np.zeros(shape, bool)
    if patch is not None:
        image[patch[0]] = patch[1]
    return image


def inside_by_hand(rings, y, x):
    """Whether a ray from (y, x) to the left crosses the rings an odd number of times; lower ends of edges count."""
    crossings = 0
    for ring in rings:
        for (y0, x0), (y1, x1) in zip(ring, [*ring[1:], ring[0]], strict=True):
            if min(y0, y1) <= y < max(y0, y1) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
                crossings += 1
    return crossings % 2 == 1


@settings(max_examples=150)
@given(rings=st.lists(RING, min_size=1, max_size=3), shape=st.tuples(st.integers(1, 20), st.integers(1, 25)))
def test_a_polygon_holds_the_voxels_whose_centres_lie_inside(rings, shape):
    filled = whole(fill_rings(rings, shape), shape)
    for y in range(shape[0]):
        for x in range(shape[1]):
            assert filled[y, x] == inside_by_hand(rings, y + 0.5, x + 0.5)


def test_a_rectangle_in_faces_holds_start_to_stop():
    filled = whole(fill_rings([[(2, 3), (2, 7), (5, 7), (5, 3)]], (9, 10)), (9, 10))
    expected = np.zeros((9, 10), bool)
    expected[2:5, 3:7] = True
    np.testing.assert_array_equal(filled, expected)


def test_neighbours_share_no_voxel_and_leave_none_out():
    corners = [(0, 0), (0, 12), (12, 12), (12, 0)]
    middle = (5.5, 6.5)  # a centre: an edge that runs through centres belongs to one side
    parts = [[corners[i], corners[(i + 1) % 4], middle] for i in range(4)]
    assert (sum(whole(fill_rings([p], (12, 12)), (12, 12)).astype(int) for p in parts) == 1).all()


def test_an_outline_of_many_vertices_takes_no_time():
    angle = np.linspace(0, 2 * np.pi, 50_000, endpoint=False)
    ring = np.c_[1000 + 900 * np.sin(angle), 1000 + 900 * np.cos(angle)]
    filled = whole(fill_rings([ring], (2000, 2000)), (2000, 2000))  # minutes, if every voxel met every vertex
    assert filled.sum() == pytest.approx(math.pi * 900**2, rel=1e-3)


def distance_by_hand(p, a, b):
    """From a point to a segment."""
    along = [q - r for q, r in zip(b, a, strict=True)]
    square = sum(v * v for v in along)
    t = 0.0 if square == 0 else sum((q - r) * v for q, r, v in zip(p, a, along, strict=True)) / square
    t = min(1.0, max(0.0, t))
    return math.dist(p, [r + t * v for r, v in zip(a, along, strict=True)])


@settings(max_examples=60)
@given(
    dim=st.sampled_from([2, 3]),
    width=st.sampled_from([1.0, 2.0, 3.0, 5.5]),
    seed=st.integers(0, 10**6),
    number=st.integers(1, 4),
)
def test_a_line_holds_the_voxels_within_half_its_width(dim, width, seed, number):
    random = np.random.default_rng(seed)
    shape = (14, 17) if dim == 2 else (5, 9, 11)
    vertices = random.uniform(-4, 18, (number, dim)).tolist()
    drawn = whole(draw_line(vertices, width, shape), shape)
    segments = list(zip(vertices, vertices[1:], strict=False)) or [(vertices[0], vertices[0])]
    for voxel in np.ndindex(shape):
        near = min(distance_by_hand(voxel, a, b) for a, b in segments)
        if near < width / 2 - 1e-6:
            assert drawn[voxel]
        if near > max(width / 2, math.sqrt(dim) / 2) + 1e-6:  # beyond: a voxel that the line passes through
            assert not drawn[voxel]


def test_a_line_between_centres_marks_the_voxel_it_passes_through():
    assert whole(draw_line([(3.5, 2.5)], 1, (8, 8)), (8, 8)).sum() == 1


def test_a_line_outside_is_none_and_an_endless_one_is_refused():
    assert draw_line([(100, 100), (200, 100)], 3, (8, 8)) is None
    assert draw_line([(-1e9, 3), (1e9, 3)], 1, (8, 8)) is not None
    with pytest.raises(ValueError, match="too much"):
        draw_line([(0, 0), (7, 7)] * 2000, 1000, (8, 8))
