"""nnUNetTrainerDSP_5epochs: nnUNetTrainerDSP for 5 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_5epochs(nnUNetTrainerDSP):
    """nnUNetTrainerDSP for 5 epochs."""

    training_epochs = 5


__all__ = ["nnUNetTrainerDSP_5epochs"]
