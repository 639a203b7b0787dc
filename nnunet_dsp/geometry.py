"""Where annotations lie: raw image -> preprocessed case -> training patch. Coordinates only, no files, no labels.

Three frames, all in array order with voxel centres at whole numbers: *raw* (the image file), *case* (the array that
nnU-Net's preprocessing stored) and *patch* (what the network gets, after augmentation). Raw to case is analytic.
Case to patch is read off a coordinate map that nnU-Net's own transforms moved along with the image (PatchMap).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nnunet_dsp.coordinate_map import CoordinateMap, FloatArray

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_AFFINE_TOLERANCE = 0.02  # voxels; interpolation of a linear map through float32 stays well below 0.001
_STRAIGHT_TOLERANCE = 1e-3  # voxels; what a patch may be turned against the case and still count as straight
_VALID_WEIGHT = 0.999  # how much of a voxel's interpolation must have come from inside the crop


@dataclass(frozen=True)
class CaseFrame:
    """How nnU-Net's preprocessing moved one case: transpose, crop, resample.

    Attributes:
        transpose: order of the raw axes in the case (the plans' ``transpose_forward``).
        offset: (3,) first voxel kept by the crop, per case axis, raw voxels.
        scale: (3,) case voxels per raw voxel, per case axis.
        shape: (3,) voxels of the case.
    """

    transpose: tuple[int, ...]
    offset: FloatArray
    scale: FloatArray
    shape: IntArray

    @classmethod
    def from_properties(
        cls, properties: Mapping[str, Any], transpose_forward: Sequence[int], case_shape: Sequence[int]
    ) -> CaseFrame:
        """From the .pkl that nnU-Net stores beside a preprocessed case, the plans and the stored array's shape."""
        cropped = np.asarray(properties["shape_after_cropping_and_before_resampling"], dtype=np.float64)
        shape = np.asarray(case_shape, dtype=np.int64)
        return cls(
            transpose=tuple(int(axis) for axis in transpose_forward),
            offset=np.asarray([bounds[0] for bounds in properties["bbox_used_for_cropping"]], dtype=np.float64),
            scale=shape / cropped,
            shape=shape,
        )

    def points(self, raw: FloatArray) -> FloatArray:
        """Raw voxel positions, (N, 3), as positions in the case, (N, 3). Voxel centres are at whole numbers in both.

        Resampling keeps the outer faces of the array in place, so it is the faces (-0.5) that scale, not the centres.
        """
        return (raw[:, self.transpose] - self.offset + 0.5) * self.scale - 0.5

    def boxes(self, raw: FloatArray) -> FloatArray:
        """Raw half-open boxes, (N, 2, 3), as the spans they cover in the case, (N, 2, 3), between voxel faces.

        A raw box [start, stop) holds the voxels v with start <= v < stop, and covers the space between the outer faces
        of these; so does the result.
        """
        faces = np.ceil(raw) - 0.5
        return np.stack([self.points(faces[:, 0]), self.points(faces[:, 1])], axis=1)


def coordinate_channels(crop_start: Sequence[int], crop_shape: Sequence[int], dim: int) -> Tensor:
    """The map handed to nnU-Net's transforms as ``regression_target``: each voxel's case coordinates and a one.

    Args:
        crop_start: first voxel of the crop in the case, 3 entries; may be negative where the crop is padded.
        crop_shape: spatial shape of the crop, `dim` entries.
        dim: 2 or 3; in 2D the first case axis is the slice and takes no channel.

    Returns:
        Shape (dim + 1, *crop_shape), a tensor that needs no memory. The coordinates continue linearly into the
        padding; the last channel tells what the transforms themselves invented beyond the crop.
    """
    return CoordinateMap.identity([int(first) for first in crop_start[3 - dim :]], crop_shape)


class PatchMap:
    """Where each voxel of one training patch came from in its case, and where in the patch a case position lies.

    nnU-Net's default augmentation is affine (crop, rotation, scaling, mirroring, dummy 2D); then the map is one
    matrix and everything below is exact and cheap. Elastic or any other deformation falls back to a nearest
    neighbour search in the moved map.

    Args:
        moved: (dim + 1, *patch): coordinate_channels() after the transforms, still a CoordinateMap if they did what
            that understands, else float32.
        case_shape: (3,) voxels of the case.
        slice_index: in 2D, the slice of the case this patch shows; ignored in 3D.
    """

    def __init__(self, moved: Tensor, case_shape: Sequence[int], slice_index: int = 0) -> None:
        self._moved = moved
        self.dim = moved.ndim - 1
        self.shape = np.asarray(moved.shape[1:], dtype=np.int64)
        self.case_shape = np.asarray(case_shape, dtype=np.int64)[3 - self.dim :]
        self.slice_index = slice_index
        self._channels: npt.NDArray[np.float32] | None = None
        self._source: FloatArray | None = None
        self._tree: Any = None
        self.matrix, self.translation, self.is_affine = self._fit()
        self._trusted_everywhere = self._is_trusted_everywhere()

    def _dense(self) -> npt.NDArray[np.float32]:
        """(dim + 1, *patch); made of a CoordinateMap only where formulas do not do."""
        if self._channels is None:
            moved = self._moved
            self._channels = (moved.dense() if isinstance(moved, CoordinateMap) else moved).numpy()
        return self._channels

    def _samples(self, voxels: IntArray) -> tuple[FloatArray, FloatArray]:
        """Coordinates (N, dim) and ones channel (N,) at some voxels, (N, dim)."""
        if isinstance(self._moved, CoordinateMap) and self._channels is None:
            return self._moved.at(voxels)
        every_channel = (slice(None), *voxels.T)
        channels = self._dense()[every_channel].astype(np.float64)
        return channels[:-1].T, channels[-1]

    def _trusted(self, voxels: IntArray) -> BoolArray:
        """(N,) whether the voxels, (N, dim), show something from inside the crop."""
        if self._trusted_everywhere:
            return np.ones(len(voxels), np.bool_)
        return np.asarray(self._samples(voxels)[1] > _VALID_WEIGHT)

    def _is_trusted_everywhere(self) -> bool:
        if isinstance(self._moved, CoordinateMap) and self.is_affine:
            # Inside the crop is a box, and an affine patch of which the corners lie in a box lies in it.
            return bool((self._samples(self._corners())[1] > _VALID_WEIGHT).all())
        return bool(self._dense()[-1].min(initial=1) > _VALID_WEIGHT)

    def _corners(self) -> IntArray:
        return np.array(list(product(*[(0, size - 1) for size in self.shape])), dtype=np.int64)

    def _fit(self) -> tuple[FloatArray, FloatArray, bool]:
        """Least squares of source = matrix @ voxel + translation over a coarse grid of trustworthy voxels."""
        straight = self._moved.straight() if isinstance(self._moved, CoordinateMap) else None
        if straight is not None:
            return np.diag(straight[0]), straight[1], True
        lines = [np.unique(np.linspace(0, size - 1, min(size, 9)).round().astype(np.int64)) for size in self.shape]
        index = np.stack([axis.ravel() for axis in np.meshgrid(*lines, indexing="ij")], axis=1)
        source, weight = self._samples(index)
        trusted = weight > _VALID_WEIGHT
        voxels, source = index[trusted].astype(np.float64), source[trusted]
        identity = np.eye(self.dim)
        if len(voxels) <= self.dim:
            return identity, np.zeros(self.dim), False
        centre = voxels.mean(axis=0)
        design = np.concatenate([voxels - centre, np.ones((len(voxels), 1))], axis=1)
        solution, _, rank, _ = np.linalg.lstsq(design, source, rcond=None)
        if rank <= self.dim:  # an axis of one voxel: it moves on its own
            single = self.shape == 1
            solution[: self.dim][single] = identity[single]
        matrix = solution[: self.dim].T
        translation = solution[self.dim] - matrix @ centre
        error = np.abs(voxels @ matrix.T + translation - source).max()
        regular = abs(np.linalg.det(matrix)) > 1e-6
        return matrix, translation, bool(error < _AFFINE_TOLERANCE and regular)

    @cached_property
    def _axes(self) -> IntArray | None:
        """(dim,) which patch axis runs along each case axis, None if the patch is turned against the case."""
        if not self.is_affine:
            return None
        axes = np.abs(self.matrix).argmax(axis=1)
        others = self.matrix.copy()
        others[np.arange(self.dim), axes] = 0
        straight = (np.abs(others) * self.shape).max() < _STRAIGHT_TOLERANCE
        return axes if straight and len(set(axes.tolist())) == self.dim else None

    def _lines(self, axes: IntArray) -> list[FloatArray]:
        """Case coordinates along each case axis, where each has a patch axis of its own."""
        return [
            self.matrix[d, a] * np.arange(self.shape[a]) + self.translation[d] + self._others(d, int(a))
            for d, a in enumerate(axes)
        ]

    def _others(self, d: int, a: int) -> float:
        """What the tiny remaining slope along the other patch axes adds, in the middle."""
        rest = self.matrix[d].copy()
        rest[a] = 0
        return float(rest @ (self.shape - 1) / 2)

    @property
    def step(self) -> FloatArray:
        """(dim,) case voxels, per case axis, between neighbouring patch voxels: how finely the patch samples it."""
        if self.is_affine:
            return np.abs(self.matrix).max(axis=1)
        return np.ones(self.dim)

    def source(self) -> FloatArray:
        """(dim, *patch) case coordinates of every voxel."""
        if self._source is None:
            if self.is_affine:
                ranges = [np.arange(size, dtype=np.float64) for size in self.shape]
                lines = np.meshgrid(*ranges, indexing="ij", sparse=True)
                self._source = np.stack(
                    [
                        np.broadcast_to(sum(self.matrix[d, a] * lines[a] for a in range(self.dim)), self.shape)
                        + self.translation[d]
                        for d in range(self.dim)
                    ]
                )
            else:
                self._source = self._dense()[:-1] / np.maximum(self._dense()[-1], 1e-6)
        return self._source

    def outside(self) -> BoolArray | None:
        """(*patch) True where a voxel shows no part of the case; None: every voxel shows some."""
        if self.is_affine and self._trusted_everywhere and self._corners_inside_case():
            return None
        beyond = np.zeros(tuple(self.shape), np.bool_)
        if not self._trusted_everywhere:
            beyond |= self._dense()[-1] <= _VALID_WEIGHT
        if self._axes is not None:
            for line, axis, size in zip(self._straight_lines, self._axes, self.case_shape, strict=True):
                off = (line < -0.5) | (line > size - 0.5)
                if off.any():
                    beyond |= off.reshape([-1 if a == axis else 1 for a in range(self.dim)])
        else:
            for d, size in enumerate(self.case_shape):
                if self.is_affine and self._axis_inside_case(d):
                    continue
                coordinate = self._coordinate(d)
                beyond |= (coordinate < -0.5) | (coordinate > size - 0.5)
        return beyond if beyond.any() else None

    def _coordinate(self, d: int) -> npt.NDArray[np.floating[Any]]:
        """(*patch) one case coordinate of every voxel."""
        if not self.is_affine:
            return np.asarray(self.source()[d])
        terms = np.ogrid[tuple(slice(0, int(size)) for size in self.shape)]
        total: Any = np.float32(self.translation[d])
        for axis, term in enumerate(terms):
            total = total + (self.matrix[d, axis] * term).astype(np.float32)
        return np.broadcast_to(total, tuple(self.shape))

    def _axis_inside_case(self, d: int) -> bool:
        source = self._corners() @ self.matrix[d] + self.translation[d]
        return bool(((source >= -0.5) & (source <= self.case_shape[d] - 0.5)).all())

    def _corners_inside_case(self) -> bool:
        return all(self._axis_inside_case(d) for d in range(self.dim))

    def locate(self, positions: FloatArray) -> tuple[IntArray, BoolArray]:
        """The patch voxel nearest to each case position.

        Args:
            positions: (N, dim) case coordinates.

        Returns:
            voxels: (N, dim) int64, meaningless where not visible.
            visible: (N,) bool: the position lies in the patch, that is, its nearest voxel is within a voxel of it.
        """
        if len(positions) == 0:
            return np.zeros((0, self.dim), np.int64), np.zeros(0, np.bool_)
        if self.is_affine:
            exact = np.linalg.solve(self.matrix, (positions - self.translation).T).T
            voxels: IntArray = np.floor(exact + 0.5).astype(np.int64)
            # a position exactly on the patch's outer face still belongs to the voxel behind it
            on_face = (voxels == self.shape) & (exact - 0.5 - (self.shape - 1) < 1e-6)
            voxels = np.where(on_face, self.shape - 1, voxels)
            visible = np.asarray(((voxels >= 0) & (voxels < self.shape)).all(axis=1))
        else:
            voxels, visible = self._nearest(positions)
        if not visible.all():
            voxels = np.where(visible[:, None], voxels, 0)
        return voxels, visible & self._trusted(voxels)

    def _nearest(self, positions: FloatArray) -> tuple[IntArray, BoolArray]:
        from scipy.spatial import cKDTree

        trusted = np.flatnonzero(self._dense()[-1] > _VALID_WEIGHT)
        if len(trusted) == 0:
            return np.zeros((len(positions), self.dim), np.int64), np.zeros(len(positions), np.bool_)
        if self._tree is None:
            self._tree = cKDTree(self.source().reshape(self.dim, -1).T[trusted])
        distance, neighbour = self._tree.query(positions)
        voxels = np.stack(np.unravel_index(trusted[neighbour], tuple(self.shape)), axis=1)
        # the last voxels of the patch reach half a voxel further than their centre, on every axis at once
        return voxels.astype(np.int64), distance <= np.sqrt(self.dim) / 2 + 1e-6

    def shows_whole_case(self) -> bool:
        """True if the patch shows the case from corner to corner (of a 3D case in 2D: never, but for one slice)."""
        corners = np.array(list(product(*[(0, size - 1) for size in self.case_shape])), dtype=np.float64)
        return bool(self.locate(corners)[1].all())

    def spans_visible(self, spans: FloatArray) -> BoolArray:
        """(N,) True where a span, (N, 2, dim), lies in the patch with all its voxels' centres."""
        if len(spans) == 0:
            return np.zeros(0, np.bool_)
        low, high = _inner_corners(spans)
        corners = np.stack([low, high], axis=1)
        picks = np.array(list(product((0, 1), repeat=self.dim)))
        positions = corners[:, picks, np.arange(self.dim)]  # (N, 2^dim, dim)
        visible: BoolArray = self.locate(positions.reshape(-1, self.dim))[1]
        return np.asarray(visible.reshape(len(spans), -1).all(axis=1))

    def spans_touch(self, spans: FloatArray) -> BoolArray:
        """(N,) False only where a span surely has no voxel in the patch; a cheap first sieve."""
        if not self.is_affine or len(spans) == 0:
            return np.ones(len(spans), np.bool_)
        half = (self.shape - 1) / 2
        middle = self.matrix @ half + self.translation
        reach = np.abs(self.matrix) @ (half + 0.5)
        return np.asarray(((spans[:, 1] >= middle - reach) & (spans[:, 0] <= middle + reach)).all(axis=1))

    def voxels_in(self, span: FloatArray) -> tuple[IntArray, FloatArray]:
        """The patch voxels whose source lies in a span.

        Args:
            span: (2, dim) case coordinates, lower face included, upper face not.

        Returns:
            flat: (M,) int64, voxel numbers in C order.
            source: (M, dim) case coordinates of these voxels.
        """
        if self.is_affine:
            corners = np.array(list(product(*span.T)))
            inverse = np.linalg.solve(self.matrix, (corners - self.translation).T).T
            low = np.clip(np.ceil(inverse.min(axis=0) - 1e-6), 0, self.shape).astype(np.int64)
            high = np.clip(np.floor(inverse.max(axis=0) + 1e-6) + 1, 0, self.shape).astype(np.int64)
            if (high <= low).any():
                return np.zeros(0, np.int64), np.zeros((0, self.dim))
            block = np.meshgrid(*[np.arange(a, b) for a, b in zip(low, high, strict=True)], indexing="ij")
            voxels = np.stack([axis.ravel() for axis in block], axis=1)
            source = voxels @ self.matrix.T + self.translation
            flat = np.ravel_multi_index(tuple(voxels.T), tuple(self.shape))
        else:
            source = self.source().reshape(self.dim, -1).T
            flat = np.arange(len(source))
        # a float32 map carries errors of about 1e-4 voxels: a voxel centre may sit on a face only by chance
        inside = ((source >= span[0] - 1e-3) & (source < span[1] - 1e-3)).all(axis=1)
        if not self._trusted_everywhere:
            inside &= self._dense()[-1].reshape(-1)[flat] > _VALID_WEIGHT
        return flat[inside].astype(np.int64), source[inside]


    def straight_box(self, span: FloatArray, complete: bool) -> tuple[IntArray, IntArray, int] | None:
        """voxels_in() and box_lines() at once, axis by axis, where the patch is not turned against the case.

        Most patches are not, and then a box of the case is a box of the patch: nothing has to be asked voxel by voxel.

        Args:
            span: (2, dim) the box in case coordinates.
            complete: True if the whole box is visible.

        Returns:
            flat (M,), lines (M, dim) and their number, as those functions would; None where they have to do it.
        """
        axes = self._axes
        if axes is None or not self._trusted_everywhere:
            return None
        extent = span[1] - span[0]
        number = np.maximum(1, (extent / self._thickness + 1e-6).astype(np.int64)).tolist()
        shown = [True] * self.dim
        if not complete:
            low, high = _inner_corners(span[None])
            shown = [bool(self._shows(d, low[:, d], high[:, d])[0]) for d in range(self.dim)]
        lines: list[IntArray] = []
        index: list[IntArray] = [np.zeros(0, np.int64)] * self.dim
        count = 0
        for d, line in enumerate(self._straight_lines):
            inside = np.flatnonzero((line >= span[0, d] - 1e-3) & (line < span[1, d] - 1e-3))
            bins = ((line[inside] - (span[0, d] - 1e-3)) * (number[d] / extent[d])).astype(np.int64)
            np.minimum(bins, number[d] - 1, out=bins)
            kept = np.zeros(number[d], np.bool_)
            kept[bins] = True
            if not complete:
                edges = span[0, d] + extent[d] * np.arange(number[d] + 1) / number[d]
                middle = (edges[:-1] + edges[1:]) / 2
                kept &= self._shows(d, np.minimum(edges[:-1] + 0.5, middle), np.maximum(edges[1:] - 0.5, middle))
                kept &= all(shown[e] for e in range(self.dim) if e != d)
            numbers = np.where(kept, count - 1 + np.cumsum(kept), -1)
            count += int(np.count_nonzero(kept))
            index[axes[d]] = inside
            lines.append(numbers[bins])
        flat = index[0]
        for axis in range(1, self.dim):
            flat = flat[..., None] * self.shape[axis] + index[axis]
        numbered = np.empty((*flat.shape, self.dim), np.int64)
        for d, axis in enumerate(axes):
            numbered[..., d] = lines[d].reshape([-1 if a == axis else 1 for a in range(self.dim)])
        return flat.reshape(-1), numbered.reshape(-1, self.dim), count

    @cached_property
    def _thickness(self) -> FloatArray:
        """(dim,) of a box's lines, in case voxels; see box_lines()."""
        return np.maximum(1.0, self.step)

    @cached_property
    def _straight_lines(self) -> list[FloatArray]:
        return [] if self._axes is None else self._lines(self._axes)

    def _shows(self, d: int, low: FloatArray, high: FloatArray) -> BoolArray:
        """(N,) whether both of two positions on a case axis lie in the patch, as locate() decides."""
        axis = int(np.abs(self.matrix[d]).argmax())
        size = int(self.shape[axis])
        shown = np.ones(len(low), np.bool_)
        for position in (low, high):
            exact = (position - self.translation[d] - self._others(d, axis)) / self.matrix[d, axis]
            voxel = np.floor(exact + 0.5)
            shown &= (voxel >= 0) & ((voxel < size) | ((voxel == size) & (exact - 0.5 - (size - 1) < 1e-6)))
        return shown


def _inner_corners(spans: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Centres of the outermost voxels of each span: half a voxel in from the faces, or the middle if it is thinner."""
    middle = spans.mean(axis=1)
    return np.minimum(spans[:, 0] + 0.5, middle), np.maximum(spans[:, 1] - 0.5, middle)


def box_lines(
    patch: PatchMap, span: FloatArray, source: FloatArray, complete: bool
) -> tuple[IntArray, int]:
    """Numbers the rows, columns and slices of one box in its own axes, however the patch is turned.

    A line is a slab across the box, one case voxel thick, or as thick as the patch's sampling step where the patch is
    coarser than the case (a thinner slab might hold no voxel at all). A connected object in a tight box crosses every
    such slab, whatever its thickness.

    Args:
        patch: the patch's map.
        span: (2, dim) the box in case coordinates.
        source: (M, dim) case coordinates of the box's visible voxels.
        complete: True if the whole box is visible; otherwise each line is checked, and one that the crop cut off
            promises nothing.

    Returns:
        lines: (M, dim) int64, from 0 on without gaps over all axes, -1 where the line was cut off.
        count: the number of lines kept.
    """
    dim = source.shape[1]
    extent = span[1] - span[0]
    thickness = np.maximum(1.0, patch.step)
    number = np.maximum(1, np.floor(extent / thickness + 1e-6)).astype(np.int64)
    bins = np.clip(((source - span[0] + 1e-3) / extent * number).astype(np.int64), 0, number - 1)
    lines = np.full((len(source), dim), -1, dtype=np.int64)
    first = 0
    for axis in range(dim):
        kept = np.ones(number[axis], dtype=np.bool_)
        if not complete:
            edges = span[0, axis] + extent[axis] * np.arange(number[axis] + 1) / number[axis]
            slabs = np.repeat(span[None], number[axis], axis=0)
            slabs[:, 0, axis], slabs[:, 1, axis] = edges[:-1], edges[1:]
            kept = patch.spans_visible(slabs)
        seen = np.zeros(number[axis], dtype=np.bool_)
        seen[bins[:, axis]] = True
        kept &= seen
        numbers = np.full(number[axis], -1, dtype=np.int64)
        numbers[kept] = first + np.arange(kept.sum())
        lines[:, axis] = numbers[bins[:, axis]]
        first += int(kept.sum())
    return lines, first
