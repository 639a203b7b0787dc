"""nnUNetTrainerPrompt: nnU-Net's trainer with the prompt network in place of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch import nn

from nnunet_dsp.dataset_conversion.prepare import sync_annotations
from nnunet_dsp.prompt import PromptNetwork, VotesAsLogits, unwrapped
from nnunet_dsp.prompt_choice import PROMPT_KEY, PromptRequest
from nnunet_dsp.prompt_settings import PROMPT_PLANS_KEY, PromptSettings
from nnunet_dsp.prompt_source import CASES_LOOKED_AT, PromptSource, requests_of, source_of
from nnunet_dsp.training_set import find_weak_cases


class nnUNetTrainerPrompt(nnUNetTrainer):
    """Classifies each voxel by the vote of the labelled voxels of a small prompt, embedded by the same network.

    Everything else (planning, augmentation, losses, schedule, validation, prediction) is nnU-Net's. Voxels that nobody
    annotated carry nnU-Net's ignore label; cases without any annotated voxel are left out. The prompt is named in
    dataset.json or chosen, shown in prompt.png and prompt.json of the output folder, and kept in the checkpoint.

    A plans file may carry ``"nnunet_dsp_prompt": {...}``; see PromptSettings. Regions work. There is no deep
    supervision; PromptNetwork says why.

    Source: Kato & Hotta, One-shot and Partially-Supervised Cell Image Segmentation Using Small Visual Prompt, CVPR
    workshops 2023; re-implemented, see docs/prompt.md.

    Raises:
        NotImplementedError: the configuration is the second stage of a cascade.
        ValueError: an option in the plans is unknown or impossible.
    """

    default_settings: ClassVar[PromptSettings] = PromptSettings()
    training_epochs: ClassVar[int | None] = None
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
        settings = PromptSettings.from_plans(plans, self.default_settings)
        # the plans are saved with the model: prediction rebuilds the same network from them
        plans[PROMPT_PLANS_KEY] = settings.to_plans()
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = settings
        if self.is_cascaded:
            raise NotImplementedError(
                f"{type(self).__name__} cannot train {configuration}: the prompt would need a segmentation of the "
                "previous stage of its own. Use 2d, 3d_fullres or 3d_lowres."
            )
        if settings.variant == "released" and self.label_manager.has_regions:
            raise NotImplementedError('The variant "released" has no regions. Declare plain labels in dataset.json.')
        self.enable_deep_supervision = False
        if self.training_epochs is not None:
            self.num_epochs = self.training_epochs
        self.save_every = max(1, min(self.save_every, self.num_epochs // 5))
        self._weak: dict[str, frozenset[str]] = {}

    # --- network and loss

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """nnU-Net's network from the plans, as PromptNetwork; the prompt comes with weights or when training starts."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, False
        )
        settings = PromptSettings.from_plans(plans_manager.plans, strict=False)
        return PromptNetwork(network, num_output_channels, settings)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """The prompt network has none."""

    def _build_loss(self) -> nn.Module:
        if self.settings.variant == "released":
            return _ByMode(VotesAsLogits(self.label_manager.ignore_label), super()._build_loss())
        loss: nn.Module = super()._build_loss()
        return loss

    def initialize(self) -> None:
        super().initialize()
        options = ", ".join(f"{name}={value}" for name, value in self.settings.to_plans().items())
        self.print_to_log_file(f"{type(self).__name__}: {options}")

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if isinstance(self.loss, _ByMode):
            self.loss.train()

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        if isinstance(self.loss, _ByMode):
            self.loss.eval()

    # --- cases

    def _cases_without_annotation(self, cases: list[str]) -> frozenset[str]:
        """Found once, by the class locations nnU-Net stored."""
        if not self.label_manager.has_ignore_label:
            return frozenset()
        folder = self.preprocessed_dataset_folder
        if folder not in self._weak:
            key = (-1, *(int(label) for label in self.label_manager.all_labels))
            self._weak[folder] = frozenset(find_weak_cases(Path(folder), cases, key))
        return self._weak[folder]

    def _annotated_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split without the cases in which nothing is annotated: there is nothing to learn from them."""
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        training, validation = (list(cases) for cases in super().do_split())
        weak = self._cases_without_annotation(sorted({*training, *validation}))
        left = [case for case in training if case not in weak]
        if not left:
            raise ValueError(
                f"None of the {len(training)} training cases of fold {self.fold} has an annotated voxel in its label "
                "file. Annotate at least a rectangle in one of them; the rest may be 'ignore'."
            )
        if len(left) < len(training):
            self.print_to_log_file(f"{len(training) - len(left)} training cases have no annotated voxel: left out.")
        return left, [case for case in validation if case not in weak] or left

    def do_split(self) -> tuple[list[str], list[str]]:
        """See _annotated_split(); variants choose among its cases."""
        return self._annotated_split()

    # --- the prompt

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's, after the prompt is there: what is wrong with it must show before the workers start."""
        network = self._prompt_network()
        if not network.has_prompt:  # a checkpoint brings its own
            self._give_prompt(network)
        loaders: tuple[Any, Any] = super().get_dataloaders()
        return loaders

    def _prompt_network(self) -> PromptNetwork:
        return cast(PromptNetwork, unwrapped(self.network))

    def _prompt_groups(self, requests: list[PromptRequest]) -> list[list[str]]:
        """Where to look for a prompt if none is named; see PromptSource.choose()."""
        training, _ = self._annotated_split()
        return [sorted(training)[:CASES_LOOKED_AT]]

    def _give_prompt(self, network: PromptNetwork) -> None:
        """Chooses the prompt and hands it to the network; the same on every rank, for it depends on files alone."""
        source = self._prompt_source()
        requests = self._requests()
        prompt = source.build(source.choose(requests, self._prompt_groups(requests)))
        training, validation = self._annotated_split()
        for window in prompt.windows:
            where = f"voxels {window.start} to {window.stop} of its preprocessed image"
            self.print_to_log_file(f"Prompt: {window.case}, {where}")
            if window.case in validation and window.case not in training:
                self.print_to_log_file(f"WARNING: {window.case} validates in this fold, and the prompt shows a part.")
        if prompt.missing:
            self.print_to_log_file(
                f"WARNING: the prompt shows no voxel of {', '.join(prompt.missing)}: the model will hardly ever "
                f'predict it. Name further windows in dataset.json under "{PROMPT_KEY}", as a list.'
            )
        network.set_prompt(prompt.images, prompt.labels, self._membership())
        if self.local_rank == 0:
            source.show(prompt, Path(self.output_folder))

    def _membership(self) -> torch.Tensor | None:
        """Which labels make up which region, (R, L) bool."""
        manager = self.label_manager
        if not manager.has_regions:
            return None
        regions = [set(r) if isinstance(r, (list, tuple)) else {r} for r in manager.foreground_regions]
        return torch.tensor([[int(label) in region for label in manager.all_labels] for region in regions])

    def _requests(self) -> list[PromptRequest]:
        return requests_of(self)

    def _prompt_source(self) -> PromptSource:
        if self.local_rank == 0 and nnUNet_raw.is_set():
            raw = Path(nnUNet_raw) / self.plans_manager.dataset_name
            sync_annotations(raw, Path(self.preprocessed_dataset_folder_base))
        if self.is_ddp:
            dist.barrier()
        return source_of(self, self.settings)


class _ByMode(nn.Module):
    """One loss in training, another in validation, where the network returns log-probabilities again."""

    def __init__(self, training_loss: nn.Module, validation_loss: nn.Module) -> None:
        super().__init__()
        self.training_loss = training_loss
        self.validation_loss = validation_loss

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = (self.training_loss if self.training else self.validation_loss)(output, target)
        return loss


__all__ = ["nnUNetTrainerPrompt"]
