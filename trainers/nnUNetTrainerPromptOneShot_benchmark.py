"""nnUNetTrainerPromptOneShot_benchmark: nnUNetTrainerPromptOneShot for as long as the plans say."""

from nnunet_dsp.trainers.benchmark_schedule import BenchmarkSchedule
from nnunet_dsp.trainers.nnUNetTrainerPromptOneShot import nnUNetTrainerPromptOneShot


class nnUNetTrainerPromptOneShot_benchmark(BenchmarkSchedule, nnUNetTrainerPromptOneShot):
    """nnUNetTrainerPromptOneShot for as long as the plans say."""


__all__ = ["nnUNetTrainerPromptOneShot_benchmark"]
