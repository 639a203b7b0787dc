"""nnUNetTrainerCRAC_entropyFilter: nnUNetTrainerCRAC without its most uncertain pseudo-labels."""

from nnunet_dsp.instances.settings import CRACSettings
from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC


class nnUNetTrainerCRAC_entropyFilter(nnUNetTrainerCRAC):
    """nnUNetTrainerCRAC without the most uncertain pseudo-labels of each batch, 20 % at first, then ever fewer."""

    default_settings = CRACSettings(entropy_filter=True)


__all__ = ["nnUNetTrainerCRAC_entropyFilter"]
