"""Label images: values, colours, instance numbers, partial masks, wrong ones."""

import json

import numpy as np
import pytest
import SimpleITK
import tifffile
from importer_oracle import painted, save_picture
from PIL import Image
from skimage import io

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion import import_annotations
from nnunet_dsp.dataset_conversion.importers.label_images import parse_values


@pytest.fixture
def folders(tmp_path):
    """images/a.png and the folder masks/ beside it."""
    save_picture(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    return tmp_path


@pytest.fixture
def labels_of(nnunet, call, folders):
    """Import masks/ as dataset 1; returns the label map written and dataset.json's labels."""

    def run(*options):
        assert call(import_annotations, "labels", folders, "-d", 1, "--name", "L", "--overwrite", *options) == 0
        folder = nnunet / "Dataset001_L"
        return io.imread(folder / "labelsTr" / "a.png"), json.loads((folder / "dataset.json").read_text())["labels"]

    return run


def label_map():
    """Background 0, cell 1, vessel 2."""
    masks = painted()[1]
    return masks["cell"] * np.uint8(1) + masks["vessel"] * np.uint8(2)


def test_a_mask_of_0_and_255_is_background_and_a_class(folders, labels_of):
    cell = painted()[1]["cell"]
    Image.fromarray(cell.astype(np.uint8) * 255).save(folders / "masks" / "a_mask.png")
    written, labels = labels_of("--values", "255=cell")
    assert labels == {"background": 0, "cell": 1}
    np.testing.assert_array_equal(written, cell)


def test_without_values_they_are_shown_and_asked_for(folders, nnunet, call):
    Image.fromarray(painted()[1]["cell"].astype(np.uint8) * 255).save(folders / "masks" / "a.png")
    with pytest.raises(
        AnnotationError, match=r"a\.png: nothing says .* 0, 255\. Say it: --values 0=background,255=cell"
    ):
        call(import_annotations, "labels", folders, "-d", 1)
    assert not list(nnunet.iterdir())


def test_scribbles_have_a_value_for_what_nobody_drew_on(folders, labels_of):
    drawn = np.full((40, 60), 9, np.uint8)
    drawn[8, 35:40], drawn[25, 9:14], drawn[0, :5] = 1, 2, 0
    Image.fromarray(drawn).save(folders / "masks" / "a.png")
    written, labels = labels_of("--values", "1=cell,2=vessel,9=unlabelled")
    assert labels == {"background": 0, "cell": 1, "vessel": 2, "ignore": 3}
    np.testing.assert_array_equal(written, np.where(drawn == 9, 3, drawn))


def test_colours_are_classes(folders, labels_of):
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 128]], np.uint8)[label_map()]
    Image.fromarray(colours).save(folders / "masks" / "a.png")
    written, _ = labels_of("--values", "#000000=background,#FF0000=cell,#00ff80=vessel")
    np.testing.assert_array_equal(written, label_map())


def test_a_palette_counts_by_its_numbers_or_by_its_colours(folders, labels_of):
    picture = Image.fromarray(label_map(), "L").convert("P")
    picture.putdata(label_map().ravel().tolist())
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(folders / "masks" / "a.png")
    for values in ("1=cell,2=vessel", "#FF0000=cell,#00FF00=vessel"):
        np.testing.assert_array_equal(labels_of("--values", values)[0], label_map())


def test_instance_numbers_are_one_class(folders, labels_of):
    instances = np.where(painted()[1]["cell"], np.arange(60, dtype=np.uint16) * 1000, 0).astype(np.uint16)
    tifffile.imwrite(folders / "masks" / "a_seg.tif", instances)
    written, labels = labels_of("--values", "1-65535=cell")
    np.testing.assert_array_equal(written, painted()[1]["cell"])
    assert labels == {"background": 0, "cell": 1}


def test_a_mask_of_some_classes_leaves_background_open_to_the_others(folders, labels_of, nnunet):
    Image.fromarray(label_map()).save(folders / "masks" / "a.png")
    table = folders / "values.txt"
    table.write_text("# what the numbers mean\n1=cell\n2=vessel\n3=nerve\n")
    written, labels = labels_of("--values", str(table), "--mask-labels", "cell,vessel")
    assert labels == {"background": 0, "cell": 1, "vessel": 2, "nerve": 3, "ignore": 4}
    said = json.loads((nnunet / "Dataset001_L" / "annotationsTr" / "a.json").read_text())
    assert said["mask_labels"] == ["cell", "vessel"]
    np.testing.assert_array_equal(written, label_map())


def test_masks_lie_beside_images_under_their_suffix(tmp_path, nnunet, call):
    save_picture(tmp_path / "flat" / "a.png")
    Image.fromarray(label_map()).save(tmp_path / "flat" / "a_seg.png")
    assert call(import_annotations, "labels", tmp_path / "flat", "-d", 1, "--values", "1=cell,2=vessel") == 0
    assert [p.name for p in (nnunet / "Dataset001_flat" / "imagesTr").iterdir()] == ["a_0000.png"]
    np.testing.assert_array_equal(io.imread(nnunet / "Dataset001_flat" / "labelsTr" / "a.png"), label_map())


def volume(path, array, spacing=(0.5, 0.6, 2.0), origin=(1, 2, 3)):
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    path.parent.mkdir(exist_ok=True, parents=True)
    SimpleITK.WriteImage(image, str(path))


@pytest.mark.parametrize("mask", ["a_mask.png", "masks/a.png"])
def test_label_images_are_no_unlabelled_images(tmp_path, nnunet, call, mask):
    for name in ("a", "b"):
        save_picture(tmp_path / "d" / f"{name}.png")
    save_picture(tmp_path / "d" / mask, painted()[1]["cell"].astype(np.uint8))
    options = () if "/" not in mask else ("--images", tmp_path / "d")
    source = tmp_path / "d" / "masks" if options else tmp_path / "d"
    arguments = ("labels", source, "-d", 1, "--name", "L", "--values", "1=cell", "--unlabelled", *options)
    assert call(import_annotations, *arguments) == 0
    names = sorted(path.name for path in (nnunet / "Dataset001_L" / "imagesTr").iterdir())
    assert names == ["a_0000.png", "b_0000.png"]


def test_label_volumes_keep_their_place_and_one_that_lies_elsewhere_is_refused(tmp_path, nnunet, call):
    random = np.random.default_rng(0)
    drawn = random.integers(0, 3, (5, 6, 7)).astype(np.uint8)
    volume(tmp_path / "images" / "v.nrrd", random.normal(size=(5, 6, 7)).astype(np.float32))
    volume(tmp_path / "labels" / "v.nii.gz", drawn)
    arguments = ("labels", tmp_path, "-d", 1, "--name", "V", "--values", "1=cell,2=vessel")
    assert call(import_annotations, *arguments) == 0
    written = SimpleITK.ReadImage(str(nnunet / "Dataset001_V" / "labelsTr" / "v.nrrd"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(written), drawn)
    assert written.GetSpacing() == pytest.approx((0.5, 0.6, 2.0)) and written.GetOrigin() == pytest.approx((1, 2, 3))
    volume(tmp_path / "labels" / "v.nii.gz", drawn, origin=(1, 2, 9))
    with pytest.raises(AnnotationError, match=r"v\.nii\.gz: it lies elsewhere in the world than v\.nrrd"):
        call(import_annotations, *arguments, "--overwrite")


@pytest.mark.parametrize("part", ["labels", "images"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_volume_that_is_cut_off_is_refused_not_filled_with_background(tmp_path, nnunet, call, part, ending):
    for folder in ("images", "labels"):
        volume(tmp_path / folder / f"v{ending}", np.random.default_rng(0).integers(0, 2, (9, 20, 30)).astype(np.uint8))
    file = tmp_path / part / f"v{ending}"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    arguments = ("labels", tmp_path, "-d", 1, "--values", "1=cell")
    with pytest.raises(AnnotationError, match=rf"{part}/v{ending}: the image cannot be read: truncated"):
        call(import_annotations, *arguments)
    assert not list(nnunet.glob("Dataset001*"))


def test_with_add_the_values_are_those_of_the_dataset_and_others_are_refused(folders, nnunet, call, make_dataset):
    make_dataset(101)
    Image.fromarray(label_map() + np.uint8(1)).save(folders / "masks" / "a.png")
    assert call(import_annotations, "labels", folders, "-d", 101, "--add") == 0
    np.testing.assert_array_equal(io.imread(nnunet / "Dataset101_Full" / "labelsTr" / "a.png"), label_map() + 1)
    Image.fromarray(label_map() + np.uint8(3)).save(folders / "masks" / "a.png")
    with pytest.raises(AnnotationError, match=r"a\.png: 2 of its values have no class \(voxels\): 4 \(112\), 5 \(91\)"):
        call(import_annotations, "labels", folders, "-d", 101, "--add", "--overwrite")


@pytest.mark.parametrize(
    ("array", "name", "message"),
    [
        (np.zeros((40, 59), np.uint8), "a.png", r"shape \(40, 59\), but its image a\.png has \(40, 60\)"),
        (np.full((40, 60), 0.5, np.float32), "a.tif", "not whole numbers"),
        (np.zeros((40, 60), np.uint8), "a.jpg", "JPEG changes the values"),
        (np.zeros((40, 60), np.uint8), "b.png", "there is no image"),
        (np.dstack([painted()[0]] * 2 + [painted()[0] * 0]), "a.png", "names no colours"),
    ],
)
def test_label_images_that_cannot_be_right_are_named(folders, nnunet, call, array, name, message):
    if name.endswith(".tif"):
        tifffile.imwrite(folders / "masks" / name, array)
    else:
        Image.fromarray(array).save(folders / "masks" / name)
    with pytest.raises(AnnotationError, match=message):
        call(import_annotations, "labels", folders, "-d", 1, "--values", "1=cell")
    assert not list(nnunet.iterdir())


@pytest.mark.parametrize(
    "text", ["cell", "x=cell", "3-1=cell", "1=cell,1=vessel", "1-9=cell,5=vessel", "#12=cell", "="]
)
def test_tables_of_values_that_say_nothing_are_refused(text):
    with pytest.raises(AnnotationError, match="--values"):
        parse_values(text)
