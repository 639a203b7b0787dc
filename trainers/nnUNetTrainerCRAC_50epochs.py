"""nnUNetTrainerCRAC_50epochs: nnUNetTrainerCRAC for 50 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC


class nnUNetTrainerCRAC_50epochs(nnUNetTrainerCRAC):
    """nnUNetTrainerCRAC for 50 epochs."""

    training_epochs = 50


__all__ = ["nnUNetTrainerCRAC_50epochs"]
