"""Images in every form: what nnU-Net reads of the dataset is what lay in the file."""

import gzip
import json

import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.image_store import common_form, probe, write_image
from nnunet_dsp.dataset_conversion.import_writing import reader_writer

GREY = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7) * 7
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], -1)


def stored(folder, files, **options):
    """Import files as one dataset would; returns what nnU-Net reads of each (channels, z, y, x), the form and notes."""
    infos = [(file, probe(file)) for file in files]
    form, notes = common_form(infos)
    arrays = []
    for number, (file, info) in enumerate(infos):
        target = folder / f"case{number}_0000{form.ending}"
        write_image(file, info, form, target, **options)
        if form.family == "stack":
            (folder / f"case{number}.json").write_text(json.dumps({"spacing": [1, 1, 1]}))
        arrays.append(reader_writer(form)().read_images([str(target)])[0])
    return arrays, form, notes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def save(path, array, **more):
    Image.fromarray(array).save(path, **more)
    return path


def test_a_picture_that_nnunet_reads_is_linked_byte_by_byte(folder):
    for name in ("a.png", "b.bmp", "c.TIF"):
        file = save(folder.parent / name, GREY)
        (array,), form, notes = stored(folder, [file])
        assert (folder / f"case0_0000{form.ending}").samefile(file) and not notes
        np.testing.assert_array_equal(array[0, 0], GREY)
        (folder / f"case0_0000{form.ending}").unlink()


def test_a_jpeg_becomes_a_png_of_the_same_pixels_in_three_channels(folder):
    file = save(folder.parent / "a.jpg", COLOUR, quality=80)
    (array,), form, notes = stored(folder, [file])
    assert form.ending == ".png" and form.channel_names == ["R", "G", "B"] and ".jpg" in notes[0]
    np.testing.assert_array_equal(array[:, 0], np.asarray(Image.open(file)).transpose(2, 0, 1))


def test_16_bits_stay_16_bits_and_mixed_endings_become_one(folder):
    deep = GREY.astype(np.uint16) * 257
    files = [save(folder.parent / "a.png", deep), folder.parent / "b.tiff", save(folder.parent / "c.bmp", GREY)]
    tifffile.imwrite(files[1], deep + 1)
    arrays, form, notes = stored(folder, files)
    assert form.ending == ".png" and len(notes) == 1
    for array, expected in zip(arrays, (deep, deep + 1, GREY), strict=True):
        np.testing.assert_array_equal(array[0, 0], expected)


def test_floats_go_into_tiff_not_into_png(folder):
    tifffile.imwrite(folder.parent / "a.tif", GREY / np.float32(3))
    arrays, form, _ = stored(folder, [folder.parent / "a.tif", save(folder.parent / "b.png", GREY)])
    assert form.ending == ".tif"
    np.testing.assert_array_equal(arrays[0][0, 0], GREY / np.float32(3))
    np.testing.assert_array_equal(arrays[1][0, 0], GREY)


def test_a_2d_tiff_called_tiff_is_renamed_for_nnunet(folder):
    tifffile.imwrite(folder.parent / "a.tiff", GREY)
    (array,), form, _ = stored(folder, [folder.parent / "a.tiff"])
    assert form.ending == ".tif" and form.reader is None
    np.testing.assert_array_equal(array[0, 0], GREY)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK", "grey palette"])
def test_odd_pictures_become_grey_or_rgb(folder, mode):
    file = folder.parent / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "CMYK":
        file = folder.parent / "a.jpg"
    if mode == "1":
        image, expected = Image.fromarray(GREY > 100), (GREY > 100)[None] * 255
    elif mode == "grey palette":
        image = Image.fromarray(255 - GREY).convert("P")
        image.putdata(GREY.ravel().tolist())
        image.putpalette([v for g in range(256) for v in (255 - g,) * 3])
        expected = 255 - GREY[None]
    elif mode == "LA":
        image, expected = Image.fromarray(np.stack([GREY, GREY * 0 + 9], -1)), GREY[None]
    elif mode == "RGBA":
        image, expected = Image.fromarray(np.dstack([COLOUR, GREY])), COLOUR.transpose(2, 0, 1)
    else:
        image = Image.fromarray(COLOUR).convert(mode)
        expected = None
    image.save(file)
    if expected is None:
        expected = np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)
    (array,), form, _ = stored(folder, [file])
    assert form.channels == len(expected)
    np.testing.assert_array_equal(array[:, 0], expected)
    assert ("alpha" in probe(file).note) == (mode in ("LA", "RGBA"))


def test_grey_among_colour_gets_three_equal_channels_and_that_is_told(folder):
    files = [save(folder.parent / "a.png", GREY), save(folder.parent / "b.png", COLOUR)]
    arrays, form, notes = stored(folder, files)
    assert form.channels == 3 and "1 grey and 1 colour" in notes[0]
    np.testing.assert_array_equal(arrays[0][:, 0], np.stack([GREY] * 3))
    np.testing.assert_array_equal(arrays[1][:, 0], COLOUR.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("turned", [False, True])
def test_an_exif_orientation_is_applied_as_pillow_does_or_not_at_all(folder, orientation, turned):
    from PIL import ImageOps

    image = Image.fromarray(COLOUR)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(folder.parent / "a.png", exif=exif)
    (array,), _, _ = stored(folder, [folder.parent / "a.png"], turned=turned)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(folder.parent / "a.png"))) if turned else COLOUR
    np.testing.assert_array_equal(array[:, 0], expected.transpose(2, 0, 1))
    info = probe(folder.parent / "a.png")
    assert (info.turned_shape if turned else info.shape) == expected.shape[:2]


def test_a_tiff_stack_is_a_volume_even_if_it_is_three_pixels_wide(folder):
    for shape in ((4, 5, 6), (4, 5, 3)):
        volume = np.random.default_rng(0).integers(0, 60000, shape).astype(np.uint16)
        tifffile.imwrite(folder.parent / "a.tif", volume, photometric="minisblack")
        (array,), form, _ = stored(folder, [folder.parent / "a.tif"])
        assert form.axes == 3 and form.reader == "Tiff3DIO"
        np.testing.assert_array_equal(array[0], volume)
        (folder / "case0_0000.tif").unlink()


def test_a_tiff_of_one_page_is_a_picture_and_planes_of_colour_are_put_together(folder):
    tifffile.imwrite(folder.parent / "a.tif", GREY[None])
    (array,), form, _ = stored(folder, [folder.parent / "a.tif"])
    assert form.axes == 2
    np.testing.assert_array_equal(array[0, 0], GREY)
    tifffile.imwrite(folder.parent / "a.tif", COLOUR.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    (folder / "case0_0000.tif").unlink()
    (array,), _, _ = stored(folder, [folder.parent / "a.tif"])
    np.testing.assert_array_equal(array[:, 0], COLOUR.transpose(2, 0, 1))


def test_medical_images_keep_voxels_and_place(folder):
    voxels = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing((0.5, 0.7, 3))
    image.SetOrigin((-7, 8, 9))
    image.SetDirection((-1, 0, 0, 0, 0, 1, 0, 1, 0))
    files = [folder.parent / name for name in ("a.nii", "b.nrrd", "c.mha", "d.nii.gz")]
    for file in files:
        SimpleITK.WriteImage(image, str(file))
    arrays, form, notes = stored(folder, files)
    assert form.ending == ".nii.gz" and len(notes) == 1
    for number, array in enumerate(arrays):
        np.testing.assert_array_equal(array[0], voxels)
        back = SimpleITK.ReadImage(str(folder / f"case{number}_0000.nii.gz"))
        assert back.GetSpacing() == pytest.approx(image.GetSpacing()) and back.GetOrigin() == pytest.approx((-7, 8, 9))
        assert back.GetDirection() == pytest.approx(image.GetDirection())
    assert gzip.decompress((folder / "case0_0000.nii.gz").read_bytes()) == files[0].read_bytes()


def test_2d_with_3d_and_pictures_with_medical_images_are_refused(folder):
    tifffile.imwrite(folder.parent / "v.tif", np.zeros((4, 5, 6), np.uint8), photometric="minisblack")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((4, 5, 6), np.uint8)), str(folder.parent / "v.mha"))
    a = save(folder.parent / "a.png", GREY)
    with pytest.raises(AnnotationError, match=r"a\.png is a 2D image and .*v\.tif a 3D one"):
        stored(folder, [a, folder.parent / "v.tif"])
    with pytest.raises(AnnotationError, match="different kinds"):
        stored(folder, [folder.parent / "v.mha", folder.parent / "v.tif"])


@pytest.mark.parametrize("ending", [".png", ".jpg", ".bmp", ".tif", ".nii.gz", ".nrrd", ".mha"])
def test_a_file_that_is_no_image_is_named(tmp_path, ending):
    for content in (b"", b"nonsense", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"II*\0\xff\xff\xff\xff"):
        (tmp_path / f"bad{ending}").write_bytes(content)
        with pytest.raises(AnnotationError, match=rf"bad\{ending}: the image cannot be read"):
            probe(tmp_path / f"bad{ending}")


def test_channels_and_time_points_are_refused_with_what_to_do(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((2, 6, 7), np.uint16), metadata={"axes": "CYX"}, ome=True)
    with pytest.raises(AnnotationError, match="axes CYX.*Save each channel"):
        probe(tmp_path / "a.tif")
    SimpleITK.WriteImage(SimpleITK.Image([4, 5, 6, 2], SimpleITK.sitkUInt8), str(tmp_path / "b.nrrd"))
    with pytest.raises(AnnotationError, match="4 axes.*Save each channel"):
        probe(tmp_path / "b.nrrd")
