"""The demonstration's training length, shared by its two trainers: what two CPU cores do in a few minutes."""

from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler


class DemoSchedule:
    """Mixin: 12 epochs of 75 iterations instead of 1000 of 250, and AdamW; all else as the trainer beside it has it.

    nnU-Net's optimiser, SGD with a momentum of 0.99, is made for long trainings and has hardly begun after 900 steps.
    """

    num_epochs: int
    num_iterations_per_epoch: int
    num_val_iterations_per_epoch: int
    initial_lr: float
    weight_decay: float
    network: Any

    def initialize(self) -> None:
        self.num_epochs = 12
        self.num_iterations_per_epoch = 75
        self.num_val_iterations_per_epoch = 4
        self.initial_lr = 2e-3
        parent: Any = super()
        parent.initialize()

    def configure_optimizers(self) -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)


__all__ = ["DemoSchedule"]
