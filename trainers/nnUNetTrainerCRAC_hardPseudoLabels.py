"""nnUNetTrainerCRAC_hardPseudoLabels: nnUNetTrainerCRAC with pseudo-labels of 0 or 1."""

from nnunet_dsp.instances.settings import CRACSettings
from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC


class nnUNetTrainerCRAC_hardPseudoLabels(nnUNetTrainerCRAC):
    """nnUNetTrainerCRAC with pseudo-labels of 0 or 1."""

    default_settings = CRACSettings(pseudo_labels="hard")


__all__ = ["nnUNetTrainerCRAC_hardPseudoLabels"]
