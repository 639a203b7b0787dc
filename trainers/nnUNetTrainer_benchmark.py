"""nnUNetTrainer_benchmark: nnU-Net's own trainer, as long as the plans say, for `nnunet_dsp benchmark accuracy`."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dsp.trainers.benchmark_schedule import BenchmarkSchedule


class nnUNetTrainer_benchmark(BenchmarkSchedule, nnUNetTrainer):
    """nnUNetTrainer for as long as the plans say."""


__all__ = ["nnUNetTrainer_benchmark"]
