"""Arrays from files of any format, and what the files say about axes and geometry. What the numbers mean: elsewhere."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MICROMETRES = {
    "m": 1e6, "cm": 1e4, "mm": 1e3, "um": 1.0, "µm": 1.0, "\u03bcm": 1.0, "\\u00b5m": 1.0, "micron": 1.0,
    "microns": 1.0, "micrometer": 1.0, "nm": 1e-3, "inch": 25400.0,
}  # fmt: skip
"""In one of each unit; two letters look like the Greek one, and ImageJ writes it as an escape."""


def read_array(
    path: Path, key: str | None = None, *, palette_indices: bool = False
) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """The array in a PNG, TIFF, BMP, NIfTI, NRRD, MHA, NPY or HDF5 file, in array order (y, x) or (z, y, x).

    Args:
        key: the dataset's path in an HDF5 file; needed where there are several.
        palette_indices: of a picture with a palette (PNG, BMP), the indices instead of their colours.

    Returns:
        The array, in this machine's byte order (colour images with a last axis of 3 or 4, channels that a TIFF names in
        front), and what the file says about its geometry: "itk" holds spacing, origin and direction as SimpleITK has
        them, "spacing" that of a TIFF (z, y, x; micrometres, if the file names its unit), "colour" is true where the
        last axis is colour, "channels" where the file calls the first one channels.

    Raises:
        ImportError: the file is HDF5, and h5py is not installed.
        ValueError: the file cannot be read; the message names it.
    """
    try:
        array, said = _read(path, key, palette_indices)
    except ImportError:
        raise
    except Exception as error:  # of a broken file each library has its own: EOFError, struct.error, zlib.error, ...
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error
    return array.astype(array.dtype.newbyteorder("="), copy=False), said


def _read(path: Path, key: str | None, palette_indices: bool) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    name = path.name.lower()
    if name.endswith((".h5", ".hdf5", ".hdf")):
        return _read_hdf5(path, key), {}
    if name.endswith(".npy"):
        return np.load(path, allow_pickle=False), {}
    if name.endswith((".nii.gz", ".nii", ".nrrd", ".mha")):
        return _read_itk(path)
    if name.endswith((".tif", ".tiff")):
        import tifffile

        with tifffile.TiffFile(path) as file:
            return _read_tiff(file)
    if palette_indices:
        from PIL import Image

        with Image.open(path) as picture:
            if picture.mode == "P":
                return np.asarray(picture), {}
    from skimage.io import imread

    array = imread(path)
    return array, {"colour": array.ndim == 3}


def _read_itk(path: Path) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    import SimpleITK as sitk

    check_whole(path)
    image = sitk.ReadImage(str(path))
    geometry = {"spacing": image.GetSpacing(), "origin": image.GetOrigin(), "direction": image.GetDirection()}
    return sitk.GetArrayFromImage(image), {"itk": geometry, "colour": image.GetNumberOfComponentsPerPixel() > 1}


def check_whole(path: Path) -> None:
    """Compare a NIfTI file's length with what its header says: ITK reads what a cut off file lacks as 0, silently.

    Other formats pass: their readers notice.

    Raises:
        ValueError: it is too short.
        RuntimeError, OSError, zlib.error: it is broken, or no NIfTI file.
    """
    import SimpleITK as sitk

    if not path.name.lower().endswith((".nii.gz", ".nii")):
        return
    header = sitk.ImageFileReader()
    header.SetFileName(str(path))
    header.ReadImageInformation()
    size = [int(header.GetMetaData(f"dim[{axis + 1}]")) for axis in range(int(header.GetMetaData("dim[0]")))]
    bits = math.prod(size) * int(header.GetMetaData("bitpix"))
    expected = int(float(header.GetMetaData("vox_offset"))) + -(-bits // 8)
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    found = 0
    try:
        if compressed:
            with gzip.open(path) as unpacked:
                while piece := unpacked.read1(1 << 20):
                    found += len(piece)
        else:
            found = path.stat().st_size
    except EOFError:
        found = min(found, expected - 1)
    if found < expected:
        raise ValueError(
            f"truncated: {'unpacked, ' if compressed else ''}it should hold {expected} bytes, as its header says, but "
            f"ends after {found}. Was it copied or exported completely?"
        )


def _read_tiff(file: Any) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """The first series of a tifffile.TiffFile, without axes of one voxel."""
    series = file.series[0]
    array = series.asarray()
    axes = "".join(axis for axis, size in zip(series.axes, array.shape, strict=True) if size > 1)
    array = array.squeeze()
    if axes.count("C") == 1:
        array = np.moveaxis(array, axes.index("C"), 0)
    colour = series.axes.endswith("S")
    return array, {"colour": colour, "channels": "C" in axes, "spacing": _tiff_spacing(file)}


def _tiff_spacing(file: Any) -> tuple[float, float, float] | None:
    """The voxel size (z, y, x) that ImageJ or OME wrote into a tifffile.TiffFile; None where one of the three lacks.

    In micrometres if the units of all axes are known, else in what they are, if that is the same for all of them.
    Resolutions of other TIFFs are those of a printer, and none says how far slices lie apart.
    """
    try:
        if file.is_ome:
            sizes, units = _ome_sizes(file.ome_metadata)
        elif file.is_imagej:
            sizes, units = _imagej_sizes(file)
        else:
            return None
    except (ArithmeticError, LookupError, SyntaxError, TypeError, ValueError):  # nobody's reason to refuse the image
        return None
    factors = [MICROMETRES.get(unit.strip().lower()) for unit in units]
    if None not in factors:
        sizes = [size * float(factor or 1) for size, factor in zip(sizes, factors, strict=True)]
    elif len(set(units)) > 1:
        return None
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return None
    z, y, x = sizes
    return z, y, x


def _imagej_sizes(file: Any) -> tuple[list[float], list[str]]:
    """Size and unit of a voxel's z, y and x; a KeyError where ImageJ was told none."""
    said, tags = file.imagej_metadata, file.pages[0].tags
    resolutions = [tags[name].value for name in ("YResolution", "XResolution")]  # voxels in a unit, as a fraction
    sizes = [abs(float(said["spacing"])), *(denominator / numerator for numerator, denominator in resolutions)]
    unit = str(said.get("unit", ""))
    return sizes, [str(said.get("zunit", unit)), str(said.get("yunit", unit)), unit]


def _ome_sizes(description: str) -> tuple[list[float], list[str]]:
    """Size and unit of a voxel's z, y and x; a KeyError where the file says none."""
    from defusedxml.ElementTree import fromstring

    pixels = next((e for e in fromstring(description).iter() if e.tag.rpartition("}")[2] == "Pixels"), None)
    said = {} if pixels is None else pixels.attrib
    sizes = [float(said[f"PhysicalSize{axis}"]) for axis in "ZYX"]
    return sizes, [said.get(f"PhysicalSize{axis}Unit", "µm") for axis in "ZYX"]


def _read_hdf5(path: Path, key: str | None) -> npt.NDArray[Any]:
    try:
        import h5py
    except ImportError:
        raise ImportError(f"{path}: HDF5 files need the package h5py. Install it with `pip install h5py`.") from None
    with h5py.File(path, "r") as file:
        found: list[str] = []
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        if key is None and len(found) != 1:
            raise ValueError(
                f"it holds the arrays {', '.join(found) or '(none)'}; say which to read (--image-key, --label-key)"
            )
        name = key or found[0]
        if name not in found:
            raise ValueError(f"it holds no array {name!r}, only {', '.join(found) or '(none)'}")
        return np.asarray(file[name][()])


__all__ = ["check_whole", "read_array"]
