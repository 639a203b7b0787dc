"""The training length that `nnunet_dsp benchmark accuracy` gives to every arm, whatever its trainer."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

PLANS_KEY = "nnunet_dsp_benchmark"
THREADS_VARIABLE = "nnUNet_dsp_threads"
KEYS = ("num_epochs", "iterations_per_epoch", "val_iterations", "seed", "optimizer", "initial_lr", "precision")
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("float32", "bfloat16")


class BenchmarkSchedule:
    """Mixin for a trainer: length, seed and optimiser from the plans, and no validation by prediction at the end.

    The plans carry ``"nnunet_dsp_benchmark": {"num_epochs": ..., "iterations_per_epoch": ..., "val_iterations": ...,
    "seed": ..., "optimizer": "sgd" or "adamw", "initial_lr": ..., "precision": "float32" or "bfloat16"}``. The last
    three may be left out: the trainer's own optimiser then, and learning rate, and nnU-Net's precision. All else is as
    the trainer beside this has it.

    On a CPU nnU-Net trains in float32. "bfloat16" runs the training step under torch's autocast there, which takes half
    the time on processors with bfloat16 arithmetic; on other devices it changes nothing.

    The seed is that of the initialisation. nnU-Net's own loaders draw their batches without one.

    nnU-Net ends a training by predicting its validation cases with mirroring. The benchmark trains with fold `all`,
    where these are the training cases, and predicts its test cases afterwards: `perform_actual_validation` does
    nothing.

    The environment variable nnUNet_dsp_threads bounds torch's threads (nnUNetv2_train takes all cores on a CPU, which
    is too many where several trainings run side by side).

    Raises:
        ValueError: the plans carry no schedule, or an impossible one.
    """

    plans_manager: Any
    num_epochs: int
    num_iterations_per_epoch: int
    num_val_iterations_per_epoch: int
    save_every: int
    initial_lr: float
    weight_decay: float
    network: Any
    device: torch.device

    def initialize(self) -> None:
        schedule = read_schedule(self.plans_manager.plans)
        self.num_epochs = schedule["num_epochs"]
        self.num_iterations_per_epoch = schedule["iterations_per_epoch"]
        self.num_val_iterations_per_epoch = schedule["val_iterations"]
        self.save_every = max(1, min(self.save_every, self.num_epochs // 5))
        if schedule.get("initial_lr") is not None:
            self.initial_lr = schedule["initial_lr"]
        if os.environ.get(THREADS_VARIABLE):
            torch.set_num_threads(int(os.environ[THREADS_VARIABLE]))
        random.seed(schedule["seed"])
        np.random.seed(schedule["seed"])
        torch.manual_seed(schedule["seed"])
        parent: Any = super()
        parent.initialize()

    def configure_optimizers(self) -> tuple[Any, Any]:
        parent: Any = super()
        if read_schedule(self.plans_manager.plans).get("optimizer") != "adamw":
            optimizers: tuple[Any, Any] = parent.configure_optimizers()
            return optimizers
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        parent: Any = super()
        lower = self.device.type == "cpu" and read_schedule(self.plans_manager.plans).get("precision") == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            result: dict[str, Any] = parent.train_step(batch)
        return result

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Nothing: the benchmark predicts and evaluates its test cases itself."""
        report: Any = self
        report.print_to_log_file("No final validation: the benchmark predicts the test cases.")


def read_schedule(plans: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule in a plans dictionary.

    Raises:
        ValueError: there is none, or an entry is unknown or impossible.
    """
    schedule = plans.get(PLANS_KEY)
    if not isinstance(schedule, Mapping):
        raise ValueError(
            f'The plans carry no "{PLANS_KEY}", which says how long to train. `nnunet_dsp benchmark accuracy` writes '
            "it; this trainer is of no use without."
        )
    unknown = sorted(set(schedule) - set(KEYS))
    if unknown:
        raise ValueError(f'Unknown entry `{unknown[0]}` under "{PLANS_KEY}" in the plans. Known: {", ".join(KEYS)}.')
    for name, least in (("num_epochs", 1), ("iterations_per_epoch", 1), ("val_iterations", 1), ("seed", 0)):
        value = schedule.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f'Expected `{name}` under "{PLANS_KEY}" to be a whole number >= {least}, got {value!r}.')
    if schedule.get("optimizer") not in (None, *OPTIMIZERS):
        raise ValueError(
            f'Expected `optimizer` under "{PLANS_KEY}" to be one of {", ".join(OPTIMIZERS)}, but got '
            f"{schedule['optimizer']!r}."
        )
    if schedule.get("precision") not in (None, *PRECISIONS):
        raise ValueError(
            f'Expected `precision` under "{PLANS_KEY}" to be one of {", ".join(PRECISIONS)}, but got '
            f"{schedule['precision']!r}."
        )
    rate = schedule.get("initial_lr")
    if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < float("inf")):
        raise ValueError(f'Expected `initial_lr` under "{PLANS_KEY}" to be a number above 0, but got {rate!r}.')
    return dict(schedule)


__all__ = ["BenchmarkSchedule", "read_schedule"]
