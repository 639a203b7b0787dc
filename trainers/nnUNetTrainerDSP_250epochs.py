"""nnUNetTrainerDSP_250epochs: nnUNetTrainerDSP for 250 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_250epochs(nnUNetTrainerDSP):
    """nnUNetTrainerDSP for 250 epochs."""

    training_epochs = 250


__all__ = ["nnUNetTrainerDSP_250epochs"]
