"""nnUNetTrainerDSP_noPseudoLabels: nnUNetTrainerDSP without pseudo-labels."""

from nnunet_dsp.settings import DSPSettings
from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_noPseudoLabels(nnUNetTrainerDSP):
    """nnUNetTrainerDSP without pseudo-labels."""

    default_settings = DSPSettings(pseudo_label_weight=0.0)


__all__ = ["nnUNetTrainerDSP_noPseudoLabels"]
