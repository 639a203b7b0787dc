"""nnUNetTrainerDSP_standardHead: nnUNetTrainerDSP with nnU-Net's own last layer."""

from nnunet_dsp.settings import DSPSettings
from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_standardHead(nnUNetTrainerDSP):
    """nnUNetTrainerDSP with nnU-Net's own last layer."""

    default_settings = DSPSettings(head="standard")


__all__ = ["nnUNetTrainerDSP_standardHead"]
