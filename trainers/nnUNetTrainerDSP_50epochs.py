"""nnUNetTrainerDSP_50epochs: nnUNetTrainerDSP for 50 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_50epochs(nnUNetTrainerDSP):
    """nnUNetTrainerDSP for 50 epochs."""

    training_epochs = 50


__all__ = ["nnUNetTrainerDSP_50epochs"]
