"""Three dimensions and cascades with nnU-Net's own commands; a file of its own, since files run side by side."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = pytest.mark.e2e
CPU = ("-device", "cpu")


@pytest.fixture(scope="module")
def volumes(workspace):
    """Dataset 11: synthetic, 3D; dataset 12: two masks, some scribbles, points and boxes."""
    workspace("nnunet_dsp", "convert", "synthetic", "-d", 11, "--dim", 3, "--cases", 7, "--test", 1, "--size", 32)
    weak = ("--scribbles", 2, "--points", "rest", "--boxes", "rest", "--tags", "rest")
    workspace("nnunet_dsp", "simulate", "-d", 11, "-o", 12, "--name", "Weak3D", "--masks", 2, *weak)
    splits = workspace.dataset("raw", 12) / "splits_final.json"
    splits.write_text(json.dumps(json.loads(splits.read_text())[:2]))  # a cascade needs every fold; two are enough
    workspace("nnunet_dsp", "prepare", "-d", 12)
    workspace("nnUNetv2_plan_and_preprocess", "-d", 12, "-c", "3d_fullres", "-npfp", 1, "-np", 1)
    workspace("nnunet_dsp", "plans", "-d", 12, "-o", "Small", "--patch", 32, "--features", 4, 6, 8)
    return workspace


def test_three_dimensions_train_and_predict(volumes, tmp_path):
    said = volumes("nnUNetv2_train", 12, "3d_fullres", 0, "-tr", "nnUNetTrainerDSP_quick", "-p", "Small", *CPU)
    assert re.search(r"dsp_box [1-9]", said), "boxes take part"
    assert re.search(r"dsp_point [1-9]", said)
    source = volumes.dataset("raw", 11) / "imagesTs"
    model = ("-d", 12, "-c", "3d_fullres", "-f", 0, "-tr", "nnUNetTrainerDSP_quick", "-p", "Small")
    volumes("nnUNetv2_predict", "-i", source, "-o", tmp_path, *model, "-npp", 1, "-nps", 1, *CPU)
    assert list(tmp_path.glob("*.nii.gz"))


def test_a_cascade_trains_on_predictions_for_weak_cases_too(volumes):
    """nnU-Net plans a cascade for large images only, so the plans of this small one are given one by hand."""
    file = volumes.dataset("preprocessed", 12) / "Small.json"
    plans = json.loads(file.read_text())
    full = plans["configurations"]["3d_fullres"]
    low = {**full, "data_identifier": "SmallLow", "spacing": [s * 1.5 for s in full["spacing"]]}
    plans["plans_name"] = "Cascade"
    plans["configurations"]["3d_lowres"] = {**low, "next_stage": "3d_cascade_fullres"}
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans["configurations"]["3d_cascade_fullres"] = cascade
    file.with_name("Cascade.json").write_text(json.dumps(plans))
    volumes("nnUNetv2_preprocess", "-d", 12, "-plans_name", "Cascade", "-c", "3d_lowres", "-np", 1)
    # the first stage must have predicted every case before the second trains: all folds, as nnU-Net asks for
    folds = json.loads((volumes.dataset("preprocessed", 12) / "splits_final.json").read_text())
    for fold in range(len(folds)):
        volumes("nnUNetv2_train", 12, "3d_lowres", fold, "-tr", "nnUNetTrainerDSP_quick", "-p", "Cascade", *CPU)
    model = ("-tr", "nnUNetTrainerDSP_quick", "-p", "Cascade")
    low = volumes.model(12, "nnUNetTrainerDSP_quick", "Cascade", "3d_lowres")
    predicted = {path.stem for path in (low / "predicted_next_stage" / "3d_cascade_fullres").glob("*.b2nd")}
    assert predicted == {f"cells_{number:03d}" for number in range(7)}
    summary = json.loads((low / "fold_0" / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == len(folds[0]["val"]), "the others stay out of the validation"
    said = volumes("nnUNetv2_train", 12, "3d_cascade_fullres", 0, *model, *CPU)
    assert "Mean Validation Dice" in said
