"""nnUNetTrainerCRAC_released: nnUNetTrainerCRAC after the released code."""

from nnunet_dsp.instances.settings import CRACSettings
from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC


class nnUNetTrainerCRAC_released(nnUNetTrainerCRAC):
    """nnUNetTrainerCRAC in the oddities and with the optimiser of the authors' code, as far as they are
    cheap to have.
    """

    default_settings = CRACSettings(
        released=True,
        pseudo_labels="soft",
        entropy_filter=True,
        entropy_share=0.005,
        warmup=0.0,
        optimizer="released",
    )


__all__ = ["nnUNetTrainerCRAC_released"]
