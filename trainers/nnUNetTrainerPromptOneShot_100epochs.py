"""nnUNetTrainerPromptOneShot_100epochs: nnUNetTrainerPromptOneShot for 100 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerPromptOneShot import nnUNetTrainerPromptOneShot


class nnUNetTrainerPromptOneShot_100epochs(nnUNetTrainerPromptOneShot):
    """nnUNetTrainerPromptOneShot for 100 epochs."""

    training_epochs = 100


__all__ = ["nnUNetTrainerPromptOneShot_100epochs"]
