"""What our trainers share beside nnU-Net's: the terms of their losses in the log and in progress.png, and the seed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from PIL import Image
from torch import distributed as dist

SEED_VARIABLE = "nnUNet_dsp_seed"


def seed_from_environment() -> int | None:
    """The environment variable nnUNet_dsp_seed, None where it is unset or empty.

    Raises:
        ValueError: it is no whole number of 0 or more.
    """
    value = os.environ.get(SEED_VARIABLE)
    if not value:
        return None
    try:
        seed = int(value)
    except ValueError:
        seed = -1
    if seed < 0:
        raise ValueError(
            f"Expected the environment variable {SEED_VARIABLE} to be a whole number from 0 on, but got {value!r}."
        )
    return seed


class LossTerms:
    """Mixin for a trainer whose loss keeps the last step's unweighted terms in `loss.terms`, a tensor.

    Their means over each epoch (and over the processes of DDP) are logged, printed and drawn.
    """

    loss_terms: ClassVar[Sequence[str]]
    """Names, in the order of `loss.terms`."""

    loss: Any
    logger: Any
    current_epoch: int
    is_ddp: bool

    def log_loss_terms(self) -> None:
        """To be called once, at the end of __init__."""
        self.logger.local_logger = TermsLocalLogger(self.loss_terms, self.logger.local_logger.verbose)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        parent: Any = super()
        result: dict[str, Any] = parent.train_step(batch)
        return {**result, **dict(zip(self.loss_terms, self.loss.terms.cpu().numpy(), strict=True))}

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        parent: Any = super()
        parent.on_train_epoch_end(train_outputs)
        values = [[output[name] for name in self.loss_terms] for output in train_outputs]
        means = np.asarray(values, dtype=np.float64).mean(axis=0)
        if self.is_ddp:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, means)
            means = np.mean(gathered, axis=0)
        for name, value in zip(self.loss_terms, means, strict=True):
            self.logger.log(name, float(value), self.current_epoch)

    def on_epoch_end(self) -> None:
        parent: Any = super()
        values = ", ".join(f"{name} {self.logger.get_value(name, step=-1):.4f}" for name in self.loss_terms)
        parent.print_to_log_file(f"loss terms: {values}")
        parent.on_epoch_end()


class TermsLocalLogger(LocalLogger):
    """LocalLogger that knows one more value an epoch for each loss term, and draws them below nnU-Net's own curves."""

    def __init__(self, terms: Sequence[str], verbose: bool = False) -> None:
        super().__init__(verbose)
        self.terms = tuple(terms)
        for name in self.terms:
            self.my_fantastic_logging[name] = []

    def plot_progress_png(self, output_folder: str) -> None:
        """nnU-Net's three panels, and a fourth one with the loss terms, in the same file."""
        super().plot_progress_png(output_folder)
        file = Path(output_folder) / "progress.png"
        with Image.open(file) as picture:
            above = picture.convert("RGB")
        below = self._terms_panel(above.width)
        joined = Image.new("RGB", (above.width, above.height + below.height), "white")
        joined.paste(above, (0, 0))
        joined.paste(below, (0, above.height))
        joined.save(file)

    def _terms_panel(self, width: int) -> Image.Image:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(30, 18), dpi=width / 30)
        for name in self.terms:
            values: list[Any] = self.my_fantastic_logging[name]
            axes.plot(range(len(values)), values, linewidth=4, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss term, unweighted")
        axes.legend(loc=(0, 1), ncols=len(self.terms), fontsize=20)
        figure.tight_layout()
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
        plt.close(figure)
        return Image.fromarray(np.ascontiguousarray(pixels))
