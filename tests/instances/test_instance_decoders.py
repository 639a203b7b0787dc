"""Decoders: perfect affinities give the truth back; broken input is refused; mutex watershed against a plain one."""

from __future__ import annotations

import itertools
import json

import cc3d
import numpy as np
import pytest
from skimage.metrics import adapted_rand_error

from nnunet_dsp.instances import decoders
from nnunet_dsp.instances.decoders import REQUIRES, available, decode, relabel

OFFSETS = {
    2: ((-1, 0), (0, -1), (-3, 0), (0, -3), (-9, 0), (0, -9)),
    3: ((-1, 0, 0), (0, -1, 0), (0, 0, -1), (-3, 0, 0), (0, -3, 0), (0, 0, -3)),
}


SMALL = ((1, 1), (1, 30), (2, 2), (5, 5), (9, 27), (1, 1, 1), (1, 9, 9), (3, 9, 1), (2, 3, 4))


def needs(decoder):
    return pytest.mark.skipif(not available(decoder), reason=f"{REQUIRES[decoder]} is not installed")


def cells(shape, number, seed=0, gap=False):
    """A Voronoi partition in which every instance hangs together; with `gap`, background between the cells."""
    rng = np.random.default_rng(seed)
    seeds = rng.uniform(0, shape, (number, len(shape)))
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance = np.linalg.norm(grid[..., None, :] - seeds, axis=-1)
    labels = distance.argmin(-1) + 1
    if gap:
        nearest = np.sort(distance, -1)
        labels[nearest[..., 1] - nearest[..., 0] < 1.5] = 0
    connectivity = 4 if len(shape) == 2 else 6
    return cc3d.connected_components(labels.astype(np.uint32), connectivity=connectivity).astype(np.int32)


def perfect(labels, offsets, rest=0.5):
    """Affinities of a truth, by comparing shifted copies; `rest` beyond the border."""
    affinities = np.full((len(offsets), *labels.shape), rest, np.float32)
    for channel, offset in enumerate(offsets):
        for voxel in itertools.product(*map(range, labels.shape)):
            other = tuple(v + o for v, o in zip(voxel, offset, strict=True))
            if all(0 <= v < n for v, n in zip(other, labels.shape, strict=True)):
                affinities[(channel, *voxel)] = labels[voxel] == labels[other] and labels[voxel] > 0
    return affinities


def same_partition(one, other):
    pairs = set(zip(one.ravel().tolist(), other.ravel().tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize("decoder", [pytest.param("mutex", marks=needs("mutex")), "components"])
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("shape", [(40, 37), (9, 20, 21)])
def test_perfect_affinities_give_the_truth_back_exactly(decoder, gap, shape):
    truth = cells(shape, 14, gap=gap)
    found = decode(
        perfect(truth, OFFSETS[len(shape)]), OFFSETS[len(shape)], decoder=decoder, foreground=truth > 0 if gap else None
    )
    assert adapted_rand_error(truth, found, ignore_labels=(0,))[0] == 0
    assert same_partition(found, truth)
    assert found.dtype == np.int32 and set(np.unique(found)) - {0} == set(range(1, found.max() + 1))


@pytest.mark.parametrize("decoder", [pytest.param(d, marks=needs(d)) for d in REQUIRES])
@pytest.mark.parametrize("shape", SMALL)
def test_images_smaller_than_an_offset_are_decoded(decoder, shape):
    truth = np.ones(shape, np.int32)
    truth[..., shape[-1] // 2 :] = 2
    axes = range(len(shape))
    offsets = [tuple(-reach if a == axis else 0 for a in axes) for reach in (1, 3, 9, 27) for axis in axes]
    affinities = perfect(truth, offsets)
    for foreground in (None, truth > 0):
        found = decode(affinities, offsets, decoder=decoder, foreground=foreground)
        assert found.shape == shape
        assert (found > 0).all() or truth.size == 1, "one voxel need not be an instance"
        assert same_partition(found, truth) or decoder == "multicut", "whose fragments may be off by a voxel"


@pytest.mark.parametrize("decoder", [pytest.param(d, marks=needs(d)) for d in ("multicut", "waterz")])
@pytest.mark.parametrize("shape", [(48, 48), (10, 32, 32)])
def test_agglomerating_decoders_come_close_to_the_truth_of_perfect_affinities(decoder, shape, capfd):
    truth = cells(shape, 8, seed=1)
    found = decode(perfect(truth, OFFSETS[len(shape)]), OFFSETS[len(shape)], decoder=decoder)
    assert adapted_rand_error(truth, found, ignore_labels=(0,))[0] < 0.1
    assert capfd.readouterr().out == ""


@needs("mutex")
@pytest.mark.parametrize("seed", range(4))
def test_mutex_watershed_is_that_of_a_plain_loop(seed):
    offsets = ((-1, 0), (0, -1), (-2, 0), (0, -3))
    affinities = np.random.default_rng(seed).random((4, 9, 8))
    assert same_partition(decode(affinities, offsets), plain_mutex_watershed(affinities, offsets))


def plain_mutex_watershed(affinities, offsets):
    """Wolf et al. 2018, Algorithm 1: edges by descending weight; attractive ones join what no mutex forbids."""
    shape = affinities.shape[1:]
    edges = []
    for channel, offset in enumerate(offsets):
        for voxel in itertools.product(*map(range, shape)):
            other = tuple(v + o for v, o in zip(voxel, offset, strict=True))
            if all(0 <= v < n for v, n in zip(other, shape, strict=True)):
                weight = float(affinities[(channel, *voxel)]) - 0.5
                if channel < 2 or weight < 0:
                    edges.append((abs(weight), weight > 0, voxel, other))
    cluster = {voxel: {voxel} for voxel in itertools.product(*map(range, shape))}
    mutex = set()
    for _, attractive, a, b in sorted(edges, key=lambda e: e[0], reverse=True):
        if cluster[a] is cluster[b]:
            continue
        forbidden = any((x, y) in mutex for x in cluster[a] for y in cluster[b])
        if not attractive:
            mutex |= {(a, b), (b, a)}
        elif not forbidden:
            joined = cluster[a] | cluster[b]
            for voxel in joined:
                cluster[voxel] = joined
    ids = {id(group): number for number, group in enumerate({id(g): g for g in cluster.values()}.values(), 1)}
    return np.array([ids[id(cluster[voxel])] for voxel in itertools.product(*map(range, shape))]).reshape(shape)


@needs("mutex")
def test_long_edges_keep_objects_apart_that_a_leak_would_join():
    truth = np.ones((20, 20), np.int32)
    truth[:, 10:] = 2
    affinities = perfect(truth, OFFSETS[2])
    affinities[1, 9:11, 10] = 0.95  # two edges leak
    affinities[1, [*range(9), *range(11, 20)], 10] = 0.04
    affinities[2:] = np.where(affinities[2:] == 0, 0.02, affinities[2:])
    assert decode(affinities, OFFSETS[2], decoder="components").max() == 1
    assert same_partition(decode(affinities, OFFSETS[2]), truth)


@needs("mutex")
def test_the_decoder_does_not_change_its_input_and_background_stays_zero():
    truth = cells((30, 30), 6, gap=True)
    affinities = perfect(truth, OFFSETS[2])
    before = affinities.copy()
    foreground = truth > 0
    found = decode(affinities, OFFSETS[2], foreground=foreground)
    assert np.array_equal(affinities, before)
    assert np.array_equal(found > 0, foreground)
    assert not decode(affinities, OFFSETS[2], foreground=np.zeros_like(foreground)).any()


def test_small_instances_become_background_and_ids_are_consecutive():
    labels = np.array([[0, 5, 5, 9], [7, 7, 7, 0]])
    assert relabel(labels).tolist() == [[0, 1, 1, 3], [2, 2, 2, 0]]
    assert relabel(labels, 2).tolist() == [[0, 1, 1, 0], [2, 2, 2, 0]]
    assert relabel(labels * 10**12, 3).tolist() == [[0, 0, 0, 0], [1, 1, 1, 0]]
    assert relabel(np.full((2, 2), 10**12)).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"affinities": np.full((6, 4, 4), np.nan)}, r"in \[0, 1\]"),
        ({"affinities": np.full((6, 4, 4), 1.5)}, r"in \[0, 1\]"),
        ({"affinities": np.zeros((5, 4, 4))}, "one offset for each"),
        ({"affinities": np.zeros((6, 4))}, "one offset for each"),
        ({"foreground": np.ones((4, 5), bool)}, "foreground"),
        ({"offsets": ((-1, 0), (0, -2), (-3, 0), (0, -3), (-9, 0), (0, -9))}, "step of one voxel"),
        ({"decoder": "magic"}, "decoder"),
        ({"threshold": 1.0}, "threshold"),
    ],
)
def test_broken_input_is_refused_with_what_was_expected(change, message):
    given = {"affinities": np.zeros((6, 4, 4)), "offsets": OFFSETS[2], "decoder": "components", **change}
    with pytest.raises(ValueError, match=message):
        decode(**given)


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(decoders, "available", lambda _: False)
    with pytest.raises(ImportError, match=r"pip install nnunet-dsp\[instances\]"):
        decode(np.zeros((6, 4, 4)), OFFSETS[2])


@needs("mutex")
def test_the_decoder_benchmark_reports_seconds_limits_and_the_error(tmp_path, capsys):
    from nnunet_dsp import cli

    few = ["benchmark", "decoder", "--repeats", "1", "--warmup", "0"]
    small = ["--only", "2D", "--shape", "48", "64", "--decoder", "mutex", "components"]
    assert cli.main([*few, *small, "--json", str(tmp_path / "x.json")]) == 0
    text = (tmp_path / "x.json").read_text()
    result = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    assert [row["name"] for row in result["rows"]] == [
        "2D, 48 x 64, 9 offsets: mutex", "2D, 48 x 64, 9 offsets: components"
    ]  # fmt: skip
    assert all(row["median_s"] > 0 and row["limit"] is None for row in result["rows"])
    assert 0 <= result["meta"]["arand"]["2D, 48 x 64, 9 offsets: mutex"] < 0.5
    assert cli.main([*few, "--shape", "48", "64"]) == 1
    assert cli.main([*few, "--only", "3D", "--shape", "48", "64"]) == 1
    assert cli.main([*few, "--device", "cuda"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_the_benchmarks_affinities_are_those_of_its_instances_with_noise():
    from nnunet_dsp.benchmark.decoder import noisy_affinities, offsets_for

    offsets = offsets_for(3)
    truth, affinities = noisy_affinities((8, 10, 12), 5, offsets, 0)
    assert truth.shape == (8, 10, 12) and len(np.unique(truth)) == 5
    said = perfect(truth, offsets)
    known = said != 0.5
    assert affinities.min() >= 0 and affinities.max() <= 1 and (affinities[~known] == 0.5).all()
    for value, mean in ((0, 0.1), (1, 0.9)):
        assert abs(affinities[said == value].mean() - mean) < 0.06, "clipping moves it a little"
