"""nnUNetTrainerCRAC_20epochs: nnUNetTrainerCRAC for 20 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC


class nnUNetTrainerCRAC_20epochs(nnUNetTrainerCRAC):
    """nnUNetTrainerCRAC for 20 epochs."""

    training_epochs = 20


__all__ = ["nnUNetTrainerCRAC_20epochs"]
