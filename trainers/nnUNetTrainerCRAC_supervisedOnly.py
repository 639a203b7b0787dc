"""nnUNetTrainerCRAC_supervisedOnly: nnUNetTrainerCRAC on labelled edges only: no consistency, no pseudo-labels."""

from nnunet_dsp.instances.settings import CRACSettings
from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC


class nnUNetTrainerCRAC_supervisedOnly(nnUNetTrainerCRAC):
    """nnUNetTrainerCRAC on labelled edges only: no consistency, no pseudo-labels."""

    default_settings = CRACSettings(consistency_weight=0.0)


__all__ = ["nnUNetTrainerCRAC_supervisedOnly"]
