"""plans.py: smaller plans that nnU-Net still builds a network from."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_dsp.cli import main
from nnunet_dsp.plans import shrink_plans


def planned(dim: int, residual: bool = False) -> dict:
    convolution = f"torch.nn.modules.conv.Conv{dim}d"
    stages = 6
    arguments = {
        "n_stages": stages,
        "features_per_stage": [32, 64, 128, 256, 320, 320],
        "conv_op": convolution,
        "kernel_sizes": [[3] * dim] * stages,
        "strides": [[1] * dim] + [[2] * dim] * (stages - 1),
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        ("n_blocks_per_stage" if residual else "n_conv_per_stage"): [1, 2, 3, 4, 4, 4],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    kind = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    configuration = {
        "patch_size": [160, 128, 96][:dim],
        "batch_size": 9,
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
            "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {"plans_name": "nnUNetPlans", "configurations": {"a": configuration, "b": {"inherits_from": "a"}}}


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_the_smaller_network_is_built_and_takes_its_patch(dim, residual):
    plans = planned(dim, residual)
    before = copy.deepcopy(plans)
    small = shrink_plans(plans, "Small", patch=37, features=(4, 6, 8), batch_size=2)
    assert plans == before
    configuration = small["configurations"]["a"]
    assert small["plans_name"] == "Small"
    assert configuration["patch_size"] == [36] * dim, "rounded down to what two halvings divide"
    assert configuration["batch_size"] == 2
    assert small["configurations"]["b"] == {"inherits_from": "a"}
    architecture = configuration["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        3,
        deep_supervision=False,
    )
    with torch.no_grad():
        assert network(torch.zeros(1, 1, *[36] * dim)).shape == (1, 3, *[36] * dim)


def test_a_patch_is_never_larger_than_planned_and_other_things_stay():
    small = shrink_plans(planned(2), "Small", patch=500)["configurations"]["a"]
    assert small["patch_size"] == [160, 128]
    assert small["batch_size"] == 9


def test_sizes_an_axis_reach_the_configurations_that_have_these_axes():
    both = planned(2)
    both["configurations"]["volume"] = planned(3)["configurations"]["a"]
    given = shrink_plans(both, "Small", patch=[16, 48, 32], features=(4, 6, 8))["configurations"]
    assert given["a"]["patch_size"] == [48, 32]
    assert given["volume"]["patch_size"] == [16, 48, 32]
    flat = shrink_plans(both, "Small", patch=[48, 32], features=(4, 6, 8))["configurations"]
    assert flat["a"]["patch_size"] == [48, 32]
    assert flat["volume"]["patch_size"] == [160, 128, 96]


def test_another_number_of_patch_sizes_is_refused():
    with pytest.raises(ValueError, match="but got 4"):
        shrink_plans(planned(2), "Small", patch=[16, 16, 16, 16])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"patch": 0}, "--patch: expected 1 or more, but got 0"),
        ({"patch": [16, -5]}, "--patch: expected 1 or more, but got 16 -5"),
        ({"features": (4, 0, 8)}, "--features: expected 1 or more, but got 4 0 8"),
        ({"batch_size": 0}, "--batch-size: expected 1 or more, but got 0"),
    ],
)
def test_sizes_below_one_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        shrink_plans(planned(2), "Small", **sizes)


def test_what_cannot_be_found_or_written_is_named_without_a_traceback(tmp_path, monkeypatch, capsys):
    def refused(*arguments: str) -> str:
        assert main(["plans", *arguments]) == 1
        return capsys.readouterr().err

    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    assert "nnUNet_preprocessed is not set" in refused("-d", "7")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    assert "no dataset with id 007" in (said := refused("-d", "7")) and "nnUNetv2_plan_and_preprocess -d 7" in said
    folder = tmp_path / "Dataset007_Cells"
    folder.mkdir()
    assert "no dataset Dataset008_Cells" in refused("-d", "Dataset008_Cells")
    assert "Expected a dataset id such as 501" in refused("-d", "cells")
    assert "nnUNetPlans.json does not exist. Run nnUNetv2_plan_and_preprocess -d 7" in refused("-d", "7")
    (folder / "nnUNetPlans.json").write_text(json.dumps(planned(2)))
    for name in ("../Small", ""):
        assert f"-o: expected a name for the plans, such as nnUNetPlansSmall, but got {name!r}" in refused(
            "-d", "7", "-o", name
        )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["Dataset007_Cells", "nnUNetPlans.json"]
