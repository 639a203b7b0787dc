"""geometry.py against the image itself: paint an annotation, let nnU-Net's own code move it, compare."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dsp.geometry import CaseFrame, PatchMap, box_lines, coordinate_channels

DATASET_JSON = {"channel_names": {"0": "EM"}, "labels": {"background": 0, "cell": 1}, "file_ending": ".nii.gz"}


def plans_for(transpose: list[int], spacing: list[float]) -> PlansManager:
    resampling = "resample_data_or_seg_to_shape"
    options = {"order_z": 0, "force_separate_z": False}
    configuration = {
        "spacing": spacing,
        "patch_size": [16, 16, 16],
        "normalization_schemes": ["NoNormalization"],
        "use_mask_for_norm": [False],
        "architecture": {"network_class_name": "none", "arch_kwargs": {}, "_kw_requires_import": []},
        "resampling_fn_data": resampling,
        "resampling_fn_seg": resampling,
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 1, **options},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **options},
    }
    return PlansManager(
        {
            "plans_name": "test",
            "dataset_name": "Dataset001_test",
            "transpose_forward": transpose,
            "transpose_backward": list(np.argsort(transpose)),
            "foreground_intensity_properties_per_channel": {"0": {}},
            "configurations": {"3d_fullres": configuration},
            "label_manager": "LabelManager",
        }
    )


def preprocess(mask: np.ndarray, inside: np.ndarray, spacing: list[float], plans: PlansManager):
    """nnU-Net's own preprocessing of a mask; `inside` is where the image is not zero."""
    image = np.where(inside, 1.0, 0.0).astype(np.float32)[None]
    configuration = plans.get_configuration("3d_fullres")
    _, seg, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        image, mask.astype(np.int16)[None], {"spacing": spacing}, plans, configuration, DATASET_JSON
    )
    return seg[0], properties


@pytest.mark.parametrize("transpose", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
@pytest.mark.parametrize("target_spacing", [[1.0, 1.0, 1.0], [2.0, 0.5, 1.5]])
def test_a_raw_box_lies_where_preprocessing_puts_its_painted_voxels(transpose, target_spacing):
    shape, spacing = (30, 36, 28), [1.2, 0.8, 1.0]
    inside = np.zeros(shape, bool)
    inside[3:28, 5:33, 2:27] = True
    box = np.array([[[6.0, 9, 5], [18, 24, 21]]])
    mask = np.zeros(shape, np.int16)
    mask[6:18, 9:24, 5:21] = 1
    plans = plans_for(transpose, target_spacing)
    seg, properties = preprocess(mask, inside, spacing, plans)
    frame = CaseFrame.from_properties(properties, transpose, seg.shape)
    span = frame.boxes(box)[0]
    painted = np.argwhere(seg == 1)
    np.testing.assert_allclose(painted.min(axis=0) - 0.5, span[0], atol=0.51)
    np.testing.assert_allclose(painted.max(axis=0) + 0.5, span[1], atol=0.51)


def test_a_box_with_fractions_holds_the_voxels_from_its_start_up_to_its_stop():
    frame = CaseFrame((0, 1, 2), np.zeros(3), np.ones(3), np.array([1, 12, 12]))
    (span,) = frame.boxes(np.array([[[0.0, 3.4, 4], [1, 4.4, 4.1]]]))
    np.testing.assert_array_equal(span, [[-0.5, 3.5, 3.5], [0.5, 4.5, 4.5]])


def test_a_raw_point_lies_at_the_centre_of_its_painted_ball():
    shape, spacing, transpose = (40, 44, 36), [1.0, 1.0, 1.0], [2, 0, 1]
    inside = np.zeros(shape, bool)
    inside[2:40, 4:44, 0:36] = True
    at = np.array([[21.0, 17.0, 13.0]])
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    mask = (np.linalg.norm(grid - at[0], axis=-1) <= 6).astype(np.int16)
    plans = plans_for(transpose, [0.5, 2.0, 1.0])
    seg, properties = preprocess(mask, inside, spacing, plans)
    frame = CaseFrame.from_properties(properties, transpose, seg.shape)
    np.testing.assert_allclose(np.argwhere(seg == 1).mean(axis=0), frame.points(at)[0], atol=0.3)


def nnunet_transforms(dim: int, patch: tuple[int, ...], dummy_2d: bool = False):
    return nnUNetTrainer.get_training_transforms(
        patch, (-np.pi, np.pi), None, tuple(range(dim)), dummy_2d, ignore_label=None
    )


CASES = [
    pytest.param(2, False, (1, 100, 120), (64, 56), (90, 90), id="2D"),
    pytest.param(3, False, (40, 60, 64), (24, 32, 28), (40, 48, 48), id="3D"),
    pytest.param(3, True, (40, 60, 64), (24, 32, 28), (24, 48, 48), id="dummy-2D"),
]


def augment(transforms, start, crop, dim, seed, segmentation=None):
    np.random.seed(seed)
    torch.manual_seed(seed)
    segmentation = np.zeros(crop, np.int16) if segmentation is None else segmentation
    return transforms(
        image=torch.zeros((1, *crop)),
        segmentation=torch.from_numpy(segmentation[None]),
        regression_target=coordinate_channels(start, crop, dim),
    )


def cut(volume: np.ndarray, start, crop) -> np.ndarray:
    """The crop nnU-Net would take, zero beyond the volume; `volume` has three axes, the crop two or three."""
    dim = len(crop)
    start = list(start)[3 - dim :]
    volume = volume.reshape(volume.shape[3 - dim :])
    result = np.zeros(crop, volume.dtype)
    source = tuple(slice(max(0, s), max(0, min(n, s + c))) for s, c, n in zip(start, crop, volume.shape, strict=True))
    target = tuple(slice(max(0, -s), max(0, -s) + (x.stop - x.start)) for s, x in zip(start, source, strict=True))
    result[target] = volume[source]
    return result


@pytest.mark.parametrize(("dim", "dummy_2d", "shape", "patch", "crop"), CASES)
def test_points_come_out_where_augmentation_puts_their_painted_voxels(dim, dummy_2d, shape, patch, crop):
    transforms = nnunet_transforms(dim, patch, dummy_2d)
    rng = np.random.default_rng(0)
    compared = 0
    for seed in range(25):
        start = [0] * (3 - dim) + [int(rng.integers(-12, 20)) for _ in range(dim)]
        points = np.stack([rng.integers(0, size, 40) for size in shape], axis=1)
        points = np.unique(points, axis=0)
        volume = np.zeros(shape, np.int16)
        volume[tuple(points.T)] = np.arange(1, len(points) + 1)
        out = augment(transforms, start, crop, dim, seed, cut(volume, start, crop))
        painted = out["segmentation"][0].numpy()
        patch_map = PatchMap(out["regression_target"], shape)
        assert patch_map.is_affine
        voxels, visible = patch_map.locate(points[:, 3 - dim :].astype(float))
        for number, (voxel, seen) in enumerate(zip(voxels, visible, strict=True), start=1):
            where = np.argwhere(painted == number)
            if len(where):  # nearest-neighbour sampling may lose a painted voxel; the coordinates never do
                assert seen, f"point {number} is painted but was not located (seed {seed})"
                assert np.abs(where - voxel).max(axis=1).min() <= 1
                compared += 1
    assert compared > 40


@pytest.mark.parametrize(("dim", "dummy_2d", "shape", "patch", "crop"), CASES)
def test_a_boxes_voxels_are_the_painted_ones_under_rotation_and_scaling(dim, dummy_2d, shape, patch, crop):
    transforms = nnunet_transforms(dim, patch, dummy_2d)
    box = np.array([[s // 3, 2 * s // 3] if s > 1 else [0, 1] for s in shape]).T
    volume = np.zeros(shape, np.int16)
    volume[tuple(slice(a, b) for a, b in box.T)] = 1
    span = (box - 0.5)[:, 3 - dim :]
    start = [0] * (3 - dim) + [3, 5, 4][:dim]
    for seed in range(25):
        out = augment(transforms, start, crop, dim, seed, cut(volume, start, crop))
        patch_map = PatchMap(out["regression_target"], shape)
        flat, _ = patch_map.voxels_in(span)
        found = np.zeros(patch, bool)
        found.reshape(-1)[flat] = True
        painted = out["segmentation"][0].numpy() == 1
        if painted.sum() > 30:
            overlap = (found & painted).sum() / (found | painted).sum()
            assert overlap > 0.93, f"seed {seed}: overlap {overlap:.3f}"


@pytest.mark.parametrize(("dim", "dummy_2d", "shape", "patch", "crop"), CASES)
def test_every_kept_line_of_a_tight_box_crosses_its_object_however_it_is_turned(dim, dummy_2d, shape, patch, crop):
    transforms = nnunet_transforms(dim, patch, dummy_2d)
    axes = np.meshgrid(*[np.arange(s) for s in shape], indexing="ij")
    radius = [s / 5 if s > 1 else 1 for s in shape]
    ball = sum(((a - s / 2) / r) ** 2 for a, s, r in zip(axes, shape, radius, strict=True)) <= 1
    where = np.argwhere(ball)
    span = np.stack([where.min(axis=0) - 0.5, where.max(axis=0) + 0.5])[:, 3 - dim :]
    start = [0] * (3 - dim) + [4, 2, 6][:dim]
    cut_off = 0
    for seed in range(25):
        out = augment(transforms, start, crop, dim, seed, cut(ball.astype(np.int16), start, crop))
        patch_map = PatchMap(out["regression_target"], shape)
        flat, source = patch_map.voxels_in(span)
        complete = bool(patch_map.spans_visible(span[None])[0])
        lines, count = box_lines(patch_map, span, source, complete)
        assert set(np.unique(lines[lines >= 0])) == set(range(count))
        cut_off += int((lines < 0).any())
        painted = out["segmentation"][0].numpy()
        reach = np.zeros(patch, bool)  # sampling may move a thin tip by a voxel
        reach[tuple(np.argwhere(painted == 1).T)] = True
        for axis in range(dim):
            reach |= np.roll(reach, 1, axis) | np.roll(reach, -1, axis)
        hit = reach.reshape(-1)[flat]
        for line in range(count):
            assert hit[(lines == line).any(axis=1)].any(), f"seed {seed}: line {line} of {count} misses the object"
    if dim == 2:
        assert cut_off > 0, "no crop cut the box; the test shows nothing about cut lines"


def identity_map(shape, start, crop, dim) -> PatchMap:
    return PatchMap(coordinate_channels(start, crop, dim), shape)


def test_rows_that_the_crop_cuts_off_promise_nothing_and_columns_wholly_seen_still_do():
    patch_map = identity_map((1, 100, 100), (0, 0, 0), (20, 100), 2)
    span = np.array([[9.5, 29.5], [29.5, 39.5]])  # rows 10 to 29 (cut at 20), columns 30 to 39
    flat, source = patch_map.voxels_in(span)
    lines, count = box_lines(patch_map, span, source, complete=False)
    assert len(flat) == 10 * 10
    assert count == 10, "ten whole rows are visible; all ten columns are cut"
    assert (lines[:, 0] >= 0).all()
    assert (lines[:, 1] == -1).all()


def test_a_point_just_outside_the_crop_is_not_seen_and_one_on_its_last_voxel_is():
    patch_map = identity_map((1, 50, 50), (0, 10, 10), (20, 20), 2)
    voxels, visible = patch_map.locate(np.array([[29.0, 10.0], [30.0, 10.0], [9.0, 15.0], [10.4, 29.49]]))
    assert visible.tolist() == [True, False, False, True]
    assert voxels[visible].tolist() == [[19, 0], [0, 19]]


def test_padding_is_outside_and_the_image_is_not():
    patch_map = identity_map((1, 10, 10), (0, -2, 4), (8, 8), 2)
    outside = patch_map.outside()
    assert outside is not None
    assert outside[:2].all()
    assert outside[:, 6:].all()
    assert not outside[2:, :6].any()


def test_the_whole_case_is_shown_only_if_every_corner_is():
    assert identity_map((1, 10, 10), (0, -1, 0), (11, 10), 2).shows_whole_case()
    assert not identity_map((1, 10, 10), (0, 0, 1), (11, 10), 2).shows_whole_case()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=2, unique=True), st.integers(-5, 5), st.integers(0, 30))
def test_mirroring_twice_is_the_identity(axes, start, position):
    channels = coordinate_channels((0, start, start), (31, 31), 2)
    flipped = torch.flip(channels, [a + 1 for a in axes])
    at = np.array([[position + start, position + start]], float)
    once, seen = PatchMap(flipped, (1, 60, 60)).locate(at)
    twice, _ = PatchMap(torch.flip(flipped, [a + 1 for a in axes]), (1, 60, 60)).locate(at)
    assert seen.all()
    assert twice[0].tolist() == [position, position]
    assert once[0].tolist() == [30 - position if a in axes else position for a in (0, 1)]


def test_elastic_deformation_carries_points_to_within_a_voxel():
    shape, crop = (1, 96, 96), (96, 96)
    transform = SpatialTransform(
        (80, 80), 0, False, p_elastic_deform=1, elastic_deform_scale=(0.1, 0.1), elastic_deform_magnitude=(6, 6)
    )
    rng = np.random.default_rng(1)
    compared = 0
    for seed in range(5):
        points = np.stack([np.zeros(30, int), rng.integers(20, 76, 30), rng.integers(20, 76, 30)], axis=1)
        points = np.unique(points, axis=0)
        volume = np.zeros(shape, np.int16)
        for number, (_, y, x) in enumerate(points, start=1):
            volume[0, y - 1 : y + 2, x - 1 : x + 2] = number
        out = augment(transform, (0, 0, 0), crop, 2, seed, volume[0])
        patch_map = PatchMap(out["regression_target"], shape)
        assert not patch_map.is_affine
        voxels, visible = patch_map.locate(points[:, 1:].astype(float))
        painted = out["segmentation"][0].numpy()
        for number, (voxel, seen) in enumerate(zip(voxels, visible, strict=True), start=1):
            where = np.argwhere(painted == number)
            if len(where) >= 5 and seen:
                assert np.abs(where.mean(axis=0) - voxel).max() <= 1.5
                compared += 1
    assert compared > 50
