"""Offsets, implicit affinities and edge targets against loops over every edge."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from nnunet_dsp.affinities import (
    check_offsets,
    default_offsets,
    edge_targets,
    implicit_affinities,
    unit_channels,
    valid_edges,
)

IGNORE = 9
OFFSETS_2D = ((-1, 0), (0, -1), (-3, 0), (0, -2), (2, -1))
OFFSETS_3D = ((-1, 0, 0), (0, -1, 0), (0, 0, -1), (-2, 0, 0), (1, -2, 1))


def edges(shape, offsets):
    """(channel, voxel, its partner or None)."""
    for channel, offset in enumerate(offsets):
        for voxel in itertools.product(*map(range, shape)):
            other = tuple(v + o for v, o in zip(voxel, offset, strict=True))
            inside = all(0 <= v < n for v, n in zip(other, shape, strict=True))
            yield channel, voxel, other if inside else None


@pytest.mark.parametrize(("shape", "offsets"), [((5, 7), OFFSETS_2D), ((3, 4, 5), OFFSETS_3D)])
def test_implicit_affinities_are_the_cosines_of_a_loop_and_zero_beyond_the_border(shape, offsets):
    embedding = torch.randn(2, 4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = implicit_affinities(embedding, offsets)
    for item in range(2):
        for channel, voxel, other in edges(shape, offsets):
            expected = 0.0
            if other is not None:
                a, b = (embedding[(item, slice(None), *where)].tolist() for where in (voxel, other))
                dot = sum(x * y for x, y in zip(a, b, strict=True))
                expected = dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
            assert float(found[(item, channel, *voxel)]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("background_known", [True, False])
@pytest.mark.parametrize(("shape", "offsets"), [((6, 7), OFFSETS_2D), ((3, 4, 5), OFFSETS_3D)])
def test_targets_known_edges_and_candidates_are_those_of_a_loop(shape, offsets, complete, background_known):
    generator = torch.Generator().manual_seed(1)
    instances = torch.tensor([0, 1, 2, 3, IGNORE])[torch.randint(5, (2, *shape), generator=generator)]
    found = edge_targets(
        instances, offsets, IGNORE, complete_instances=complete, background_known=background_known
    )
    valid = valid_edges(offsets, shape)
    seen = set()
    for item in range(2):
        for channel, voxel, other in edges(shape, offsets):
            where = (item, channel, *voxel)
            assert bool(valid[where[1:]]) == (other is not None)
            if other is None:
                assert not found.known[where] and not found.candidate[where] and not found.same[where]
                continue
            a, b = int(instances[(item, *voxel)]), int(instances[(item, *other)])
            objects = [value not in (0, IGNORE) for value in (a, b)]
            unlabelled = IGNORE in (a, b)
            known = any(objects) and (complete or not unlabelled)
            candidate = not (any(objects) if complete else known) and not (a == b == 0)
            if not complete and any(objects) and unlabelled:
                candidate = True
            if background_known and a == b == 0:
                known = True
            seen.add((known, candidate))
            assert bool(found.known[where]) == known, (a, b)
            assert bool(found.candidate[where]) == candidate, (a, b)
            assert bool(found.same[where]) == (a == b and all(objects)), (a, b)
    assert len(seen) >= 2


def test_an_offset_along_z_is_compared_with_the_slice_it_names_not_the_next_one():
    instances = torch.zeros(1, 4, 1, 1, dtype=torch.int64)
    instances[0, :, 0, 0] = torch.tensor([1, 2, 2, 1])
    same = edge_targets(instances, ((-1, 0, 0), (-3, 0, 0)), None).same[0, :, :, 0, 0]
    assert same.tolist() == [[False, False, True, False], [False, False, False, True]]


def test_ids_above_what_float32_can_tell_apart_stay_apart():
    instances = torch.tensor([[[2**24, 2**24 + 1]]])
    targets = edge_targets(instances, ((0, -1),), None)
    assert bool(targets.known[0, 0, 0, 1]) and not bool(targets.same[0, 0, 0, 1])


@pytest.mark.parametrize("axis", [0, 1])
def test_mirroring_labels_mirrors_the_targets_of_the_mirrored_offsets(axis):
    instances = torch.randint(0, 4, (1, 9, 8), generator=torch.Generator().manual_seed(2))
    mirrored = tuple(tuple(-v if a == axis else v for a, v in enumerate(offset)) for offset in OFFSETS_2D)
    straight = edge_targets(instances, OFFSETS_2D, 3)
    flipped = edge_targets(instances.flip(axis + 1), mirrored, 3)
    for one, other in zip(straight, flipped, strict=True):
        assert torch.equal(one, other.flip(axis + 2))


def test_identical_embeddings_give_cosines_of_one_and_finite_gradients():
    embedding = torch.ones(1, 3, 4, 4).mul_(1e3).requires_grad_()
    found = implicit_affinities(embedding, OFFSETS_2D)
    assert float(found.detach().max()) == pytest.approx(1.0)
    assert float(found.detach().max()) <= 1.0
    found.sum().backward()
    assert torch.isfinite(embedding.grad).all()
    zero = torch.zeros(1, 3, 4, 4, requires_grad=True)
    implicit_affinities(zero, OFFSETS_2D).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_cosines_are_computed_in_float32_from_half_precision_embeddings():
    embedding = torch.full((1, 2, 3, 3), 300.0, dtype=torch.float16)  # 300 squared is infinity in float16
    found = implicit_affinities(embedding, ((0, -1), (-1, 0)))
    assert found.dtype == torch.float32
    assert float(found[0, 0, 0, 1]) == pytest.approx(1)


def test_offsets_follow_the_plans_anisotropy_and_unit_steps_come_first():
    assert default_offsets((128, 128), (1, 1)) == (
        (-1, 0), (0, -1), (-3, 0), (0, -3), (-9, 0), (0, -9), (-27, 0), (0, -27),
    )  # fmt: skip
    released = [
        [-1, 0, 0], [0, -1, 0], [0, 0, -1], [-2, 0, 0], [0, -3, 0], [0, 0, -3],
        [-3, 0, 0], [0, -9, 0], [0, 0, -9], [-4, 0, 0], [0, -27, 0], [0, 0, -27],
    ]  # fmt: skip
    assert default_offsets((18, 160, 160), (30, 6, 6)) == tuple(map(tuple, released))
    isotropic = default_offsets((64, 64, 64), (1, 1, 1))
    assert len(isotropic) == 12 and (-27, 0, 0) in isotropic
    assert (-27, 0, 0) not in default_offsets((54, 64, 64), (1, 1, 1)), "half the patch and more is left out"
    assert unit_channels(isotropic) == [0, 1, 2]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([[-1, 0], [0, 0]], "not all of them 0"),
        ([[-1, 0], [0, -1], [0, -1]], "every offset once"),
        ([[-1, 0], [0, -3]], "step of one voxel"),
        ([[-1, 0, 0]], "2 entries"),
    ],
)
def test_impossible_offsets_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        check_offsets(offsets, 2)
