"""nnUNetTrainerDSP_1epoch: nnUNetTrainerDSP for 1 epoch."""

from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_1epoch(nnUNetTrainerDSP):
    """nnUNetTrainerDSP for 1 epoch."""

    training_epochs = 1


__all__ = ["nnUNetTrainerDSP_1epoch"]
