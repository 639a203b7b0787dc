"""nnUNetTrainerDSP_benchmark: nnUNetTrainerDSP, as long as the plans say, for `nnunet_dsp benchmark accuracy`."""

from nnunet_dsp.trainers.benchmark_schedule import BenchmarkSchedule
from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_benchmark(BenchmarkSchedule, nnUNetTrainerDSP):
    """nnUNetTrainerDSP for as long as the plans say."""


__all__ = ["nnUNetTrainerDSP_benchmark"]
