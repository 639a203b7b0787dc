"""settings.py: options in the plans file."""

from __future__ import annotations

import json

import pytest

from nnunet_dsp.settings import DSPSettings


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
        ({"dsp_weight": -1}, "`dsp_weight` to be a finite number of at least 0"),
        ({"box_weight": float("nan")}, "`box_weight`"),
        ({"num_prototypes": 0}, "`num_prototypes`"),
        ({"temperature": 0}, "`temperature`"),
        ({"embedding_channels": -1}, "`embedding_channels`"),
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
