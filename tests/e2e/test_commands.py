"""nnU-Net's own commands on datasets made by ours, as subprocesses; asserted is what a user would see."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from skimage.io import imread

pytestmark = pytest.mark.e2e
CPU = ("-device", "cpu")


def losses(text: str) -> list[str]:
    return re.findall(r"train_loss (\S+)", text)


@pytest.fixture(scope="module")
def trained(workspace):
    return workspace("nnUNetv2_train", 2, "2d", 0, "-tr", "nnUNetTrainerDSP_quick", "-p", "Small", "--npz", *CPU)


def test_training_says_what_it_trains_on_and_logs_every_term(workspace, trained):
    assert "Training on 2 cases with masks" in trained
    assert "5 with annotations only" in trained
    for name in ("mask_loss", "dsp_image", "dsp_box", "dsp_point", "dsp_mask", "pseudo_label"):
        assert re.search(rf"loss terms:.*{name} \d", trained), name
    assert "Mean Validation Dice" in trained
    assert "No annotated pixels" not in trained, "no storm of warnings about cases without mask"
    fold = workspace.model(2, "nnUNetTrainerDSP_quick") / "fold_0"
    assert (fold / "progress.png").is_file()
    assert list((fold / "validation").glob("*.npz"))


def test_prediction_needs_nothing_but_the_plugin_and_the_model_folder(workspace, trained, tmp_path):
    source = workspace.dataset("raw", 1)
    command = ("nnUNetv2_predict", "-i", source / "imagesTs", "-o", tmp_path / "out", "-d", 2, "-c", "2d", "-f", 0)
    model = ("-tr", "nnUNetTrainerDSP_quick", "-p", "Small", "--save_probabilities", "-npp", 1, "-nps", 1)
    workspace(*command, *model, *CPU, nnUNet_raw=str(tmp_path / "none"), nnUNet_preprocessed=str(tmp_path / "none"))
    for truth in (source / "labelsTs").glob("*.png"):
        predicted = imread(tmp_path / "out" / truth.name)
        assert predicted.shape == imread(truth).shape
        probabilities = np.load(tmp_path / "out" / f"{truth.stem}.npz")["probabilities"]
        np.testing.assert_allclose(probabilities.astype(float).sum(axis=0), 1, atol=1e-2)
    files = (source / "labelsTs", tmp_path / "out", "-djfile", tmp_path / "out" / "dataset.json")
    workspace("nnUNetv2_evaluate_folder", *files, "-pfile", tmp_path / "out" / "plans.json", "-np", 1)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["foreground_mean"]["Dice"] >= 0


def test_validation_alone_repeats_the_final_validation(workspace, trained):
    again = workspace("nnUNetv2_train", 2, "2d", 0, "-tr", "nnUNetTrainerDSP_quick", "-p", "Small", "--val", *CPU)
    dice = re.findall(r"Mean Validation Dice:\s+(\S+)", trained + again)
    assert len(dice) == 2
    assert dice[0] == dice[1]


def test_a_killed_training_resumes_with_the_losses_of_one_that_was_not(workspace):
    train = ("nnUNetv2_train", 2, "2d", 1, "-p", "Small", *CPU)
    whole = workspace(*train, "-tr", "nnUNetTrainerDSP_quick", nnUNet_dsp_seed="5")
    killed = workspace(*train, "-tr", "nnUNetTrainerDSP_killed", code=-9, nnUNet_dsp_seed="5")
    resumed = workspace(*train, "-tr", "nnUNetTrainerDSP_killed", "--c", nnUNet_dsp_seed="5", SURVIVE="1")
    assert len(losses(whole)) == 2
    assert losses(killed) + losses(resumed) == losses(whole)


@pytest.fixture(scope="module")
def vanilla(workspace):
    """The same fold by nnU-Net's own trainer; its checkpoint."""
    workspace("nnUNetv2_train", 2, "2d", 0, "-p", "Small", "-tr", "nnUNetTrainer_quick", "--npz", *CPU)
    return workspace.model(2, "nnUNetTrainer_quick") / "fold_0" / "checkpoint_final.pth"


def test_the_best_configuration_and_its_ensemble_are_found_among_dsp_and_nnunet(workspace, trained, vanilla):
    trainers = ("-tr", "nnUNetTrainer_quick", "nnUNetTrainerDSP_quick")
    said = workspace("nnUNetv2_find_best_configuration", 2, "-c", "2d", "-f", 0, "-p", "Small", *trainers, "-np", 1)
    assert "ensemble___nnUNetTrainer_quick__Small__2d___nnUNetTrainerDSP_quick__Small__2d" in said


def test_weights_pretrained_by_nnunet_start_a_training_on_resenc_plans_only_if_they_fit(workspace, vanilla):
    train = ("nnUNetv2_train", 2, "2d", 0, "-tr", "nnUNetTrainerDSP_quick", "-pretrained_weights", vanilla, *CPU)
    said = workspace(*train, "-p", "Small")
    assert "Loading pretrained weights" in said
    assert "Mean Validation Dice" in said
    workspace("nnUNetv2_plan_experiment", "-d", 2, "-pl", "nnUNetPlannerResEncM")
    small = ("-o", "SmallResEnc", "--patch", 32, "--features", 4, 6, 8, "--batch-size", 2)
    workspace("nnunet_dsp", "plans", "-d", 2, "-p", "nnUNetResEncUNetMPlans", *small)
    assert "missing in the pretrained" in workspace(*train, "-p", "SmallResEnc", code=None)


def test_an_annotation_that_cannot_be_right_stops_training_and_names_case_and_entry(workspace):
    folder = workspace.dataset("raw", 2) / "annotationsTr"
    file = sorted(folder.glob("*.json"))[0]
    good = file.read_text()
    said = json.loads(good)
    said["points"][0]["at"] = [5, 640]
    try:
        file.write_text(json.dumps(said))
        complaint = workspace(
            "nnUNetv2_train", 2, "2d", 0, "-tr", "nnUNetTrainerDSP_quick", "-p", "Small", *CPU, code=None
        )
    finally:
        file.write_text(good)
    assert re.search(rf"{file.stem}.*points\[0\]", complaint)
    assert "Epoch 0" not in complaint
