"""nnUNetTrainerCRAC with so few iterations that a test can wait for it."""

from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC


class nnUNetTrainerCRAC_quick(nnUNetTrainerCRAC):
    """nnUNetTrainerCRAC for six iterations."""

    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = 2, 3, 1, 1
        super().initialize()
