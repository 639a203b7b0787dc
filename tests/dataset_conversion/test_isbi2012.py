"""`nnunet_dsp convert isbi2012` on a made-up stack of its form, and on the real one where there is one."""

import json

import numpy as np
import pytest
from skimage import io

from nnunet_dsp.dataset_conversion import convert
from nnunet_dsp.dataset_conversion.raw_dataset import RECORD
from nnunet_dsp.dataset_conversion.sections import choose_sections


@pytest.fixture
def stack(tmp_path):
    """Ten sections of 20 x 30 pixels in the published form; returns the folder, and image and label of each."""
    folder, arrays = tmp_path / "membrane", {}
    for part in ("image", "label"):
        (folder / part).mkdir(parents=True)
    for number in range(10):
        random = np.random.default_rng(number)
        image = random.integers(0, 256, (20, 30), np.uint8)
        arrays[number] = image, random.choice(np.array([0, 255], np.uint8), (20, 30))
        for part, array in zip(("image", "label"), arrays[number], strict=True):
            io.imsave(folder / part / f"{number}.png", array, check_contrast=False)
    return folder, arrays


def test_membranes_become_the_foreground_and_sections_are_kept_apart(stack, nnunet, call, read, capsys):
    source, arrays = stack
    assert call(convert, "isbi2012", source, "-d", 9) == 0
    folder = nnunet / "Dataset009_ISBI2012"
    for number, part in ((0, "Tr"), (6, "Tr"), (8, "Ts"), (9, "Ts")):
        image, label = arrays[number]
        assert np.array_equal(read(folder / f"images{part}" / f"isbi2012_s{number:02d}_0000.png"), image)
        converted = read(folder / f"labels{part}" / f"isbi2012_s{number:02d}.png")
        assert converted.dtype == np.uint8 and np.array_equal(converted, label == 0)
    assert len(list((folder / "imagesTr").iterdir())) == 7 and len(list((folder / "imagesTs").iterdir())) == 2
    content = json.loads((folder / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "membrane": 1} and content["numTraining"] == 7
    for fold in json.loads((folder / "splits_final.json").read_text()):
        train, val = ({int(case[-2:]) for case in fold[k]} for k in ("train", "val"))
        assert min(abs(t - v) for t in train for v in val) == 2
    assert json.loads((folder / RECORD).read_text())["sections"] == {
        "train": list(range(7)), "unused": [7], "test": [8, 9]
    }  # fmt: skip
    assert "7 training cases" in capsys.readouterr().out


def test_sections_can_be_named():
    numbers = list(range(10))
    assert choose_sections(numbers, [1, 0], [7], 1) == ([0, 1], [7])
    assert choose_sections(numbers, None, [0, 9], 2) == ([3, 4, 5, 6], [0, 9])
    assert choose_sections(numbers, None, [], 1) == (numbers, [])
    assert choose_sections(numbers, [2], None, 1) == ([2], [8, 9])
    with pytest.raises(ValueError, match=r"--train-sections: \[6, 7\] lie within 1 sections"):
        choose_sections(numbers, [1, 6, 7], [7], 1)
    with pytest.raises(ValueError, match=r"--test-sections: there is no section \[12\]; there are 0 to 9"):
        choose_sections(numbers, None, [12], 1)
    with pytest.raises(ValueError, match="No section is left for training"):
        choose_sections(numbers, None, [2, 7], 8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: io.imsave(s / "label" / "3.png", np.full((20, 30), 17, "u1"), check_contrast=False),
         r"3\.png: unknown label value\(s\) \[17\]. Known are 0 \(membrane\) and 255"),
        (lambda s: (s / "label" / "3.png").unlink(), r"10 and 9; sections \[3\] have only one"),
        (lambda s: (s / "image").rename(s / "images"), "expected the folders image and label"),
        (lambda s: io.imsave(s / "image" / "3.png", np.zeros((20, 29), "u1"), check_contrast=False),
         r"image/3\.png and .*: expected two uint8 images of one shape"),
        (lambda s: (s / "image" / "3.png").rename(s / "image" / "three.png"), "file name that ends in the section's"),
        (lambda s: (s / "image" / "03.png").write_bytes((s / "image" / "3.png").read_bytes()), "are both section 3"),
    ],
)  # fmt: skip
def test_sources_that_do_not_fit_are_explained(stack, nnunet, call, spoil, message):
    source, _ = stack
    spoil(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(convert, "isbi2012", source, "-d", 9)
    assert list(nnunet.iterdir()) == [], "a failure left something behind"


def test_the_published_sections_convert(shared, nnunet, call, read):
    assert call(convert, "isbi2012", shared("isbi2012"), "-d", 9, "--test-sections", 18, 19) == 0
    files = sorted((nnunet / "Dataset009_ISBI2012").glob("labelsT*/*.png"))
    assert len(files) == 19
    share = np.mean([read(f).mean() for f in files])
    assert 0.15 < share < 0.3, "membranes are the smaller part"
