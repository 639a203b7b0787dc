"""nnUNetTrainerPrompt_250epochs: nnUNetTrainerPrompt for 250 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerPrompt import nnUNetTrainerPrompt


class nnUNetTrainerPrompt_250epochs(nnUNetTrainerPrompt):
    """nnUNetTrainerPrompt for 250 epochs."""

    training_epochs = 250


__all__ = ["nnUNetTrainerPrompt_250epochs"]
