"""nnUNetTrainerDSP_500epochs: nnUNetTrainerDSP for 500 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_500epochs(nnUNetTrainerDSP):
    """nnUNetTrainerDSP for 500 epochs."""

    training_epochs = 500


__all__ = ["nnUNetTrainerDSP_500epochs"]
