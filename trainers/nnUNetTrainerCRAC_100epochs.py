"""nnUNetTrainerCRAC_100epochs: nnUNetTrainerCRAC for 100 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC


class nnUNetTrainerCRAC_100epochs(nnUNetTrainerCRAC):
    """nnUNetTrainerCRAC for 100 epochs."""

    training_epochs = 100


__all__ = ["nnUNetTrainerCRAC_100epochs"]
