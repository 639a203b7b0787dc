"""nnUNetTrainerDSP_10epochs: nnUNetTrainerDSP for 10 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_10epochs(nnUNetTrainerDSP):
    """nnUNetTrainerDSP for 10 epochs."""

    training_epochs = 10


__all__ = ["nnUNetTrainerDSP_10epochs"]
