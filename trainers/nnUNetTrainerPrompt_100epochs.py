"""nnUNetTrainerPrompt_100epochs: nnUNetTrainerPrompt for 100 epochs."""

from nnunet_dsp.trainers.nnUNetTrainerPrompt import nnUNetTrainerPrompt


class nnUNetTrainerPrompt_100epochs(nnUNetTrainerPrompt):
    """nnUNetTrainerPrompt for 100 epochs."""

    training_epochs = 100


__all__ = ["nnUNetTrainerPrompt_100epochs"]
