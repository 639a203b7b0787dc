"""nnUNetTrainerCRAC_unfiltered: nnUNetTrainerCRAC with every pseudo-label, however uncertain."""

from nnunet_dsp.instances.settings import CRACSettings
from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC


class nnUNetTrainerCRAC_unfiltered(nnUNetTrainerCRAC):
    """nnUNetTrainerCRAC with every pseudo-label, however uncertain."""

    default_settings = CRACSettings(entropy_filter=False)


__all__ = ["nnUNetTrainerCRAC_unfiltered"]
