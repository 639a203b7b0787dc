"""nnUNetTrainer_demo: nnU-Net's own trainer, as long as nnUNetTrainerDSP_demo, for comparison in `make demo`."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dsp.trainers.demo_schedule import DemoSchedule


class nnUNetTrainer_demo(DemoSchedule, nnUNetTrainer):
    """nnUNetTrainer for 900 iterations."""


__all__ = ["nnUNetTrainer_demo"]
