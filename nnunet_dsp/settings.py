"""DSPSettings: every number a user may want to change, in one place, kept in the plans that travel with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nnunet_dsp.settings_base import number, one_of, settings_from_plans, whole_number

PLANS_KEY = "nnunet_dsp"


@dataclass(frozen=True)
class DSPSettings:
    """Options of nnUNetTrainerDSP. A ``"nnunet_dsp": {...}`` entry in the plans file overrides the trainer's own.

    Attributes:
        head: "prototype" (the DSP head in place of the last layer) or "standard" (nnU-Net's last layer).
        num_prototypes: prototypes per class.
        embedding_channels: width of the embedding; 0 lets the head choose by its input.
        temperature: divisor of the cosine similarities.
        variant: "default", or "released" for the losses of the authors' code.
        dsp_weight: weight of the sum of the four DSP losses when training begins.
        dsp_schedule: "linear": that weight falls to 0 by the end of the training; "constant": it stays.
        image_weight, box_weight, point_weight, mask_weight: of the four among themselves; 0 switches one off.
        pseudo_label_weight: weight of the loss against the filtered pseudo-label; 0 switches it off.
        pseudo_label_loss: "nnunet": nnU-Net's own loss (Dice and cross entropy, on all outputs), with the pseudo-labels
            of the items without mask in the mask's place, and cross entropy where a mask leaves voxels open;
            "cross_entropy": that alone, everywhere.
        pseudo_labels_in_boxes: "boxed": inside a box a pseudo-label counts only if it is of a class that has boxes
            there; "all": every pseudo-label counts.
        pseudo_label_warmup: share of the training, in [0, 1], whose batches hold masked cases only, if there are any;
            pseudo-labels and the marginal cross entropy are used after it. Without any masked case, the marginal cross
            entropy is used from the start; so it is where masks of some classes (`mask_labels`) leave voxels blank.
        marginal_weight: weight of the marginal cross entropy: where there is neither a mask nor a pseudo-label that
            counts, the classes that tags, complete boxes, points and partial masks rule out share no probability.
            0 switches it off.
        masked_fraction: share of a batch drawn from masked cases after the warm-up, in [0, 1], where there are weak
            ones too.
        prototypes_from_prompt: the prototypes start as what the labelled voxels of a prompt look like to the network,
            instead of in random directions. Worth it with -pretrained_weights. Which prompt: as for
            nnUNetTrainerPrompt ("prompt" in dataset.json, "nnunet_dsp_prompt" in the plans).
        seed: None for nnU-Net's own unseeded training; else training is repeatable on the same hardware.
    """

    head: str = "prototype"
    num_prototypes: int = 5
    embedding_channels: int = 0
    temperature: float = 0.05
    variant: str = "default"
    dsp_weight: float = 0.03
    dsp_schedule: str = "linear"
    image_weight: float = 1.0
    box_weight: float = 1.0
    point_weight: float = 1.0
    mask_weight: float = 1.0
    pseudo_label_weight: float = 1.0
    pseudo_label_loss: str = "nnunet"
    pseudo_labels_in_boxes: str = "boxed"
    pseudo_label_warmup: float = 0.25
    marginal_weight: float = 1.0
    masked_fraction: float = 0.5
    prototypes_from_prompt: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        one_of("head", self.head, ("prototype", "standard"))
        one_of("dsp_schedule", self.dsp_schedule, ("linear", "constant"))
        one_of("variant", self.variant, ("default", "released"))
        one_of("pseudo_label_loss", self.pseudo_label_loss, ("nnunet", "cross_entropy"))
        one_of("pseudo_labels_in_boxes", self.pseudo_labels_in_boxes, ("boxed", "all"))
        for name in ("pseudo_label_warmup", "masked_fraction"):
            number(name, getattr(self, name))
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Expected setting `{name}` to lie in [0, 1], but got {getattr(self, name)}.")
        for field in fields(self):
            if field.name.endswith("_weight"):
                number(field.name, getattr(self, field.name))
                if getattr(self, field.name) < 0:
                    raise ValueError(
                        f"Expected setting `{field.name}` to be at least 0, but got {getattr(self, field.name)}."
                    )
        whole_number("num_prototypes", self.num_prototypes, 1)
        whole_number("embedding_channels", self.embedding_channels, 0)
        number("temperature", self.temperature)
        if self.temperature <= 0:
            raise ValueError(f"Expected setting `temperature` to be above 0, but got {self.temperature}.")
        if self.seed is not None:
            whole_number("seed", self.seed, 0)
        if not isinstance(self.prototypes_from_prompt, bool):
            raise ValueError(
                f"Expected setting `prototypes_from_prompt` to be true or false, got {self.prototypes_from_prompt!r}."
            )
        if self.prototypes_from_prompt and self.head != "prototype":
            raise ValueError(
                f'Setting `prototypes_from_prompt` goes with `head` "prototype", but `head` is {self.head!r}: that is '
                "nnU-Net's own last layer, which has no prototypes. Leave one of the two out."
            )

    @classmethod
    def from_plans(
        cls, plans: Mapping[str, Any], default: DSPSettings | None = None, *, strict: bool = True
    ) -> DSPSettings:
        """The settings in a plans dictionary; what it leaves out comes from `default`.

        Args:
            strict: refuse unknown names. Prediction passes over them: a model of another version still is a model.

        Raises:
            ValueError: an unknown name or an impossible value.
        """
        return settings_from_plans(cls, PLANS_KEY, plans, default, strict=strict)

    def to_plans(self) -> dict[str, Any]:
        return asdict(self)
