"""From affinities to instances: mutex watershed, multicut, waterz, connected components. NumPy in, NumPy out; no torch.

All decoders take affinities in [0, 1], (K, *S), edge (p, p + offset) stored at p, and return int32 labels 1..n, 0 for
background and for what is too small.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse import csgraph

FloatArray = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
Offsets = Sequence[Sequence[int]]

REQUIRES = {"mutex": "mwatershed", "multicut": "elf", "waterz": "waterz", "components": ""}
"""The decoders, and the module each of them needs beside what nnU-Net brings."""

EXTRA = {"mutex": "instances", "multicut": "multicut", "waterz": "waterz"}


def available(decoder: str) -> bool:
    """Whether the library that a decoder needs is installed."""
    return not REQUIRES[decoder] or importlib.util.find_spec(REQUIRES[decoder]) is not None


def decode(
    affinities: FloatArray,
    offsets: Offsets,
    *,
    decoder: str = "mutex",
    foreground: BoolArray | None = None,
    threshold: float = 0.5,
    min_size: int = 0,
) -> Labels:
    """Instances of one image or volume.

    Args:
        affinities: (K, *S), in [0, 1]; 0.5 says nothing. Not changed.
        offsets: K offsets in voxels, one step of one voxel along each axis among them.
        decoder: "mutex" (mutex watershed: short edges attract, long ones repel), "multicut" (of a watershed's
            fragments), "waterz" (agglomeration of a watershed's fragments) or "components" (connected components of
            the short edges above `threshold`; one leak joins two objects).
        foreground: (*S) bool; everything else becomes 0. None: no background.
        threshold: affinity from which two voxels rather belong together.
        min_size: voxels; smaller instances become 0.

    Returns:
        (*S) int32.

    Raises:
        ValueError: shapes that do not fit, values outside [0, 1], NaN, an unknown decoder, a missing unit step.
        ImportError: the decoder's library is not installed; the message says how to install it.
    """
    _check(affinities, offsets, decoder, foreground, threshold)
    shape = affinities.shape[1:]
    if affinities[0].size == 0 or (foreground is not None and not foreground.any()):
        return np.zeros(shape, np.int32)
    if len(shape) == 3 and shape.count(1) == 1:  # a volume of one slice is an image
        axis = shape.index(1)
        inside = [channel for channel, offset in enumerate(offsets) if not offset[axis]]
        flat = decode(
            affinities[inside].squeeze(axis + 1),
            [[v for a, v in enumerate(offsets[channel]) if a != axis] for channel in inside],
            decoder=decoder,
            foreground=None if foreground is None else foreground.squeeze(axis),
            threshold=threshold,
            min_size=min_size,
        )
        return np.expand_dims(flat, axis)
    if 1 in shape:  # the libraries want two voxels along each axis: the second one belongs to nothing
        margins = [(0, int(n == 1)) for n in shape]
        affinities = np.pad(affinities, [(0, 0), *margins])
        foreground = None if foreground is None else np.pad(foreground, margins)
    # edges that no two voxels have: the libraries break on them
    fits = [all(abs(v) < n for v, n in zip(offset, affinities.shape[1:], strict=True)) for offset in offsets]
    if not all(fits):
        affinities, offsets = affinities[fits], [offset for offset, fit in zip(offsets, fits, strict=True) if fit]
    labels = _DECODERS[decoder](affinities, [tuple(int(v) for v in o) for o in offsets], foreground, threshold)
    if foreground is not None:
        labels = np.where(foreground, labels, 0)
    return relabel(labels[tuple(slice(n) for n in shape)], min_size)


def relabel(labels: npt.NDArray[np.integer[Any]], min_size: int = 0) -> Labels:
    """Consecutive ids, 1..n in the order of the old ones; 0 stays, and instances below `min_size` voxels become 0."""
    highest = int(labels.max(initial=0))
    if highest > 8 * labels.size + 1024:  # a lookup table would be larger than the image
        values, inverse = np.unique(labels, return_inverse=True)
        labels = inverse.reshape(labels.shape) + (0 if values[0] == 0 else 1)
        highest = int(labels.max(initial=0))
    sizes = np.bincount(labels.ravel().astype(np.int64, copy=False), minlength=highest + 1)
    keep = sizes >= max(1, min_size)
    keep[0] = False
    table = np.zeros(highest + 1, np.int32)
    table[keep] = np.arange(1, int(keep.sum()) + 1, dtype=np.int32)
    return np.asarray(table[labels], dtype=np.int32)


def _check(
    affinities: FloatArray, offsets: Offsets, decoder: str, foreground: BoolArray | None, threshold: float
) -> None:
    if decoder not in REQUIRES:
        raise ValueError(f"Expected argument `decoder` to be one of {', '.join(REQUIRES)}, but got {decoder!r}.")
    if not 0 < threshold < 1:
        raise ValueError(f"Expected argument `threshold` to lie between 0 and 1, but got {threshold}.")
    dim = affinities.ndim - 1
    if dim not in (2, 3) or affinities.shape[0] != len(offsets) or any(len(o) != dim for o in offsets):
        raise ValueError(
            f"Expected affinities of shape (K, y, x) or (K, z, y, x) with one offset for each of the K channels, but "
            f"got shape {affinities.shape} and {len(offsets)} offsets {[list(o) for o in offsets]}."
        )
    if foreground is not None and foreground.shape != affinities.shape[1:]:
        raise ValueError(
            f"Expected argument `foreground` to have the shape {affinities.shape[1:]}, but got {foreground.shape}."
        )
    low, high = (affinities.min(), affinities.max()) if affinities.size else (0.0, 1.0)
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise ValueError(f"Expected affinities in [0, 1], but got values from {low} to {high}.")
    if len(_unit_channels(offsets)) != dim:
        raise ValueError(f"Expected a step of one voxel along each axis among the offsets, but got {list(offsets)}.")
    if not available(decoder):
        raise ImportError(
            f"The decoder {decoder!r} needs the package {_PACKAGE[decoder]}, which is not installed. Install it with "
            f"`pip install nnunet-dsp[{EXTRA[decoder]}]`, or choose --decoder components."
        )


_PACKAGE = {"mutex": "mwatershed", "multicut": "python-elf", "waterz": "waterz"}


def _unit_channels(offsets: Offsets) -> list[int]:
    """As affinities.unit_channels(), which would import torch."""
    found: dict[int, int] = {}
    for channel, offset in enumerate(offsets):
        moved = [axis for axis, value in enumerate(offset) if value]
        if len(moved) == 1 and abs(offset[moved[0]]) == 1:
            found.setdefault(moved[0], channel)
    return [found[axis] for axis in sorted(found)]


def _ends(offset: Sequence[int], shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the voxels whose partner lies inside, and of the partners."""
    here = tuple(slice(min(n, max(0, -o)), max(0, n - max(0, o))) for o, n in zip(offset, shape, strict=True))
    there = tuple(slice(max(0, h.start + o), max(0, h.stop + o)) for h, o in zip(here, offset, strict=True))
    return here, there


def _mutex(
    affinities: FloatArray, offsets: Sequence[tuple[int, ...]], foreground: BoolArray | None, threshold: float
) -> npt.NDArray[Any]:
    """Mutex watershed (Wolf et al., ECCV 2018).

    Short edges count whatever they say, long ones only where they repel, and in 3D only every second one along each
    axis: neighbouring long edges say nearly the same, and sorting them is what takes the time.
    """
    mwatershed = importlib.import_module("mwatershed")
    dim = affinities.ndim - 1
    short = set(_unit_channels(offsets))
    weights = affinities.astype(np.float64) - threshold
    for channel, offset in enumerate(offsets):
        if channel not in short:
            np.minimum(weights[channel], 0, out=weights[channel])
        if foreground is not None:
            here, there = _ends(offset, foreground.shape)
            weights[channel][here] *= foreground[here] & foreground[there]
    stride = 2 if dim == 3 else 1
    strides = [[1] * dim if channel in short else [stride] * dim for channel in range(len(offsets))]
    labels = np.asarray(mwatershed.agglom(weights, [list(o) for o in offsets], strides=strides)).astype(np.int64)
    alone = labels == 0  # voxels that nothing attracts
    labels[alone] = labels.max(initial=0) + np.arange(1, int(alone.sum()) + 1)
    return labels


def _components(
    affinities: FloatArray, offsets: Sequence[tuple[int, ...]], foreground: BoolArray | None, threshold: float
) -> npt.NDArray[Any]:
    shape = affinities.shape[1:]
    nodes = np.arange(int(np.prod(shape)), dtype=np.int32 if np.prod(shape) < 2**31 else np.int64).reshape(shape)
    starts, ends = [], []
    for channel in _unit_channels(offsets):
        here, there = _ends(offsets[channel], shape)
        joined = affinities[channel][here] > threshold
        if foreground is not None:
            joined &= foreground[here] & foreground[there]
        starts.append(nodes[here][joined])
        ends.append(nodes[there][joined])
    start, end = np.concatenate(starts), np.concatenate(ends)
    graph = sparse.coo_array((np.ones(len(start), np.bool_), (start, end)), shape=(nodes.size, nodes.size)).tocsr()
    _, labels = csgraph.connected_components(graph, directed=False)
    return np.asarray(labels).reshape(shape) + 1


def _boundary(affinities: FloatArray, offsets: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float32]:
    """How much a voxel looks like a border: 1 - the lowest affinity to a direct neighbour, on either side."""
    shape = affinities.shape[1:]
    lowest = np.ones(shape, np.float32)
    for channel in _unit_channels(offsets):
        here, there = _ends(offsets[channel], shape)
        edge = affinities[channel][here]
        lowest[here] = np.minimum(lowest[here], edge)
        lowest[there] = np.minimum(lowest[there], edge)
    return 1 - lowest


def _multicut(
    affinities: FloatArray, offsets: Sequence[tuple[int, ...]], foreground: BoolArray | None, threshold: float
) -> npt.NDArray[Any]:
    """Multicut (Kernighan-Lin) of the region graph of a distance-transform watershed.

    Costs come from the mean affinity across each border, weighted by the border's length.
    """
    watershed = importlib.import_module("elf.segmentation.watershed")
    features = importlib.import_module("elf.segmentation.features")
    multicut = importlib.import_module("elf.segmentation.multicut")
    boundary = _boundary(affinities, offsets)
    mask = None if foreground is None else foreground.astype(bool)
    with np.errstate(invalid="ignore"):  # a boundary everywhere has no distance to it
        fragments, _ = watershed.distance_transform_watershed(
            boundary, threshold=1 - threshold, sigma_seeds=1.0, min_size=0, mask=mask
        )
    fragments = fragments.astype(np.uint32)
    if not fragments.any():  # too small for a seed
        return _components(affinities, offsets, foreground, threshold)
    if int(fragments.max()) == 1:
        return np.asarray(fragments)
    graph = features.compute_rag(fragments)
    edges = features.compute_affinity_features(
        graph, fragments, np.ascontiguousarray(affinities, dtype=np.float32), [list(o) for o in offsets]
    )
    apart, sizes = 1 - edges[:, 0], edges[:, -1]
    costs = multicut.compute_edge_costs(apart, edge_sizes=sizes, beta=threshold, weighting_scheme="all")
    if mask is not None:  # background is a fragment of its own and joins nothing
        ends = np.asarray(graph.uv_ids())
        costs = np.where((ends == 0).any(1), -np.abs(costs).max() * 10 - 1, costs)
    nodes = multicut.multicut_kernighan_lin(graph, costs)
    return np.asarray(features.project_node_labels_to_pixels(graph, fragments, nodes)).astype(np.int64) + 1


def _waterz(
    affinities: FloatArray, offsets: Sequence[tuple[int, ...]], foreground: BoolArray | None, threshold: float
) -> npt.NDArray[Any]:
    """Hierarchical agglomeration (Funke et al., 2019) of a watershed's fragments by the median-like quantile score.

    The score is the one that waterz ships built; others would need a compiler.
    """
    waterz = importlib.import_module("waterz")
    shape = affinities.shape[1:]
    short = np.zeros((3, *((1,) * (3 - len(shape))), *shape), np.float32)
    for axis, channel in enumerate(_unit_channels(offsets)):
        here, there = _ends(offsets[channel], shape)
        values = affinities[channel][here].astype(np.float32)
        if foreground is not None:
            values = values * (foreground[here] & foreground[there])
        upper = here if offsets[channel][axis] < 0 else there  # waterz stores an edge at its upper voxel
        target = short[axis + 3 - len(shape)]
        (target if len(shape) == 3 else target[0])[upper] = values
    with _silenced():  # it reports every step
        segmentations = waterz.agglomerate(
            short,
            [1 - threshold],
            scoring_function="OneMinus<HistogramQuantileAffinity<RegionGraphType, 50, ScoreValue, 256>>",
            discretize_queue=256,
        )
        labels = next(iter(segmentations)).copy()
    return np.asarray(labels).reshape(shape).astype(np.int64)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Send what a library prints, in Python and below it, to nowhere."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


_DECODERS: dict[str, Callable[..., npt.NDArray[Any]]] = {
    "mutex": _mutex,
    "multicut": _multicut,
    "waterz": _waterz,
    "components": _components,
}

__all__ = ["EXTRA", "REQUIRES", "available", "decode", "relabel"]
