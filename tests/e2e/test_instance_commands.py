"""From label images to instances through nnU-Net's own commands and ours, as subprocesses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from skimage.io import imread, imsave

pytestmark = pytest.mark.e2e
NUMBER = 41
TRAINER = "nnUNetTrainerCRAC_quick"
CPU = ("-device", "cpu")


def nuclei(seed, shape=(70, 82)):
    """Bright discs on black, some of them touching."""
    rng = np.random.default_rng(seed)
    grid = np.moveaxis(np.indices(shape), 0, -1)
    labels = np.zeros(shape, np.uint16)
    for number, centre in enumerate(rng.uniform(8, np.array(shape) - 8, (9, 2)), 1):
        disc = np.linalg.norm(grid - centre, axis=-1) < rng.uniform(5, 9)
        labels[disc & (labels == 0)] = number
    image = np.clip(np.where(labels > 0, 150, 20) + rng.normal(0, 8, shape), 0, 255).astype(np.uint8)
    return image, labels


@pytest.fixture(scope="module")
def trained(workspace):
    """Dataset 41: nuclei, background labelled, six iterations of training; what the training printed."""
    source = workspace.root / "nuclei"
    for seed, part in enumerate(["", "", "", "", "", "test_", "test_"]):
        for name in ("images", "labels"):
            (source / f"{part}{name}").mkdir(parents=True, exist_ok=True)
        image, labels = nuclei(seed)
        imsave(source / f"{part}images" / f"n{seed}.png", image, check_contrast=False)
        imsave(source / f"{part}labels" / f"n{seed}.png", labels, check_contrast=False)
    workspace("nnunet_dsp", "convert", "instances", source, "-d", NUMBER, "--name", "Nuclei", "--label", "nucleus")
    planning = ("-c", "2d", "-npfp", 1, "-np", 1, "--verify_dataset_integrity")
    workspace("nnUNetv2_plan_and_preprocess", "-d", NUMBER, *planning)
    workspace("nnunet_dsp", "plans", "-d", NUMBER, "-o", "Small", "--patch", 32, "--features", 4, 6, 8)
    return workspace("nnUNetv2_train", NUMBER, "2d", 0, "-tr", TRAINER, "-p", "Small", *CPU)


def test_training_ends_with_the_foregrounds_dice_and_the_instances_measures(workspace, trained):
    assert "Mean Validation Dice" in trained
    assert "Instances of the validation cases" in trained
    assert "loss terms: implicit" in trained
    validation = workspace.model(NUMBER, TRAINER) / "fold_0" / "validation"
    assert json.loads((validation / "instances" / "summary.json").read_text())["mean"]["num_truth"] > 0


def test_plain_nnunet_prediction_gives_the_foreground(workspace, trained, tmp_path):
    images = workspace.dataset("raw", NUMBER) / "imagesTs"
    model = ("-d", NUMBER, "-c", "2d", "-f", 0, "-tr", TRAINER, "-p", "Small", "-npp", 1, "-nps", 1)
    workspace("nnUNetv2_predict", "-i", images, "-o", tmp_path, *model, *CPU)
    for file in images.iterdir():
        predicted = imread(tmp_path / file.name.replace("_0000", ""))
        assert predicted.shape == imread(file).shape
        assert set(np.unique(predicted)) <= {0, 1}


def test_instances_are_predicted_and_evaluated(workspace, trained, tmp_path):
    raw = workspace.dataset("raw", NUMBER)
    model = ("-m", workspace.model(NUMBER, TRAINER), "-f", 0, "--decoder", "components", "--min-size", 3)
    command = ("nnunet_dsp", "instances", "predict", "-i", raw / "imagesTs", "-o", tmp_path / "out", *model, *CPU)
    said = workspace(*command)
    assert "instances of 3 voxels or more in 2 images" in said
    for file in (raw / "labelsTs").iterdir():
        assert imread(tmp_path / "out" / file.name).shape == imread(file).shape
    assert "--overwrite" in workspace(*command, code=1), "results are not replaced silently"
    learnt = json.loads((workspace.model(NUMBER, TRAINER) / "plans.json").read_text())["nnunet_dsp_crac"]["min_size"]
    said = workspace(*command[: command.index("--min-size")], *CPU, "--overwrite")
    assert f"Instances of less than {learnt} voxels" in trained
    assert f"instances of {learnt} voxels or more in 2 images" in said
    table = workspace("nnunet_dsp", "instances", "evaluate", raw / "labelsTs", tmp_path / "out")
    ignore = json.loads((raw / "dataset.json").read_text())["labels"]["ignore"]
    assert "arand" in table and "mean" in table and f"label {ignore}" in table
    summary = json.loads((tmp_path / "out" / "instances_summary.json").read_text())
    assert set(summary["cases"]) == {"n5", "n6"}
    assert summary["ignore_label"] == ignore


def test_small_images_are_predicted_and_broken_ones_named(workspace, trained, tmp_path, monkeypatch, capsys):
    from nnunet_dsp import cli

    monkeypatch.setenv("nnUNet_extTrainer", workspace.environment["nnUNet_extTrainer"])
    model = workspace.model(NUMBER, TRAINER)
    command = ["instances", "predict", "-f", "0", "--decoder", "components", "--overwrite", *CPU]

    def predict(image, name="x_0000.png", model=model):
        (tmp_path / "in").mkdir(exist_ok=True)
        if isinstance(image, bytes):
            (tmp_path / "in" / name).write_bytes(image)
        else:
            imsave(tmp_path / "in" / name, image, check_contrast=False)
        status = cli.main([*command, "-m", str(model), "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")])
        return status, capsys.readouterr().err

    small = np.random.default_rng(0).integers(0, 255, (6, 41), np.uint8)  # an offset is 9, the patch 32
    assert predict(small)[0] == 0
    assert imread(tmp_path / "out" / "x.png").shape == (6, 41)
    status, said = predict(np.zeros((20, 20, 3), np.uint8))
    assert status == 1 and "x: " in said and "1 channel(s), but got 3" in said
    status, said = predict(b"no picture")
    assert status == 1 and "x_0000.png cannot be used: nnU-Net's reader says" in said

    broken = tmp_path / "model"
    shutil.copytree(model, broken, ignore=shutil.ignore_patterns("validation"))
    content = json.loads((broken / "dataset.json").read_text())
    (broken / "dataset.json").write_text(json.dumps({**content, "file_ending": ".tif"}))
    image = np.ones((20, 20), np.float32)
    image[3, 3] = np.nan
    status, said = predict(image, "x_0000.tif", broken)
    assert status == 1 and "x: the image holds NaN or infinity" in said
    (broken / "fold_0" / "checkpoint_final.pth").write_bytes(b"cut off")
    status, said = predict(image, "x_0000.tif", broken)
    assert status == 1 and "the model cannot be loaded" in said
