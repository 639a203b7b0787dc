"""A coordinate map that is never stored: each voxel's own coordinates, moved along by nnU-Net's transforms.

Coordinates only; what is read off the moved map stands in geometry.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

FloatArray = npt.NDArray[np.float64]


class CoordinateMap(torch.Tensor):
    """The tensor (D + 1, *S) of D coordinates and a one for each voxel, as formulas instead of numbers.

    Four channels of a 3D crop are more data than the image and its mask together, and interpolating them costs more
    than all other augmentation. But interpolation of a linear map is the map itself, at the place asked for. So this
    tensor holds no numbers: it knows how cropping, padding, mirroring and sampling on a grid (what nnU-Net's spatial
    transforms do) change the formula. Any other operation gets the numbers, made at that moment, and goes on with an
    ordinary tensor; the result is the same, the cost that of an ordinary map.

    State: position v of this tensor is ``sign * v + shift`` of the tensor that was sampled on `grid` (if any was), and
    position u of that has the coordinates ``slope * u + start``, if ``low <= u <= high`` on every axis. Interpolation
    with zeros beyond gives the ones channel its value between.
    """

    _slope: FloatArray
    _start: FloatArray
    _low: FloatArray
    _high: FloatArray
    _grid: Tensor | None
    _source_shape: tuple[int, ...]
    _align_corners: bool
    _sign: FloatArray
    _shift: FloatArray
    _batched: bool

    @classmethod
    def identity(cls, start: Sequence[int], shape: Sequence[int]) -> CoordinateMap:
        """The map of a crop of a case: voxel v has the coordinates ``start + v``, and shows the case.

        Args:
            start: first voxel of the crop, D whole numbers.
            shape: of the crop, D numbers.
        """
        dim = len(shape)
        state = {
            "_slope": np.ones(dim),
            "_start": np.asarray(start, dtype=np.float64),
            "_low": np.zeros(dim),
            "_high": np.asarray(shape, dtype=np.float64) - 1,
            "_grid": None,
            "_source_shape": tuple(int(size) for size in shape),
            "_align_corners": False,
            "_sign": np.ones(dim),
            "_shift": np.zeros(dim),
            "_batched": False,
        }
        return cls._with(shape, state)

    @classmethod
    def _with(cls, spatial_shape: Sequence[int], state: dict[str, Any]) -> CoordinateMap:
        dim = len(spatial_shape)
        shape = ((1,) if state["_batched"] else ()) + (dim + 1, *(int(size) for size in spatial_shape))
        made: CoordinateMap = torch.zeros(()).expand(shape).as_subclass(cls)
        for name, value in state.items():
            setattr(made, name, value)
        return made

    def _state(self, **changes: Any) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in CoordinateMap.__annotations__}, **changes}

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """S."""
        return tuple(int(size) for size in self.shape[-self._dim :])

    @property
    def _dim(self) -> int:
        return len(self._slope)

    # --- the numbers

    def at(self, voxels: npt.NDArray[np.integer[Any]]) -> tuple[FloatArray, FloatArray]:
        """Coordinates (N, D), and the ones channel's value (N,), of the voxels (N, D)."""
        position: FloatArray = voxels.astype(np.float64) * self._sign + self._shift
        if self._grid is not None:
            index = tuple(torch.from_numpy(axis.astype(np.int64)) for axis in position.T)
            position = self._unnormalised(self._grid[index].double().numpy())
        return position * self._slope + self._start, self._weight(position, np.minimum, 1).prod(axis=1)

    def straight(self) -> tuple[FloatArray, FloatArray] | None:
        """(D,) slope and start of the coordinates along each axis; None once it was sampled on a grid."""
        if self._grid is not None:
            return None
        return self._slope * self._sign, self._slope * self._shift + self._start

    def _unnormalised(self, sampled: Any) -> Any:
        """Voxel positions, (..., D) in array order, from grid_sample's, which run from -1 to 1, last axis first."""
        axes: list[int] = list(range(self._dim))[::-1]
        size = np.asarray(self._source_shape, dtype=np.float64)
        sampled = sampled[..., axes]
        if isinstance(sampled, Tensor):
            size = torch.from_numpy(size).to(sampled.dtype)  # type: ignore[assignment]
        if self._align_corners:
            return (sampled + 1) / 2 * (size - 1)
        return ((sampled + 1) * size - 1) / 2

    def _weight(self, position: Any, minimum: Callable[..., Any], one: Any) -> Any:
        """By axis: how much of an interpolation at `position` comes from between `low` and `high`."""
        low, high = self._low, self._high
        if isinstance(position, Tensor):
            low, high = (torch.from_numpy(bound).to(position.dtype) for bound in (low, high))  # type: ignore[assignment]
        inside = minimum(position - (low - 1), (high + 1) - position)
        return minimum(inside, one).clip(0, 1)

    def dense(self) -> Tensor:
        """The numbers: what an ordinary map would be now, (D + 1, *S) float32, with a batch axis where this has one.

        Where the ones channel is between 0 and 1 an interpolated map would hold the coordinates times that value; so
        does this.
        """
        shape = self.spatial_shape
        lines = [
            torch.arange(size, dtype=torch.float64) * sign + shift
            for size, sign, shift in zip(shape, self._sign, self._shift, strict=True)
        ]
        if self._grid is None:
            axes = [line.view([-1 if a == axis else 1 for a in range(self._dim)]) for axis, line in enumerate(lines)]
            position = torch.stack(torch.broadcast_tensors(*axes), dim=-1)
        else:
            index = torch.meshgrid(*[line.long() for line in lines], indexing="ij")
            position = self._unnormalised(self._grid[index].double())
        one = torch.ones((), dtype=position.dtype)
        weight = self._weight(position, torch.minimum, one).prod(-1)
        coordinates = position * torch.from_numpy(self._slope) + torch.from_numpy(self._start)
        channels = torch.cat([coordinates * weight[..., None], weight[..., None]], dim=-1).movedim(-1, 0).float()
        channels = channels.contiguous()
        return channels[None] if self._batched else channels

    # --- what the transforms do to it

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ABOUT_THE_TENSOR:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        change = _CHANGES.get(func)
        if change is not None and isinstance(args[0], CoordinateMap):
            result = change(*args, **kwargs)
            if result is not NotImplemented:
                return result

        def numbers(value: Any) -> Any:
            if isinstance(value, CoordinateMap):
                return value.dense()
            return type(value)(numbers(v) for v in value) if type(value) in (list, tuple) else value

        return func(*numbers(list(args)), **{key: numbers(value) for key, value in kwargs.items()})


_ABOUT_THE_TENSOR = frozenset(
    {"__get__", "__set__", "size", "dim", "ndimension", "numel", "nelement", "__len__", "untyped_storage"}
)


def _index(this: CoordinateMap, index: Any) -> Any:
    if index is None and not this._batched:
        return CoordinateMap._with(this.spatial_shape, this._state(_batched=True))
    if this._batched:
        if isinstance(index, int) and index == 0:
            return CoordinateMap._with(this.spatial_shape, this._state(_batched=False))
        return NotImplemented
    if not isinstance(index, tuple) or len(index) != this._dim + 1 or not all(isinstance(i, slice) for i in index):
        return NotImplemented
    ranges = [range(*i.indices(int(size))) for i, size in zip(index, this.shape, strict=True)]
    if len(ranges[0]) != this._dim + 1 or any(r.step != 1 or len(r) == 0 for r in ranges):
        return NotImplemented
    first = np.asarray([r.start for r in ranges[1:]], dtype=np.float64)
    return _moved(this, first, [len(r) for r in ranges[1:]])


def _moved(this: CoordinateMap, first: FloatArray, shape: Sequence[int]) -> CoordinateMap:
    """The part that starts at voxel `first`, which may lie beyond the tensor if nothing was sampled yet."""
    return CoordinateMap._with(shape, this._state(_shift=this._shift + this._sign * first))


def _flip(this: CoordinateMap, *dims: Any) -> Any:
    axes = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    sign, shift = this._sign.copy(), this._shift.copy()
    leading = this.ndim - this._dim
    for axis in axes:
        number = int(axis) % this.ndim - leading
        if number < 0:
            return NotImplemented
        shift[number] += sign[number] * (this.spatial_shape[number] - 1)
        sign[number] = -sign[number]
    return CoordinateMap._with(this.spatial_shape, this._state(_sign=sign, _shift=shift))


def _pad(this: CoordinateMap, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    before = np.zeros(this._dim)
    shape = list(this.spatial_shape)
    if mode != "constant" or value not in (None, 0) or len(pad) > 2 * this._dim or this._grid is not None:
        return NotImplemented
    for number, (low, high) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis = this._dim - 1 - number
        if low < 0 or high < 0:
            return NotImplemented
        before[axis] = low
        shape[axis] += low + high
    # what is beyond this tensor is no part of the map from now on
    ends = np.stack([this._shift, this._shift + this._sign * (np.asarray(this.spatial_shape) - 1)])
    bounded = CoordinateMap._with(
        this.spatial_shape,
        this._state(_low=np.maximum(this._low, ends.min(axis=0)), _high=np.minimum(this._high, ends.max(axis=0))),
    )
    return _moved(bounded, -before, shape)


def _sample(
    this: CoordinateMap,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Any:
    fits = isinstance(grid, Tensor) and grid.ndim == this._dim + 2 and grid.shape[0] == 1 and grid.device.type == "cpu"
    if mode != "bilinear" or padding_mode != "zeros" or not this._batched or this._grid is not None or not fits:
        return NotImplemented
    # positions of `this` become positions u, so the formula and its bounds are written in them
    low = np.maximum(0, np.where(this._sign > 0, this._low - this._shift, this._shift - this._high))
    high = np.minimum(
        np.asarray(this.spatial_shape) - 1, np.where(this._sign > 0, this._high - this._shift, this._shift - this._low)
    )
    return CoordinateMap._with(
        grid.shape[1:-1],
        this._state(
            _slope=this._slope * this._sign,
            _start=this._slope * this._shift + this._start,
            _low=low,
            _high=high,
            _sign=np.ones(this._dim),
            _shift=np.zeros(this._dim),
            _grid=grid[0],
            _source_shape=this.spatial_shape,
            _align_corners=bool(align_corners),
        ),
    )


_CHANGES: dict[Any, Callable[..., Any]] = {
    torch.Tensor.__getitem__: _index,
    torch.flip: _flip,
    torch.Tensor.flip: _flip,
    F.pad: _pad,
    F.grid_sample: _sample,
}
