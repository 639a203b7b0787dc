"""nnUNetTrainerDSP: nnU-Net's trainer, with the DSP head, the DSP losses and the annotation loader in their places."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch import nn

from nnunet_dsp.annotation_cache import CACHE_FOLDER
from nnunet_dsp.annotations import LabelNames
from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.combined_loss import TERMS, BatchKnowledge, CombinedLoss
from nnunet_dsp.data import DSPDataLoader
from nnunet_dsp.dataset_conversion.prepare import fingerprint_is_contaminated, sync_annotations
from nnunet_dsp.head import replace_last_layer
from nnunet_dsp.patch_annotations import CaseAnnotations
from nnunet_dsp.prompt import initialise_prototypes, unwrapped
from nnunet_dsp.prompt_settings import PromptSettings
from nnunet_dsp.prompt_source import CASES_LOOKED_AT, requests_of, source_of
from nnunet_dsp.schedules import progress_of
from nnunet_dsp.settings import PLANS_KEY, DSPSettings
from nnunet_dsp.training_log import LossTerms, seed_from_environment
from nnunet_dsp.training_set import ANNOTATIONS_FOLDER, find_weak_cases, load_case_annotations


class nnUNetTrainerDSP(LossTerms, nnUNetTrainer):
    """Trains on masks, partial masks, tags, points, boxes and unlabelled images, in any mixture.

    Source: Reiss et al., Decoupled Semantic Prototypes enable learning from diverse annotation types for
    semi-weakly segmentation in expert-driven domains, CVPR 2023.

    A variant overrides `default_settings` or `training_epochs`; a plans file may carry `"nnunet_dsp": {...}`; the
    environment variable nnUNet_dsp_seed makes a training repeatable. See DSPSettings for all options.

    Raises:
        NotImplementedError: the dataset is trained with regions: a voxel of several classes at once has no single
            prototype.
        ValueError: an option in the plans is unknown or impossible, or (by `initialize`) the network has too few stages
            for nnU-Net's deep supervision.
    """

    default_settings: ClassVar[DSPSettings] = DSPSettings()
    training_epochs: ClassVar[int | None] = None
    loss_terms = TERMS
    dataset_class: Any
    save_every: int

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),
    ) -> None:
        settings = DSPSettings.from_plans(plans, self.default_settings)
        if (seed := seed_from_environment()) is not None:
            settings = DSPSettings.from_plans({PLANS_KEY: {"seed": seed}}, settings)
        # the plans are saved with the model: prediction rebuilds the same network from them
        plans[PLANS_KEY] = settings.to_plans()
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = settings
        if self.label_manager.has_regions:
            raise NotImplementedError(
                f"{type(self).__name__} cannot train with regions (dataset.json of {self.plans_manager.dataset_name} "
                "declares labels that are lists of values): its losses need one class per voxel. "
                "Declare plain labels and combine them into regions after prediction, or use nnUNetTrainer."
            )
        if settings.prototypes_from_prompt and self.is_cascaded:
            raise NotImplementedError(
                f"Setting `prototypes_from_prompt` cannot be used with {configuration}: the prompt would need a "
                "segmentation of the previous stage of its own. Leave it out."
            )
        if self.training_epochs is not None:
            self.num_epochs = self.training_epochs
        self.save_every = max(1, min(self.save_every, self.num_epochs // 5))
        self.log_loss_terms()
        self._weak_cases_of: dict[str, list[str]] = {}
        self._cases_to_validate: list[str] | None = None

    # --- network and loss

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """nnU-Net's network from the plans, its last layer replaced by the prototype head the settings describe."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        settings = DSPSettings.from_plans(plans_manager.plans, strict=False)
        if settings.head == "prototype":
            network = replace_last_layer(
                network,
                num_prototypes=settings.num_prototypes,
                temperature=settings.temperature,
                embedding_channels=settings.embedding_channels or None,
            )
        return network

    def _build_loss(self) -> nn.Module:
        if self.enable_deep_supervision and len(self._get_deep_supervision_scales()) < 2:
            raise ValueError(
                f"The network of configuration {self.configuration_name} in {self.plans_manager.plans_name} has fewer "
                "than three stages. nnU-Net's deep supervision leaves out the lowest output, so none would be left, "
                "and the loss would be nan. Plan for larger patches, or give `nnunet_dsp plans` more --features."
            )
        gathers = self.is_ddp and self.configuration_manager.batch_dice
        return CombinedLoss(super()._build_loss(), self.settings, self.label_manager.ignore_label, gathers)

    def initialize(self) -> None:
        if self.settings.seed is not None:
            torch.manual_seed(self.settings.seed)
        super().initialize()
        options = ", ".join(f"{name}={value}" for name, value in self.settings.to_plans().items())
        self.print_to_log_file(f"{type(self).__name__}: {options}")

    # --- cases

    def _weak_cases(self, cases: list[str]) -> list[str]:
        """Those of the cases that carry no mask at all; found once, by the class locations nnU-Net stored."""
        if not self.label_manager.has_ignore_label:
            return []
        folder = self.preprocessed_dataset_folder
        if folder not in self._weak_cases_of:
            dataset_class = self.dataset_class or infer_dataset_class(folder)
            everyone = sorted(dataset_class.get_identifiers(folder))
            key = (-1, *self.label_manager.all_labels)
            cache = self._cache_file(f"{Path(folder).name}.weak.json")
            self._weak_cases_of[folder] = find_weak_cases(Path(folder), everyone, key, cache)
        weak = set(self._weak_cases_of[folder])
        return [case for case in cases if case in weak]

    def _cache_file(self, name: str) -> Path:
        return Path(self.preprocessed_dataset_folder_base) / CACHE_FOLDER / name

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, but weak cases train in every fold and validate in none.

        Without splits_final.json one is made of the masked cases; it lists the weak ones under "train" in every fold,
        so that other trainers can use the same file.
        """
        if self._cases_to_validate is not None:
            return [], self._cases_to_validate
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        everyone = sorted(self.dataset_class.get_identifiers(self.preprocessed_dataset_folder))
        weak = self._weak_cases(everyone)
        if weak:
            self._make_split_file(sorted(set(everyone) - set(weak)), weak)
            if self.is_ddp:  # the other ranks must not make nnU-Net's split in the meantime
                dist.barrier()
        training, validation = (list(cases) for cases in super().do_split())
        if not weak:
            return training, validation
        masked_validation = [case for case in validation if case not in set(weak)]
        training = [*dict.fromkeys([*training, *weak])]
        self._warn_of_fold_without_masks(training, masked_validation, weak)
        if not masked_validation:
            masked_validation = [case for case in training if case not in set(weak)]
            if masked_validation:
                self.print_to_log_file("WARNING: no masked case is left to validate on; masked training cases serve.")
            else:
                masked_validation = weak[:5]
                self.print_to_log_file(
                    "WARNING: no case has a mask. There is nothing to validate on; the Dice below means nothing."
                )
        self.print_to_log_file(
            f"Of these, {len(weak)} cases without mask train and do not validate: "
            f"{len(training)} training and {len(masked_validation)} validation cases."
        )
        return training, masked_validation

    def _warn_of_fold_without_masks(self, training: list[str], validation: list[str], weak: list[str]) -> None:
        """A training on weak cases alone may be meant; it is not where nnU-Net's own trainer made the split."""
        if validation and set(training) <= set(weak):
            self.print_to_log_file(
                f"WARNING: fold {self.fold} of {Path(self.preprocessed_dataset_folder_base) / 'splits_final.json'} "
                f"validates on all cases with masks ({', '.join(validation[:5])}) and leaves none to train on. If you "
                "did not mean that, remove the file, and a split of the masked cases is made, or train another fold, "
                "or `all`."
            )

    def _make_split_file(self, masked: list[str], weak: list[str]) -> None:
        file = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
        if self.fold == "all" or file.is_file() or self.local_rank != 0:
            return
        if len(masked) >= 2:
            splits = generate_crossval_split(masked, seed=12345, n_splits=min(5, len(masked)))
        else:
            splits = [{"train": list(masked), "val": list(masked)}]
        for split in splits:
            split["train"] = [str(case) for case in [*split["train"], *weak]]
            split["val"] = [str(case) for case in split["val"]]
        self.print_to_log_file(
            f"Creating a new {len(splits)}-fold split of the {len(masked)} masked cases; "
            f"the {len(weak)} cases without mask train in every fold."
        )
        temporary = file.with_suffix(".json.tmp")
        save_json(splits, str(temporary), sort_keys=False)
        os.replace(temporary, file)

    # --- annotations and loaders

    def _sync_annotations(self) -> None:
        base = Path(self.preprocessed_dataset_folder_base)
        if self.local_rank == 0 and nnUNet_raw.is_set():
            raw = Path(nnUNet_raw) / self.plans_manager.dataset_name
            if (raw / ANNOTATIONS_FOLDER).is_dir():
                sync_annotations(raw, base)
        if self.is_ddp:
            dist.barrier()

    def _read_annotations(self, dataset: Any) -> dict[str, CaseAnnotations]:
        base = Path(self.preprocessed_dataset_folder_base)
        reader = self.plans_manager.image_reader_writer_class()
        weak = set(self._weak_cases(list(dataset.identifiers)))

        def mask_file(case: str) -> Path:
            return base / "gt_segmentations" / (case + self.dataset_json["file_ending"])

        def read_mask(case: str) -> npt.NDArray[Any] | None:
            file = mask_file(case)
            return None if case in weak or not file.is_file() else reader.read_seg(str(file))[0][0]

        return load_case_annotations(
            base / ANNOTATIONS_FOLDER,
            Path(self.preprocessed_dataset_folder),
            list(dataset.identifiers),
            self.dataset_class.get_identifiers(self.preprocessed_dataset_folder),
            lambda case: dataset.load_case(case)[0].shape[1:],
            LabelNames.from_dataset_json(self.dataset_json),
            self.plans_manager.transpose_forward,
            read_mask,
            mask_file=mask_file,
            cache_file=self._cache_file(f"{Path(self.preprocessed_dataset_folder).name}.annotations.npz"),
        )

    def _partial_masks(self, dataset: Any) -> dict[str, CaseAnnotations]:
        """The annotations of validation cases whose masks show some of the classes only."""
        found = {case: said for case, said in self._read_annotations(dataset).items() if not said.listed.all()}
        if found:
            self.print_to_log_file(
                f"WARNING: the masks of {len(found)} validation cases show some of the classes only (`mask_labels`). "
                "The loss and the pseudo Dice leave out what they leave blank; nnU-Net's final validation counts it as "
                "background, so the Dice of the other classes in summary.json is too low."
            )
        return found

    def _describe(self, dataset: Any, annotations: dict[str, CaseAnnotations]) -> None:
        """What the training sees, into the log.

        Raises:
            ValueError: cases without mask would be normalised otherwise than the others.
        """
        base = Path(self.preprocessed_dataset_folder_base)
        weak = set(self._weak_cases(list(dataset.identifiers)))
        both = sum(case not in weak for case in annotations)
        self.print_to_log_file(
            f"Training on {len(dataset.identifiers) - len(weak)} cases with masks ({both} of them with further "
            f"annotations), {len(annotations) - both} with annotations only and "
            f"{len(weak) - len(annotations) + both} unlabelled."
        )
        if weak and len(weak) < len(dataset.identifiers):
            share, warmup = self.settings.masked_fraction, self.settings.pseudo_label_warmup
            after = f" after the first {warmup:.0%} of the training, which sees masked cases only" if warmup > 0 else ""
            self.print_to_log_file(
                f"Each batch of {self.batch_size} holds on average {self.batch_size * share:g} patches of masked cases"
                f"{after}."
            )
        if weak and fingerprint_is_contaminated(self.plans_manager.plans, base):
            self.print_to_log_file(
                "WARNING: the intensity statistics in these plans count voxels that nobody annotated as foreground "
                "(nnU-Net #3055), and CT normalisation uses them. Run `nnunet_dsp prepare -d "
                f"{self.plans_manager.dataset_name}` and nnUNetv2_plan_and_preprocess again."
            )
        if weak and any(self.configuration_manager.use_mask_for_norm):
            plans, configuration = self.plans_manager.plans_name, self.configuration_name
            raise ValueError(
                f"{plans} normalises the images of {configuration} by what lies inside the head or body "
                "(`use_mask_for_norm`). nnU-Net takes that from the label files, and finds nothing outside where they "
                f"are `ignore` all over: the {len(weak)} cases without mask would not look as the others do. Set "
                f"`use_mask_for_norm` to false for each channel in {base / (plans + '.json')}, and preprocess again: "
                f"nnUNetv2_preprocess -d {self.plans_manager.dataset_name} -plans_name {plans} -c {configuration}"
            )

    def get_dataloaders(self) -> tuple[Any, Any]:
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        labels = self.label_manager
        common = {"is_cascaded": self.is_cascaded, "foreground_labels": labels.foreground_labels}
        patch_size = self.configuration_manager.patch_size
        transforms_tr = self.get_training_transforms(
            patch_size,
            rotation,
            scales,
            mirror_axes,
            dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            ignore_label=labels.ignore_label,
            **common,
        )
        transforms_val = self.get_validation_transforms(scales, ignore_label=labels.ignore_label, **common)
        dataset_tr, dataset_val = self.get_tr_and_val_datasets()
        self._sync_annotations()
        annotations = self._read_annotations(dataset_tr)
        self._describe(dataset_tr, annotations)
        settings = self.settings
        num_workers = get_allowed_n_proc_DA()
        workers_val = max(1, num_workers // 2)
        loader_tr = self._loader(
            dataset_tr,
            initial_patch_size,
            transforms_tr,
            annotations=annotations,
            with_components=settings.dsp_weight > 0 and settings.mask_weight > 0,
            first_batch=self.current_epoch * self.num_iterations_per_epoch,
            masked_batches=self._masked_batches(),
            num_workers=num_workers,
            stream=2 * self.local_rank,
        )
        loader_val = self._loader(
            dataset_val,
            patch_size,
            transforms_val,
            annotations=self._partial_masks(dataset_val),
            first_batch=self.current_epoch * self.num_val_iterations_per_epoch,
            num_workers=workers_val,
            stream=2 * self.local_rank + 1,
        )
        batches = (
            self._in_workers(loader_tr, num_workers),
            self._in_workers(loader_val, workers_val if num_workers else 0),
        )
        for generator in batches:  # as nnU-Net does: a loader that cannot load fails here
            next(generator)
        return batches

    def _masked_batches(self) -> int:
        """How many batches the warm-up takes, the one included that get_dataloaders() draws to see that it can."""
        steps = self.settings.pseudo_label_warmup * self.num_epochs * self.num_iterations_per_epoch
        return math.ceil(steps) + 1 if steps > 0 else 0

    def _loader(self, dataset: Any, patch_size: Any, transforms: Any, **kwargs: Any) -> DSPDataLoader:
        return DSPDataLoader(
            dataset,
            self.batch_size,
            patch_size,
            self.configuration_manager.patch_size,
            self.label_manager,
            oversample_foreground_percent=self.oversample_foreground_percent,
            sampling_probabilities=None,
            pad_sides=None,
            probabilistic_oversampling=self.probabilistic_oversampling,
            transforms=transforms,
            weak_cases=self._weak_cases(list(dataset.identifiers)),
            masked_fraction=self.settings.masked_fraction,
            num_classes=self.label_manager.num_segmentation_heads,
            ignore_label=self.label_manager.ignore_label,
            seed=self.settings.seed,
            **kwargs,
        )

    def _in_workers(self, loader: DSPDataLoader, num_workers: int) -> Any:
        """nnU-Net's augmenters; with a seed, the one that keeps the order of the batches."""
        pin_memory = self.device.type == "cuda"
        if num_workers == 0:
            return SingleThreadedAugmenter(loader, None)
        if self.settings.seed is not None:
            return MultiThreadedAugmenter(
                loader, None, num_workers, num_cached_per_queue=2, seeds=None, pin_memory=pin_memory, wait_time=0.002
            )
        return NonDetMultiThreadedAugmenter(
            data_loader=loader,
            transform=None,
            num_processes=num_workers,
            num_cached=max(6, num_workers // 2),
            seeds=None,
            pin_memory=pin_memory,
            wait_time=0.002,
        )

    # --- prototypes

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.settings.prototypes_from_prompt and self.current_epoch == 0:  # a checkpoint brings its own
            self._initialise_prototypes()

    def _initialise_prototypes(self) -> None:
        """Each class's prototypes become what the prompt's voxels of it look like to the network; the same on every
        rank."""
        training, _ = self.do_split()
        weak = set(self._weak_cases(training))
        groups = [sorted(case for case in training if (case in weak) == without) for without in (False, True)]
        source = source_of(self, PromptSettings.from_plans(self.plans_manager.plans))
        windows = source.choose(requests_of(self), [cases[:CASES_LOOKED_AT] for cases in groups])
        prompt = source.build(windows)
        network = unwrapped(self.network)
        found = initialise_prototypes(network, prompt.images, prompt.labels)
        if self.is_ddp:  # ranks may round differently, and parameters are shared once, before this
            dist.broadcast(network.decoder.seg_layers[-1].prototypes.data, 0)
        names = list(source.label_names.values())
        self.print_to_log_file(
            f"Prototypes of {', '.join(names[c] for c in found)} start from a prompt: "
            f"{', '.join(dict.fromkeys(window.case for window in windows))}."
        )
        if prompt.missing:
            self.print_to_log_file(f"The prompt shows no voxel of {', '.join(prompt.missing)}: these start at random.")
        if self.local_rank == 0:
            source.show(prompt, Path(self.output_folder))

    # --- steps

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.settings.seed is not None:
            torch.manual_seed(self.settings.seed + self.current_epoch)
        self._step = 0

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        progress = progress_of(self.current_epoch, self._step, self.num_iterations_per_epoch, self.num_epochs)
        self._step += 1
        components = batch.get("components")
        self.loss.set_progress(progress)
        self.loss.knowledge = BatchKnowledge(
            AnnotationBatch.from_list(batch["annotations"]).to(self.device),
            batch["num_masked"],
            None if components is None else components.to(self.device, non_blocking=True),
            batch.get("num_components", 0),
        )
        try:
            return super().train_step(batch)
        finally:
            self.loss.knowledge = None

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's; before a cascade's next stage, cases that no fold validates are predicted too.

        The next stage trains on them, so it needs their predictions. They stay out of the validation's Dice.
        """
        if self.configuration_manager.next_stage_names is not None:
            self._predict_for_next_stage()
        super().perform_actual_validation(save_probabilities)

    def _predict_for_next_stage(self) -> None:
        training, validation = self.do_split()
        validated = set(validation)
        splits = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
        if self.fold != "all" and splits.is_file():
            weak = set(self._weak_cases(training))
            validated |= {case for split in load_json(str(splits)) for case in split["val"]} - weak
        never = [case for case in training if case not in validated]
        if not never:
            return
        self.print_to_log_file(
            f"Predicting {len(never)} training cases that no fold validates, for the next stage. "
            "The Dice of this pass says nothing."
        )
        self._cases_to_validate = never
        try:
            super().perform_actual_validation(False)
        finally:
            self._cases_to_validate = None
        if self.local_rank == 0:
            for case in never:
                file = Path(self.output_folder) / "validation" / (case + self.dataset_json["file_ending"])
                file.unlink(missing_ok=True)


__all__ = ["nnUNetTrainerDSP"]
