"""The map that holds no numbers, against the ordinary tensor that holds them all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_dsp.coordinate_map import CoordinateMap
from nnunet_dsp.geometry import PatchMap, box_lines


def ordinary(start, shape) -> torch.Tensor:
    axes = [torch.arange(first, first + size).float() for first, size in zip(start, shape, strict=True)]
    return torch.stack([*torch.meshgrid(*axes, indexing="ij"), torch.ones(*shape)])


def affine_grid(rng, dim, shape, scale=1.0) -> torch.Tensor:
    matrix = scale * (np.eye(dim) + rng.normal(size=(dim, dim)) * 0.2)
    theta = torch.from_numpy(np.concatenate([matrix, rng.normal(size=(dim, 1)) * 0.1], axis=1))[None].float()
    return F.affine_grid(theta, [1, 1, *shape], align_corners=False)


def same(ours, numbers) -> None:
    """Where the ones channel is whole the values agree; elsewhere the ones channel does."""
    made = ours.dense() if isinstance(ours, CoordinateMap) else ours
    assert made.shape == numbers.shape
    torch.testing.assert_close(made[-1], numbers[-1], atol=1e-4, rtol=0)
    whole = numbers[-1] > 0.9999
    torch.testing.assert_close(made[:, whole], numbers[:, whole], atol=1e-3, rtol=0)


@pytest.mark.parametrize("dim", [2, 3])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_whatever_the_transforms_do_the_formula_gives_the_numbers(dim, seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(5, 9, dim))
    start = tuple(int(first) for first in rng.integers(-4, 5, dim))
    ours, numbers = CoordinateMap.identity(start, shape), ordinary(start, shape)
    for step in rng.permutation(["crop", "flip", "pad", "sample", "crop", "flip"])[: rng.integers(1, 7)]:
        size = numbers.shape[1:]
        if step == "crop":
            low = [int(rng.integers(0, 2)) for _ in size]
            high = [max(a + 2, s - int(rng.integers(0, 2))) for a, s in zip(low, size, strict=True)]
            index = (slice(None), *[slice(a, b) for a, b in zip(low, high, strict=True)])
            ours, numbers = ours[index], numbers[index]
        elif step == "flip":
            axes = [a + 1 for a in range(dim) if rng.random() < 0.5]
            ours, numbers = torch.flip(ours, axes), torch.flip(numbers, axes)
        elif step == "pad":
            width = [int(w) for w in rng.integers(0, 3, 2 * dim)]
            ours, numbers = F.pad(ours, width, mode="constant", value=0), F.pad(numbers, width)
        else:
            grid = affine_grid(rng, dim, rng.integers(4, 8, dim).tolist())
            ours, numbers = (
                F.grid_sample(t[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]
                for t in (ours, numbers)
            )
        same(ours, numbers)
    if isinstance(ours, CoordinateMap):
        voxels = np.stack([rng.integers(0, size, 9) for size in ours.spatial_shape], axis=1)
        at, weight = ours.at(voxels)
        dense = ours.dense()[(slice(None), *voxels.T)].numpy()
        np.testing.assert_allclose(weight, dense[-1], atol=1e-6)
        np.testing.assert_allclose(at.T * weight, dense[:-1], atol=1e-3)


def test_the_map_holds_no_numbers_and_stays_a_formula_through_nnunets_spatial_transforms():
    ours = CoordinateMap.identity((0, 0, 0), (1000, 1000, 1000))
    assert ours.shape == (4, 1000, 1000, 1000)
    assert ours.untyped_storage().nbytes() < 100
    cropped = torch.flip(ours[:, 10:30, 20:40, 30:50], [1, 3])
    sampled = F.grid_sample(cropped[None], torch.zeros(1, 4, 4, 4, 3), align_corners=False)[0]
    for tensor in (cropped, sampled):
        assert isinstance(tensor, CoordinateMap)
    np.testing.assert_allclose(cropped.at(np.array([[0, 0, 0]]))[0], [[29, 20, 49]])
    np.testing.assert_allclose(sampled.at(np.array([[1, 2, 3]]))[0], [[19.5, 29.5, 39.5]])


@pytest.mark.parametrize(
    "operation",
    [
        lambda t: t * 2,
        lambda t: t.reshape(-1, 4),
        lambda t: t[:, ::2],
        lambda t: t[0],
        lambda t: torch.rot90(t, 1, [1, 2]),
        lambda t: F.pad(t, [1, 1], mode="replicate"),
        lambda t: torch.cat([t, t]),
        lambda t: F.grid_sample(t[None], torch.zeros(1, 3, 3, 2), padding_mode="border", align_corners=False),
        lambda t: F.grid_sample(t[None], torch.zeros(1, 3, 3, 2), mode="nearest", align_corners=False),
        lambda t: t.numpy(),
    ],
)
def test_any_other_operation_gets_the_numbers(operation):
    ours, numbers = CoordinateMap.identity((3, 5), (4, 6)), ordinary((3, 5), (4, 6))
    result = operation(ours)
    assert not isinstance(result, CoordinateMap)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(operation(numbers)))


@pytest.mark.parametrize("dim", [2, 3])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_box_taken_axis_by_axis_is_the_box_taken_voxel_by_voxel(dim, seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(9, 14, dim))
    start = tuple(int(first) for first in rng.integers(0, 5, dim))
    moved = CoordinateMap.identity(start, shape)
    if rng.random() < 0.5:  # sampled finer or coarser along each axis
        theta = torch.from_numpy(np.concatenate([np.diag(rng.uniform(0.5, 0.95, dim)), np.zeros((dim, 1))], axis=1))
        grid = F.affine_grid(theta[None].float(), [1, 1, *rng.integers(6, 16, dim).tolist()], align_corners=False)
        moved = F.grid_sample(moved[None], grid, align_corners=False)[0]
    moved = torch.flip(moved, [a + 1 for a in range(dim) if rng.random() < 0.5])
    if rng.random() < 0.3:
        moved = moved.dense().transpose(1, dim).contiguous()
    patch = PatchMap(moved, (20,) * 3)
    low = rng.uniform(-2, 12, dim)
    span = np.stack([low, low + rng.uniform(0.8, 9, dim)]).round(int(rng.integers(0, 3)))
    span[1] = np.maximum(span[1], span[0] + 0.5)
    for complete in {bool(patch.spans_visible(span[None])[0]), False}:
        straight = patch.straight_box(span, complete)
        assert straight is not None
        flat, source = patch.voxels_in(span)
        assert sorted(straight[0].tolist()) == flat.tolist()
        if len(flat) == 0:
            continue
        lines, count = box_lines(patch, span, source, complete)
        order = np.argsort(straight[0])
        np.testing.assert_array_equal(straight[1][order], lines)
        assert straight[2] == count


def test_a_turned_patch_takes_boxes_voxel_by_voxel():
    angle = 0.1
    theta = torch.tensor([[np.cos(angle), -np.sin(angle), 0.0], [np.sin(angle), np.cos(angle), 0.0]])[None].float()
    grid = 0.5 * F.affine_grid(theta, [1, 1, 8, 8], align_corners=False)
    moved = F.grid_sample(CoordinateMap.identity((0, 0), (20, 20))[None], grid, align_corners=False)[0]
    patch = PatchMap(moved, (1, 20, 20))
    assert patch.is_affine
    assert patch.straight_box(np.array([[5.0, 5.0], [9.0, 9.0]]), False) is None
    assert len(patch.voxels_in(np.array([[5.0, 5.0], [9.0, 9.0]]))[0]) > 0
