"""nnUNetTrainerDSP in one process, on a hand-made dataset: what it trains on, refuses, logs and repeats."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dsp import trainers
from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.combined_loss import TERMS
from nnunet_dsp.head import PrototypeHead
from nnunet_dsp.plans import shrink_plans
from nnunet_dsp.trainers import nnUNetTrainerDSP, nnUNetTrainerDSP_5epochs, nnUNetTrainerDSP_standardHead

WEAK = {"weak_0", "weak_1", "unlabelled"}


def train_one_epoch(trainer) -> list[dict]:
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    results = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
    trainer.on_train_epoch_end(results)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    trainer.on_epoch_end()
    return results


@pytest.mark.parametrize("tiny", [2, 3], indirect=True)
def test_an_epoch_trains_every_term_and_logs_each(tiny):
    trainer = tiny.trainer(nnUNetTrainerDSP, settings={"pseudo_label_warmup": 0.0}, iterations=6)
    trainer.num_epochs = 1
    trainer.on_train_start()
    before = {name: value.clone() for name, value in trainer.network.named_parameters()}
    results = train_one_epoch(trainer)
    for name in TERMS:
        values = [float(result[name]) for result in results]
        assert np.isfinite(values).all(), name
        assert any(value != 0 for value in values), f"{name} never had anything to say"
        assert trainer.logger.get_value(name, step=0) == pytest.approx(np.mean(values), rel=1e-4)
    head = [name for name in before if ".seg_layers.1.prototypes" in name]
    assert head, "the head is the last layer"
    assert any(not torch.equal(before[name], value) for name, value in trainer.network.named_parameters())
    log = "".join(path.read_text() for path in (tiny.base.parents[1] / "results").rglob("training_log*.txt"))
    assert "loss terms: mask_loss" in log
    assert "4 cases with masks" in log or "3 cases with masks" in log


@pytest.mark.parametrize(("warmup", "start", "masked_only"), [(0.25, 0, 3), (0.25, 1, 0), (0.5, 1, 3), (0.1, 0, 2)])
def test_batches_of_the_warm_up_hold_masked_cases_only(tiny, warmup, start, masked_only):
    settings = {"pseudo_label_warmup": warmup, "masked_fraction": 0.0, "seed": 2}
    trainer = tiny.trainer(nnUNetTrainerDSP, settings=settings, iterations=3)
    trainer.num_epochs = 4
    trainer.current_epoch = start
    trainer.on_train_start()
    found = [next(trainer.dataloader_train)["num_masked"] for _ in range(5)]
    assert found == [trainer.batch_size] * masked_only + [0] * (5 - masked_only)


def test_the_progress_picture_shows_the_terms_below_nnunets_panels(tiny):
    from PIL import Image

    trainer = tiny.trainer(nnUNetTrainerDSP)
    trainer.num_epochs = 1
    trainer.on_train_start()
    train_one_epoch(trainer)
    picture = next((tiny.base.parents[1] / "results").rglob("progress.png"))
    width, height = Image.open(picture).size
    assert height > 2 * width, "nnU-Net's picture is 30 x 54 inches; the terms add 18"


@pytest.mark.parametrize(("schedule", "shares"), [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25])])
def test_the_loss_is_the_weighted_sum_of_its_terms(tiny, schedule, shares):
    weights = {"dsp_weight": 0.3, "image_weight": 2.0, "box_weight": 3.0, "point_weight": 5.0, "mask_weight": 7.0}
    others = {"dsp_schedule": schedule, "pseudo_label_weight": 11.0, "pseudo_label_warmup": 0.0, "seed": 1}
    trainer = tiny.trainer(nnUNetTrainerDSP, settings={**weights, **others}, iterations=2)
    trainer.num_epochs = 2
    trainer.on_train_start()
    for step, share in enumerate(shares):
        if step % 2 == 0:
            trainer.current_epoch = step // 2
            trainer.on_train_epoch_start()
        result = trainer.train_step(next(trainer.dataloader_train))
        mask, image, box, point, component, pseudo, marginal = (float(result[name]) for name in TERMS)
        dsp = 2 * image + 3 * box + 5 * point + 7 * component
        assert dsp > 0.1
        expected = mask + 0.3 * share * dsp + 11 * pseudo + marginal
        assert float(result["loss"]) == pytest.approx(expected, rel=1e-4)


def test_pseudo_labels_wait_for_the_warm_up(tiny):
    trainer = tiny.trainer(nnUNetTrainerDSP, settings={"pseudo_label_warmup": 0.5}, iterations=4)
    trainer.num_epochs = 1
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    values = [float(trainer.train_step(next(trainer.dataloader_train))["pseudo_label"]) for _ in range(4)]
    assert values[:2] == [0.0, 0.0]
    assert all(value != 0 for value in values[2:]), "its Dice part is negative"


@pytest.mark.parametrize("existing", [False, True], ids=["no split file", "a split file that validates on weak cases"])
def test_weak_cases_train_in_every_fold_and_validate_in_none(tiny, existing):
    file = tiny.base / "splits_final.json"
    masked = {f"masked_{n}" for n in range(4)}
    if existing:
        split = {"train": ["masked_0", "masked_1", "weak_0"], "val": ["masked_2", "weak_1", "unlabelled"]}
        file.write_text(json.dumps([split] * 4))
    validated = set()
    for fold in range(4):
        training, validation = tiny.trainer(nnUNetTrainerDSP, fold=fold).do_split()
        assert set(training) >= WEAK
        assert not WEAK & set(validation)
        assert validation
        assert not set(training) & set(validation)
        validated |= set(validation)
    if not existing:
        assert validated == masked, "every masked case validates once"
        assert all(set(split["train"]) >= WEAK for split in json.loads(file.read_text()))


@pytest.mark.parametrize("left", [[], ["masked_3"]])
def test_a_split_that_leaves_no_mask_to_train_on_is_warned_of(tiny, left):
    validated = [case for case in (f"masked_{n}" for n in range(4)) if case not in left]
    (tiny.base / "splits_final.json").write_text(json.dumps([{"train": left, "val": [*validated, "weak_0"]}]))
    assert tiny.trainer(nnUNetTrainerDSP).do_split()[1] == validated
    log = "".join(path.read_text() for path in (tiny.base.parents[1] / "results").rglob("training_log*.txt"))
    assert ("validates on all cases with masks (masked_0, masked_1" in log) == (not left)


def test_fold_all_trains_on_everything_and_validates_on_the_masked_cases(tiny):
    training, validation = tiny.trainer(nnUNetTrainerDSP, fold="all").do_split()
    assert len(training) == 7
    assert set(validation) == {f"masked_{n}" for n in range(4)}


def test_regions_are_refused_at_construction(tiny):
    tiny.dataset_json["labels"] = {"background": 0, "whole": [1, 2], "nucleus": 2}
    tiny.dataset_json["regions_class_order"] = [1, 2]
    with pytest.raises(NotImplementedError, match="regions"):
        tiny.trainer(nnUNetTrainerDSP)


def test_a_network_that_leaves_deep_supervision_nothing_is_refused_before_training(tiny):
    planned = tiny.trainer(nnUNetTrainerDSP).plans_manager.plans
    two_stages = shrink_plans(planned, "nnUNetPlans", features=(4, 6))
    trainer = tiny.trainer(nnUNetTrainerDSP, configurations=two_stages["configurations"])
    with pytest.raises(ValueError, match="2d in nnUNetPlans has fewer than three stages"):
        trainer.initialize()


def test_a_misspelt_option_in_the_plans_is_refused_with_the_right_name(tiny):
    with pytest.raises(ValueError, match="Did you mean `temperature`"):
        tiny.trainer(nnUNetTrainerDSP, settings={"temprature": 0.1})


def test_a_wrong_annotation_stops_training_before_the_first_epoch_and_names_case_and_entry(tiny):
    said = {"format": "nnunet_dsp.annotations", "version": 1, "points": [tiny.point("cell", 5, 99)]}
    (tiny.base / "annotationsTr" / "weak_1.json").write_text(json.dumps(said))
    trainer = tiny.trainer(nnUNetTrainerDSP)
    with pytest.raises(AnnotationError, match=r"weak_1.*points\[0\]") as caught:
        trainer.on_train_start()
    assert "99" in str(caught.value)


def test_a_point_that_its_mask_contradicts_stops_training(tiny):
    said = {"format": "nnunet_dsp.annotations", "version": 1, "points": [tiny.point("nucleus", 20, 20)]}
    (tiny.base / "annotationsTr" / "masked_2.json").write_text(json.dumps(said))
    trainer = tiny.trainer(nnUNetTrainerDSP, fold="all")
    with pytest.raises(AnnotationError, match="masked_2"):
        trainer.on_train_start()


def test_an_annotation_file_without_a_case_is_named(tiny):
    (tiny.base / "annotationsTr" / "nobody.json").write_text('{"format": "nnunet_dsp.annotations", "version": 1}')
    with pytest.raises(AnnotationError, match="nobody"):
        tiny.trainer(nnUNetTrainerDSP).on_train_start()


def test_annotations_of_the_raw_dataset_reach_the_preprocessed_one(tiny):
    raw = tiny.base.parents[1] / "raw" / tiny.base.name / "annotationsTr"
    raw.mkdir(parents=True)
    for file in (tiny.base / "annotationsTr").glob("*.json"):
        raw.joinpath(file.name).write_text(file.read_text())
        file.unlink()
    tiny.trainer(nnUNetTrainerDSP).on_train_start()
    assert sorted(path.stem for path in (tiny.base / "annotationsTr").glob("*.json")) == ["weak_0", "weak_1"]


def test_a_dataset_without_annotations_and_ignore_label_trains_as_in_nnunet(tiny):
    for case in WEAK:
        for file in tiny.folder.glob(f"{case}*"):
            file.unlink()
    for file in (tiny.base / "annotationsTr").glob("*.json"):
        file.unlink()
    del tiny.dataset_json["labels"]["ignore"]
    trainer = tiny.trainer(nnUNetTrainerDSP, fold="all")
    trainer.on_train_start()
    results = train_one_epoch(trainer)
    for name in ("dsp_image", "dsp_box", "dsp_point", "pseudo_label", "marginal"):
        assert all(float(result[name]) == 0 for result in results)
    assert all(np.isfinite(float(result["loss"])) for result in results)


def test_a_dataset_without_any_mask_trains_with_a_warning(tiny):
    for case in (f"masked_{n}" for n in range(4)):
        for file in tiny.folder.glob(f"{case}*"):
            file.unlink()
    trainer = tiny.trainer(nnUNetTrainerDSP, settings={"pseudo_label_warmup": 0.0})
    trainer.on_train_start()
    with pytest.warns(RuntimeWarning):  # NumPy: the mean of no Dice at all
        results = train_one_epoch(trainer)
    assert all(np.isfinite(float(result["loss"])) for result in results)
    log = "".join(path.read_text() for path in (tiny.base.parents[1] / "results").rglob("training_log*.txt"))
    assert "no case has a mask" in log


def test_the_settings_travel_in_the_plans_and_rebuild_the_same_network(tiny):
    trainer = tiny.trainer(nnUNetTrainerDSP, settings={"num_prototypes": 7, "temperature": 0.2})
    trainer.on_train_start()
    saved = json.loads((trainer_folder(tiny, "nnUNetTrainerDSP") / "plans.json").read_text())
    assert saved["nnunet_dsp"]["num_prototypes"] == 7
    manager = PlansManager(saved)
    network = nnUNetTrainerDSP.build_network_architecture(
        manager, manager.get_configuration(tiny.configuration), 1, 3, enable_deep_supervision=False
    )
    network.load_state_dict(trainer.network.state_dict())
    trainer.set_deep_supervision_enabled(False)
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(image), trainer.network.eval()(image))
    assert network.decoder.seg_layers[-1].temperature == 0.2


def trainer_folder(tiny, name):
    return tiny.base.parents[1] / "results" / tiny.base.name / f"{name}__nnUNetPlans__{tiny.configuration}"


def test_the_standard_head_variant_keeps_nnunets_last_layer(tiny):
    trainer = tiny.trainer(nnUNetTrainerDSP_standardHead)
    trainer.initialize()
    assert not any(isinstance(module, PrototypeHead) for module in trainer.network.modules())


def test_weights_of_an_nnunet_checkpoint_load_into_everything_but_the_last_layers(tiny, tmp_path):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    source = tiny.trainer(nnUNetTrainer)
    source.initialize()
    source.save_checkpoint(str(tmp_path / "pretrained.pth"))
    target = tiny.trainer(nnUNetTrainerDSP)
    target.initialize()
    load_pretrained_weights(target.network, str(tmp_path / "pretrained.pth"))
    theirs = source.network.state_dict()
    moved = [key for key in target.network.state_dict() if ".seg_layers." not in key]
    assert moved
    for key in moved:
        torch.testing.assert_close(target.network.state_dict()[key], theirs[key])


def test_an_interrupted_run_resumes_with_the_losses_of_an_uninterrupted_one(tiny, monkeypatch):
    monkeypatch.setenv("nnUNet_dsp_seed", "3")

    def losses(trainer, epochs):
        return [[float(r["loss"]) for r in train_one_epoch(trainer)] for _ in range(epochs)]

    whole = tiny.trainer(nnUNetTrainerDSP_5epochs, iterations=3)
    whole.on_train_start()
    expected = losses(whole, 3)
    again = tiny.trainer(nnUNetTrainerDSP_5epochs, iterations=3)
    again.on_train_start()
    assert losses(again, 1) == expected[:1]
    folder = trainer_folder(tiny, "nnUNetTrainerDSP_5epochs") / "fold_0"
    assert (folder / "checkpoint_latest.pth").is_file(), "short trainings save often enough to be resumed"
    resumed = tiny.trainer(nnUNetTrainerDSP_5epochs, iterations=3)
    resumed.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert resumed.current_epoch == 1
    resumed.on_train_start()
    assert losses(resumed, 2) == expected[1:]


@pytest.mark.parametrize("name", sorted(trainers.__all__))
def test_every_trainer_is_found_by_nnunets_own_lookup_and_is_the_same_class(name, monkeypatch):
    from pathlib import Path

    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    import nnunet_dsp

    monkeypatch.setenv("nnUNet_extTrainer", str(Path(nnunet_dsp.__file__).parent / "nnunet_entry"))
    found = recursive_find_trainer_class_by_name(name)
    assert found is getattr(trainers, name)
    assert found.__name__ == name


def test_a_fingerprint_that_counts_ignored_voxels_is_warned_about_where_ct_normalisation_uses_it(tiny):
    plans = tiny.trainer(nnUNetTrainerDSP).plans_manager.plans
    plans["configurations"]["2d"]["normalization_schemes"] = ["CTNormalization"]
    trainer = tiny.trainer(nnUNetTrainerDSP, configurations=plans["configurations"])
    trainer.on_train_start()
    log = "".join(path.read_text() for path in (tiny.base.parents[1] / "results").rglob("training_log*.txt"))
    assert "#3055" in log


def test_normalisation_by_what_label_files_leave_out_is_refused_where_cases_have_no_mask(tiny):
    plans = tiny.trainer(nnUNetTrainerDSP).plans_manager.plans
    plans["configurations"]["2d"]["use_mask_for_norm"] = [True]
    trainer = tiny.trainer(nnUNetTrainerDSP, configurations=plans["configurations"])
    with pytest.raises(ValueError, match="the 3 cases without mask would not look .* Set `use_mask_for_norm` to false"):
        trainer.on_train_start()


def test_validation_leaves_out_what_the_mask_of_some_classes_leaves_blank(tiny):
    for case in ("partly_0", "partly_1"):
        tiny.add(case, weak=False, said={"mask_labels": ["cell"]})
        file = tiny.base / "gt_segmentations" / f"{case}.nii.gz"
        sitk.WriteImage(sitk.ReadImage(file) == 1, file)  # nobody drew the nuclei
    (tiny.base / "splits_final.json").write_text(json.dumps([{"train": ["masked_2"], "val": ["partly_0", "partly_1"]}]))
    trainer = tiny.trainer(nnUNetTrainerDSP)
    trainer.on_train_start()
    batch = next(trainer.dataloader_val)
    target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
    assert (target == 3).any()
    assert (batch["data"][target == 0] == 0).all(), "nnU-Net's padding is background"
    log = "".join(path.read_text() for path in (tiny.base.parents[1] / "results").rglob("training_log*.txt"))
    assert "the masks of 2 validation cases show some of the classes only (`mask_labels`)" in log
