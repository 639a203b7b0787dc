"""From a trained CRACNetwork and a preprocessed image to instances in the image's own geometry.

Tiles, blocks, stitching, and the way back through nnU-Net's preprocessing. Decoding itself is in decoders.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from torch import Tensor
from tqdm import tqdm

from nnunet_dsp.affinities import Offsets, edge_slices
from nnunet_dsp.instances.decoders import Labels, decode, relabel
from nnunet_dsp.instances.label_facts import DEFAULT_MIN_SIZE
from nnunet_dsp.instances.network import CRACNetwork

Slices = tuple[slice, ...]
DEFAULT_BLOCK_VOXELS = 8_000_000  # at about 0.6 kB a voxel: 5 GB
JOINED_SHARE = 0.5  # of the smaller one's voxels near the border of two blocks that two pieces of one object share


@dataclass(frozen=True)
class DecoderOptions:
    """How affinities become instances.

    Attributes:
        decoder, threshold: see decoders.decode().
        min_size: voxels of the network's grid; smaller instances are removed, after blocks are joined.
        use_foreground: leave out what the network takes for background.
        block_voxels: volumes of more voxels are decoded block by block; so are slices, for a 2D network.
    """

    decoder: str = "mutex"
    threshold: float = 0.5
    min_size: int = DEFAULT_MIN_SIZE
    use_foreground: bool = True
    block_voxels: int = DEFAULT_BLOCK_VOXELS


class AffinityPredictor:
    """Sliding window over one image: affinities and foreground.

    An edge counts in a tile only if both its ends lie in it, weighted by the geometric mean of nnU-Net's Gaussian at
    both; no value that the network had to make up at a tile's border is used. No mirroring: a mirrored image has
    other offsets.

    Args:
        network: in evaluation mode; its `output` is set for the time of a call.
        patch_size: (y, x) or (z, y, x).
        parameters: state dicts of the folds to average; None for the weights the network has.
        step_size: of the tiles, as a share of the patch; up to 0.5 every edge is seen whole by some tile.
    """

    def __init__(
        self,
        network: CRACNetwork,
        patch_size: Sequence[int],
        device: torch.device,
        *,
        parameters: Sequence[dict[str, Any]] | None = None,
        source: str = "average",
        step_size: float = 0.5,
        show_progress: bool = True,
    ) -> None:
        if not 0 < step_size <= 0.5:
            raise ValueError(f"Expected argument `step_size` to lie in (0, 0.5], but got {step_size}.")
        self.offsets: Offsets = network.offsets
        self._network = network
        self._patch = tuple(int(p) for p in patch_size)
        self._device = device
        self._parameters = parameters
        self._source = source
        self._step_size = step_size
        self._show_progress = show_progress
        self._weight = self._edge_weights()

    @property
    def dim(self) -> int:
        return len(self._patch)

    def _edge_weights(self) -> Tensor:
        """(K + 1, *patch) float32: weight of each edge, and of each voxel for the foreground."""
        gaussian = compute_gaussian(self._patch, 1 / 8, 1, dtype=torch.float32, device=torch.device("cpu"))
        weights = torch.zeros((len(self.offsets) + 1, *self._patch))
        for channel, offset in enumerate(self.offsets):
            here, there = edge_slices(offset, self._patch)
            weights[channel][here] = (gaussian[here] * gaussian[there]).sqrt()
        weights[-1] = gaussian
        return weights.to(self._device)

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Affinities (K, *S), in [0, 1], 0.5 where no tile held both ends, and the foreground, (*S) bool.

        Args:
            image: (C, *S), preprocessed, of the patch's dimension.
        """
        shape = tuple(image.shape[1:])
        short = [max(0, p - n) for p, n in zip(self._patch, shape, strict=True)]
        before = [s // 2 for s in short]
        margins = [m for b, s in zip(reversed(before), reversed(short), strict=True) for m in (b, s - b)]
        image = torch.nn.functional.pad(image, margins) if any(short) else image
        steps = compute_steps_for_sliding_window(tuple(image.shape[1:]), self._patch, self._step_size)
        total = torch.zeros((len(self.offsets) + 1, *image.shape[1:]))
        weight = torch.zeros_like(total)
        corners = list(itertools.product(*steps))
        folds: Sequence[dict[str, Any] | None] = [None] if self._parameters is None else list(self._parameters)
        network = self._network.to(self._device).eval()
        before_output, before_source = network.output, network.source
        network.output, network.source = "instances", self._source
        weight_here = self._weight.cpu()
        try:
            with tqdm(
                total=len(corners) * len(folds), desc="Tiles", leave=False, disable=not self._show_progress
            ) as bar:
                for parameters in folds:
                    if parameters is not None:
                        network.load_state_dict(parameters)
                    for corner in corners:
                        sides = [slice(c, c + p) for c, p in zip(corner, self._patch, strict=True)]
                        where: Any = (slice(None), *sides)
                        tile = image[where][None].to(self._device)
                        with torch.autocast("cuda", enabled=self._device.type == "cuda"):
                            output = network(tile)[0]
                        total[where] += (output.float() * self._weight).cpu()
                        weight[where] += weight_here
                        bar.update()
        finally:
            network.output, network.source = before_output, before_source
        values = torch.where(weight > 0, total / weight.clamp_min(1e-12), 0.5).clamp(0, 1)
        inside: Any = (slice(None), *(slice(b, b + n) for b, n in zip(before, shape, strict=True)))
        result = values[inside].numpy()
        if not np.isfinite(result).all():
            raise ValueError(
                "The network's output holds NaN or infinity: the training diverged, or the image does. Nothing can be "
                "decoded from it."
            )
        return result[:-1], result[-1] > 0.5


def segment(predictor: AffinityPredictor, image: Tensor, options: DecoderOptions) -> Labels:
    """Instances of a preprocessed image, in the network's grid.

    Args:
        image: (C, z, y, x), as nnU-Net preprocesses; a 2D configuration works slice by slice, and no instance then
            reaches beyond a slice.

    Returns:
        (z, y, x) int32, consecutive.
    """
    shape = tuple(int(n) for n in image.shape[1:])
    labels = np.zeros(shape, np.int32)
    if predictor.dim == 2:
        highest = 0
        for z in range(shape[0]):
            found = _segment_in_blocks(predictor, image[:, z], options)
            labels[z] = np.where(found > 0, found + highest, 0)
            highest += int(found.max(initial=0))
        return relabel(labels, options.min_size)
    return relabel(_segment_in_blocks(predictor, image, options), options.min_size)


def _segment_in_blocks(predictor: AffinityPredictor, image: Tensor, options: DecoderOptions) -> Labels:
    """Instances of one image of the network's dimension, (C, *S), of whatever size; consecutive."""
    shape = tuple(int(n) for n in image.shape[1:])
    blocks = list(split_blocks(shape, options.block_voxels, halo_of(predictor.offsets)))
    if len(blocks) == 1:
        return _segment_whole(predictor, image, options)
    stitcher = Stitcher(shape)
    for block in tqdm(blocks, desc="Blocks", leave=False):
        outer: Any = (slice(None), *block.outer)
        stitcher.add(block, _segment_whole(predictor, image[outer], options))
    return relabel(stitcher.labels())


def _segment_whole(predictor: AffinityPredictor, image: Tensor, options: DecoderOptions) -> Labels:
    affinities, foreground = predictor(image)
    return decode(
        affinities,
        predictor.offsets,
        decoder=options.decoder,
        foreground=foreground if options.use_foreground else None,
        threshold=options.threshold,
    )


@dataclass(frozen=True)
class Block:
    """A part of an image or volume: `core` is its own; `outer`, with a halo where there is room, is what is decoded."""

    core: Slices
    outer: Slices


def halo_of(offsets: Offsets) -> tuple[int, ...]:
    """Voxels around a block, per axis: as far as edges reach, at least eight."""
    return tuple(max(8, *(abs(offset[axis]) for offset in offsets)) for axis in range(len(offsets[0])))


def split_blocks(shape: Sequence[int], most_voxels: int, halo: Sequence[int]) -> Iterator[Block]:
    """Blocks whose cores cover an image or volume once, and that hold at most about `most_voxels` with their halos.

    Raises:
        ValueError: the halo alone is larger than that.
    """
    counts = [1] * len(shape)

    def outer_size(axis: int) -> int:
        size = -(-shape[axis] // counts[axis])
        return int(min(shape[axis], size + (2 * halo[axis] if counts[axis] > 1 else 0)))

    while np.prod([outer_size(axis) for axis in range(len(shape))]) > most_voxels:
        axis = max(range(len(shape)), key=lambda a: -(-shape[a] // counts[a]) / halo[a])
        if -(-shape[axis] // counts[axis]) <= halo[axis]:
            least = int(np.prod([min(n, 3 * h) for n, h in zip(shape, halo, strict=True)]))
            raise ValueError(
                f"An image of {tuple(shape)} voxels cannot be cut into blocks of {most_voxels} voxels, since each "
                f"needs a margin of {tuple(halo)} voxels. Allow at least {least} (--block-voxels)."
            )
        counts[axis] += 1
    edges = [np.linspace(0, n, c + 1).round().astype(int) for n, c in zip(shape, counts, strict=True)]
    for index in itertools.product(*(range(c) for c in counts)):
        core = tuple(slice(int(e[i]), int(e[i + 1])) for e, i in zip(edges, index, strict=True))
        outer = tuple(
            slice(max(0, c.start - h), min(n, c.stop + h)) for c, h, n in zip(core, halo, shape, strict=True)
        )
        yield Block(core, outer)


class Stitcher:
    """Joins blocks' labels into a volume's.

    Each block's core is written. What two blocks show on both sides of their common border, up to half of the halo,
    tells which pieces are one object: those that share at least half of the voxels that the smaller one has there.
    On one side alone an object that reaches a voxel across would be one with whatever the other block has there.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._written = np.zeros(tuple(shape), np.int64)
        self._near: list[tuple[Slices, npt.NDArray[np.int64]]] = []  # labels of blocks that others may touch yet
        self._parent = np.arange(1, dtype=np.int64)

    def add(self, block: Block, found: Labels) -> None:
        """One block's labels, over its `outer` part; blocks come in the order of split_blocks()."""
        first = len(self._parent) - 1
        mine = np.where(found > 0, found.astype(np.int64) + first, 0)
        highest = int(found.max(initial=0))
        self._parent = np.concatenate([self._parent, np.arange(first + 1, first + highest + 1)])
        near = tuple(
            slice((o.start + c.start) // 2, (c.stop + o.stop + 1) // 2)
            for c, o in zip(block.core, block.outer, strict=True)
        )
        self._near = [(where, theirs) for where, theirs in self._near if where[0].stop > near[0].start]
        for where, theirs in self._near:
            shared = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(where, near, strict=True))
            if all(s.start < s.stop for s in shared):
                self._join_alike(theirs[_within(shared, where)], mine[_within(shared, block.outer)])
        self._near.append((near, mine[_within(near, block.outer)].copy()))
        self._written[block.core] = mine[_within(block.core, block.outer)]

    def _join_alike(self, theirs: npt.NDArray[np.int64], here: npt.NDArray[np.int64]) -> None:
        both = (theirs > 0) & (here > 0)
        if both.any():
            pairs, shared = np.unique(np.stack([theirs[both], here[both]]), axis=1, return_counts=True)
            sizes_theirs, sizes_here = np.bincount(theirs.ravel()), np.bincount(here.ravel())
            for (a, b), count in zip(pairs.T, shared, strict=True):
                if count >= JOINED_SHARE * min(sizes_theirs[a], sizes_here[b]):
                    self._join(int(a), int(b))

    def _root(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = int(self._parent[label])
        return label

    def _join(self, first: int, second: int) -> None:
        low, high = sorted((self._root(first), self._root(second)))
        self._parent[high] = low

    def labels(self) -> npt.NDArray[np.int64]:
        """The whole volume, int64, 0 for background; ids have gaps."""
        roots = np.array([self._root(label) for label in range(len(self._parent))], dtype=np.int64)
        return np.asarray(roots[self._written])


def _within(part: Slices, whole: Slices) -> Slices:
    """Slices of `part` in an array that holds `whole`."""
    return tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, whole, strict=True))


def to_image_geometry(labels: Labels, properties: dict[str, Any], transpose_backward: Sequence[int]) -> Labels:
    """Labels of the network's grid in the image file's own: resampled to the nearest voxel, uncropped, transposed back.

    Instances are decoded before resampling, in the grid whose voxels the offsets count: resampled affinities would
    belong to no offset. The nearest voxel is taken, since ids cannot be interpolated.

    Args:
        labels: (z, y, x).
        properties: those of nnU-Net's preprocessing.
    """
    shape = [int(n) for n in properties["shape_after_cropping_and_before_resampling"]]
    for axis, size in enumerate(shape):
        if labels.shape[axis] != size:
            nearest = np.floor((np.arange(size) + 0.5) * labels.shape[axis] / size).astype(int)
            labels = labels.take(np.minimum(nearest, labels.shape[axis] - 1), axis=axis)
    whole = np.zeros([int(n) for n in properties["shape_before_cropping"]], np.int32)
    whole[tuple(slice(int(low), int(high)) for low, high in properties["bbox_used_for_cropping"])] = labels
    return np.ascontiguousarray(whole.transpose(list(transpose_backward)))


__all__ = [
    "AffinityPredictor",
    "Block",
    "DecoderOptions",
    "Stitcher",
    "halo_of",
    "segment",
    "split_blocks",
    "to_image_geometry",
]
