"""Reading image headers, and writing images into a dataset in the one form that nnU-Net wants of all of them.

A dataset has one file ending, one number of channels and one number of axes. What is there already in that form is
linked or copied byte by byte; anything else is converted without loss, and what changes is said in a note. Annotations
do not matter here.
"""

from __future__ import annotations

import filecmp
import gzip
import io
import os
import shutil
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.array_files import check_whole
from nnunet_dsp.dataset_conversion.image_files import ending_of

ITK_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
TIFF_ENDINGS = (".tif", ".tiff")
JPEG_ENDINGS = (".jpg", ".jpeg")
ORIENTATION = 0x0112  # EXIF and TIFF tag
MAX_PIXELS = 1 << 34  # of one image: a header may claim anything
_AXES_SWAPPED = (5, 6, 7, 8)
_WITHOUT_LOSS_IN_PNG = ("bool", "uint8", "uint16")


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an image file says.

    Attributes:
        shape: (y, x) or (z, y, x), as stored (before any EXIF orientation); a stack of one TIFF page is (y, x).
        channels: 1, or 3 for colour.
        dtype: of the voxels; "bool" for one bit.
        ending: of the file name, lower case.
        family: "natural" (2D picture files), "stack" (3D TIFF) or "itk".
        orientation: EXIF orientation, 1 where there is none.
        verbatim: nnU-Net reads the file as it is, given its ending stays.
        note: what converting it would leave out ("" for nothing).
    """

    shape: tuple[int, ...]
    channels: int
    dtype: str
    ending: str
    family: str
    orientation: int = 1
    verbatim: bool = True
    note: str = ""

    @property
    def turned_shape(self) -> tuple[int, ...]:
        """The shape as viewers show it, with the EXIF orientation applied."""
        return self.shape[::-1] if self.orientation in _AXES_SWAPPED else self.shape


def probe(file: Path, data: bytes | None = None) -> ImageInfo:
    """Read an image's header.

    Args:
        file: the image; its ending decides who reads it.
        data: its bytes, where they lie in no file.

    Raises:
        AnnotationError: the file cannot be read, or is no image that nnU-Net can be given.
    """
    ending = ending_of(file)
    if data is not None and not (ending and ending not in (*ITK_ENDINGS, *TIFF_ENDINGS)):
        ending = ".png"
    if ending is None:
        raise AnnotationError(f"{file}: expected an image (PNG, TIFF, BMP, JPEG, NIfTI, NRRD, MHA).")
    if ending in ITK_ENDINGS:
        info = _probe_itk(file, ending)
    elif ending in TIFF_ENDINGS:
        info = _probe_tiff(file, ending)
    else:
        info = _probe_picture(file, ending, data)
    if min(info.shape) < 1 or int(np.prod(info.shape, dtype=object)) > MAX_PIXELS:
        raise AnnotationError(f"{file}: the image has the shape {info.shape}, which is empty or beyond all bounds.")
    return info


def _probe_picture(file: Path, ending: str, data: bytes | None) -> ImageInfo:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data) if data is not None else file) as image:
                mode, (width, height) = image.mode, image.size
                orientation = int(image.getexif().get(ORIENTATION, 1) or 1)
                if mode in ("P", "PA"):
                    mode = "P" if _palette_is_grey(image) else "PC"
                see_through = mode in ("LA", "RGBA", "PA") or "transparency" in image.info
    except Exception as error:  # PIL's plugins raise whatever comes up on broken files
        raise AnnotationError(f"{file}: the image cannot be read: {_reason(error)}") from None
    dtype = {"1": "bool", "I": "int32", "F": "float32"}.get(mode, "uint16" if mode.startswith("I;16") else "uint8")
    channels = 1 if mode in ("1", "L", "LA", "P", "I", "F") or mode.startswith("I;16") else 3
    plain = mode in ("L", "RGB") or mode.startswith("I;16")
    return ImageInfo(
        (height, width),
        channels,
        dtype,
        ending,
        "natural",
        orientation if 1 <= orientation <= 8 else 1,
        plain and orientation == 1 and ending not in JPEG_ENDINGS and data is None and not see_through,
        "the alpha channel (transparency) is left out" if see_through else "",
    )


def _palette_is_grey(image: Any) -> bool:
    palette = np.asarray(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    return bool(len(palette)) and bool((palette == palette[:, :1]).all())


def _probe_tiff(file: Path, ending: str) -> ImageInfo:
    import tifffile

    try:
        with tifffile.TiffFile(file) as tiff:
            series = tiff.series[0]
            shape, axes, dtype = tuple(map(int, series.shape)), str(series.axes), np.dtype(series.dtype)
            tag = series.keyframe.tags.get(274)
            orientation = int(tag.value) if tag is not None and int(tag.value) in range(1, 9) else 1
            photometric = str(getattr(series.keyframe.photometric, "name", ""))
            several = len(tiff.series) > 1
    except Exception as error:
        raise AnnotationError(f"{file}: the image cannot be read: {_reason(error)}") from None
    if dtype.kind not in "buif":
        raise AnnotationError(f"{file}: expected whole or floating-point numbers, but its voxels are {dtype}.")
    samples = shape[axes.index("S")] if "S" in axes else 1
    rest = [(size, axis) for size, axis in zip(shape, axes, strict=True) if axis != "S"]
    extra = [(size, axis) for size, axis in rest if axis not in "YX" and size > 1]
    if [axis for _, axis in rest if axis in "YX"] != ["Y", "X"] or len(extra) > 1 or (extra and extra[0][1] == "C"):
        raise AnnotationError(
            f"{file}: the image has the axes {axes} of sizes {shape}. Expected one grey or colour picture, or one "
            "stack of grey slices. Save each channel or time point as a file of its own."
        )
    if photometric in ("PALETTE", "CFA", "SEPARATED", "YCBCR", "CIELAB") and not (photometric == "YCBCR"):
        raise AnnotationError(f"{file}: a TIFF with {photometric.lower()} colours. Save it as grey or RGB.")
    if samples not in (1, 2, 3, 4) or (extra and samples != 1):
        raise AnnotationError(
            f"{file}: the image has {samples} values a voxel in {'3D' if extra else '2D'}. "
            "nnU-Net reads grey stacks, and grey or RGB pictures."
        )
    yx = tuple(size for size, axis in rest if axis in "YX")
    alpha = "the alpha channel (transparency) is left out" if samples in (2, 4) else ""
    if several:
        alpha = "; ".join(filter(None, (alpha, "it holds several images, of which the first is taken")))
    if photometric == "MINISWHITE":
        alpha = "; ".join(filter(None, (alpha, "0 means white in it: brightness is kept as stored")))
    stored = np.dtype(dtype).newbyteorder("=")
    if extra:
        return ImageInfo((extra[0][0], *yx), 1, str(stored), ending, "stack", 1, len(shape) == 3 and not several, alpha)
    plain = axes in ("YX", "YXS") and samples in (1, 3) and orientation == 1 and not several and stored.itemsize <= 4
    return ImageInfo(
        yx, 3 if samples > 2 else 1, str(stored), ending, "natural", orientation, plain and dtype.kind != "b", alpha
    )


def _probe_itk(file: Path, ending: str) -> ImageInfo:
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise AnnotationError(f"{file}: the image cannot be read: {_reason(error)}") from None
    size, values = reader.GetSize(), reader.GetNumberOfComponents()
    if len(size) == 4 and size[3] == 1:
        size = size[:3]
    if len(size) not in (2, 3) or values != 1:
        raise AnnotationError(
            f"{file}: expected an image of 2 or 3 axes with one value a voxel, but it has {len(reader.GetSize())} axes "
            f"{tuple(reader.GetSize())} and {values} value(s). Save each channel or time point as a file of its own."
        )
    pixel = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    dtype = {
        "8-bit unsigned integer": "uint8", "16-bit unsigned integer": "uint16", "8-bit signed integer": "int8",
        "16-bit signed integer": "int16", "32-bit float": "float32",
    }.get(pixel, pixel)  # fmt: skip
    whole = len(reader.GetSize()) == len(size) and ending != ".nii"
    return ImageInfo(tuple(int(s) for s in size[::-1]), 1, dtype, ending, "itk", 1, whole)


@dataclass(frozen=True)
class Form:
    """The form all images of a dataset have.

    axes: 2 or 3. channels: 1 or 3 (colour pictures, one file each). ending: with the dot. family: as in ImageInfo.
    reader: name for dataset.json's overwrite_image_reader_writer; None where nnU-Net finds the right one by itself.
    """

    axes: int
    channels: int
    ending: str
    family: str
    reader: str | None = None

    @property
    def channel_names(self) -> list[str]:
        """Names for dataset.json. nnU-Net normalises each with its own mean and spread, whatever these are."""
        return ["R", "G", "B"] if self.channels == 3 else ["image"]


def common_form(infos: Sequence[tuple[Path, ImageInfo]]) -> tuple[Form, list[str]]:
    """The form that fits all images without loss, and notes on what has to be converted.

    Raises:
        AnnotationError: 2D and 3D mixed, or picture files mixed with medical ones.
    """
    axes = {len(info.shape): file for file, info in infos}
    families = {info.family: file for file, info in infos}
    if len(axes) > 1:
        raise AnnotationError(
            f"{axes[2]} is a 2D image and {axes[3]} a 3D one. A dataset of nnU-Net holds either; import them apart."
        )
    if len(families) > 1:
        (a, file_a), (b, file_b) = sorted(families.items())[:2]
        raise AnnotationError(
            f"{file_a} and {file_b} are of different kinds ({a}, {b}): one states voxel sizes, the other none. "
            "Import them apart, or convert one of them."
        )
    family = next(iter(families))
    endings = sorted({info.ending for _, info in infos})
    notes = []
    if family == "itk":
        kept = len(endings) == 1 and endings[0] != ".nii"
        form = Form(next(iter(axes)), 1, endings[0] if kept else ".nii.gz", family)
    elif family == "stack":
        form = Form(3, 1, ".tif", family, "Tiff3DIO")
    else:
        grey = sum(info.channels == 1 for _, info in infos)
        channels = 1 if grey == len(infos) else 3
        if 0 < grey < len(infos):
            notes.append(
                f"{grey} grey and {len(infos) - grey} colour images: the grey ones get three equal channels, for "
                "nnU-Net wants one number of channels"
            )
        dtypes = {info.dtype for _, info in infos}
        if len(endings) == 1 and endings[0] not in JPEG_ENDINGS:
            ending = ".tif" if endings[0] in TIFF_ENDINGS else endings[0]
            if ending == ".bmp" and not all(info.verbatim for _, info in infos):
                ending = ".png"
        else:
            ending = ".tif" if channels == 3 and "uint16" in dtypes else ".png"
        if ending == ".png" and not all(d in _WITHOUT_LOSS_IN_PNG for d in dtypes):
            ending = ".tif"
        form = Form(2, channels, ending, family)
    if len(endings) > 1 or endings[0] != form.ending:
        notes.append(f"images end in {', '.join(endings)}: all become {form.ending}, without loss")
    return form, notes


def check_fits(file: Path, info: ImageInfo, form: Form) -> None:
    """Refuse an image that cannot join a dataset of this form; AnnotationError says why."""
    if len(info.shape) != form.axes or info.family != form.family:
        raise AnnotationError(
            f"{file} ({len(info.shape)}D, {info.ending}) does not fit the dataset, which holds {form.axes}D images "
            f"ending in {form.ending}."
        )


def write_image(
    file: Path, info: ImageInfo, form: Form, target: Path, *, data: bytes | None = None, turned: bool = False
) -> None:
    """Put an image into a dataset.

    Args:
        file: the image. data: its bytes, where they lie in no file.
        info: what probe() said of it.
        form: the form that all images get.
        target: imagesTr/CASE_0000 + form.ending.
        turned: apply the EXIF orientation; else the voxels stay as stored.

    Raises:
        AnnotationError: the image cannot be read whole, or cannot be converted without loss.
    """
    if data is None:
        _check_whole(file)
    if info.verbatim and data is None and info.channels == form.channels and _same_ending(info.ending, form.ending):
        link_or_copy(file, target)
        return
    if form.family == "itk":
        _convert_itk(file, info, form, target)
        return
    array = read_picture(file, data, info)
    if turned:
        array = apply_orientation(array, info.orientation)
    if form.channels == 3 and array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    elif form.channels == 1 and array.ndim == 3 and form.axes == 2:
        if not (array == array[..., :1]).all():
            raise AnnotationError(f"{file} is a colour image, but those of the dataset are grey.")
        array = array[..., 0]
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    _write_picture(array, form, target, file)


def _same_ending(a: str, b: str) -> bool:
    return a == b or (a in TIFF_ENDINGS and b in TIFF_ENDINGS)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` (a hard link), or a copy of it where that cannot be."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def read_picture(file: Path, data: bytes | None, info: ImageInfo) -> npt.NDArray[Any]:
    """Voxels of a picture or TIFF stack: (y, x), (y, x, 3) or (z, y, x), without alpha, as stored."""
    try:
        if info.ending in TIFF_ENDINGS and data is None:
            return _read_tiff(file, info)
        from PIL import Image

        with Image.open(io.BytesIO(data) if data is not None else file) as image:
            image.load()
            if image.mode == "PA" or (image.mode == "P" and info.channels == 3):
                image = image.convert("RGB")
            elif image.mode == "P":
                image = image.convert("L")
            elif image.mode == "LA":
                image = image.getchannel("L")
            elif image.mode not in ("1", "L", "I", "F", "RGB") and not image.mode.startswith("I;16"):
                image = image.convert("RGB")
            array = np.asarray(image)
    except AnnotationError:
        raise
    except Exception as error:
        raise AnnotationError(f"{file}: the image cannot be read: {_reason(error)}") from None
    return array.astype(np.uint16) if array.dtype.byteorder == ">" and array.dtype.kind == "u" else array


def _read_tiff(file: Path, info: ImageInfo) -> npt.NDArray[Any]:
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        series = tiff.series[0]
        array, axes = series.asarray(), str(series.axes)
    if "S" in axes:
        array = np.moveaxis(array, axes.index("S"), -1)
        array = array.reshape(*info.shape, array.shape[-1])
        array = array[..., :3] if info.channels == 3 else array[..., 0]
    else:
        array = array.reshape(info.shape)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def same_voxels(file: Path, other: Path, data: bytes | None = None) -> bool:
    """Whether two image files hold the same voxels, whatever their format.

    Args:
        file: an image. data: its bytes, where they lie in no file.
        other: an image file.

    Raises:
        AnnotationError: one of them cannot be read.
    """
    if data is None and (os.path.samefile(file, other) or filecmp.cmp(file, other, shallow=False)):
        return True
    infos = probe(file, data), probe(other)
    if infos[0].shape != infos[1].shape or (infos[0].family == "itk") != (infos[1].family == "itk"):
        return False
    one, two = _voxels(file, data, infos[0]), _voxels(other, None, infos[1])
    if one.ndim != two.ndim:  # grey, in a dataset of colour images
        one, two = (a[..., None] if a.ndim == len(infos[0].shape) else a for a in (one, two))
    return bool((one == two).all())


def _voxels(file: Path, data: bytes | None, info: ImageInfo) -> npt.NDArray[Any]:
    if info.family != "itk":
        array = read_picture(file, data, info)
        return array.astype(np.uint8) * 255 if array.dtype == bool else array
    return read_volume(file, info)


def read_volume(file: Path, info: ImageInfo) -> npt.NDArray[Any]:
    """Voxels of a NIfTI, NRRD or MHA file: (z, y, x) or (y, x), as stored.

    Raises:
        AnnotationError: the file cannot be read, or is cut off.
    """
    import SimpleITK

    _check_whole(file)
    try:
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file))).reshape(info.shape)
    except RuntimeError as error:
        raise AnnotationError(f"{file}: the image cannot be read: {_reason(error)}") from None


def _check_whole(file: Path) -> None:
    try:
        check_whole(file)
    except (OSError, RuntimeError, ValueError, zlib.error) as error:
        raise AnnotationError(f"{file}: the image cannot be read: {_reason(error)}") from None


def apply_orientation(array: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Turn voxels (y, x, ...) as the EXIF orientation (1 to 8) says, as viewers do."""
    if orientation in _AXES_SWAPPED:
        array = np.swapaxes(array, 0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _write_picture(array: npt.NDArray[Any], form: Form, target: Path, file: Path) -> None:
    if form.ending in TIFF_ENDINGS:
        import tifffile

        if array.dtype.itemsize > 4:
            if array.dtype.kind != "f":
                raise AnnotationError(f"{file}: its voxels are {array.dtype}. Save the image with 32 bits or fewer.")
            array = array.astype(np.float32)  # nnU-Net works on float32, whatever the file holds
        tifffile.imwrite(
            target, array, compression="zlib", photometric="rgb" if array.ndim == 3 and form.axes == 2 else "minisblack"
        )
        return
    from PIL import Image

    if str(array.dtype) not in ("uint8", "uint16") or (array.ndim == 3 and array.dtype != np.uint8):
        if array.dtype.kind in "iu" and array.ndim == 2 and array.min() >= 0 and array.max() < 2**16:
            array = array.astype(np.uint16)
        else:
            raise AnnotationError(
                f"{file}: its voxels ({array.dtype}) do not go into {form.ending} without loss. "
                "Save all images as TIFF."
            )
    Image.fromarray(array).save(target)


def _convert_itk(file: Path, info: ImageInfo, form: Form, target: Path) -> None:
    import SimpleITK

    if info.ending == ".nii" and form.ending == ".nii.gz" and info.verbatim is False and _axes_of(file) == form.axes:
        with open(file, "rb") as source, gzip.open(target, "wb", compresslevel=5) as packed:
            shutil.copyfileobj(source, packed)
        return
    try:
        image: Any = SimpleITK.ReadImage(str(file))
        if image.GetDimension() == 4:
            image = image[:, :, :, 0]
        SimpleITK.WriteImage(image, str(target), True)
    except RuntimeError as error:
        raise AnnotationError(f"{file}: the image cannot be read or written: {_reason(error)}") from None


def _axes_of(file: Path) -> int:
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    return int(reader.GetDimension())


def with_shape(info: ImageInfo, shape: tuple[int, ...]) -> ImageInfo:
    """The same image, turned: its shape as it will lie in the dataset."""
    return replace(info, shape=shape, orientation=1)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[-1][:300] if lines else type(error).__name__
    return text if text.endswith(".") else f"{text}."
