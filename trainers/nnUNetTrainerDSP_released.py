"""nnUNetTrainerDSP_released: nnUNetTrainerDSP with the losses of the authors' released code."""

from nnunet_dsp.settings import DSPSettings
from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP


class nnUNetTrainerDSP_released(nnUNetTrainerDSP):
    """nnUNetTrainerDSP with the losses of the authors' released code."""

    default_settings = DSPSettings(
        variant="released",
        dsp_weight=0.1,
        dsp_schedule="constant",
        pseudo_label_loss="cross_entropy",
        pseudo_labels_in_boxes="all",
    )


__all__ = ["nnUNetTrainerDSP_released"]
