"""nnU-Net's local log with the DSP loss terms in it, and their curves below nnU-Net's own in progress.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from PIL import Image

from nnunet_dsp.combined_loss import TERMS


class DSPLocalLogger(LocalLogger):
    """LocalLogger that knows one more value an epoch for each loss term."""

    def __init__(self, verbose: bool = False) -> None:
        super().__init__(verbose)
        for name in TERMS:
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
        for name in TERMS:
            values: list[Any] = self.my_fantastic_logging[name]
            axes.plot(range(len(values)), values, linewidth=4, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss term, unweighted")
        axes.legend(loc=(0, 1), ncols=len(TERMS), fontsize=20)
        figure.tight_layout()
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
        plt.close(figure)
        return Image.fromarray(np.ascontiguousarray(pixels))
