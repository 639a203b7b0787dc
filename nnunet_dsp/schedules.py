"""Numbers that change in the course of a training. Each is a function of its progress, 0 to 1, and of nothing else.

So an interrupted training that is taken up again continues where it was, with no counter to save.
"""

from __future__ import annotations

from dataclasses import dataclass


def progress_of(epoch: int, step: int, steps_per_epoch: int, num_epochs: int) -> float:
    """The share of a training that is done, in [0, 1], before step `step` of epoch `epoch` (both from 0)."""
    return min(1.0, max(0.0, (epoch + step / max(1, steps_per_epoch)) / max(1, num_epochs)))


@dataclass(frozen=True)
class WarmUp:
    """0 for the first `share` of the training, then `value`."""

    share: float
    value: float = 1.0

    def __call__(self, progress: float) -> float:
        return self.value if progress >= self.share else 0.0


@dataclass(frozen=True)
class PolynomialDecay:
    """start * (1 - progress) ** power: from `start` down to 0."""

    start: float
    power: float = 1.5

    def __call__(self, progress: float) -> float:
        return float(self.start * max(0.0, 1.0 - progress) ** self.power)


__all__ = ["PolynomialDecay", "WarmUp", "progress_of"]
