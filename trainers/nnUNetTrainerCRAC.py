"""nnUNetTrainerCRAC: a few labelled instances, two networks that teach each other the rest; instances out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch import nn
from torch._dynamo import OptimizedModule

from nnunet_dsp.affinities import Offsets, check_offsets, default_offsets, edge_targets
from nnunet_dsp.crac_loss import TERMS, CRACLoss
from nnunet_dsp.dataset_conversion.raw_dataset import write_json
from nnunet_dsp.dataset_conversion.splits import SPLITS_FILE, read_splits
from nnunet_dsp.instances.decoders import available
from nnunet_dsp.instances.evaluate_command import measure_files, table
from nnunet_dsp.instances.label_facts import LabelFacts, label_facts
from nnunet_dsp.instances.label_files import write_instances
from nnunet_dsp.instances.measures import average
from nnunet_dsp.instances.network import CRACNetwork
from nnunet_dsp.instances.predict import AffinityPredictor, DecoderOptions, segment, to_image_geometry
from nnunet_dsp.instances.settings import PLANS_KEY, CRACSettings
from nnunet_dsp.schedules import progress_of
from nnunet_dsp.training_log import LossTerms, seed_from_environment

ERROR_FEATURES = 32  # the error predictor's widest layer


class nnUNetTrainerCRAC(LossTerms, nnUNetTrainer):
    """Trains on images in which some instances are labelled and the rest is not; predicts instances.

    The dataset is one region of instance ids with nnU-Net's ignore label for what nobody labelled; `nnunet_dsp convert
    instances` makes it, `nnunet_dsp simulate --instances` thins it out. nnUNetv2_predict gives the foreground,
    `nnunet_dsp instances predict` the instances. See docs/instances.md.

    A variant overrides `default_settings` or `training_epochs`; a plans file may carry `"nnunet_dsp_crac": {...}`. See
    CRACSettings for all options.

    Raises:
        NotImplementedError: the dataset is no instance dataset, or the configuration is part of a cascade.
        ValueError: an option in the plans is unknown or impossible; or, when training begins, nnU-Net would normalise
            partly labelled images by what their labels call inside.

    Source: Liu et al., Learning Cross-Representation Affinity Consistency for Sparsely Supervised Biomedical Instance
    Segmentation, ICCV 2023, re-implemented.
    """

    default_settings: ClassVar[CRACSettings] = CRACSettings()
    training_epochs: ClassVar[int | None] = None
    loss_terms = TERMS
    dataset_class: Any
    num_epochs: int
    save_every: int

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),
    ) -> None:
        settings = CRACSettings.from_plans(plans, self.default_settings)
        if (seed := seed_from_environment()) is not None:
            settings = CRACSettings.from_plans({PLANS_KEY: {"seed": seed}}, settings)
        # the plans are saved with the model: prediction rebuilds the same network from them
        manager = PlansManager(plans)
        self.offsets = offsets_of(settings, manager.get_configuration(configuration))
        settings = CRACSettings.from_plans({PLANS_KEY: {"offsets": self.offsets}}, settings)
        plans[PLANS_KEY] = settings.to_plans()
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = settings
        self._label_facts: LabelFacts | None = None
        labels = self.label_manager
        if not labels.has_regions or len(labels.foreground_regions) != 1:
            raise NotImplementedError(
                f"{type(self).__name__} trains on instances: one label whose value is the list of all ids, such as "
                f'"cell": [1, 2, ..., 100]. dataset.json of {self.plans_manager.dataset_name} declares '
                f"{list(dataset_json['labels'])} otherwise. `nnunet_dsp convert instances FOLDER -d ID` makes such a "
                "dataset from label images, or from the connected components of ordinary masks."
            )
        if self.is_cascaded or self.configuration_manager.next_stage_names:
            raise NotImplementedError(f"{type(self).__name__} knows no cascades. Train 2d or 3d_fullres.")
        self.enable_deep_supervision = False
        self.num_epochs = settings.epochs or self.training_epochs or self.num_epochs
        if settings.iterations_per_epoch:
            self.num_iterations_per_epoch = settings.iterations_per_epoch
            self.num_val_iterations_per_epoch = max(1, settings.iterations_per_epoch // 5)
        self.save_every = max(1, min(self.save_every, self.num_epochs // 5))
        self.initial_lr = 1e-2 if settings.optimizer == "sgd" else 1e-4 if settings.optimizer == "released" else 1e-3
        self.log_loss_terms()

    # --- network, loss, optimiser

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Two networks of the plans in one module; in evaluation mode it returns the foreground, as nnU-Net expects."""
        settings = CRACSettings.from_plans(plans_manager.plans, strict=False)
        offsets = offsets_of(settings, configuration_manager)

        def network(inputs: int, outputs: int, widest: int | None = None) -> nn.Module:
            arguments = copy.deepcopy(configuration_manager.network_arch_init_kwargs)
            if widest is not None:
                arguments["features_per_stage"] = [min(widest, f) for f in arguments["features_per_stage"]]
            built: nn.Module = get_network_from_plans(
                configuration_manager.network_arch_class_name,
                arguments,
                configuration_manager.network_arch_init_kwargs_req_import,
                inputs,
                outputs,
                allow_init=True,
                deep_supervision=False,
            )
            return built

        count = len(offsets)
        return CRACNetwork(
            network(num_input_channels, settings.embedding_channels),
            network(num_input_channels, count + num_output_channels),
            offsets,
            network(num_input_channels + 2 * count, count, ERROR_FEATURES) if settings.error_filter else None,
        )

    def _build_loss(self) -> nn.Module:
        return CRACLoss(self.offsets, self.settings, self.label_manager.ignore_label)

    def configure_optimizers(self) -> tuple[Any, Any]:
        """Adam with nnU-Net's decay; or the authors' constant Adam, or nnU-Net's SGD."""
        if self.settings.optimizer == "sgd":
            return super().configure_optimizers()
        parameters = self.network.parameters()
        if self.settings.optimizer == "released":
            optimizer = torch.optim.Adam(parameters, self.initial_lr, eps=0.01, weight_decay=1e-6, amsgrad=True)
            return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=0)
        optimizer = torch.optim.Adam(parameters, self.initial_lr)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def initialize(self) -> None:
        if self.settings.seed is not None:
            torch.manual_seed(self.settings.seed)
        super().initialize()
        options = ", ".join(f"{name}={value}" for name, value in self.settings.to_plans().items())
        self.print_to_log_file(f"{type(self).__name__}: {options}")

    @property
    def _module(self) -> CRACNetwork:
        """The network itself, out of DistributedDataParallel and torch.compile."""
        module: Any = self.network.module if self.is_ddp else self.network
        if isinstance(module, OptimizedModule):
            module = module._orig_mod
        network: CRACNetwork = module
        return network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none."""

    # --- data

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Any:
        """nnU-Net's, but without mirroring at prediction, where edges point in a direction.

        Training mirrors all the same: targets are computed afterwards.
        """
        chosen = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return chosen

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> BasicTransform:
        """nnU-Net's, except that ids stay ids: no conversion to regions, and the nearest neighbour's id.

        nnU-Net interpolates segmentations label by label, which takes a pass for each of hundreds of ids.
        """
        kwargs["regions"] = None
        transforms = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        for transform in transforms.transforms:
            if isinstance(transform, SpatialTransform):
                transform.mode_seg = "nearest"
        return transforms

    @staticmethod
    def get_validation_transforms(*args: Any, **kwargs: Any) -> BasicTransform:
        """nnU-Net's, without the conversion to regions."""
        kwargs["regions"] = None
        return nnUNetTrainer.get_validation_transforms(*args, **kwargs)

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, or the raw dataset's splits_final.json, which keeps tiles of one image together.

        nnU-Net wants five cases for a split of its own; fewer make as many folds, and a single one is on both sides.
        """
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        if self.fold != "all" and self.local_rank == 0:
            self._make_split_file(Path(self.preprocessed_dataset_folder_base) / SPLITS_FILE)
        if self.is_ddp:
            dist.barrier()
        training, validation = super().do_split()
        return list(training), list(validation)

    def _make_split_file(self, file: Path) -> None:
        if file.is_file():
            return
        cases = sorted(str(c) for c in self.dataset_class.get_identifiers(self.preprocessed_dataset_folder))
        raw = Path(nnUNet_raw) / self.plans_manager.dataset_name / SPLITS_FILE if nnUNet_raw.is_set() else None
        if raw is not None and raw.is_file():
            splits = read_splits(raw, cases)
            self.print_to_log_file(f"Using the split that came with the raw dataset: {raw}")
        elif len(cases) < 5:
            splits = [{"train": cases, "val": cases}]
            if len(cases) > 1:
                made = generate_crossval_split(cases, seed=12345, n_splits=len(cases))
                splits = [{part: [str(c) for c in split[part]] for part in ("train", "val")} for split in made]
            self.print_to_log_file(f"Only {len(cases)} case(s): made a split of {len(splits)} fold(s).")
        else:
            return
        write_json(file, splits)

    def on_train_start(self) -> None:
        facts = self._look_at_labels()
        self._refuse_masked_normalisation(facts)
        super().on_train_start()
        learnt = facts.background_labelled
        self._module.foreground_learnt.fill_(learnt)
        self.loss.foreground_learnt = learnt
        if not learnt:
            self.print_to_log_file(
                "The training cases label no background, or next to none. The foreground cannot be learnt from them: "
                "nnUNetv2_predict will show the voxels that belong to one of their neighbours. If the images have any "
                "background, label some of it: without, it is decoded into objects, and pseudo-labels may do harm."
            )
        why = "" if self.settings.min_size is not None else (
            " All but 5 % of the labelled instances are that large, and it is at most a quarter of their median size; "
            "`instances predict --min-size` says otherwise."
        )  # fmt: skip
        self.print_to_log_file(
            f"Instances of less than {self._min_size()} voxels will be left out of predictions.{why}"
        )
        # in the plans that are saved with the model, where prediction finds it
        self.plans_manager.plans[PLANS_KEY]["min_size"] = self._min_size()
        if self.local_rank == 0:
            write_json(Path(self.output_folder_base) / "plans.json", self.plans_manager.plans)

    def _refuse_masked_normalisation(self, facts: LabelFacts) -> None:
        """ValueError where training images would be normalised otherwise than those to predict."""
        if facts.partly_labelled and any(self.configuration_manager.use_mask_for_norm):
            name, plans, configuration = (
                self.plans_manager.dataset_name, self.plans_manager.plans_name, self.configuration_name,
            )  # fmt: skip
            file = Path(self.preprocessed_dataset_folder_base) / f"{plans}.json"
            raise ValueError(
                f"{plans} normalises the images of {configuration} by what lies inside of a black surrounding "
                "(`use_mask_for_norm`). nnU-Net takes that from the label files, where `ignore` counts as inside: "
                f"{facts.partly_labelled} training cases, which are not labelled all over, would not look as the "
                f"images to predict do. Set `use_mask_for_norm` to false for each channel in {file}, and preprocess "
                f"again: nnUNetv2_preprocess -d {name} -plans_name {plans} -c {configuration}"
            )

    def _look_at_labels(self) -> LabelFacts:
        """What the training cases' labels tell; they are read once."""
        if self._label_facts is None:
            cases, _ = self.do_split()
            dataset = self.dataset_class(self.preprocessed_dataset_folder, cases)
            self._label_facts = label_facts(
                (np.asarray(dataset.load_case(case)[1][:]) for case in dataset.identifiers),
                self.label_manager.ignore_label,
                slicewise=len(self.configuration_manager.patch_size) == 2,
                complete_instances=self.settings.complete_instances,
            )
        return self._label_facts

    def _min_size(self) -> int:
        said = self.settings.min_size
        return self._look_at_labels().min_size if said is None else said

    # --- steps

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._step = 0

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.loss.progress = progress_of(self.current_epoch, self._step, self.num_iterations_per_epoch, self.num_epochs)
        self._step += 1
        return super().train_step(batch)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._module.output = "training"

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The loss, and how well the two affinities' mean finds borders: their F1 takes the place of nnU-Net's Dice."""
        image = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        with torch.autocast("cuda", enabled=self.device.type == "cuda"):
            output = self.network(image)
            loss = self.loss(output, target)
        edges = edge_targets(
            target[:, 0].long(),
            self.offsets,
            self.label_manager.ignore_label,
            complete_instances=self.settings.complete_instances,
            background_known=self.settings.background_known,
        )
        affinity = (output.implicit.relu() + output.explicit_logits.float().sigmoid()) / 2
        found = (affinity < 0.5) & edges.known
        border = ~edges.same & edges.known
        counts = [(found & border).sum(), (found & ~border).sum(), (~found & border).sum()]
        tp, fp, fn = (count[None].cpu().numpy() for count in counts)
        return {"loss": loss.detach().cpu().numpy(), "tp_hard": tp, "fp_hard": fp, "fn_hard": fn}

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        self._module.output = "foreground"
        if not any((o["tp_hard"] + o["fp_hard"] + o["fn_hard"]).any() for o in val_outputs):
            val_outputs = [{**output, "fp_hard": output["fp_hard"] + 1} for output in val_outputs]  # F1 0, not NaN
        super().on_validation_epoch_end(val_outputs)

    def on_epoch_end(self) -> None:
        self.print_to_log_file("The pseudo Dice below is the F1 of borders between instances.")
        super().on_epoch_end()

    # --- validation

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, of the foreground; then the validation cases' instances, in validation/instances, and measures."""
        super().perform_actual_validation(save_probabilities)
        folder = Path(self.output_folder) / "validation" / "instances"
        folder.mkdir(parents=True, exist_ok=True)
        decoder = "mutex" if available("mutex") else "components"
        if decoder == "components":
            self.print_to_log_file(
                "mwatershed is not installed (pip install nnunet-dsp[instances]): instances are validated by connected "
                "components, which a single leak joins."
            )
        network = self._module.eval()
        options = DecoderOptions(decoder, min_size=self._min_size())
        predictor = AffinityPredictor(network, self.configuration_manager.patch_size, self.device, show_progress=False)
        _, cases = self.do_split()
        mine = cases[self.local_rank :: dist.get_world_size()] if self.is_ddp else cases
        dataset = self.dataset_class(self.preprocessed_dataset_folder, mine)
        ending = self.dataset_json["file_ending"]
        for case in dataset.identifiers:
            image, _, _, properties = dataset.load_case(case)
            labels = segment(predictor, torch.from_numpy(np.array(image[:])), options)
            labels = to_image_geometry(labels, properties, self.plans_manager.transpose_backward)
            writer = self.plans_manager.image_reader_writer_class
            write_instances(writer, labels, folder / f"{case}{ending}", properties)
        if self.is_ddp:
            dist.barrier()
        if self.local_rank == 0:
            self._evaluate_instances(folder, cases, ending)

    def _evaluate_instances(self, folder: Path, cases: list[str], ending: str) -> None:
        truth = Path(self.preprocessed_dataset_folder_base) / "gt_segmentations"
        if not truth.is_dir():
            return
        ignore = self.label_manager.ignore_label
        measured = dict(measure_files((c, truth / f"{c}{ending}", folder / f"{c}{ending}", ignore)) for c in cases)
        summary = {"mean": average(list(measured.values())), "cases": measured}
        write_json(folder / "summary.json", {"ignore_label": ignore, **summary})
        self.print_to_log_file("Instances of the validation cases:\n" + table(summary))


def offsets_of(settings: CRACSettings, configuration: ConfigurationManager) -> Offsets:
    """The offsets that the settings name, or those that follow from the configuration's patch and spacing."""
    patch = [int(p) for p in configuration.patch_size]
    if settings.offsets is not None:
        return check_offsets(settings.offsets, len(patch))
    return default_offsets(patch, [float(s) for s in configuration.spacing][-len(patch) :])


__all__ = ["nnUNetTrainerCRAC"]
