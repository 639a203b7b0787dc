"""nnUNetTrainerPrompt_released: nnUNetTrainerPrompt with what the authors' released code does and is cheap to have."""

from nnunet_dsp.prompt_settings import PromptSettings
from nnunet_dsp.trainers.nnUNetTrainerPrompt import nnUNetTrainerPrompt


class nnUNetTrainerPrompt_released(nnUNetTrainerPrompt):
    """nnUNetTrainerPrompt with embeddings of two channels, their plain dot product, and the loss on probabilities."""

    default_settings = PromptSettings(variant="released", embedding_channels=2, similarity="dot", temperature=1.0)


__all__ = ["nnUNetTrainerPrompt_released"]
