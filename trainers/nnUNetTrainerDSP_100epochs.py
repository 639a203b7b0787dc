"""nnUNetTrainerDSP_100epochs: nnUNetTrainerDSP for 100 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_100epochs(nnUNetTrainerDSP):
    """nnUNetTrainerDSP for 100 epochs."""

    training_epochs = 100


__all__ = ["nnUNetTrainerDSP_100epochs"]
