"""Painted images, and which voxels a mark covers: computed from the meaning of the coordinates, with nothing of ours.

Voxel i has its centre at i in the centres convention and at i + 0.5 in the faces convention.
"""

import argparse
from pathlib import Path
from types import ModuleType

import numpy as np
from matplotlib.path import Path as Outline
from PIL import Image

from nnunet_dsp.dataset_conversion.image_files import ImageFolder
from nnunet_dsp.dataset_conversion.imported import BoxMark, Mark, PointMark, RasterMask, Region, Scribble, SourceImage

# No image is square or centred, so that swapped axes, flips and mixed-up objects fail
PAINTED = {"cell": (slice(5, 12), slice(31, 47)), "vessel": (slice(20, 33), slice(8, 15)), "nerve": (18, slice(3, 55))}


def painted() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A picture (40, 60), uint8, and the mask of each object in it."""
    masks = {}
    for name, where in PAINTED.items():
        masks[name] = np.zeros((40, 60), bool)
        masks[name][where] = True
    picture = np.zeros((40, 60), np.uint8)
    for value, mask in enumerate(masks.values(), 1):
        picture[mask] = 60 * value
    return picture, masks


def save_picture(path: Path, picture: np.ndarray | None = None) -> Path:
    """Write a picture (the painted one) and return where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(painted()[0] if picture is None else picture).save(path)
    return path


def arguments(module: ModuleType, *options: str) -> argparse.Namespace:
    """The options of a format as the command line gives them."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(options)


def read(module: ModuleType, src: Path, *options: str, images: Path | None = None) -> list[SourceImage]:
    """Everything that a format finds in SRC."""
    folder = images or (src if src.is_dir() else src.parent)
    return list(module.read(src, arguments(module, *options), ImageFolder(folder)))


def covered(mark: Mark, shape: tuple[int, ...]) -> np.ndarray:
    """The voxels of an image that a mark covers."""
    voxels = np.zeros(shape, bool)
    centres = np.indices(shape)
    if isinstance(mark, PointMark):
        voxels[tuple(int(np.floor(v + 0.5)) for v in mark.at)] = True
    elif isinstance(mark, BoxMark):
        voxels[:] = True
        for axis, (start, stop) in enumerate(zip(mark.start, mark.stop, strict=True)):
            voxels &= (centres[axis] + 0.5 >= start) & (centres[axis] + 0.5 < stop)
    elif isinstance(mark, Scribble):
        for a, b in zip(mark.vertices, mark.vertices[1:], strict=False):
            for t in np.linspace(0, 1, 500):
                voxels[tuple(int(np.floor(p + (q - p) * t + 0.5)) for p, q in zip(a, b, strict=True))] = True
    elif isinstance(mark, Region):
        inside = np.zeros(shape[-2:], bool)
        y, x = np.indices(shape[-2:])
        for ring in mark.rings:
            outline = Outline([(q, p) for p, q in [*ring, ring[0]]])
            inside ^= outline.contains_points(np.c_[x.ravel() + 0.5, y.ravel() + 0.5]).reshape(inside.shape)
        voxels[... if mark.plane is None else int(np.floor(mark.plane + 0.5))] = inside
    elif isinstance(mark, RasterMask):
        array = mark.load()
        voxels[tuple(slice(o, o + s) for o, s in zip(mark.offset, array.shape, strict=True))] = array
    else:
        raise TypeError(mark)
    return voxels


def lies_on(mark: Mark, object_mask: np.ndarray) -> bool:
    """Whether points and lines lie on the object, boxes touch it on every side, and areas are the object itself."""
    voxels = covered(mark, object_mask.shape)
    if isinstance(mark, (PointMark, Scribble)):
        return bool(voxels.any() and object_mask[voxels].all())
    if isinstance(mark, BoxMark):
        where = [
            np.flatnonzero(object_mask.any(tuple(a for a in range(voxels.ndim) if a != axis)))
            for axis in range(voxels.ndim)
        ]
        around = np.zeros_like(voxels)
        around[tuple(slice(w[0], w[-1] + 1) for w in where)] = True
        return bool((voxels == around).all())
    return bool((voxels == object_mask).all())
