"""nnUNetTrainerPrompt_benchmark: nnUNetTrainerPrompt for as long as the plans say."""

from nnunet_dsp.trainers.benchmark_schedule import BenchmarkSchedule
from nnunet_dsp.trainers.nnUNetTrainerPrompt import nnUNetTrainerPrompt


class nnUNetTrainerPrompt_benchmark(BenchmarkSchedule, nnUNetTrainerPrompt):
    """nnUNetTrainerPrompt for as long as the plans say."""


__all__ = ["nnUNetTrainerPrompt_benchmark"]
