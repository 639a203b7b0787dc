"""nnUNetTrainerDSP_20epochs: nnUNetTrainerDSP for 20 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_20epochs(nnUNetTrainerDSP):
    """nnUNetTrainerDSP for 20 epochs."""

    training_epochs = 20


__all__ = ["nnUNetTrainerDSP_20epochs"]
