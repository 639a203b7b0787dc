"""nnUNetTrainerCRAC on a tiny dataset: what it trains on, what it saves, what nnU-Net gets from it."""

from __future__ import annotations

import importlib
import json
import pkgutil
import shutil

import cc3d
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage.io import imread, imsave

import nnunet_dsp.trainers
from nnunet_dsp import cli
from nnunet_dsp.crac_loss import TERMS
from nnunet_dsp.instances.decoders import available
from nnunet_dsp.instances.network import CRACOutput
from nnunet_dsp.instances.settings import CRACSettings
from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC
from nnunet_dsp.trainers.nnUNetTrainerCRAC_errorPredictor import nnUNetTrainerCRAC_errorPredictor
from nnunet_dsp.trainers.nnUNetTrainerCRAC_supervisedOnly import nnUNetTrainerCRAC_supervisedOnly

MOST = 300  # ids that need 16 bits
IGNORE = MOST + 1
IDS = tuple(range(1, MOST + 1))


class Instances:
    """The `tiny` dataset's folder, filled with instance labels instead of classes."""

    def __init__(self, tiny):
        self.tiny = tiny
        for folder in (tiny.folder, tiny.base / "gt_segmentations", tiny.base / "annotationsTr"):
            shutil.rmtree(folder)
            folder.mkdir()
        tiny.dataset_json |= {
            "labels": {"background": 0, "cell": list(IDS), "ignore": IGNORE},
            "regions_class_order": [1],
        }

    def add(self, case, seed, sparse=True, black=False):
        """Six cells with membranes between them; with `sparse` two are labelled, else all and the membranes too.

        With `black` the membranes are 0 in the image, and their labels -1, as nnU-Net's preprocessing has it.
        """
        rng = np.random.default_rng(seed)
        shape = self.tiny.shape
        flat = shape[-2:]
        seeds = rng.uniform(0, 24, (6, 2))
        distance = np.linalg.norm(np.moveaxis(np.indices(flat), 0, -1)[..., None, :] - seeds, axis=-1)
        nearest = np.sort(distance, -1)
        truth = np.where(nearest[..., 1] - nearest[..., 0] < 1.5, 0, distance.argmin(-1) + 1)
        truth = cc3d.connected_components(truth.astype(np.uint8), connectivity=4).astype(np.int16)
        truth = np.broadcast_to(np.where(truth > 0, truth + MOST - 20, 0), shape).astype(np.int16)
        image = (truth > 0) + rng.normal(0, 0.1, shape)
        seg = truth.copy()
        if sparse:
            kept = np.unique(truth)[1:3]
            seg[~np.isin(seg, kept)] = IGNORE
        gt = seg.copy()
        if black:
            image[truth == 0] = 0
            seg[seg == 0] = -1
        properties = {
            "class_locations": {
                IDS: np.argwhere(np.isin(seg[None], IDS)), (-1, 0, *IDS): np.argwhere(seg[None] != IGNORE),
            },
            "shape_before_cropping": shape,
            "bbox_used_for_cropping": [[0, size] for size in shape],
            "shape_after_cropping_and_before_resampling": shape,
            "spacing": [1.0, 1.0, 1.0],
            "sitk_stuff": {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())},
        }  # fmt: skip
        blocks = (1, *shape)
        nnUNetDatasetBlosc2.save_case(
            image[None].astype(np.float32), seg[None], properties, str(self.tiny.folder / case),
            chunks=blocks, blocks=blocks,
        )  # fmt: skip
        file = self.tiny.base / "gt_segmentations" / f"{case}.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(gt.astype(np.uint16)), file)

    def trainer(self, trainer_class=nnUNetTrainerCRAC, fold=0, iterations=2, **settings):
        trainer = self.tiny.trainer(trainer_class, fold, None, iterations, nnunet_dsp_crac=settings)
        trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = iterations, 1
        trainer.logger.local_logger.plot_progress_png = lambda folder: None  # a large picture, seconds each time
        return trainer


@pytest.fixture
def instances(tiny):
    dataset = Instances(tiny)
    for number in range(6):
        dataset.add(f"case_{number}", number)
    return dataset


def log_of(instances):
    return "".join(p.read_text() for p in (instances.tiny.base.parents[1] / "results").rglob("training_log*.txt"))


def model_folder(instances, name="nnUNetTrainerCRAC"):
    return instances.tiny.base.parents[1] / "results" / instances.tiny.base.name / (
        f"{name}__nnUNetPlans__{instances.tiny.configuration}"
    )


def train_epoch(trainer):
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    results = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
    trainer.on_train_epoch_end(results)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        validated = [trainer.validation_step(next(trainer.dataloader_val))]
        trainer.on_validation_epoch_end(validated)
    trainer.on_epoch_end()
    return results


@pytest.mark.parametrize("tiny", [2, 3], indirect=True)
@pytest.mark.parametrize("trainer_class", [nnUNetTrainerCRAC, nnUNetTrainerCRAC_errorPredictor])
def test_training_moves_every_network_with_finite_losses(instances, trainer_class):
    trainer = instances.trainer(trainer_class, iterations=3, warmup=0.0, error_gate=0.0, epochs=2)
    trainer.on_train_start()
    before = {name: value.clone() for name, value in trainer.network.named_parameters()}
    results = train_epoch(trainer)
    assert all(np.isfinite(result[name]) for result in results for name in ("loss", *TERMS))
    assert all(result["implicit_consistency"] > 0 for result in results)
    assert any(result["error"] > 0 for result in results) is (trainer_class is nnUNetTrainerCRAC_errorPredictor)
    parts = {"embedding", "affinity"} | ({"error"} if trainer.network.error is not None else set())
    for part in parts:
        mine = [n for n in before if n.startswith(part)]
        now = dict(trainer.network.named_parameters())
        assert any(not torch.equal(now[n], before[n]) for n in mine), part
    assert "borders between instances" in log_of(instances)


def test_augmented_batches_hold_ids_of_the_case_and_nothing_between_them(instances):
    trainer = instances.trainer()
    trainer.on_train_start()
    seen = set()
    for _ in range(15):
        batch = next(trainer.dataloader_train)
        assert batch["target"].dtype == torch.int16 and batch["target"].shape[1] == 1
        seen |= set(batch["target"].unique().tolist())
    assert seen <= {0, IGNORE, *range(MOST - 19, MOST + 1)}
    assert max(seen - {IGNORE}) > 255, "ids beyond 8 bits survive"


def test_the_targets_of_a_step_are_those_of_the_batch_and_supervision_is_sparse(instances):
    trainer = instances.trainer(nnUNetTrainerCRAC_supervisedOnly, warmup=0.0)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    result = trainer.train_step(next(trainer.dataloader_train))
    assert result["implicit_consistency"] == result["explicit_consistency"] == result["kept"] == 0
    assert result["implicit"] > 0 and result["explicit"] > 0


@pytest.mark.parametrize("said", [None, 7])
def test_the_model_says_how_small_an_instance_may_be(instances, said):
    trainer = instances.trainer(min_size=said)
    trainer.on_train_start()
    dataset = trainer.dataset_class(str(instances.tiny.folder), trainer.do_split()[0])
    labels = [np.asarray(dataset.load_case(case)[1][:]) for case in dataset.identifiers]
    sizes = [size for part in labels for size in np.unique(part[(part > 0) & (part != IGNORE)], return_counts=True)[1]]
    expected = int(min(np.percentile(sizes, 5), np.median(sizes) / 4)) if said is None else said
    saved = json.loads((model_folder(instances) / "plans.json").read_text())
    assert CRACSettings.from_plans(saved).min_size == expected > 1
    trainer.save_checkpoint(str(model_folder(instances) / "checkpoint.pth"))
    inside = torch.load(model_folder(instances) / "checkpoint.pth", weights_only=False)["init_args"]["plans"]
    assert CRACSettings.from_plans(inside).min_size == expected
    assert f"less than {expected} voxels" in log_of(instances)


@pytest.mark.parametrize("black", [False, True])
@pytest.mark.parametrize("sparse", [True, False])
def test_the_foreground_is_learnt_only_where_background_is_labelled(tiny, sparse, black):
    dataset = Instances(tiny)
    for number in range(6):
        dataset.add(f"case_{number}", number, sparse=sparse, black=black)
    trainer = dataset.trainer()
    trainer.on_train_start()
    assert bool(trainer.network.foreground_learnt) is not sparse
    assert trainer.loss.foreground_learnt is not sparse
    assert ("label no background" in log_of(dataset)) is sparse
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    lowest = int(batch["target"].min())  # with `sparse`, a patch inside the image need not hold any 0
    assert lowest >= 0 and (sparse or lowest == 0), "what nnU-Net marks with -1 is background in the batch"
    assert (trainer.train_step(batch)["foreground"] > 0) is not sparse


@pytest.mark.parametrize("tiny", [2, 3], indirect=True)
def test_plans_rebuild_the_same_network_with_one_output_for_nnunets_prediction(instances):
    trainer = instances.trainer(embedding_channels=5)
    trainer.on_train_start()
    saved = json.loads((model_folder(instances) / "plans.json").read_text())
    assert saved["nnunet_dsp_crac"]["offsets"] == [list(o) for o in trainer.offsets]
    manager = PlansManager(saved)
    network = nnUNetTrainerCRAC.build_network_architecture(
        manager, manager.get_configuration(instances.tiny.configuration), 1, 1, enable_deep_supervision=False
    )
    network.load_state_dict(trainer.network.state_dict())
    image = torch.randn(1, 1, *(16,) * instances.tiny.dim)
    with torch.no_grad():
        out = network.eval()(image)
        assert out.shape == (1, 1, *(16,) * instances.tiny.dim)
        torch.testing.assert_close(out, trainer.network.eval()(image))
        assert isinstance(network.train()(image), CRACOutput)
    assert trainer.inference_allowed_mirroring_axes is None


def test_validation_writes_instances_and_their_measures_and_can_be_run_again(instances):
    trainer = instances.trainer(iterations=1, epochs=1)
    trainer.on_train_start()
    train_epoch(trainer)
    trainer.on_train_end()
    again = instances.trainer()
    again.load_checkpoint(str(model_folder(instances) / "fold_0" / "checkpoint_final.pth"))
    again.perform_actual_validation()
    folder = model_folder(instances) / "fold_0" / "validation"
    summary = json.loads((folder / "instances" / "summary.json").read_text())
    _, cases = trainer.do_split()
    assert set(summary["cases"]) == set(cases)
    assert summary["ignore_label"] == IGNORE and summary["mean"]["num_truth"] > 0
    assert (folder / "summary.json").is_file(), "nnU-Net's own foreground Dice"
    labels = sitk.GetArrayFromImage(sitk.ReadImage(folder / "instances" / f"{cases[0]}.nii.gz"))
    assert labels.shape == instances.tiny.shape
    assert ("mwatershed is not installed" in log_of(instances)) is not available("mutex")


def colour_model(dataset):
    """The folder of an untrained network for colour pictures, as a training leaves it."""
    tiny = dataset.tiny
    tiny.dataset_json |= {"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    configurations = dataset.trainer().plans_manager.plans["configurations"]
    configurations["2d"] |= {"normalization_schemes": ["ZScoreNormalization"] * 3, "use_mask_for_norm": [False] * 3}
    trainer = tiny.trainer(
        nnUNetTrainerCRAC,
        image_reader_writer="NaturalImage2DIO",
        configurations=configurations,
        foreground_intensity_properties_per_channel={str(c): {"mean": 1.0, "std": 1.0} for c in range(3)},
    )
    trainer.initialize()
    folder = model_folder(dataset)
    for name, content in (("plans", trainer.plans_manager.plans), ("dataset", tiny.dataset_json)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    trainer.save_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
    return folder


def test_colour_pictures_in_one_file_are_predicted_and_other_numbers_of_channels_named(instances, tmp_path, capsys):
    words = ["instances", "predict", "-m", str(colour_model(instances)), "-device", "cpu", "--overwrite"]
    words += ["--decoder", "components", "--min-size", "0", "-o", str(tmp_path / "out")]

    def predict(**pictures):
        images = tmp_path / "_".join(pictures)
        images.mkdir()
        for name, picture in pictures.items():
            imsave(images / f"{name}.png", picture, check_contrast=False)
        status = cli.main([*words, "-i", str(images)])
        return status, capsys.readouterr().err

    picture = np.random.default_rng(0).integers(1, 255, (20, 23, 3), np.uint8)
    assert predict(one_0000=picture)[0] == 0
    assert predict(**{f"three_{channel:04d}": picture[..., channel] for channel in range(3)})[0] == 0
    found = [imread(tmp_path / "out" / f"{name}.png") for name in ("one", "three")]
    assert found[0].shape == (20, 23) and np.array_equal(*found)
    status, said = predict(grey_0000=picture[..., 0])
    assert status == 1 and "grey_0000.png cannot be used: the model reads 3 channel(s), but got 1" in said
    status, said = predict(two_0000=picture[..., 0], two_0001=picture[..., 1])
    assert status == 1 and "one file with all of them" in said and "2 file(s)" in said
    status, said = predict(many_0000=picture, many_0001=picture, many_0002=picture)
    assert status == 1 and "3 channel(s), but got 9" in said


@pytest.mark.parametrize("partly", [True, False])
def test_partly_labelled_images_are_not_normalised_by_what_their_labels_call_inside(tiny, partly):
    dataset = Instances(tiny)
    for case in range(6):
        dataset.add(f"case_{case}", case, sparse=partly, black=not partly)
    configurations = dataset.trainer().plans_manager.plans["configurations"]
    configurations[tiny.configuration]["use_mask_for_norm"] = [True]
    trainer = tiny.trainer(nnUNetTrainerCRAC, 0, None, 2, configurations=configurations)
    if partly:
        number = len(trainer.do_split()[0])
        with pytest.raises(ValueError, match=f"{number} training cases, .* Set `use_mask_for_norm` to false"):
            trainer.on_train_start()
    else:
        trainer.on_train_start()


def test_an_interrupted_training_continues_where_it_was(instances):
    first = instances.trainer(epochs=4, iterations=2, warmup=0.4)
    first.save_every = 1
    first.on_train_start()
    train_epoch(first)
    checkpoint = model_folder(instances) / "fold_0" / "checkpoint_latest.pth"
    resumed = instances.trainer(epochs=4, iterations=2, warmup=0.4)
    resumed.load_checkpoint(str(checkpoint))
    resumed.on_train_start()
    assert resumed.current_epoch == 1
    for name, value in first.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value)
    resumed.on_train_epoch_start()
    terms = [resumed.train_step(next(resumed.dataloader_train))["implicit_consistency"] for _ in range(2)]
    assert resumed.loss.progress == pytest.approx(1.5 / 4)
    assert terms == [0, 0], "the warm-up counts the whole training, not the part after the interruption"


@pytest.mark.parametrize("number", [1, 3])
def test_fewer_cases_than_nnunet_wants_for_its_split_still_train(tiny, number):
    dataset = Instances(tiny)
    for case in range(number):
        dataset.add(f"case_{case}", case)
    training, validation = dataset.trainer().do_split()
    assert training and validation
    assert bool(set(training) & set(validation)) is (number == 1)


def test_the_raw_datasets_split_is_used_if_nnunet_has_none(instances):
    raw = instances.tiny.base.parents[1] / "raw" / instances.tiny.base.name
    raw.mkdir(parents=True)
    split = [{"train": ["case_0", "case_1"], "val": ["case_5"]}]
    (raw / "splits_final.json").write_text(json.dumps(split))
    assert instances.trainer().do_split() == (["case_0", "case_1"], ["case_5"])


def test_datasets_of_classes_are_refused_with_the_command_that_makes_instances(tiny):
    with pytest.raises(NotImplementedError, match="nnunet_dsp convert instances"):
        tiny.trainer(nnUNetTrainerCRAC)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_up": 0.1}, "Did you mean `warmup`"),
        ({"pseudo_labels": "warm"}, "soft, hard"),
        ({"entropy_share": 2}, r"\[0, 1\]"),
        ({"embedding_channels": 1}, "at least 2"),
        ({"offsets": [[-1, 0]]}, "step of one voxel"),
    ],
)
def test_impossible_options_are_refused(instances, settings, message):
    with pytest.raises(ValueError, match=message):
        instances.trainer(**settings)


def test_the_options_survive_the_plans_and_every_variant_overrides_one_thing():
    settings = CRACSettings(offsets=((-1, 0), (0, -1)), warmup=0.3)
    plans = json.loads(json.dumps({"nnunet_dsp_crac": settings.to_plans()}))
    assert CRACSettings.from_plans(plans).to_plans() == settings.to_plans()
    default = CRACSettings().to_plans()
    expected = {
        "supervisedOnly": {"consistency_weight": 0.0},
        "entropyFilter": {"entropy_filter": True},
        "errorPredictor": {"entropy_filter": True, "error_filter": True},
        "softPseudoLabels": {"pseudo_labels": "soft"},
    }
    everything = [m.name for m in pkgutil.iter_modules(nnunet_dsp.trainers.__path__)]
    names = [name for name in everything if name.startswith("nnUNetTrainerCRAC_")]
    assert len(names) >= 9
    for name in names:
        variant = getattr(importlib.import_module(f"nnunet_dsp.trainers.{name}"), name)
        changed = {k: v for k, v in variant.default_settings.to_plans().items() if v != default[k]}
        if name.endswith("epochs"):
            assert changed == {} and variant.training_epochs == int(name.split("_")[1][: -len("epochs")])
        elif not name.endswith("_released"):
            assert changed == expected[name.split("_")[1]], name
