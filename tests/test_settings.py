"""settings.py: options in the plans file."""

from __future__ import annotations

import json

import pytest

from nnunet_dsp.settings import DSPSettings
from nnunet_dsp.training_log import seed_from_environment


def test_what_the_plans_leave_out_comes_from_the_trainer():
    settings = DSPSettings.from_plans({"nnunet_dsp": {"temperature": 0.2}}, DSPSettings(dsp_weight=0.7))
    assert (settings.temperature, settings.dsp_weight) == (0.2, 0.7)


def test_settings_come_back_from_the_plans_they_were_written_to():
    settings = DSPSettings(head="standard", seed=3, masked_fraction=0.25)
    plans = json.loads(json.dumps({"nnunet_dsp": settings.to_plans()}))
    assert DSPSettings.from_plans(plans) == settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head": "linear"}, "one of prototype, standard"),
        ({"variant": "paper"}, "one of default, released"),
        ({"dsp_schedule": "cosine"}, "one of linear, constant"),
        ({"masked_fraction": 1.5}, r"`masked_fraction` to lie in \[0, 1\], but got 1.5"),
        ({"pseudo_label_warmup": -0.1}, "`pseudo_label_warmup`"),
        ({"dsp_weight": -1}, "`dsp_weight` to be at least 0, but got -1"),
        ({"dsp_weight": "0.1"}, "`dsp_weight` to be a finite number, but got '0.1'"),
        ({"dsp_weight": True}, "`dsp_weight` to be a finite number, but got True"),
        ({"masked_fraction": None}, "`masked_fraction` to be a finite number"),
        ({"box_weight": float("nan")}, "`box_weight`"),
        ({"num_prototypes": 0}, "`num_prototypes`"),
        ({"num_prototypes": 2.5}, "`num_prototypes` to be a whole number of at least 1, but got 2.5"),
        ({"temperature": 0}, "`temperature`"),
        ({"temperature": float("inf")}, "`temperature` to be a finite number"),
        ({"embedding_channels": -1}, "`embedding_channels`"),
        ({"embedding_channels": 48.0}, "`embedding_channels` to be a whole number"),
        ({"seed": -1}, "`seed` to be a whole number of at least 0, but got -1"),
        ({"seed": "7"}, "`seed`"),
        ({"prototypes_from_prompt": 1}, "`prototypes_from_prompt` to be true or false, got 1"),
        ({"prototypes_from_prompt": True, "head": "standard"}, "`head` is 'standard'"),
        ({"dsp_wieght": 1}, "Did you mean `dsp_weight`"),
        ({"xyz": 1}, "Known: head"),
        ([], "to be an object, but got list"),
    ],
)
def test_an_impossible_option_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        DSPSettings.from_plans({"nnunet_dsp": given})


def test_a_model_of_another_version_still_predicts():
    plans = {"nnunet_dsp": {"temperature": 0.3, "option_of_the_future": 1}}
    assert DSPSettings.from_plans(plans, strict=False).temperature == 0.3


@pytest.mark.parametrize("value", ["-1", "1.5", "seven"])
def test_a_seed_in_the_environment_that_is_none_is_refused(value, monkeypatch):
    monkeypatch.setenv("nnUNet_dsp_seed", value)
    with pytest.raises(ValueError, match=f"nnUNet_dsp_seed to be a whole number from 0 on, but got '{value}'"):
        seed_from_environment()
