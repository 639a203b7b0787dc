"""The prompt trainers in one process, on a hand-made dataset: what they train on, show, keep and refuse."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnunet_dsp import trainers
from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.prompt import PromptNetwork, VotesAsLogits
from nnunet_dsp.prompt_settings import PROMPT_PLANS_KEY
from nnunet_dsp.trainers import (
    nnUNetTrainerDSP,
    nnUNetTrainerDSP_standardHead,
    nnUNetTrainerPrompt,
    nnUNetTrainerPrompt_released,
    nnUNetTrainerPromptOneShot,
)

SMALL = {"window": 8, "margin": 2, "max_keys": 64}
CASES = {f"masked_{number}" for number in range(4)}


def make(tiny, trainer_class=nnUNetTrainerPrompt, fold="all", settings=None, **plans):
    return tiny.trainer(trainer_class, fold=fold, **{PROMPT_PLANS_KEY: {**SMALL, **(settings or {})}}, **plans)


def train_one_epoch(trainer):
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    results = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
    trainer.on_train_epoch_end(results)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    trainer.on_epoch_end()
    return [float(result["loss"]) for result in results]


def log_of(tiny):
    return "".join(path.read_text() for path in (tiny.base.parents[1] / "results").rglob("training_log*.txt"))


def prompt_file(trainer):
    from pathlib import Path

    return Path(trainer.output_folder) / "prompt.json"


@pytest.mark.parametrize("tiny", [2, 3], indirect=True)
def test_an_epoch_trains_and_the_model_that_is_saved_predicts_the_same(tiny):
    trainer = make(tiny)
    trainer.num_epochs = 1
    trainer.on_train_start()
    before = {name: value.clone() for name, value in trainer.network.named_parameters()}
    assert np.isfinite(train_one_epoch(trainer)).all()
    assert all(not torch.equal(before[name], value) for name, value in trainer.network.named_parameters() if
               "bias" not in name and value.ndim > 1)  # fmt: skip
    trainer.save_checkpoint(str(prompt_file(trainer).parent / "checkpoint_final.pth"))

    predictor = nnUNetPredictor(device=torch.device("cpu"), verbose=False, allow_tqdm=False)
    # the trainer's class is looked up by name, as nnUNetv2_predict does
    folder = prompt_file(trainer).parents[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "nnunetv2.inference.predict_from_raw_data.recursive_find_trainer_class_by_name",
            lambda name: getattr(trainers, name),
        )
        predictor.initialize_from_trained_model_folder(str(folder), ("all",), "checkpoint_final.pth")
    assert isinstance(predictor.network, PromptNetwork)
    x = torch.randn(1, 1, *[16] * tiny.dim)
    with torch.inference_mode():
        predicted = predictor.network.eval()(x)
        assert torch.equal(predicted, trainer.network.eval()(x))
    assert predicted.shape[1] == 3, "one channel a class, the ignore label without"


def test_the_prompt_is_drawn_described_and_logged_and_weak_cases_are_left_out(tiny):
    trainer = make(tiny)
    trainer.on_train_start()
    windows = json.loads(prompt_file(trainer).read_text())["windows"]
    assert {window["case"] for window in windows} <= CASES
    assert all(sum(window["voxels"][name] for window in windows) > 0 for name in ("background", "cell", "nucleus"))
    assert prompt_file(trainer).with_name("prompt.png").is_file()
    assert set(trainer.dataloader_train.data_loader.indices) == CASES
    log = log_of(tiny)
    assert "Prompt: masked_" in log and "3 training cases have no annotated voxel" in log
    image = trainer.network.prompt["seg_layers"].image
    assert image.shape == (len(windows), 1, 16, 16)
    label = trainer.network.prompt["seg_layers"].label
    for window, keys in zip(windows, label, strict=True):
        counts = [int((keys == c).sum()) for c in range(3)]
        assert counts == [window["voxels"][name] for name in ("background", "cell", "nucleus")]
    again = make(tiny)
    again.on_train_start()
    assert json.loads(prompt_file(again).read_text())["windows"] == windows, "another choice from the same data"


def test_a_prompt_named_in_dataset_json_is_taken_and_the_raw_dataset_counts(tiny):
    tiny.dataset_json["prompt"] = {"case": "masked_1"}  # what preprocessing copied once
    raw = tiny.base.parents[1] / "raw" / tiny.base.name
    raw.mkdir()
    wanted = {"case": "masked_2", "bbox": [[3, 11], [4, 12]]}
    (raw / "dataset.json").write_text(json.dumps({**tiny.dataset_json, "prompt": wanted}))
    trainer = make(tiny)
    trainer.on_train_start()
    (window,) = json.loads(prompt_file(trainer).read_text())["windows"]
    assert window["case"] == "masked_2" and window["bbox"] == [[3.0, 11.0], [4.0, 12.0]]
    label = trainer.network.prompt["seg_layers"].label
    assert int((label >= 0).sum()) == 64
    (raw / "dataset.json").write_text(json.dumps({**tiny.dataset_json, "prompt": {"case": "nowhere"}}))
    with pytest.raises(AnnotationError, match="no training case 'nowhere'"):
        make(tiny).on_train_start()


def test_a_dataset_json_that_is_no_json_is_named(tiny):
    raw = tiny.base.parents[1] / "raw" / tiny.base.name
    raw.mkdir()
    (raw / "dataset.json").write_text(json.dumps(tiny.dataset_json)[:-1] + ' "prompt": {"case": "masked_2"}}')
    with pytest.raises(ValueError, match=r"raw.Dataset001_Tiny.dataset\.json is not valid JSON: Expecting"):
        make(tiny).on_train_start()


def test_large_similarities_leave_nnunets_prediction_finite(tiny):
    trainer = make(tiny, settings={"similarity": "dot", "temperature": 0.001})
    trainer.on_train_start()
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    described = (trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json)
    predictor.manual_initialization(trainer.network, *described, type(trainer).__name__, (0, 1))
    image = torch.randn(1, 1, 24, 24)
    with torch.no_grad():
        predicted = predictor.predict_sliding_window_return_logits(image)
        votes = trainer.network.eval()(image[:, :, :16, :16])
    assert torch.isfinite(predicted).all()
    torch.testing.assert_close(votes.exp().sum(1), torch.ones(1, 16, 16))


def test_points_of_a_case_without_mask_can_be_the_prompt(tiny):
    tiny.dataset_json["prompt"] = {"case": "weak_0"}
    trainer = make(tiny, settings={"window": 0})
    trainer.on_train_start()
    voxels = json.loads(prompt_file(trainer).read_text())["windows"][0]["voxels"]
    assert voxels["nucleus"] == 1 and voxels["background"] <= 1
    assert "the prompt shows no voxel of" in log_of(tiny), "the case says nothing certain of cells"


def test_resuming_keeps_the_prompt_and_does_not_choose_again(tiny, monkeypatch):
    trainer = make(tiny)
    trainer.num_epochs = 2
    trainer.on_train_start()
    train_one_epoch(trainer)
    file = str(prompt_file(trainer).parent / "checkpoint_latest.pth")
    trainer.current_epoch -= 1  # nnU-Net saves before it counts
    trainer.save_checkpoint(file)
    tiny.dataset_json["prompt"] = {"case": "masked_3", "bbox": [[0, 10], [0, 10]]}  # too late: training has begun
    resumed = make(tiny, settings={"margin": 0})
    resumed.num_epochs = 2
    resumed.load_checkpoint(file)
    monkeypatch.setattr(nnUNetTrainerPrompt, "_give_prompt", lambda *_: pytest.fail("the prompt was chosen anew"))
    resumed.on_train_start()
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    assert np.isfinite(train_one_epoch(resumed)).all()


def test_pretrained_weights_of_another_prompt_and_patch_start_a_training_with_its_own_prompt(tiny):
    source = make(tiny)
    source.on_train_start()
    file = prompt_file(source).with_name("source.pth")
    source.save_checkpoint(str(file))
    tiny.dataset_json["prompt"] = {"case": "masked_3", "bbox": [[0, 10], [0, 12]]}
    target = make(tiny, settings={"margin": 6})
    target.initialize()
    load_pretrained_weights(target.network, str(file))
    target.on_train_start()
    assert target.network.prompt["seg_layers"].image.shape == (1, 1, 16, 16)
    assert json.loads(prompt_file(target).read_text())["windows"][0]["case"] == "masked_3"
    for name, value in source.network.named_parameters():
        assert torch.equal(value, dict(target.network.named_parameters())[name]), name
    assert np.isfinite(train_one_epoch(target)).all()


# one-shot ----------------------------------------------------------------------------------------------------------


def test_one_shot_trains_on_one_case_and_takes_the_prompt_from_another(tiny):
    trainer = make(tiny, nnUNetTrainerPromptOneShot)
    trainer.on_train_start()
    assert list(trainer.dataloader_train.data_loader.indices) == ["masked_1"]
    windows = json.loads(prompt_file(trainer).read_text())["windows"]
    assert windows[0]["case"] == "masked_0" and {w["case"] for w in windows} <= {"masked_0", "masked_1"}
    assert set(trainer.do_split()[1]) == CASES, "fold all validates on all annotated cases"
    assert np.isfinite(train_one_epoch(trainer)).all()


def test_one_shot_follows_the_prompt_and_the_case_that_are_named(tiny):
    tiny.dataset_json["prompt"] = {"case": "masked_1"}
    trainer = make(tiny, nnUNetTrainerPromptOneShot)
    assert trainer.do_split()[0] == ["masked_0"]
    named = make(tiny, nnUNetTrainerPromptOneShot, settings={"one_shot_case": "masked_3"})
    assert named.do_split()[0] == ["masked_3"]
    del tiny.dataset_json["prompt"]
    same = make(tiny, nnUNetTrainerPromptOneShot, settings={"one_shot_case": "masked_0"})
    same.on_train_start()
    assert same.do_split()[0] == ["masked_0"]
    assert json.loads(prompt_file(same).read_text())["windows"][0]["case"] == "masked_1"
    with pytest.raises(ValueError, match="names 'weak_0', which is no annotated training case of fold all.*masked_0"):
        make(tiny, nnUNetTrainerPromptOneShot, settings={"one_shot_case": "weak_0"}).do_split()


def test_a_single_annotated_case_is_both(tiny):
    splits = [{"train": ["masked_0", "weak_0", "unlabelled"], "val": ["masked_1", "weak_1"]}]
    (tiny.base / "splits_final.json").write_text(json.dumps(splits))
    trainer = make(tiny, nnUNetTrainerPromptOneShot, fold=0)
    trainer.on_train_start()
    assert trainer.do_split() == (["masked_0"], ["masked_1"])
    assert {w["case"] for w in json.loads(prompt_file(trainer).read_text())["windows"]} == {"masked_0"}


def test_a_prompt_from_a_validation_case_is_allowed_and_said(tiny):
    splits = [{"train": ["masked_0", "masked_1"], "val": ["masked_2"]}]
    (tiny.base / "splits_final.json").write_text(json.dumps(splits))
    tiny.dataset_json["prompt"] = {"case": "masked_2"}
    make(tiny, fold=0).on_train_start()
    assert "WARNING: masked_2 validates in this fold" in log_of(tiny)


def test_without_any_annotated_voxel_training_does_not_start(tiny):
    (tiny.base / "splits_final.json").write_text(json.dumps([{"train": ["weak_0"], "val": ["masked_0"]}]))
    with pytest.raises(ValueError, match="None of the 1 training cases of fold 0 has an annotated voxel"):
        make(tiny, fold=0).on_train_start()


# variants and refusals ---------------------------------------------------------------------------------------------


def test_regions_are_trained_and_predicted_as_regions(tiny):
    tiny.dataset_json["labels"] = {"background": 0, "whole": [1, 2], "nucleus": 2, "ignore": 3}
    tiny.dataset_json["regions_class_order"] = [1, 2]
    trainer = make(tiny)
    trainer.on_train_start()
    assert trainer.network.prompt["seg_layers"].membership.tolist() == [[False, True, True], [False, False, True]]
    assert np.isfinite(train_one_epoch(trainer)).all()
    with torch.no_grad():
        shares = trainer.network.eval()(torch.randn(1, 1, 16, 16)).sigmoid()
    assert (shares[:, 0] >= shares[:, 1] - 1e-5).all(), "a part is likelier than the whole"


def test_the_released_variant_trains_on_votes_and_validates_on_their_logarithms(tiny):
    trainer = make(tiny, nnUNetTrainerPrompt_released)
    trainer.on_train_start()
    assert trainer.network.embedding.out_channels == 2
    assert isinstance(trainer.loss.training_loss, VotesAsLogits)
    values = train_one_epoch(trainer)
    trainer.on_train_epoch_start()
    assert trainer.loss.training
    trainer.on_validation_epoch_start()
    assert not trainer.loss.training
    assert all(0.3 < value < 1.56 for value in values), "outside what three votes can cost as logits"
    x = torch.randn(1, 1, 16, 16)
    assert (trainer.network.train()(x) >= 0).all() and (trainer.network.eval()(x) <= 1e-5).all()


def test_cascades_are_refused_at_once(tiny):
    first = make(tiny).plans_manager.plans["configurations"]["2d"]
    second = {**first, "previous_stage": "2d_low"}
    with pytest.raises(NotImplementedError, match="cannot train 2d: the prompt would need a segmentation"):
        make(tiny, configurations={"2d": second})


def test_settings_are_kept_in_the_plans_of_the_model(tiny):
    trainer = make(tiny, settings={"temperature": 0.2})
    trainer.on_train_start()
    saved = json.loads((prompt_file(trainer).parents[1] / "plans.json").read_text())[PROMPT_PLANS_KEY]
    assert saved["temperature"] == 0.2 and saved["window"] == 8 and saved["embedding_channels"] == 16


def test_epoch_variants_differ_in_their_length_alone(tiny):
    assert make(tiny, trainers.nnUNetTrainerPrompt_100epochs).num_epochs == 100
    assert make(tiny, trainers.nnUNetTrainerPromptOneShot_250epochs).num_epochs == 250


# DSP's prototypes --------------------------------------------------------------------------------------------------


def mean_directions(network, image, label, number):
    """Mean direction of each class's embeddings, by hand; (number, D). BatchNorm is fresh: it centres and scales."""
    head, seen = network.decoder.seg_layers[-1], []
    with torch.no_grad():
        handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].flatten(1).double()))
        network(image)
        handle.remove()
        norm, first, _, second = head.transform
        x = (seen[0] - seen[0].mean(1, keepdim=True)) / (seen[0].var(1, correction=0, keepdim=True) + norm.eps).sqrt()
        x = first.weight.double().flatten(1) @ x + first.bias.double()[:, None]
        x = second.weight.double().flatten(1) @ torch.where(x > 0, x, 0.1 * x) + second.bias.double()[:, None]
        x = x / x.norm(dim=0)
        means = torch.stack([x[:, label.flatten() == c].mean(1) for c in range(number)])
    return means / means.norm(dim=1, keepdim=True)


def test_dsp_starts_from_what_the_prompt_looks_like_and_a_resumed_training_does_not(tiny, monkeypatch):
    tiny.dataset_json["prompt"] = {"case": "masked_2", "bbox": [[2, 18], [3, 19]]}
    settings = {"prototypes_from_prompt": True, "num_prototypes": 1, "seed": 4}
    trainer = tiny.trainer(nnUNetTrainerDSP, fold="all", settings=settings)
    trainer.num_epochs = 2
    trainer.on_train_start()
    image, segmentation, _, _ = trainer.dataset_class(str(tiny.folder), ["masked_2"]).load_case("masked_2")
    part = np.s_[2:18, 3:19]
    label = torch.from_numpy(segmentation[:][0, 0][part].astype(int))
    expected = mean_directions(trainer.network, torch.from_numpy(image[:][:, 0][(slice(None), *part)])[None], label, 3)
    prototypes = trainer.network.decoder.seg_layers[-1].prototypes.detach()
    torch.testing.assert_close(prototypes[:, 0], expected.float(), atol=1e-5, rtol=0)
    assert "Prototypes of background, cell, nucleus start from a prompt: masked_2" in log_of(tiny)
    (window,) = json.loads(prompt_file(trainer).read_text())["windows"]
    assert window["bbox"] == [[2.0, 18.0], [3.0, 19.0]] and prompt_file(trainer).with_name("prompt.png").is_file()

    with torch.no_grad():  # as if the first epoch had moved them
        trained = trainer.network.decoder.seg_layers[-1].prototypes.mul_(2).clone()
    file = str(prompt_file(trainer).parent / "checkpoint_latest.pth")
    trainer.save_checkpoint(file)
    resumed = tiny.trainer(nnUNetTrainerDSP, fold="all", settings=settings)
    resumed.num_epochs = 2
    resumed.load_checkpoint(file)
    monkeypatch.setattr(nnUNetTrainerDSP, "_initialise_prototypes", lambda *_: pytest.fail("initialised again"))
    resumed.on_train_start()
    assert torch.equal(resumed.network.decoder.seg_layers[-1].prototypes, trained)


def test_dsp_looks_for_a_prompt_in_masks_first_and_then_in_what_weak_cases_say(tiny):
    settings = {"prototypes_from_prompt": True}
    for split in (["masked_1", "weak_0"], ["weak_0", "unlabelled"]):
        (tiny.base / "splits_final.json").write_text(json.dumps([{"train": split, "val": ["masked_3"]}]))
        tiny.trainer(nnUNetTrainerDSP, fold=0, settings=settings).on_train_start()
    assert set(re.findall(r"start from a prompt: (.*)\.", log_of(tiny))) == {"masked_1", "weak_0"}
    assert "The prompt shows no voxel of cell" in log_of(tiny), "the points of weak_0 are of nucleus and background"


def test_dsp_without_prototypes_or_in_a_cascade_takes_no_prompt(tiny):
    settings = {"prototypes_from_prompt": True}
    with pytest.raises(ValueError, match="goes with `head` \"prototype\", but `head` is 'standard'"):
        tiny.trainer(nnUNetTrainerDSP_standardHead, settings=settings)
    first = tiny.trainer(nnUNetTrainerDSP).plans_manager.plans["configurations"]["2d"]
    cascade = {"2d": {**first, "previous_stage": "2d_low"}}
    with pytest.raises(NotImplementedError, match="`prototypes_from_prompt` cannot be used with 2d"):
        tiny.trainer(nnUNetTrainerDSP, settings=settings, configurations=cascade)
