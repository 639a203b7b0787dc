"""Trainers for the end-to-end tests: the real ones, with so few iterations that a test can wait for them."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dsp.trainers import nnUNetTrainerDSP


class Quick:
    """Mixin: two epochs of three iterations, a checkpoint after each."""

    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = 2, 3, 1, 1
        super().initialize()


class nnUNetTrainerDSP_quick(Quick, nnUNetTrainerDSP):
    """nnUNetTrainerDSP for six iterations."""


class nnUNetTrainer_quick(Quick, nnUNetTrainer):
    """nnUNetTrainer for six iterations."""


class nnUNetTrainerDSP_killed(nnUNetTrainerDSP_quick):
    """Dies in its second epoch unless told to live, as a job whose time is up."""

    def on_train_epoch_start(self):
        import os
        import signal

        if self.current_epoch == 1 and not os.environ.get("SURVIVE"):
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_train_epoch_start()
