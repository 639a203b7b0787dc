"""nnUNetTrainerCRAC_softPseudoLabels: nnUNetTrainerCRAC with pseudo-labels between 0 and 1."""

from nnunet_dsp.instances.settings import CRACSettings
from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC


class nnUNetTrainerCRAC_softPseudoLabels(nnUNetTrainerCRAC):
    """nnUNetTrainerCRAC whose pseudo-labels are the other network's affinities, not 0 or 1."""

    default_settings = CRACSettings(pseudo_labels="soft")


__all__ = ["nnUNetTrainerCRAC_softPseudoLabels"]
