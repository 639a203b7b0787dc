"""nnUNetTrainerCRAC_errorPredictor: nnUNetTrainerCRAC with an error predictor."""

from nnunet_dsp.instances.settings import CRACSettings
from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC


class nnUNetTrainerCRAC_errorPredictor(nnUNetTrainerCRAC):
    """nnUNetTrainerCRAC with a third network that predicts errors, which filters beside the entropy."""

    default_settings = CRACSettings(entropy_filter=True, error_filter=True)


__all__ = ["nnUNetTrainerCRAC_errorPredictor"]
