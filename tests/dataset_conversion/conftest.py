"""Tiny raw datasets in a nnUNet_raw of their own, and commands run in this process."""

import argparse
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import SimpleITK
from skimage import io

REPOSITORY = Path(__file__).resolve().parents[2]
LABELS = {"background": 0, "membrane": 1, "mitochondrion": 2, "synapse": 3}


@pytest.fixture
def nnunet(tmp_path, monkeypatch):
    """nnU-Net's three folders, empty; returns nnUNet_raw."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "nnUNet_raw"


@pytest.fixture
def call():
    """Run a command module as the command line would, with one process; returns its exit status."""

    def run(module: ModuleType, *arguments: object) -> int:
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        return module.run(parser.parse_args([*map(str, arguments), "--num-processes", "1"]))

    return run


@pytest.fixture
def shared():
    """The folder with other people's images beside the repository; skips where there is none."""

    def find(name: str) -> Path:
        folder = REPOSITORY.parent / "shared" / "data" / name
        if not folder.is_dir():
            pytest.skip(f"needs the {name} images of ../shared/data, which do not come with the repository")
        return folder

    return find


def draw_mask(dim: int, seed: int) -> np.ndarray:
    """A net-like class 1, some blobs of class 2, in odd cases one of class 3; (40, 48) or (8, 24, 28), uint8."""
    random = np.random.default_rng(seed)
    shape = (40, 48) if dim == 2 else (8, 24, 28)
    mask = np.zeros(shape, np.uint8)
    mask[..., 10] = mask[..., 20, :] = mask[..., 0] = mask[..., -1] = 1
    grid = np.indices(shape)
    for value in [2, 2, 2, *([3] if seed % 2 else [])]:
        center = [random.integers(0, s) for s in shape]
        inside = sum((g - c) ** 2 / r**2 for g, c, r in zip(grid, center, random.uniform(2, 5, dim), strict=True)) < 1
        mask[inside] = value
    return mask


@pytest.fixture
def make_dataset(nnunet):
    """Write DatasetXXX_Full with full masks; returns its folder and the masks by case."""

    def make(number=101, *, dim=2, cases=6, channels=("EM",), labels=LABELS, name="Full", test=1):
        folder = nnunet / f"Dataset{number:03d}_{name}"
        ending = ".png" if dim == 2 else ".nii.gz"
        masks = {}
        for part, first, last in (("Tr", 0, cases), ("Ts", cases, cases + test)):
            (folder / f"images{part}").mkdir(parents=True)
            (folder / f"labels{part}").mkdir()
            for index in range(first, last):
                mask, case = draw_mask(dim, index), f"case_{index:02d}"
                random = np.random.default_rng(1000 + index)
                image = (30 * mask + random.integers(1, 60, mask.shape)).astype(np.uint8)
                for channel in range(len(channels)):
                    _write(image + channel, folder / f"images{part}" / f"{case}_{channel:04d}{ending}")
                _write(mask, folder / f"labels{part}" / f"{case}{ending}")
                if part == "Tr":
                    masks[case] = mask
        content = {
            "channel_names": {str(i): c for i, c in enumerate(channels)},
            "labels": dict(labels),
            "numTraining": cases,
            "file_ending": ending,
        }
        (folder / "dataset.json").write_text(json.dumps(content))
        return folder, masks

    return make


def _write(array: np.ndarray, file: Path) -> None:
    if array.ndim == 2:
        io.imsave(file, array, check_contrast=False)
    else:
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing((0.7, 0.8, 3.0))
        image.SetOrigin((-12.0, 5.0, 40.0))
        image.SetDirection((-1, 0, 0, 0, 0, 1, 0, 1, 0))
        SimpleITK.WriteImage(image, str(file), True)


@pytest.fixture
def read():
    """Read an image file back as an array, whatever its ending."""

    def read_array(file: Path) -> np.ndarray:
        return io.imread(file) if file.suffix == ".png" else SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))

    return read_array


@pytest.fixture
def contents():
    """Every file below a folder with its bytes, links followed."""

    def of(folder: Path, without: tuple[str, ...] = ()) -> dict[str, bytes]:
        files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in without)
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    return of
