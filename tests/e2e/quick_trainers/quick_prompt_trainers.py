"""The prompt trainers with so few iterations that a test can wait for them; see quick_trainers.py beside this."""

import os
import signal

from nnunet_dsp.trainers import nnUNetTrainerPrompt, nnUNetTrainerPromptOneShot


class QuickPrompt:
    """Mixin: two epochs of three iterations, a checkpoint after each."""

    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = 2, 3, 1, 1
        super().initialize()

    def on_train_epoch_start(self):
        if self.current_epoch == 1 and os.environ.get("DIE"):
            os.kill(os.getpid(), signal.SIGKILL)  # as a job whose time is up
        super().on_train_epoch_start()


class nnUNetTrainerPrompt_quick(QuickPrompt, nnUNetTrainerPrompt):
    """nnUNetTrainerPrompt for six iterations."""


class nnUNetTrainerPromptOneShot_quick(QuickPrompt, nnUNetTrainerPromptOneShot):
    """nnUNetTrainerPromptOneShot for six iterations."""
