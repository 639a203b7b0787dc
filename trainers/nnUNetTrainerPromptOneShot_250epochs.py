"""nnUNetTrainerPromptOneShot_250epochs: nnUNetTrainerPromptOneShot for 250 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerPromptOneShot import nnUNetTrainerPromptOneShot


class nnUNetTrainerPromptOneShot_250epochs(nnUNetTrainerPromptOneShot):
    """nnUNetTrainerPromptOneShot for 250 epochs."""

    training_epochs = 250


__all__ = ["nnUNetTrainerPromptOneShot_250epochs"]
