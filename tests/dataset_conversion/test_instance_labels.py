"""Instance labels in nnU-Net's format: reading, renumbering, thinning out, and `nnunet_dsp convert instances`."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image
from skimage.io import imread, imsave

from nnunet_dsp import cli
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.array_files import read_array
from nnunet_dsp.dataset_conversion.instance_labels import (
    MOST_IDS,
    connected_instances,
    is_instance_dataset,
    read_labels,
    region_labels,
    renumber,
    sparse_instances,
    write_sparse_dataset,
)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / f"nnUNet_{name}").mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / f"nnUNet_{name}"))
    return tmp_path / "nnUNet_raw"


def squares(shape=(40, 50), ids=(3, 70000, 12)):
    """A grid of separate squares with these ids, the first one in two pieces."""
    labels = np.zeros(shape, np.int64)
    labels[2:8, 2:8] = labels[30:36, 40:46] = ids[0]
    labels[10:20, 10:20] = ids[1]
    labels[22:28, 2:30] = ids[2]
    return labels


def source(folder, number=3, ending=".tif", colour=False):
    """`number` images with labels in `folder`, as tools write them."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(number):
        labels = np.roll(squares(), i, 1)
        image = (labels > 0).astype(np.uint8) * 100 + i
        if colour:
            image = np.stack([image, image // 2, image // 3, np.full_like(image, 255)], -1)
        imsave(folder / "images" / f"cell {i}.png", image, check_contrast=False)
        tifffile.imwrite(folder / "masks" / f"cell {i}_cp_masks{ending}", labels.astype(np.uint32))
    return folder


def convert(*words):
    return cli.main(["convert", "instances", *map(str, words), "--num-processes", "1"])


def read_case(folder, case, part="labelsTr", ending=".png"):
    return imread(folder / part / f"{case}{ending}")


def same_partition(one, other):
    pairs = set(zip(one.ravel().tolist(), other.ravel().tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_large_ids_become_small_ones_counted_in_each_image_and_nnunet_reads_the_dataset(raw, tmp_path, capsys):
    assert convert(source(tmp_path / "in"), "-d", 7, "--label", "cell") == 0
    folder = raw / "Dataset007_Instances"
    content = json.loads((folder / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "cell": [1, 2, 3, 4], "ignore": 5}
    assert content["regions_class_order"] == [1] and content["numTraining"] == 3
    assert is_instance_dataset(content)
    dataset = raw_dataset.read_dataset(folder)
    assert sorted(dataset.cases) == ["cell_0", "cell_1", "cell_2"]
    labels = read_case(folder, "cell_1")
    assert same_partition(labels, connected_instances(np.roll(squares(), 1, 1)))
    assert "3 instances more than there were ids" in capsys.readouterr().out
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    manager = LabelManager(content["labels"], content["regions_class_order"])
    assert manager.has_regions and manager.num_segmentation_heads == 1 and manager.ignore_label == 5


def test_pieces_of_one_instance_stay_together_if_asked(raw, tmp_path):
    assert convert(source(tmp_path / "in"), "-d", 7, "--keep-disconnected") == 0
    labels = read_case(raw / "Dataset007_Instances", "cell_0")
    assert same_partition(labels, squares())


@pytest.mark.parametrize("flag", [("--sparse",), ("--ignore", "12")])
def test_what_nobody_labelled_becomes_the_ignore_label(raw, tmp_path, flag):
    assert convert(source(tmp_path / "in"), "-d", 7, *flag) == 0
    folder = raw / "Dataset007_Instances"
    ignore = json.loads((folder / "dataset.json").read_text())["labels"]["ignore"]
    labels = read_case(folder, "cell_0")
    unlabelled = squares() == (0 if flag == ("--sparse",) else 12)
    assert np.array_equal(labels == ignore, unlabelled)
    assert labels[12, 12] not in (0, ignore)


def test_colour_images_become_channels_and_transparency_goes(raw, tmp_path):
    assert convert(source(tmp_path / "in", colour=True), "-d", 7) == 0
    folder = raw / "Dataset007_Instances"
    assert list(json.loads((folder / "dataset.json").read_text())["channel_names"].values()) == ["R", "G", "B"]
    green = imread(folder / "imagesTr" / "cell_2_0001.png")
    assert green[12, 14] == 51 and green.ndim == 2


def several_channels(folder, **images):
    """Two-dimensional labels `a`, `b`, ... of the images of those names, TIFF files with the options given for each."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for name, (image, options) in images.items():
        tifffile.imwrite(folder / "images" / f"{name}.tif", image, **options)
        tifffile.imwrite(folder / "labels" / f"{name}.tif", squares().astype(np.uint32))
    return folder


def test_a_grey_picture_is_repeated_among_coloured_ones_and_no_channel_among_several(raw, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(1, 255, (40, 50, 3), np.uint8)
    grey, colour = (noise[..., 0], {}), (noise, {"photometric": "rgb"})
    assert convert(several_channels(tmp_path / "in", a=colour, b=grey), "-d", 7) == 0
    made = raw / "Dataset007_Instances" / "imagesTr"
    assert all(np.array_equal(imread(made / f"b_{channel:04d}.png"), noise[..., 0]) for channel in range(3))
    capsys.readouterr()
    channels = (np.moveaxis(noise, -1, 0)[:2], {"photometric": "minisblack"})
    assert convert(several_channels(tmp_path / "other", a=channels, b=grey), "-d", 8) == 1
    assert "1 in b and 2 in a" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["channels", "axes named", "last"])
def test_channels_of_a_test_image_without_labels_are_no_slices(raw, tmp_path, kind):
    noise = np.random.default_rng(0).integers(1, 255, (2, 40, 50), np.uint8)
    options = {"photometric": "minisblack"} | ({"metadata": {"axes": "CYX"}} if kind == "axes named" else {})
    folder = several_channels(tmp_path / "in", a=(noise, options))
    (folder / "test_images").mkdir()
    if kind == "last":
        np.save(folder / "test_images" / "t.npy", np.moveaxis(noise, 0, -1))
    else:
        tifffile.imwrite(folder / "test_images" / "t.tif", noise, **options)
    assert convert(folder, "-d", 7) == 0
    made = raw / "Dataset007_Instances"
    assert all(np.array_equal(imread(made / "imagesTs" / f"t_{c:04d}.png"), noise[c]) for c in range(2))
    assert not (made / "labelsTs").exists()


def test_channels_between_an_imagej_stacks_slices_are_told_apart(raw, tmp_path):
    folder = tmp_path / "in"
    labels = np.repeat(np.arange(1, 4, dtype=np.uint16), 2)[:, None, None] * np.ones((6, 10, 12), np.uint16)
    image = np.random.default_rng(0).integers(1, 255, (6, 2, 10, 12), np.uint8)
    for part in ("images", "labels", "test_images"):
        (folder / part).mkdir(parents=True)
    for part in ("images", "test_images"):
        tifffile.imwrite(folder / part / "a.tif", image, imagej=True, metadata={"axes": "ZCYX"})
    tifffile.imwrite(folder / "labels" / "a.tif", labels, imagej=True, metadata={"axes": "ZYX"})
    assert convert(folder, "-d", 7) == 0
    for part, channel in [("imagesTr", 0), ("imagesTr", 1), ("imagesTs", 1)]:
        made = sitk.ReadImage(raw / "Dataset007_Instances" / part / f"a_{channel:04d}.nii.gz")
        assert np.array_equal(sitk.GetArrayFromImage(made), image[:, channel])


def test_a_volumes_slices_are_cut_for_training_and_test_and_keep_their_place_in_the_world(raw, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    labels = np.zeros((12, 20, 20), np.uint16)
    labels[:, :10], labels[:, 10:] = 500, 9
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=labels.shape).astype(np.float32))
    image.SetSpacing((2.0, 3.0, 5.0))
    image.SetOrigin((10.0, 20.0, 30.0))
    sitk.WriteImage(image, folder / "raw.nii.gz")
    np.save(folder / "bodies.npy", labels)
    words = ("--images", "raw.nii.gz", "--labels", "bodies.npy", "--train-slices", "0:6", "--test-slices", "8:12")
    assert convert(folder, "-d", 8, *words) == 0
    made = raw / "Dataset008_Instances"
    test = sitk.ReadImage(made / "labelsTs" / "raw_0008-0012.nii.gz")
    assert test.GetOrigin() == (10.0, 20.0, 30.0 + 8 * 5.0) and test.GetSpacing() == (2.0, 3.0, 5.0)
    assert same_partition(sitk.GetArrayFromImage(test), labels[8:12])
    part = sitk.GetArrayFromImage(sitk.ReadImage(made / "imagesTs" / "raw_0008-0012_0000.nii.gz"))
    assert np.array_equal(part, sitk.GetArrayFromImage(image)[8:12])


def test_hdf5_arrays_are_read_by_their_key_and_the_choice_is_told(raw, tmp_path, capsys):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in" / "a.h5", "w") as file:
        file["volumes/raw"] = np.random.default_rng(0).integers(0, 255, (6, 12, 12)).astype(np.uint8)
        file["volumes/labels"] = np.repeat(np.arange(1, 4), 2)[:, None, None] * np.ones((6, 12, 12), np.int64)
    words = (tmp_path / "in", "-d", 9, "--images", "a.h5", "--labels", "a.h5", "--spacing", 30, 6, 6)
    assert convert(*words) == 1
    assert "volumes/labels, volumes/raw" in capsys.readouterr().err
    assert convert(*words, "--image-key", "volumes/raw", "--label-key", "volumes/labels") == 0
    image = sitk.ReadImage(raw / "Dataset009_Instances" / "imagesTr" / "a_0000.nii.gz")
    assert image.GetSpacing() == (6.0, 6.0, 30.0)


def test_masks_without_ids_and_nnunet_datasets_become_instances_by_connected_components(raw, tmp_path):
    first = source(tmp_path / "in")
    assert convert(first, "-d", 7) == 0
    plain = raw / "Dataset020_Plain"
    for part in ("imagesTr", "labelsTr"):
        (plain / part).mkdir(parents=True)
    mask = np.where(squares() > 0, 1, 0).astype(np.uint8)
    mask[:, 45:] = 2
    imsave(plain / "imagesTr" / "a_0000.png", mask, check_contrast=False)
    imsave(plain / "labelsTr" / "a.png", mask, check_contrast=False)
    content = {"channel_names": {"0": "EM"}, "labels": {"background": 0, "cell": 1, "edge": 2}, "numTraining": 1}
    (plain / "dataset.json").write_text(json.dumps({**content, "file_ending": ".png"}))
    assert convert(plain, "-d", 21, "--name", "FromPlain") == 0
    labels = read_case(raw / "Dataset021_FromPlain", "a")
    assert same_partition(labels, connected_instances(mask))
    assert labels.max() == 5
    assert convert(plain, "-d", 22, "--name", "Edge", "--values", 2) == 0
    assert np.array_equal(read_case(raw / "Dataset022_Edge", "a") > 0, mask == 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--images", "imagesTr"), "--images: "),
        (("--labels", "labelsTr"), "--labels: "),
        (("--test-images", "imagesTr"), "--test-images: "),
        (("--test-labels", "labelsTr"), "--test-labels: "),
        (("--ignore", "3"), "4 is what nobody labelled"),
        (("--keep-disconnected",), "declares classes"),
    ],
)
def test_options_that_a_raw_nnunet_dataset_answers_itself_are_refused(raw, capsys, words, message):
    plain = raw / "Dataset020_Plain"
    for part in ("imagesTr", "labelsTr"):
        (plain / part).mkdir(parents=True)
        file = plain / part / ("a_0000.png" if part == "imagesTr" else "a.png")
        imsave(file, (squares() > 0).astype(np.uint8), check_contrast=False)
    labels = {"background": 0, "cell": 1, "edge": 2, "skin": 3, "ignore": 4}
    content = {"channel_names": {"0": "EM"}, "labels": labels, "numTraining": 1, "file_ending": ".png"}
    (plain / "dataset.json").write_text(json.dumps(content))
    assert convert(plain, "-d", 21, *words) == 1
    assert message in capsys.readouterr().err
    assert convert(plain, "-d", 21, "--ignore", "4") == 0, "says the same"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--connected-components", "--keep-disconnected"), "Give one of them"),
        (("--train-slices", "0:1", "--test-slices", "1:2", "--test-images", "masks"), "what the test set is"),
        (("--test-labels", "masks"), "no test images"),
        (("--train-slices", "0:2", "--train-slices", "4:8", "--test-slices", "7:9"), "7:9 shares slices with --train"),
    ],
)
def test_options_that_contradict_each_other_are_refused(raw, tmp_path, capsys, words, message):
    assert convert(source(tmp_path / "in"), "-d", 7, *words) == 1
    assert message in capsys.readouterr().err


def test_tiles_count_their_own_instances_and_stay_in_one_fold(raw, tmp_path):
    assert convert(source(tmp_path / "in"), "-d", 7, "--tile", 20, 25) == 0
    folder = raw / "Dataset007_Instances"
    cases = raw_dataset.read_dataset(folder).cases
    assert len(cases) == 12
    tile = read_case(folder, "cell_0_y0_x0")
    assert same_partition(tile, connected_instances(squares()[:20, :25]))
    for fold in json.loads((folder / "splits_final.json").read_text()):
        assert not {c[:6] for c in fold["train"]} & {c[:6] for c in fold["val"]}


def test_the_summary_counts_instances_by_case(raw, tmp_path, capsys):
    assert convert(source(tmp_path / "in", number=1), "-d", 7, "--tile", 20, 25) == 0
    folder = raw / "Dataset007_Instances"
    counts = [read_case(folder, f"cell_0_y{y}_x{x}").max() for y in (0, 1) for x in (0, 1)]
    assert min(counts) < max(counts)
    assert f"{min(counts)} to {max(counts)} instances in a case" in capsys.readouterr().out


def test_specks_are_neither_instances_nor_background(raw, tmp_path):
    assert convert(source(tmp_path / "in"), "-d", 7, "--min-size", 50) == 0
    folder = raw / "Dataset007_Instances"
    ignore = json.loads((folder / "dataset.json").read_text())["labels"]["ignore"]
    labels = read_case(folder, "cell_0")
    assert np.array_equal(labels == ignore, squares() == 3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "images" / "cell 1.png").unlink(), "1 label image(s) have no image: cell 1"),
        (lambda f: (f / "masks" / "cell 1_cp_masks.tif").unlink(), "1 image(s) have none: cell 1"),
        (lambda f: tifffile.imwrite(f / "masks" / "cell 1_cp_masks.tif", np.zeros((40, 51), np.uint8)), "(40, 51)"),
        (lambda f: tifffile.imwrite(f / "masks" / "cell 1_cp_masks.tif", np.full((40, 50), 0.5)), "whole numbers"),
        (lambda f: tifffile.imwrite(f / "masks" / "cell 1_cp_masks.tif", np.full((40, 50), -1)), "at least 0"),
        (lambda f: (f / "masks" / "cell 1_cp_masks.tif").write_bytes(b"no"), "cannot be read"),
        (lambda f: [tifffile.imwrite(p, np.zeros((40, 50), np.uint8)) for p in (f / "masks").iterdir()], "no training"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_no_dataset(raw, tmp_path, capsys, spoil, message):
    folder = source(tmp_path / "in")
    spoil(folder)
    assert convert(folder, "-d", 7) == 1
    assert message in capsys.readouterr().err
    assert not list(raw.iterdir())


def test_a_3d_tifs_spacing_and_test_cases_of_the_same_name_come_along(raw, tmp_path):
    folder = tmp_path / "in"
    labels = np.repeat(np.arange(1, 4, dtype=np.uint16), 2)[:, None, None] * np.ones((6, 10, 10), np.uint16)
    for part in ("images", "labels", "test/images", "test/labels"):
        (folder / part).mkdir(parents=True)
        tifffile.imwrite(folder / part / "a.tif", labels)
    (folder / "images" / "a.json").write_text('{"spacing": [30, 6, 5]}')
    assert convert(folder, "-d", 7) == 0
    made = raw / "Dataset007_Instances"
    assert sitk.ReadImage(made / "imagesTr" / "a_0000.nii.gz").GetSpacing() == (5.0, 6.0, 30.0)
    assert sitk.ReadImage(made / "labelsTs" / "a.nii.gz").GetSize() == (10, 10, 6)


OME = {"PhysicalSizeZ": 300, "PhysicalSizeZUnit": "nm", "PhysicalSizeY": 0.2, "PhysicalSizeX": 0.1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"imagej": True, "resolution": (10, 5), "metadata": {"spacing": 5.0, "unit": "um"}}, (5.0, 0.2, 0.1)),
        ({"imagej": True, "resolution": (10, 5), "metadata": {"spacing": 5.0, "unit": r"\u00B5m"}}, (5.0, 0.2, 0.1)),
        ({"imagej": True, "resolution": (10, 5), "metadata": {"spacing": 5.0, "unit": "nm"}}, (5e-3, 2e-4, 1e-4)),
        ({"imagej": True, "resolution": (10, 5), "metadata": {"spacing": 5.0, "unit": "steps"}}, (5.0, 0.2, 0.1)),
        ({"imagej": True, "resolution": (10, 5), "metadata": {"spacing": 5, "unit": "steps", "zunit": "um"}}, None),
        ({"imagej": True, "resolution": (10, 5), "metadata": {"unit": "um"}}, None),
        ({"imagej": True, "resolution": (0, 5), "metadata": {"spacing": 5.0, "unit": "um"}}, None),
        ({"ome": True, "metadata": OME}, (0.3, 0.2, 0.1)),
        ({"ome": True, "metadata": {**OME, "PhysicalSizeXUnit": "reference frame"}}, None),
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.1}}, None),
        ({"resolution": (300, 300), "resolutionunit": "INCH", "metadata": {}}, None),
    ],
)
def test_the_voxel_size_in_a_tiff_stack_is_kept_and_an_assumed_one_told(raw, tmp_path, capsys, options, expected):
    folder = tmp_path / "in"
    labels = np.repeat(np.arange(1, 4, dtype=np.uint16), 2)[:, None, None] * np.ones((6, 10, 10), np.uint16)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    options = {**options, "metadata": {"axes": "ZYX", **options["metadata"]}}
    tifffile.imwrite(folder / "images" / "a.tif", labels, **options)
    tifffile.imwrite(folder / "labels" / "a.tif", labels)
    made = raw / "Dataset007_Instances" / "imagesTr" / "a_0000.nii.gz"
    assert convert(folder, "-d", 7) == 0
    said = capsys.readouterr().out
    assert sitk.ReadImage(made).GetSpacing() == pytest.approx((expected or (1, 1, 1))[::-1])
    assert ("1 of 1 volumes name no voxel size: 1 x 1 x 1 was assumed" in said) is (expected is None)
    assert (f"Voxel size z y x: {' x '.join(f'{v:g}' for v in expected or ())}." in said) is (expected is not None)
    assert convert(folder, "-d", 7, "--overwrite", "--spacing", 9, 8, 7) == 0
    assert sitk.ReadImage(made).GetSpacing() == (7.0, 8.0, 9.0)
    (folder / "images" / "a.json").write_text('{"spacing": [30, 6, 5]}')
    assert convert(folder, "-d", 7, "--overwrite") == 0
    assert sitk.ReadImage(made).GetSpacing() == (5.0, 6.0, 30.0), "nnU-Net's own file is asked before the TIFF"


def test_more_instances_than_nnunet_can_store_are_refused_with_the_limit(raw, tmp_path, capsys):
    folder = source(tmp_path / "in", number=1)
    many = np.arange(260 * 260, dtype=np.uint32).reshape(260, 260)
    tifffile.imwrite(folder / "masks" / "cell 0_cp_masks.tif", many)
    imsave(folder / "images" / "cell 0.png", many.astype(np.uint8), check_contrast=False)
    assert convert(folder, "-d", 7) == 1
    said = capsys.readouterr().err
    assert str(MOST_IDS) in said and "--tile" in said
    assert convert(folder, "-d", 7, "--tile", 130, 130) == 0
    labels = region_labels("cell", 1)["cell"]
    assert labels == [1, 2], "a list of one value would be an ordinary label to nnU-Net"


def test_colour_pictures_of_labels_are_refused_and_grey_ones_read(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    imsave(tmp_path / "a.png", picture, check_contrast=False)
    with pytest.raises(ValueError, match="16 bit PNG or TIFF"):
        read_labels(tmp_path / "a.png")
    imsave(tmp_path / "b.png", picture[..., :1].repeat(3, -1), check_contrast=False)
    assert np.array_equal(read_labels(tmp_path / "b.png"), picture[..., 0])


@pytest.mark.parametrize("ending", [".png", ".bmp"])
def test_indices_of_pictures_with_a_palette_are_the_ids(tmp_path, ending):
    ids = (np.arange(64 * 64).reshape(64, 64) // 100).astype(np.uint8)
    picture = Image.fromarray(ids)
    picture.putpalette([value for index in range(256) for value in (index * 37 % 256, index * 91 % 256, index)])
    assert picture.mode == "P"
    picture.save(tmp_path / f"a{ending}")
    assert np.array_equal(read_labels(tmp_path / f"a{ending}"), ids)
    assert read_array(tmp_path / f"a{ending}")[0].shape == (64, 64, 3), "an image is what the eye sees"


def test_labels_in_a_jpeg_are_refused_since_it_changes_ids(raw, tmp_path, capsys):
    folder = source(tmp_path / "in", 1)
    (folder / "masks" / "cell 0_cp_masks.tif").unlink()
    imsave(folder / "masks" / "cell 0.jpg", (squares() > 0).astype(np.uint8) * 255, check_contrast=False)
    assert convert(folder, "-d", 7, "--connected-components") == 1
    assert "cell 0.jpg: JPEG changes values" in capsys.readouterr().err
    assert not list(raw.iterdir())


def test_transparency_of_a_label_picture_is_left_out(tmp_path):
    ids = (np.arange(64 * 64).reshape(64, 64) // 100).astype(np.uint8)
    alpha = np.where(ids > 0, 255, 0).astype(np.uint8)
    Image.fromarray(np.stack([ids, alpha], -1)).save(tmp_path / "a.png")
    Image.fromarray(np.stack([ids, ids, ids, alpha], -1)).save(tmp_path / "b.png")
    for name in "ab":
        assert np.array_equal(read_labels(tmp_path / f"{name}.png"), ids)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_cut_off_nifti_files_are_refused_not_filled_with_background(tmp_path, ending):
    labels = np.random.default_rng(0).integers(1, 60000, (9, 33, 32)).astype(np.uint16)
    file = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(labels), file)
    whole = file.read_bytes()
    assert np.array_equal(read_labels(file), labels)
    for length in (0, 4, 100, 352, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read: truncated" if length > 10000 else "cannot be read"):
            read_labels(file)
    if ending == ".nii.gz":
        file.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
        with pytest.raises(ValueError, match="cannot be read: truncated: unpacked"):
            read_labels(file)
        file.write_bytes(gzip.decompress(whole))
        assert np.array_equal(read_labels(file), labels), "nnU-Net reads what is compressed by its name only, too"


def test_broken_files_of_every_format_are_named(tmp_path):
    array = np.random.default_rng(0).integers(0, 60000, (9, 33, 32)).astype(np.uint16)
    np.save(tmp_path / "a.npy", array)
    tifffile.imwrite(tmp_path / "a.tif", array)
    tifffile.imwrite(tmp_path / "z.tif", array[0], compression="zlib")
    imsave(tmp_path / "a.png", array[0], check_contrast=False)
    imsave(tmp_path / "a.bmp", array[0].astype(np.uint8), check_contrast=False)
    for name in ("a.nrrd", "a.mha", "a.nii.gz"):
        sitk.WriteImage(sitk.GetImageFromArray(array), tmp_path / name)
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        for length in (0, 4, 10, len(whole) // 2):
            file.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=rf"{file.name} cannot be read: .{{6}}"):
                read_labels(file)


@pytest.mark.parametrize("big", ["images", "labels"])
def test_arrays_of_the_other_byte_order_are_read(raw, tmp_path, big):
    labels = np.repeat(np.arange(1, 4, dtype=np.uint16), 2)[:, None, None] * np.ones((6, 10, 10), np.uint16)
    for name in ("images", "labels"):
        (tmp_path / "in" / name).mkdir(parents=True)
        np.save(tmp_path / "in" / name / "a.npy", labels.astype(">u2" if name == big else "<u2"))
    assert convert(tmp_path / "in", "-d", 7) == 0
    for part in ("imagesTr/a_0000", "labelsTr/a"):
        made = sitk.ReadImage(raw / "Dataset007_Instances" / f"{part}.nii.gz")
        assert np.array_equal(sitk.GetArrayFromImage(made), labels)


def test_pickled_arrays_are_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy cannot be read"):
        read_labels(tmp_path / "a.npy")


def test_sparse_labels_keep_whole_instances_and_larger_shares_keep_the_smaller_ones():
    labels = np.random.default_rng(0).integers(0, 21, (60, 60))
    kept = {}
    for share in (0.05, 0.2, 0.5):
        sparse, number, among = sparse_instances(labels, share, 99, 4)
        ids = set(np.unique(sparse)) - {99}
        assert among == 20 and number == len(ids) == round(share * 20)
        assert 0 not in ids
        for value in ids:
            assert np.array_equal(sparse == value, labels == value)
        kept[share] = ids
    assert kept[0.05] < kept[0.2] < kept[0.5]
    again, _, _ = sparse_instances(labels, 0.2, 99, 4)
    other, _, _ = sparse_instances(labels, 0.2, 99, 5)
    assert set(np.unique(again)) - {99} == kept[0.2] != set(np.unique(other)) - {99}
    with_background, _, _ = sparse_instances(labels, 0.2, 99, 4, keep_background=True)
    assert np.array_equal(with_background == 0, labels == 0)
    assert sparse_instances(np.where(labels == 20, 99, labels), 0.5, 99, 0, known=99)[2] == 19
    assert sparse_instances(np.zeros((4, 4), int), 0.5, 99, 0)[1:] == (0, 0)
    with pytest.raises(ValueError, match="above 0"):
        sparse_instances(labels, 0.0, 99, 0)


def test_a_sparse_dataset_keeps_the_full_labels_where_nnunet_does_not_look(raw, tmp_path):
    assert convert(source(tmp_path / "in"), "-d", 7, "--label", "cell") == 0
    source_dataset = raw_dataset.read_dataset("7")
    target = raw_dataset.new_dataset_folder(8, "Sparse")
    counted = write_sparse_dataset(source_dataset, target, 0.5, seed=1)
    assert counted == {f"cell_{i}": (2, 4) for i in range(3)}
    content = json.loads((target / "dataset.json").read_text())
    assert content["labels"] == source_dataset.json["labels"] and content["regions_class_order"] == [1]
    for case in counted:
        sparse, full = read_case(target, case), read_case(target, case, "labelsTr_evaluation")
        assert np.array_equal(full, read_case(source_dataset.folder, case))
        assert set(np.unique(sparse)) - {5} < set(np.unique(full)) and (sparse == 5).any()
    plain = raw_dataset.RawDataset(target, {**content, "labels": {"background": 0, "cell": 1}}, source_dataset.cases)
    with pytest.raises(ValueError, match="nnunet_dsp convert instances"):
        write_sparse_dataset(plain, raw / "Dataset009_No", 0.5)


def test_a_sparse_dataset_is_not_made_of_undeclared_ids_or_of_nothing(raw, tmp_path):
    assert convert(source(tmp_path / "in"), "-d", 7) == 0
    dataset = raw_dataset.read_dataset("7")
    labels = read_case(dataset.folder, "cell_1")
    undeclared = r"cell_1\.png: expected ids from 0 to 5"
    for wrong, message in ((labels + 9, undeclared), (labels * 0, "no label image shows")):
        for case in dataset.cases:
            imsave(dataset.folder / "labelsTr" / f"{case}.png", wrong.astype(np.uint8), check_contrast=False)
            if message == undeclared and case != "cell_1":
                imsave(dataset.folder / "labelsTr" / f"{case}.png", labels, check_contrast=False)
        with pytest.raises(ValueError, match=message):
            write_sparse_dataset(dataset, raw / "Dataset008_Sparse", 0.5)
        assert not (raw / "Dataset008_Sparse").exists()


def test_a_negative_value_may_mean_what_nobody_labelled(raw, tmp_path, capsys):
    labels = np.full((20, 20), -1, np.int32)
    labels[:9, :9], labels[12:, 12:] = 4, 0
    for name, array in (("images", np.ones((20, 20), np.uint8)), ("labels", labels)):
        (tmp_path / "in" / name).mkdir(parents=True)
        np.save(tmp_path / "in" / name / "a.npy", array)
    assert convert(tmp_path / "in", "-d", 7) == 1
    assert "say --ignore -1" in capsys.readouterr().err
    assert convert(tmp_path / "in", "-d", 7, "--ignore", -1) == 0
    made = read_case(raw / "Dataset007_Instances", "a")
    ignore = json.loads((raw / "Dataset007_Instances" / "dataset.json").read_text())["labels"]["ignore"]
    assert same_partition(made, labels) and (made[labels < 0] == ignore).all() and (made[labels == 0] == 0).all()


def test_options_that_leave_no_instance_are_named(raw, tmp_path, capsys):
    folder = source(tmp_path / "in", number=1)
    assert convert(folder, "-d", 7, "--min-size", 10**6) == 1
    assert "Did --min-size leave all of them out?" in capsys.readouterr().err
    assert convert(folder, "-d", 7, "--min-size", -1) == 1
    assert "--min-size: expected" in capsys.readouterr().err


def test_renumbering_keeps_zero_and_touching_instances_stay_apart():
    assert renumber(np.array([[0, 9], [4, 9]])).tolist() == [[0, 2], [1, 2]]
    assert renumber(np.array([[9, 4]])).tolist() == [[2, 1]]
    touching = np.array([[1, 1, 2], [2, 1, 2]])
    assert connected_instances(touching).max() == 3
    assert connected_instances(touching, keep=[2]).max() == 1
    assert connected_instances(np.eye(3, dtype=int)).max() == 3, "corners do not connect"
