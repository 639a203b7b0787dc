"""PromptSettings: every option of the prompt trainers, kept in the plans that travel with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nnunet_dsp.settings_base import number, one_of, settings_from_plans, whole_number

PROMPT_PLANS_KEY = "nnunet_dsp_prompt"


@dataclass(frozen=True)
class PromptSettings:
    """Options of nnUNetTrainerPrompt. A ``"nnunet_dsp_prompt": {...}`` entry in the plans overrides the trainer's own.

    Attributes:
        embedding_channels: length of a voxel's embedding; 0 takes the features of the network's last stage as they
            are. (Then the network has the parameters of nnU-Net's own, and -pretrained_weights takes its checkpoints.)
        similarity: "cosine", or "dot" for the plain dot product of the released code.
        temperature: divisor of the similarities.
        variant: "default", or "released": a cross entropy that takes the votes, which are probabilities, for logits.
        window: edge of a prompt window in voxels of the preprocessed image, at most the patch; 0 for the whole patch.
        max_windows: how many windows there may be; further ones are added only for classes the first do not show.
        margin: voxels shown to the network around a window, at least; none of them is a key.
        max_keys: keys drawn in a training step, evenly over the classes.
        key_groups: blocks of voxels take turns at this many groups of a step's keys; 1: all voxels see all of them; 0:
            1 on a GPU and 8 on a CPU.
        max_keys_prediction: keys used in prediction, always the same.
        one_shot_case: the case nnUNetTrainerPromptOneShot trains on; "": the first that is not the prompt's.
    """

    embedding_channels: int = 16
    similarity: str = "cosine"
    temperature: float = 0.1
    variant: str = "default"
    window: int = 64
    max_windows: int = 4
    margin: int = 32
    max_keys: int = 1024
    key_groups: int = 0
    max_keys_prediction: int = 1024
    one_shot_case: str = ""

    def __post_init__(self) -> None:
        one_of("similarity", self.similarity, ("cosine", "dot"))
        one_of("variant", self.variant, ("default", "released"))
        for name in ("embedding_channels", "window", "margin", "key_groups"):
            whole_number(name, getattr(self, name), 0)
        for name in ("max_windows", "max_keys", "max_keys_prediction"):
            whole_number(name, getattr(self, name), 1)
        number("temperature", self.temperature)
        if self.temperature <= 0:
            raise ValueError(f"Expected setting `temperature` to be above 0, but got {self.temperature}.")
        if not isinstance(self.one_shot_case, str):
            raise ValueError(f"Expected setting `one_shot_case` to be the name of a case, got {self.one_shot_case!r}.")

    @classmethod
    def from_plans(
        cls, plans: Mapping[str, Any], default: PromptSettings | None = None, *, strict: bool = True
    ) -> PromptSettings:
        """The settings in a plans dictionary; see settings_from_plans()."""
        return settings_from_plans(cls, PROMPT_PLANS_KEY, plans, default, strict=strict)

    def to_plans(self) -> dict[str, Any]:
        return asdict(self)
