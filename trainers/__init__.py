"""The trainers that nnU-Net finds by name; one module each, each overriding one thing."""

from nnunet_dsp.trainers.nnUNetTrainer_demo import nnUNetTrainer_demo
from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP
from nnunet_dsp.trainers.nnUNetTrainerDSP_1epoch import nnUNetTrainerDSP_1epoch
from nnunet_dsp.trainers.nnUNetTrainerDSP_5epochs import nnUNetTrainerDSP_5epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_10epochs import nnUNetTrainerDSP_10epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_20epochs import nnUNetTrainerDSP_20epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_50epochs import nnUNetTrainerDSP_50epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_100epochs import nnUNetTrainerDSP_100epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_250epochs import nnUNetTrainerDSP_250epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_500epochs import nnUNetTrainerDSP_500epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_demo import nnUNetTrainerDSP_demo
from nnunet_dsp.trainers.nnUNetTrainerDSP_noDSPLoss import nnUNetTrainerDSP_noDSPLoss
from nnunet_dsp.trainers.nnUNetTrainerDSP_noPseudoLabels import nnUNetTrainerDSP_noPseudoLabels
from nnunet_dsp.trainers.nnUNetTrainerDSP_released import nnUNetTrainerDSP_released
from nnunet_dsp.trainers.nnUNetTrainerDSP_standardHead import nnUNetTrainerDSP_standardHead

__all__ = [
    "nnUNetTrainerDSP",
    "nnUNetTrainerDSP_100epochs",
    "nnUNetTrainerDSP_10epochs",
    "nnUNetTrainerDSP_1epoch",
    "nnUNetTrainerDSP_20epochs",
    "nnUNetTrainerDSP_250epochs",
    "nnUNetTrainerDSP_500epochs",
    "nnUNetTrainerDSP_50epochs",
    "nnUNetTrainerDSP_5epochs",
    "nnUNetTrainerDSP_demo",
    "nnUNetTrainerDSP_noDSPLoss",
    "nnUNetTrainerDSP_noPseudoLabels",
    "nnUNetTrainerDSP_released",
    "nnUNetTrainerDSP_standardHead",
    "nnUNetTrainer_demo",
]
