"""nnUNetTrainerCRAC_250epochs: nnUNetTrainerCRAC for 250 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC


class nnUNetTrainerCRAC_250epochs(nnUNetTrainerCRAC):
    """nnUNetTrainerCRAC for 250 epochs."""

    training_epochs = 250


__all__ = ["nnUNetTrainerCRAC_250epochs"]
