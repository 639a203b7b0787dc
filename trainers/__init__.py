"""The trainers that nnU-Net finds by name; one module each, each overriding one thing."""

from nnunet_dsp.trainers.nnUNetTrainer_benchmark import nnUNetTrainer_benchmark
from nnunet_dsp.trainers.nnUNetTrainer_demo import nnUNetTrainer_demo
from nnunet_dsp.trainers.nnUNetTrainerCRAC import nnUNetTrainerCRAC
from nnunet_dsp.trainers.nnUNetTrainerCRAC_20epochs import nnUNetTrainerCRAC_20epochs
from nnunet_dsp.trainers.nnUNetTrainerCRAC_50epochs import nnUNetTrainerCRAC_50epochs
from nnunet_dsp.trainers.nnUNetTrainerCRAC_100epochs import nnUNetTrainerCRAC_100epochs
from nnunet_dsp.trainers.nnUNetTrainerCRAC_250epochs import nnUNetTrainerCRAC_250epochs
from nnunet_dsp.trainers.nnUNetTrainerCRAC_entropyFilter import nnUNetTrainerCRAC_entropyFilter
from nnunet_dsp.trainers.nnUNetTrainerCRAC_errorPredictor import nnUNetTrainerCRAC_errorPredictor
from nnunet_dsp.trainers.nnUNetTrainerCRAC_released import nnUNetTrainerCRAC_released
from nnunet_dsp.trainers.nnUNetTrainerCRAC_softPseudoLabels import nnUNetTrainerCRAC_softPseudoLabels
from nnunet_dsp.trainers.nnUNetTrainerCRAC_supervisedOnly import nnUNetTrainerCRAC_supervisedOnly
from nnunet_dsp.trainers.nnUNetTrainerDSP import nnUNetTrainerDSP
from nnunet_dsp.trainers.nnUNetTrainerDSP_1epoch import nnUNetTrainerDSP_1epoch
from nnunet_dsp.trainers.nnUNetTrainerDSP_5epochs import nnUNetTrainerDSP_5epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_10epochs import nnUNetTrainerDSP_10epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_20epochs import nnUNetTrainerDSP_20epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_50epochs import nnUNetTrainerDSP_50epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_100epochs import nnUNetTrainerDSP_100epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_250epochs import nnUNetTrainerDSP_250epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_500epochs import nnUNetTrainerDSP_500epochs
from nnunet_dsp.trainers.nnUNetTrainerDSP_benchmark import nnUNetTrainerDSP_benchmark
from nnunet_dsp.trainers.nnUNetTrainerDSP_demo import nnUNetTrainerDSP_demo
from nnunet_dsp.trainers.nnUNetTrainerDSP_noDSPLoss import nnUNetTrainerDSP_noDSPLoss
from nnunet_dsp.trainers.nnUNetTrainerDSP_noPseudoLabels import nnUNetTrainerDSP_noPseudoLabels
from nnunet_dsp.trainers.nnUNetTrainerDSP_released import nnUNetTrainerDSP_released
from nnunet_dsp.trainers.nnUNetTrainerDSP_standardHead import nnUNetTrainerDSP_standardHead
from nnunet_dsp.trainers.nnUNetTrainerPrompt import nnUNetTrainerPrompt
from nnunet_dsp.trainers.nnUNetTrainerPrompt_100epochs import nnUNetTrainerPrompt_100epochs
from nnunet_dsp.trainers.nnUNetTrainerPrompt_250epochs import nnUNetTrainerPrompt_250epochs
from nnunet_dsp.trainers.nnUNetTrainerPrompt_benchmark import nnUNetTrainerPrompt_benchmark
from nnunet_dsp.trainers.nnUNetTrainerPrompt_released import nnUNetTrainerPrompt_released
from nnunet_dsp.trainers.nnUNetTrainerPromptOneShot import nnUNetTrainerPromptOneShot
from nnunet_dsp.trainers.nnUNetTrainerPromptOneShot_100epochs import nnUNetTrainerPromptOneShot_100epochs
from nnunet_dsp.trainers.nnUNetTrainerPromptOneShot_250epochs import nnUNetTrainerPromptOneShot_250epochs
from nnunet_dsp.trainers.nnUNetTrainerPromptOneShot_benchmark import nnUNetTrainerPromptOneShot_benchmark

__all__ = [
    "nnUNetTrainerCRAC",
    "nnUNetTrainerCRAC_100epochs",
    "nnUNetTrainerCRAC_20epochs",
    "nnUNetTrainerCRAC_250epochs",
    "nnUNetTrainerCRAC_50epochs",
    "nnUNetTrainerCRAC_entropyFilter",
    "nnUNetTrainerCRAC_errorPredictor",
    "nnUNetTrainerCRAC_released",
    "nnUNetTrainerCRAC_softPseudoLabels",
    "nnUNetTrainerCRAC_supervisedOnly",
    "nnUNetTrainerDSP",
    "nnUNetTrainerDSP_100epochs",
    "nnUNetTrainerDSP_10epochs",
    "nnUNetTrainerDSP_1epoch",
    "nnUNetTrainerDSP_20epochs",
    "nnUNetTrainerDSP_250epochs",
    "nnUNetTrainerDSP_500epochs",
    "nnUNetTrainerDSP_50epochs",
    "nnUNetTrainerDSP_5epochs",
    "nnUNetTrainerDSP_benchmark",
    "nnUNetTrainerDSP_demo",
    "nnUNetTrainerDSP_noDSPLoss",
    "nnUNetTrainerDSP_noPseudoLabels",
    "nnUNetTrainerDSP_released",
    "nnUNetTrainerDSP_standardHead",
    "nnUNetTrainerPrompt",
    "nnUNetTrainerPromptOneShot",
    "nnUNetTrainerPromptOneShot_100epochs",
    "nnUNetTrainerPromptOneShot_250epochs",
    "nnUNetTrainerPromptOneShot_benchmark",
    "nnUNetTrainerPrompt_100epochs",
    "nnUNetTrainerPrompt_250epochs",
    "nnUNetTrainerPrompt_benchmark",
    "nnUNetTrainerPrompt_released",
    "nnUNetTrainer_benchmark",
    "nnUNetTrainer_demo",
]
