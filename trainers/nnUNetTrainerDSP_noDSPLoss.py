"""nnUNetTrainerDSP_noDSPLoss: nnUNetTrainerDSP without the four DSP losses."""

from nnunet_dsp.settings import DSPSettings
from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_noDSPLoss(nnUNetTrainerDSP):
    """nnUNetTrainerDSP without the four DSP losses."""

    default_settings = DSPSettings(dsp_weight=0.0)


__all__ = ["nnUNetTrainerDSP_noDSPLoss"]
