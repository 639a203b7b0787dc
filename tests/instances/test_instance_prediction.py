"""Tiles, blocks and the way back to the image's geometry, with a network whose affinities are known exactly."""

from __future__ import annotations

import cc3d
import numpy as np
import pytest
import torch
from skimage.metrics import adapted_rand_error
from torch import nn

from nnunet_dsp.affinities import default_offsets, edge_slices, valid_edges
from nnunet_dsp.instances.label_files import write_instances
from nnunet_dsp.instances.network import CRACNetwork, CRACOutput
from nnunet_dsp.instances.predict import (
    AffinityPredictor,
    DecoderOptions,
    Stitcher,
    halo_of,
    segment,
    split_blocks,
    to_image_geometry,
)

CPU = torch.device("cpu")
COMPONENTS = DecoderOptions(decoder="components", min_size=0)


class Oracle(nn.Module):
    """Affinities of the ids that the image holds; beyond the tile's border it answers nonsense, as a network would."""

    def __init__(self, offsets):
        super().__init__()
        self.offsets = offsets

    def forward(self, image):
        ids = image[:, 0]
        logits = torch.full((image.shape[0], len(self.offsets) + 1, *ids.shape[1:]), 30.0)
        for channel, offset in enumerate(self.offsets):
            here, there = ((slice(None), *part) for part in edge_slices(offset, ids.shape[1:]))
            same = (ids[here] == ids[there]) & (ids[here] > 0)
            logits[(slice(None), channel, *here[1:])] = torch.where(same, 30.0, -30.0)
        logits[:, -1] = torch.where(ids > 0, 30.0, -30.0)
        return logits


def network(offsets):
    return CRACNetwork(nn.Identity(), Oracle(offsets), offsets).eval()


def cells(shape, number, seed=0):
    rng = np.random.default_rng(seed)
    seeds = rng.uniform(0, shape, (number, len(shape)))
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    labels = np.linalg.norm((grid[..., None, :] - seeds), axis=-1).argmin(-1) + 1
    connectivity = 4 if len(shape) == 2 else 6
    return cc3d.connected_components(labels.astype(np.uint32), connectivity=connectivity).astype(np.int32)


def predictor(shape, patch, **options):
    offsets = default_offsets(patch, (1.0,) * len(patch))
    return AffinityPredictor(network(offsets), patch, CPU, source="explicit", show_progress=False, **options)


@pytest.mark.parametrize(("shape", "patch"), [((50, 61), (24, 32)), ((20, 70), (32, 32)), ((18, 21, 30), (12, 16, 16))])
def test_no_value_from_beyond_a_tiles_border_reaches_the_affinities(shape, patch):
    truth = cells(shape, 12)
    affinities, foreground = predictor(shape, patch)(torch.from_numpy(truth)[None].float())
    offsets = default_offsets(patch, (1.0,) * len(patch))
    valid = valid_edges(offsets, shape).numpy()
    for channel, offset in enumerate(offsets):
        here, there = edge_slices(offset, shape)
        np.testing.assert_allclose(affinities[(channel, *here)], truth[here] == truth[there], atol=1e-5)
    assert foreground.all()
    assert np.isfinite(affinities).all() and valid.any()


def test_folds_are_averaged_and_the_networks_settings_are_put_back():
    offsets = default_offsets((16, 16), (1.0, 1.0))
    model = CRACNetwork(nn.Identity(), nn.Conv2d(1, len(offsets) + 1, 1), offsets).eval()
    states = []
    for bias in (-4.0, 4.0):
        nn.init.zeros_(model.affinity.weight)
        nn.init.constant_(model.affinity.bias, bias)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    predict = AffinityPredictor(model, (16, 16), CPU, parameters=states, source="explicit", show_progress=False)
    affinities, _ = predict(torch.zeros(1, 16, 16))
    assert affinities[0, 5, 5] == pytest.approx(0.5, abs=1e-6)
    assert model.output == "foreground"


def test_a_step_of_more_than_half_a_patch_is_refused():
    with pytest.raises(ValueError, match="step_size"):
        predictor((32, 32), (16, 16), step_size=0.6)


def test_nan_from_the_network_is_an_error_and_no_segmentation():
    model = predictor((32, 32), (16, 16))
    model._network.affinity.forward = lambda image: torch.full((1, len(model.offsets) + 1, 16, 16), float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        model(torch.ones(1, 32, 32))


@pytest.mark.parametrize("most", [2_000_000, 30_000])
def test_a_volume_decoded_in_blocks_is_the_volume_decoded_at_once(most):
    truth = cells((34, 40, 44), 25, seed=2)
    model = predictor(truth.shape, (16, 16, 16))
    blocks = list(split_blocks(truth.shape, most, halo_of(model.offsets)))
    assert (len(blocks) > 3) is (most == 30_000)
    options = DecoderOptions("components", min_size=0, block_voxels=most)
    found = segment(model, torch.from_numpy(truth)[None].float(), options)
    assert adapted_rand_error(truth, found, ignore_labels=(0,))[0] == 0
    assert found.max() == truth.max()


@pytest.mark.parametrize("most", [100_000, 3_000])
def test_a_large_slice_is_decoded_in_blocks_for_a_2d_network_too(most, monkeypatch):
    truth = np.stack([cells((90, 101), 30, seed=seed) for seed in (3, 4)])
    model = predictor(truth.shape[1:], (16, 16))
    seen = []
    monkeypatch.setattr(AffinityPredictor, "__call__", _recorded(AffinityPredictor.__call__, seen))
    options = DecoderOptions("components", min_size=0, block_voxels=most)
    found = segment(model, torch.from_numpy(truth)[None].float(), options)
    assert (len(seen) > 4) is (most == 3_000) and max(seen) <= most
    for z in range(2):
        assert adapted_rand_error(truth[z], found[z], ignore_labels=(0,))[0] == 0
    assert found.max() == sum(part.max() for part in truth), "each slice has ids of its own, without gaps"


def _recorded(call, seen):
    """`call`, noting how many voxels it is given."""

    def recording(self, image):
        seen.append(image[0].numel())
        return call(self, image)

    return recording


def test_blocks_cover_a_volume_once_and_stay_within_their_limit():
    covered = np.zeros((30, 100, 90), int)
    for block in split_blocks(covered.shape, 60_000, (8, 8, 8)):
        covered[block.core] += 1
        sizes = [s.stop - s.start for s in block.outer]
        assert np.prod(sizes) <= 60_000
        assert all(o.start <= c.start and c.stop <= o.stop for o, c in zip(block.outer, block.core, strict=True))
    assert (covered == 1).all()
    with pytest.raises(ValueError, match="--block-voxels"):
        list(split_blocks((300, 300, 300), 1000, (27, 27, 27)))


def test_pieces_are_joined_only_where_the_blocks_agree():
    stitcher = Stitcher((1, 4, 20))
    left, right = split_blocks((1, 4, 20), 75, (1, 1, 4))
    first = np.ones((1, 4, left.outer[2].stop), np.int32)
    second = np.full((1, 4, 20 - right.outer[2].start), 2, np.int32)
    second[:, :, 0] = 1  # a sliver of the overlap belongs to something else
    stitcher.add(left, first)
    stitcher.add(right, second)
    assert len(np.unique(stitcher.labels())) == 1
    apart = Stitcher((1, 4, 20))
    first[:, :, left.core[2].stop :] = 0  # one ends at the border, the other begins there
    apart.add(left, first)
    apart.add(right, np.where(np.arange(second.shape[2]) < 4, 0, 1).astype(np.int32)[None, None].repeat(4, 1))
    assert len(np.unique(apart.labels())) == 2


def test_an_object_that_reaches_a_voxel_across_a_blocks_border_stays_apart_from_its_neighbour():
    stitcher = Stitcher((1, 4, 40))
    left, right = split_blocks((1, 4, 40), 150, (1, 1, 8))
    border = left.core[2].stop
    for block, first_of_second in ((left, border), (right, border - 1)):  # they disagree by one voxel
        columns = np.arange(block.outer[2].start, block.outer[2].stop)
        stitcher.add(block, np.where(columns < first_of_second, 1, 2).astype(np.int32)[None, None].repeat(4, 1))
    found = stitcher.labels()
    assert len(np.unique(found[..., : border - 1])) == len(np.unique(found[..., border:])) == 1
    assert found[0, 0, 0] != found[0, 0, -1]


def test_a_2d_configuration_decodes_slice_by_slice_with_ids_of_its_own():
    truth = np.stack([cells((32, 32), 5, seed=s) for s in range(3)])
    found = segment(predictor((32, 32), (16, 16)), torch.from_numpy(truth)[None].float(), COMPONENTS)
    assert found.shape == truth.shape
    for one, other in zip(found[:-1], found[1:], strict=True):
        assert not set(np.unique(one)) & set(np.unique(other))
    for one, other in zip(found, truth, strict=True):
        assert adapted_rand_error(other, one, ignore_labels=(0,))[0] == 0


def test_labels_return_through_resampling_cropping_and_transposition():
    labels = np.zeros((4, 6, 5), np.int32)
    labels[1, 3, 3] = 7  # the nearest to the centre of the second of three rows
    properties = {
        "shape_after_cropping_and_before_resampling": (8, 3, 10),
        "shape_before_cropping": (10, 9, 12),
        "bbox_used_for_cropping": [[1, 9], [3, 6], [2, 12]],
    }
    found = to_image_geometry(labels, properties, (2, 0, 1))
    assert found.shape == (12, 10, 9)
    expected = np.zeros((10, 9, 12), np.int32)
    expected[1 + 2 : 1 + 4, 3 + 1, 2 + 6 : 2 + 8] = 7
    assert np.array_equal(found, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("dim", [2, 3])
def test_the_network_gives_one_channel_to_nnunet_and_affinities_to_the_predictor(dim):
    offsets = default_offsets((16,) * dim, (1.0,) * dim)
    convolution = (nn.Conv2d, nn.Conv3d)[dim - 2]
    count = len(offsets)
    error = convolution(1 + 2 * count, count, 1)
    model = CRACNetwork(convolution(1, 8, 3, padding=1), convolution(1, count + 1, 3, padding=1), offsets, error)
    image = torch.randn(2, 1, *(16,) * dim)
    trained = model.train()(image)
    assert isinstance(trained, CRACOutput)
    assert trained.implicit.shape == trained.explicit_logits.shape == (2, count, *(16,) * dim)
    assert trained.implicit_error_logits is not None
    assert not torch.equal(trained.judged_implicit, trained.implicit.relu()), "it learns from flawed affinities"
    assert model.eval()(image).shape == (2, 1, *(16,) * dim)
    model.output = "instances"
    outputs = {}
    for source in ("implicit", "explicit", "average"):
        model.source = source
        outputs[source] = model(image)
        assert outputs[source].shape == (2, count + 1, *(16,) * dim)
        assert outputs[source].min() >= 0 and outputs[source].max() <= 1
    mean = (outputs["implicit"] + outputs["explicit"]) / 2
    torch.testing.assert_close(outputs["average"][:, :count], mean[:, :count])


def test_without_labelled_background_the_foreground_is_what_belongs_to_a_neighbour():
    offsets = default_offsets((16, 16), (1.0, 1.0))
    truth = torch.zeros(1, 1, 16, 16)
    truth[..., 4:9, 4:9] = 1
    model = network(offsets)
    model.foreground_learnt.fill_(False)
    assert torch.equal(model(truth) > 0, truth > 0)
    model.output, model.source = "instances", "explicit"
    assert (model(truth)[:, -1] == 1).all(), "the decoder gets no foreground then"


def test_more_instances_than_the_writer_holds_are_refused_and_nothing_is_left(tmp_path):
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient

    many = np.arange(65536, dtype=np.int32).reshape(1, 256, 256)
    with pytest.raises(ValueError, match="--min-size"):
        write_instances(NaturalImage2DIO, many, tmp_path / "a.png", {"spacing": (999, 1, 1)})
    assert not list(tmp_path.iterdir())
    some = many % 300
    write_instances(NaturalImage2DIO, some, tmp_path / "a.png", {"spacing": (999, 1, 1)})
    assert np.array_equal(NaturalImage2DIO().read_seg(str(tmp_path / "a.png"))[0][0], some)
    stuff = {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}
    properties = {"sitk_stuff": {**stuff, "original_orientation": "RAS"}}
    with pytest.raises(ValueError, match="cannot store 299 instances"):
        write_instances(SimpleITKIOWithReorient, some.repeat(3, 0), tmp_path / "b.nii.gz", properties)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
