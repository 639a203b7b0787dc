"""Pictures for the page: an image, a layer of masks and marks over it, all small, none of it HTML yet.

The image and the masks become bitmaps of at most the size that is shown; points and boxes stay vectors, so they are
sharp at any size and can be switched off. Arrays and pillow only.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, features

from nnunet_dsp.instances.pictures import colour_of
from nnunet_dsp.pictures import PALETTE, class_colour

FloatArray = npt.NDArray[np.floating[Any]]
Colour = tuple[int, int, int, int]  # red, green, blue, opacity, each 0 to 255

NUM_MARKERS = 8  # shapes of points; with eight colours, 64 classes look different
MAX_MARKS = 400  # in one picture
_TINT = 125
_PERCENTILES = (0.5, 99.5)
_SAMPLED = 1 << 20  # voxels that are looked at for percentiles


class Mark(NamedTuple):
    """A point, box or outline in a picture.

    Attributes:
        shape: "point" (x, y), "box" (x, y, width, height), "outline" (x, y, x, y, ...) or "look" (x, y, width,
            height: an ellipse that says where to look).
        at: display units, see Picture.
        label: number of the class, as for class_colour(); -1 for none.
        title: what the mark is called.
        dashed: a loose box.
    """

    shape: str
    at: tuple[float, ...]
    label: int
    title: str
    dashed: bool = False


@dataclass(slots=True)
class Picture:
    """An image with what lies over it.

    Attributes:
        width, height: display units, in the proportions of the object itself (voxels need not be square).
        image: encoded bitmap, stretched over the picture. media: its type, "image/webp".
        layer: PNG with transparency, stretched likewise, or None.
        marks: drawn on top.
        description: for those who cannot see it.
        caption: a line below it.
        sharp: show the bitmaps' pixels as squares.
    """

    width: float
    height: float
    image: bytes
    media: str
    layer: bytes | None
    marks: tuple[Mark, ...]
    description: str
    caption: str = ""
    sharp: bool = True

    @property
    def num_bytes(self) -> int:
        return 4 * (len(self.image) + len(self.layer or b"")) // 3 + 150 * len(self.marks)


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of one slice, in voxels.

    Attributes:
        axis: the array axis that is cut, 0 to 2; index: which slice.
        start, stop: of the two axes that are left, in array order.
        pixel: physical size of a voxel along those two, any unit.
    """

    axis: int
    index: int
    start: tuple[int, int]
    stop: tuple[int, int]
    pixel: tuple[float, float] = (1.0, 1.0)

    @property
    def plane(self) -> tuple[int, int]:
        """The two array axes that are seen, first the one that runs down."""
        first, second = (axis for axis in range(3) if axis != self.axis)
        return first, second

    def cut(self, volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What the window shows of a (..., z, y, x) array: (..., rows, columns)."""
        chosen: list[Any] = [slice(None)] * 3
        chosen[self.axis] = self.index
        for axis, low, high in zip(self.plane, self.start, self.stop, strict=True):
            chosen[axis] = slice(low, high)
        index: tuple[Any, ...] = (..., *chosen)
        result: npt.NDArray[Any] = volume[index]
        return result


@dataclass(frozen=True, slots=True)
class Frame:
    """Voxels of a window as display units: the longer side is `size` long."""

    window: Window
    size: float
    _scale: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = (b - a for a, b in zip(self.window.start, self.window.stop, strict=True))
        down, across = self.window.pixel
        longest = max(rows * down, columns * across)
        object.__setattr__(self, "_scale", (down * self.size / longest, across * self.size / longest))

    @property
    def width(self) -> float:
        return max(1.0, (self.window.stop[1] - self.window.start[1]) * self._scale[1])

    @property
    def height(self) -> float:
        return max(1.0, (self.window.stop[0] - self.window.start[0]) * self._scale[0])

    def place(self, faces: Sequence[float]) -> tuple[float, float]:
        """(x, y) of a place between voxel faces (voxel i reaches from i to i + 1), given in the window's plane."""
        y, x = ((f - a) * s for f, a, s in zip(faces, self.window.start, self._scale, strict=True))
        return round(x, 1), round(y, 1)


# --- colours


def hatch_number(label: int) -> int:
    """0 for the first eight classes, whose masks are plain; 1 and 2 for the next, whose masks are hatched."""
    return (max(label, 1) - 1) // len(PALETTE) % 3


def marker_number(label: int) -> int:
    """Shape of a class's points: from 0, such that no two of 64 classes share both colour and shape."""
    return (max(label, 1) - 1 + (max(label, 1) - 1) // len(PALETTE)) % NUM_MARKERS


@cache
def rgb(label: int) -> tuple[int, int, int]:
    """Colour of a class; background is white."""
    text = "#FFFFFF" if label <= 0 else class_colour(label)
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


# --- bitmaps


def intensity_range(image: FloatArray) -> tuple[float, float]:
    """What is shown black and what white: the 0.5th and 99.5th percentile, of a sample where the image is large."""
    values = image.reshape(-1)
    values = values[:: max(1, values.size // _SAMPLED)]
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, _PERCENTILES))
    if high <= low:  # a few bright voxels in a black image
        low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 1.0, low + 1.0)


def to_bytes(image: FloatArray, limits: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Grey values from 0 to 255; what is not finite becomes black."""
    low, high = limits
    scaled = (np.nan_to_num(image, nan=low, posinf=high, neginf=low) - low) * (255.0 / (high - low))
    return np.asarray(np.clip(np.round(scaled), 0, 255), dtype=np.uint8)


def encode_image(pixels: npt.NDArray[np.uint8], shape: tuple[int, int]) -> tuple[bytes, str]:
    """Shrink (rows, columns) or (rows, columns, 3) to `shape` at most, and encode; returns the bytes and their type."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    rows, columns = (min(a, b) for a, b in zip(pixels.shape[:2], shape, strict=True))
    if (columns, rows) != image.size:
        image = image.resize((columns, rows), Image.Resampling.BOX)
    buffer = io.BytesIO()
    if features.check("webp"):
        image.save(buffer, "WEBP", quality=72, method=2)
        return buffer.getvalue(), "image/webp"
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue(), "image/jpeg"


def shrink_labels(
    labels: npt.NDArray[np.integer[Any]], shape: tuple[int, int], weak: int | None = None
) -> npt.NDArray[np.integer[Any]]:
    """A smaller class map in which each pixel shows what covers most of it; never larger than it was.

    Args:
        labels: (rows, columns).
        shape: rows and columns wanted.
        weak: a value that shows only where there is nothing else: thin scribbles in ignored surroundings stay visible.
    """
    rows, columns = (min(a, b) for a, b in zip(labels.shape, shape, strict=True))
    if (rows, columns) == labels.shape:
        return labels
    down, across = (
        np.linspace(0, size, count, endpoint=False).astype(np.int64)
        for size, count in zip(labels.shape, (rows, columns), strict=True)
    )
    values = np.unique(labels)
    if len(values) > 64:
        return labels[np.ix_(down, across)]
    best = np.zeros((rows, columns), np.float32)
    result = np.full((rows, columns), values[0], labels.dtype)
    for value in values:
        cover = np.add.reduceat(labels == value, down, axis=0, dtype=np.float32)
        cover = np.add.reduceat(cover, across, axis=1)
        if weak is not None and value == weak:
            cover *= 1e-3
        better = cover > best
        best[better] = cover[better]
        result[better] = value
    return result


def encode_layer(codes: npt.NDArray[np.integer[Any]], colours: Mapping[int, Colour]) -> bytes | None:
    """A PNG of a few colours, with transparency; codes without a colour are clear. None if all of it is clear."""
    found = [int(code) for code in np.unique(codes) if int(code) in colours]
    if not found:
        return None
    index = np.zeros(codes.shape, np.uint8)
    entries: list[Colour] = [(0, 0, 0, 0)]
    for code in found[:255]:
        colour = colours[code]
        if colour not in entries:
            entries.append(colour)
        index[codes == code] = entries.index(colour)
    image = Image.fromarray(index)
    image.putpalette([channel for colour in entries for channel in colour[:3]])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, transparency=bytes(colour[3] for colour in entries))
    return buffer.getvalue()


_INSTANCE_COLOURS = 97  # a prime, so that ids counted row by row do not meet their own colour in the next one
_BORDER = -10


def colour_instances(codes: npt.NDArray[np.integer[Any]]) -> tuple[npt.NDArray[np.int64], dict[int, Colour]]:
    """Instance ids -> codes and colours for encode_layer(): a colour for each, dark lines where two of them touch.

    Args:
        codes: (rows, columns): 0 background (clear), ids from 1 on, or IGNORED (stripes, as in hatch()).
    """
    ids = np.asarray(codes, dtype=np.int64)
    result, colours = hatch(np.where(ids == IGNORED, IGNORED, 0))
    numbers = (ids - 1) % _INSTANCE_COLOURS + 1
    result[ids > 0] = numbers[ids > 0]
    used = np.unique(numbers[ids > 0])
    for number, colour in zip(used.tolist(), np.round(255 * colour_of(used)).astype(int).tolist(), strict=True):
        colours[number] = (*colour, _TINT)
    touching = np.zeros(ids.shape, np.bool_)
    touching[1:] |= (ids[1:] != ids[:-1]) & (ids[1:] > 0) & (ids[:-1] > 0)
    touching[:, 1:] |= (ids[:, 1:] != ids[:, :-1]) & (ids[:, 1:] > 0) & (ids[:, :-1] > 0)
    result[touching] = _BORDER
    colours[_BORDER] = (0, 0, 0, 220)
    return result, colours


IGNORED, OUTSIDE, UNDRAWN, SCRIBBLED = -1, -2, -3, -4  # codes of hatch() beside the classes


def hatch(codes: npt.NDArray[np.integer[Any]], opacity: int = _TINT) -> tuple[npt.NDArray[np.int64], dict[int, Colour]]:
    """Class map -> codes and colours for encode_layer().

    Args:
        codes: (rows, columns): 0 background (clear), classes from 1 on, IGNORED (stripes), OUTSIDE (dark, crossed),
            UNDRAWN (dots) or SCRIBBLED (background that is not to be overlooked: white).
        opacity: of the classes, 0 to 255.

    Returns:
        Codes, where a hatched area holds two of them in turn, and what each looks like.
    """
    rows, columns = np.ogrid[: codes.shape[0], : codes.shape[1]]
    unit = max(1, max(codes.shape) // 100)
    rising, falling = (rows + columns) // unit, (rows - columns) // unit
    result = np.asarray(codes, dtype=np.int64).copy()
    colours: dict[int, Colour] = {}
    clear = -1000
    for code in np.unique(codes).tolist():
        where = codes == code
        if code == IGNORED:
            result[where & (rising % 6 != 0)] = clear
            colours[code] = (235, 235, 235, 90)
        elif code == OUTSIDE:
            result[where & ((rising % 5 == 0) | (falling % 5 == 0))] = clear - 1
            colours[code], colours[clear - 1] = (20, 20, 20, 215), (120, 120, 120, 230)
        elif code == UNDRAWN:
            result[where & ~((rows // unit % 5 == 0) & (columns // unit % 5 == 0))] = clear
            colours[code] = (255, 255, 255, 190)
        elif code == SCRIBBLED:
            colours[code] = (255, 255, 255, opacity)
        elif code > 0:
            pattern = hatch_number(code)
            if pattern:
                stripe = (rising if pattern == 1 else falling) % 4 == 0
                result[where & stripe] = code + 100_000
                colours[code + 100_000] = (*rgb(code), 235)
            colours[code] = (*rgb(code), opacity if not pattern else 2 * opacity // 3)
    return result, colours
