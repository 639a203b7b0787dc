"""nnUNetTrainerDSP_demo: nnUNetTrainerDSP for `make demo`."""

from nnunet_dsp.trainers.demo_schedule import DemoSchedule
from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_demo(DemoSchedule, nnUNetTrainerDSP):
    """nnUNetTrainerDSP for 900 iterations."""


__all__ = ["nnUNetTrainerDSP_demo"]
