"""The demonstration's training length, shared by its two trainers: what two CPU cores do in a few minutes."""

from typing import Any


class DemoSchedule:
    """Mixin: 8 epochs of 75 iterations instead of 1000 of 250, all else as the trainer beside it has it."""

    num_epochs: int
    num_iterations_per_epoch: int
    num_val_iterations_per_epoch: int

    def initialize(self) -> None:
        self.num_epochs = 8
        self.num_iterations_per_epoch = 75
        self.num_val_iterations_per_epoch = 4
        parent: Any = super()
        parent.initialize()


__all__ = ["DemoSchedule"]
