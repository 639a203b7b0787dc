"""`nnunet_dsp convert`: each format on a made-up source of its form, and on real files where there are any."""

import json
import types

import numpy as np
import pytest
import SimpleITK
from skimage import io

from nnunet_dsp.dataset_conversion import convert
from nnunet_dsp.dataset_conversion.blocks import block_majority, block_mean
from nnunet_dsp.dataset_conversion.formats import synthetic
from nnunet_dsp.dataset_conversion.raw_dataset import RECORD, read_dataset
from nnunet_dsp.dataset_conversion.sections import choose_sections

CODES = (0, 32, 64, 96, 128, 159, 191, 223, 255)
CLASS_OF = {0: 1, 32: 1, 64: 1, 96: 1, 128: 1, 159: 2, 191: 3, 223: 4, 255: 0}


def test_every_format_says_what_it_is_and_a_new_one_is_one_module(monkeypatch, capsys):
    assert {"acdc", "synthetic", "vnc"} <= set(convert.available_formats())
    new = types.ModuleType("nnunet_dsp.dataset_conversion.formats.new")
    new.NAME, new.HELP = "new", "a new format"
    new.add_arguments = lambda parser: parser.add_argument("number", type=int)
    new.run = lambda args: args.number
    monkeypatch.setitem(__import__("sys").modules, new.__name__, new)
    found = [types.SimpleNamespace(name="new")]
    monkeypatch.setattr(convert.pkgutil, "iter_modules", lambda _: found)
    import argparse

    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    assert convert.run(parser.parse_args(["new", "7"])) == 7
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([])
    assert stopped.value.code == 2


def test_blocks_are_averaged_and_voted_on():
    image = np.array([[0, 1, 9], [2, 4, 9], [9, 9, 9]], np.uint8)
    assert block_mean(image, 2).tolist() == [[2]]  # 1.75; what fills no block is left out
    labels = np.array([[0, 0, 0, 0, 1, 1], [0, 3, 2, 2, 4, 4]], np.uint8)
    assert block_majority(labels, 2, 5).tolist() == [[0, 2, 4]]  # of two equally frequent the higher
    assert block_majority(labels, 2, 5).dtype == np.uint8
    assert block_mean(image, 1) is image


# vnc -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stack(tmp_path):
    """Ten sections of 24 x 36 pixels in the published form; returns the folder and the codes of each section."""
    raw, labels = tmp_path / "repository" / "stack1" / "raw", tmp_path / "repository" / "stack1" / "labels"
    raw.mkdir(parents=True)
    labels.mkdir()
    (tmp_path / "repository" / "stack2" / "raw").mkdir(parents=True)
    codes = {}
    for number in range(10):
        random = np.random.default_rng(number)
        codes[number] = random.choice(np.array(CODES, np.uint8), (24, 36))
        io.imsave(raw / f"{number:02d}.tif", random.integers(0, 256, (24, 36), np.uint8), check_contrast=False)
        io.imsave(labels / f"labels{number:08d}.png", codes[number], check_contrast=False)
    return tmp_path / "repository", codes


def test_vnc_codes_are_merged_and_sections_kept_apart(stack, nnunet, call, read, capsys):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    source, codes = stack
    assert call(convert, "vnc", source, "-d", 7) == 0
    folder = nnunet / "Dataset007_VNC"
    for number, part in ((0, "Tr"), (6, "Tr"), (8, "Ts"), (9, "Ts")):
        label = read(folder / f"labels{part}" / f"vnc_s{number:02d}.png")
        image = read(folder / f"images{part}" / f"vnc_s{number:02d}_0000.png")
        assert label.dtype == image.dtype == np.uint8
        assert np.array_equal(label, np.vectorize(CLASS_OF.get)(codes[number]))
        assert np.array_equal(image, io.imread(source / "stack1" / "raw" / f"{number:02d}.tif"))
    names = {p.name for p in folder.rglob("vnc_*")}
    assert not any("s07" in n for n in names), "the section between training and test is used"
    assert len(list((folder / "imagesTr").iterdir())) == 7 and len(list((folder / "imagesTs").iterdir())) == 2
    splits = json.loads((folder / "splits_final.json").read_text())
    assert len(splits) == 5
    for fold in splits:
        train, val = ({int(c[5:7]) for c in fold[k]} for k in ("train", "val"))
        assert min(abs(t - v) for t in train for v in val) == 2
    record = json.loads((folder / RECORD).read_text())
    assert record["sections"] == {"train": list(range(7)), "unused": [7], "test": [8, 9]}
    assert "7 training cases" in capsys.readouterr().out
    verify_dataset_integrity(str(folder), 1)


def test_vnc_crops_tile_the_shrunken_section(stack, nnunet, call, read):
    source, codes = stack
    arguments = ["--downsample", 2, "--crop", 6, "--test-sections", 4, "--name", "Small"]
    assert call(convert, "vnc", source / "stack1", "-d", 7, *arguments) == 0
    folder = nnunet / "Dataset007_Small"
    assert {p.name[5:7] for p in (folder / "labelsTr").iterdir()} == {f"{n:02d}" for n in (0, 1, 2, 6, 7, 8, 9)}
    assert {p.name for p in (folder / "labelsTs").iterdir()} == {
        f"vnc_s04_y{y}_x{x}.png" for y in (0, 1) for x in (0, 1, 2)
    }
    merged = np.vectorize(CLASS_OF.get)(codes[4])
    image = io.imread(source / "stack1" / "raw" / "04.tif").astype(float)
    for y in (0, 1):
        for x in (0, 1, 2):
            label = read(folder / "labelsTs" / f"vnc_s04_y{y}_x{x}.png")
            picture = read(folder / "imagesTs" / f"vnc_s04_y{y}_x{x}_0000.png")
            for i in range(6):
                for j in range(6):
                    rows, columns = 2 * (6 * y + i), 2 * (6 * x + j)
                    block = merged[rows : rows + 2, columns : columns + 2].ravel().tolist()
                    assert label[i, j] == max(block, key=lambda v, b=block: (b.count(v), v))
                    assert abs(picture[i, j] - image[rows : rows + 2, columns : columns + 2].mean()) <= 0.5


def test_vnc_classes_that_are_not_kept_become_background(stack, nnunet, call, read):
    source, codes = stack
    for number, kept in ((7, ["membrane"]), (8, ["synapse", "membrane"])):
        assert call(convert, "vnc", source, "-d", number, "--classes", *kept) == 0
        folder = nnunet / f"Dataset{number:03d}_VNC"
        values = {"membrane": 1, "synapse": 2} if "synapse" in kept else {"membrane": 1}
        assert json.loads((folder / "dataset.json").read_text())["labels"] == {"background": 0, **values}
        value_of = {1: 1, 4: values.get("synapse", 0)}
        expected = np.vectorize(lambda code, of=value_of: of.get(CLASS_OF[code], 0))(codes[3])
        assert np.array_equal(read(folder / "labelsTr" / "vnc_s03.png"), expected)


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda s: io.imsave(s / "labels" / "labels00000003.png", np.full((24, 36), 17, "u1"), check_contrast=False),
         [], r"labels00000003\.png: unknown label code\(s\) \[17\]. Known are \[0, 32"),
        (lambda s: (s / "labels" / "labels00000003.png").unlink(), [], r"10 and 9; sections \[3\]"),
        (lambda s: (s / "raw").rename(s / "images"), [], "expected the folders stack1/raw and stack1/labels"),
        (lambda s: io.imsave(s / "raw" / "03.tif", np.zeros((24, 35), np.uint8), check_contrast=False),
         [], r"03\.tif and .*: expected two uint8 images of one shape"),
        (lambda s: None, ["--test-sections", 12], r"there is no section \[12\]; there are 0 to 9"),
        (lambda s: None, ["--gap", 8], "No section is left for training"),
        (lambda s: None, ["--crop", 25], "a crop of 25 pixels does not fit"),
        (lambda s: None, ["--downsample", 0], "Expected --downsample of 1 or more"),
        (lambda s: None, ["--classes", "membrane", "glea"], "no class glea to keep; there are membrane, glia, mito"),
        (lambda s: None, ["--classes", "background"], "no class background to keep"),
    ],
)  # fmt: skip
def test_vnc_sources_that_do_not_fit_are_explained(stack, nnunet, call, spoil, arguments, message):
    source, _ = stack
    spoil(source / "stack1")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(convert, "vnc", source, "-d", 7, *arguments)
    assert list(nnunet.iterdir()) == [], "a failure left something behind"


def test_the_published_vnc_images_convert_to_the_shares_that_are_known(shared, nnunet, call, read):
    assert call(convert, "vnc", shared("vnc"), "-d", 7, "--crop", 256, "--test-sections", 12) == 0
    files = sorted((nnunet / "Dataset007_VNC").glob("labelsT*/*.png"))
    assert len(files) == 12 * 16
    pixels = sum(np.bincount(read(f).ravel(), minlength=5) for f in files)
    assert pixels / pixels.sum() == pytest.approx([0.741, 0.172, 0.029, 0.054, 0.006], abs=0.004)


# acdc ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def patients(tmp_path):
    """Three patients with two frames each, in the published form; returns the folder and image, label, scribble."""
    h5py = pytest.importorskip("h5py", reason="convert acdc needs h5py, an extra")
    folder, arrays = tmp_path / "acdc", {}
    folder.mkdir()
    for patient in (1, 2, 10):
        for frame in (1, 12):
            random = np.random.default_rng(100 * patient + frame)
            shape = (4, 14, 12)
            label = random.integers(0, 4, shape, np.uint8)
            scribble = np.where(random.random(shape) < 0.1, label, 4).astype(np.uint16)
            image = random.random(shape, np.float32)
            name = f"patient{patient:03d}_frame{frame:02d}"
            with h5py.File(folder / f"{name}.h5", "w") as file:
                file["image"], file["label"], file["scribble"] = image, label, scribble
            arrays[name] = (image, label, scribble)
    return folder, arrays


@pytest.mark.parametrize("scribbles", [False, True])
def test_acdc_arrays_arrive_as_they_are(patients, nnunet, call, read, scribbles):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    source, arrays = patients
    flag = ["--scribbles"] if scribbles else []
    assert call(convert, "acdc", source, "-d", 8, "--test-patients", 1, "--spacing", 5, 1.5, 2, *flag) == 0
    folder = nnunet / "Dataset008_ACDC"
    for name, (image, label, scribble) in arrays.items():
        part = "Ts" if name.startswith("patient010") else "Tr"
        file = folder / f"images{part}" / f"{name}_0000.nii.gz"
        assert np.array_equal(read(file), image)
        assert SimpleITK.ReadImage(str(file)).GetSpacing() == (2, 1.5, 5)
        expected = scribble if scribbles and part == "Tr" else label
        assert np.array_equal(read(folder / f"labels{part}" / f"{name}.nii.gz"), expected)
        if scribbles and part == "Tr":
            assert np.array_equal(read(folder / "labelsTr_evaluation" / f"{name}.nii.gz"), label)
    assert ("ignore" in read_dataset(8).json["labels"]) == scribbles
    for fold in json.loads((folder / "splits_final.json").read_text()):
        assert not {c[:10] for c in fold["train"]} & {c[:10] for c in fold["val"]}, "a patient on both sides"
    verify_dataset_integrity(str(folder), 1)


def test_acdc_files_that_do_not_fit_are_named(patients, nnunet, call, tmp_path):
    import h5py

    source, _ = patients
    with h5py.File(source / "patient002_frame01.h5", "a") as file:
        file["label"][0, 0, 0] = 9
    with pytest.raises(ValueError, match=r"patient002_frame01\.h5: unknown value\(s\) \[9\] in label"):
        call(convert, "acdc", source, "-d", 8, "--test-patients", 1)
    (source / "patient002_frame01.h5").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"patient002_frame01\.h5 cannot be read"):
        call(convert, "acdc", source, "-d", 8, "--test-patients", 1)
    with pytest.raises(ValueError, match="--test-patients: expected 0 to 2 of the 3 patients, but got 3"):
        call(convert, "acdc", source, "-d", 8, "--test-patients", 3)
    with pytest.raises(FileNotFoundError, match=r"holds no files such as patient001_frame01\.h5"):
        call(convert, "acdc", tmp_path, "-d", 8)
    assert list(nnunet.iterdir()) == []


def test_acdc_without_h5py_says_what_to_install(patients, call, nnunet, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ValueError, match="pip install h5py"):
        call(convert, "acdc", patients[0], "-d", 8)


def test_the_published_acdc_scribbles_agree_with_the_dense_labels(shared, nnunet, call, read):
    pytest.importorskip("h5py", reason="convert acdc needs h5py, an extra")
    assert call(convert, "acdc", shared("acdc"), "-d", 8, "--scribbles", "--test-patients", 18) == 0
    folder = nnunet / "Dataset008_ACDC"
    for file in (folder / "labelsTr").iterdir():
        scribble, dense = read(file), read(folder / "labelsTr_evaluation" / file.name)
        drawn = scribble != 4
        assert (scribble[drawn] == dense[drawn]).mean() > 0.997 and drawn.mean() < 0.05


# synthetic -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
def test_synthetic_cells_are_the_same_for_the_same_seed(dim, nnunet, call, contents, read):
    arguments = ["--dim", dim, "--size", 96 if dim == 2 else 40]
    for number, more in ((1, []), (2, []), (3, ["--seed", 1])):
        counts = ["--cases", 2, "--test", 1]
        assert call(convert, "synthetic", "-d", number, "--name", "S", *arguments, *counts, *more) == 0
    assert call(convert, "synthetic", "-d", 4, "--name", "S", *arguments, "--cases", 1, "--test", 0) == 0
    first, again, other, fewer = (contents(nnunet / f"Dataset{n:03d}_S", without=(RECORD,)) for n in (1, 2, 3, 4))
    assert first == again
    pictures = [f for f in first if "images" in f]
    assert len(pictures) == 3 == len({first[f] for f in pictures}), "two cases are the same"
    assert not any(first[f] == other[f] for f in pictures)
    assert all(first[f] == content for f, content in fewer.items() if f != "dataset.json")
    ending = ".png" if dim == 2 else ".nii.gz"
    image = read(nnunet / "Dataset001_S" / "imagesTr" / f"cells_000_0000{ending}")
    assert image.shape == ((96, 96) if dim == 2 else (20, 40, 40)) and image.dtype == np.uint8
    assert not (nnunet / "Dataset004_S" / "imagesTs").exists()


def test_synthetic_cells_show_every_class_but_not_in_every_image():
    shown = np.zeros((10, len(synthetic.LABELS)), bool)
    for case in range(10):
        image, labels = synthetic.make_cells((192, 192), np.random.default_rng([0, case]))
        shown[case] = np.bincount(labels.ravel(), minlength=len(synthetic.LABELS)) > 0
        cytoplasm, membrane = image[labels == 0].mean(), image[labels == 1].mean()
        assert cytoplasm > membrane + 20, "membranes are dark"
    assert shown[:, :3].all(), "background, membrane and mitochondria are nearly everywhere"
    assert all(2 <= n <= 9 for n in shown[:, 3:].sum(0)), "tags of the others say something"


def test_nnunet_accepts_synthetic_cells(nnunet, call):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    assert call(convert, "synthetic", "-d", 1, "--cases", 2, "--test", 0, "--size", 64, "--dim", 3) == 0
    verify_dataset_integrity(str(nnunet / "Dataset001_Synthetic"), 1)


def test_sizes_that_make_no_cells_are_refused(nnunet, call):
    with pytest.raises(ValueError, match="Expected --size of 32 or more"):
        call(convert, "synthetic", "-d", 1, "--size", 8)


def test_default_test_sections_are_the_last_fifth():
    assert choose_sections(range(20), None, None, 1) == (list(range(15)), [16, 17, 18, 19])
    assert choose_sections(range(13), None, None, 0) == (list(range(10)), [10, 11, 12])
