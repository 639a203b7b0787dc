"""Pre-training, one-shot training, resuming, prediction and pseudo-labels by the commands of docs/prompt.md."""

from __future__ import annotations

import json
import re
import signal

import numpy as np
import pytest
from skimage.io import imread

pytestmark = pytest.mark.e2e
CPU = ("-device", "cpu")
PROMPT, ONE_SHOT = "nnUNetTrainerPrompt_quick", "nnUNetTrainerPromptOneShot_quick"
SOURCE, TARGET, PSEUDO = 2, 42, 43
PLANS = "FromSource"


@pytest.fixture(scope="module")
def pretrained(workspace):
    """Dataset 42: a rectangle of 24 x 24 in each image, preprocessed by dataset 2's plans; a model of dataset 2."""
    workspace("nnUNetv2_train", SOURCE, "2d", "all", "-tr", PROMPT, "-p", "Small", *CPU)
    said = workspace("nnunet_dsp", "simulate", "-d", 1, "-o", TARGET, "--name", "Rectangles", "--rectangle", 24)
    assert "rectangles    8 cases" in said
    workspace("nnUNetv2_plan_and_preprocess", "-d", TARGET, "-c", "2d", "-npfp", 1, "--no_pp")
    moved = ("-s", SOURCE, "-t", TARGET, "-sp", "Small", "-tp", PLANS)
    workspace("nnUNetv2_move_plans_between_datasets", *moved)
    workspace("nnUNetv2_preprocess", "-d", TARGET, "-plans_name", PLANS, "-c", "2d", "-np", 1)
    return workspace.model(SOURCE, PROMPT) / "fold_all" / "checkpoint_final.pth"


@pytest.fixture(scope="module")
def trained(workspace, pretrained):
    """One-shot training from the pre-trained weights, killed in its second epoch and resumed; what both said."""
    plans = workspace.dataset("preprocessed", TARGET) / f"{PLANS}.json"
    content = json.loads(plans.read_text())
    content["configurations"]["2d"]["patch_size"] = [48, 48]  # another patch and another prompt than in pre-training
    content["nnunet_dsp_prompt"] = {"window": 20}
    plans.write_text(json.dumps(content))
    train = ("nnUNetv2_train", TARGET, "2d", 0, "-tr", ONE_SHOT, "-p", PLANS, *CPU)
    killed = workspace(*train, "-pretrained_weights", pretrained, code=-signal.SIGKILL, DIE="1")
    prompt = workspace.model(TARGET, ONE_SHOT, PLANS) / "fold_0" / "prompt.json"
    before = prompt.stat().st_mtime_ns
    resumed = workspace(*train, "--c", "--npz")
    assert prompt.stat().st_mtime_ns == before, "the prompt was chosen anew"
    return killed, resumed


def test_pretrained_weights_are_taken_and_the_prompt_is_the_targets_own(workspace, trained):
    killed, _ = trained
    assert "Loading pretrained weights" in killed
    assert re.search(r"One-shot: \S+ alone is trained on, of \d annotated", killed)
    file = workspace.model(TARGET, ONE_SHOT, PLANS) / "fold_0" / "prompt.json"
    window = json.loads(file.read_text())["windows"][0]
    assert f"Prompt: {window['case']}, voxels" in killed
    mask = imread(workspace.dataset("raw", TARGET) / "labelsTr" / f"{window['case']}.png")
    (y0, y1), (x0, x1) = ((int(a), int(b)) for a, b in window["bbox"])
    inside = mask[y0:y1, x0:x1]
    assert inside.shape == (20, 20)
    ignore = json.loads((workspace.dataset("raw", TARGET) / "dataset.json").read_text())["labels"]["ignore"]
    assert (inside != ignore).sum() == sum(window["voxels"].values()) > 0


def test_a_killed_training_resumes_with_its_prompt_and_validates_the_same_again(workspace, trained):
    killed, resumed = trained
    assert "Prompt: " in killed and "Prompt: " not in resumed, "the prompt comes with the checkpoint"
    fold = workspace.model(TARGET, ONE_SHOT, PLANS) / "fold_0"
    assert (fold / "prompt.png").is_file() and list((fold / "validation").glob("*.npz"))
    again = workspace("nnUNetv2_train", TARGET, "2d", 0, "-tr", ONE_SHOT, "-p", PLANS, "--val", *CPU)
    dice = re.findall(r"Mean Validation Dice:\s+(\S+)", resumed + again)
    assert len(dice) == 2 and dice[0] == dice[1]


def test_plain_prediction_gives_votes_and_they_become_labels_where_nobody_annotated(workspace, trained, tmp_path):
    raw, out = workspace.dataset("raw", TARGET), tmp_path / "out"
    command = ("nnUNetv2_predict", "-i", raw / "imagesTr", "-o", out, "-d", TARGET, "-c", "2d", "-f", 0)
    more = ("-tr", ONE_SHOT, "-p", PLANS, "--save_probabilities", "-npp", 1, "-nps", 1, *CPU)
    nowhere = {"nnUNet_raw": str(tmp_path / "none"), "nnUNet_preprocessed": str(tmp_path / "none")}
    workspace(*command, *more, **nowhere)
    predicted = {file.stem: imread(file) for file in out.glob("*.png")}
    assert len(predicted) == 8
    for case in predicted:
        probabilities = np.load(out / f"{case}.npz")["probabilities"].astype(float)
        np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-2)

    options = ("-i", out, "-o", PSEUDO, "--num-processes", 1)
    said = workspace("nnunet_dsp", "pseudo-dataset", "-d", TARGET, *options)
    assert "8 cases" in said and f"nnUNetv2_plan_and_preprocess -d 0{PSEUDO}" in said
    ignore = json.loads((raw / "dataset.json").read_text())["labels"]["ignore"]
    for case, prediction in predicted.items():
        before = imread(raw / "labelsTr" / f"{case}.png")
        after = imread(workspace.dataset("raw", PSEUDO) / "labelsTr" / f"{case}.png")
        assert (before != ignore).sum() == 24 * 24
        assert np.array_equal(after, np.where(before == ignore, prediction, before))
