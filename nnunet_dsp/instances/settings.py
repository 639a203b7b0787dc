"""CRACSettings: what a user may want to change about nnUNetTrainerCRAC, kept in the plans beside the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nnunet_dsp.settings_base import one_of, settings_from_plans, whole_number

PLANS_KEY = "nnunet_dsp_crac"


@dataclass(frozen=True)
class CRACSettings:
    """Options of nnUNetTrainerCRAC. A ``"nnunet_dsp_crac": {...}`` entry in the plans file overrides the trainer's own.

    Attributes:
        offsets: voxels per axis (z, y, x or y, x), in the plans' axis order; None derives them from patch and spacing.
        embedding_channels: width of the embedding whose cosines are the implicit affinities.
        supervised_weight: weight of the two losses on labelled edges.
        short_weight: weight of the offsets of one voxel against the longer ones.
        foreground_weight: weight of the foreground's cross entropy, where background is labelled somewhere.
        consistency_weight: weight of the two losses against the other network's pseudo-labels; 0 switches them off.
            Every loss is a mean over the edges that count in it. The authors' are means over all voxels, so that the
            fewer edges are labelled, the less these weigh: their 1 to 10 amounts to 9 to 10 with a tenth labelled.
        warmup: share of the training, in [0, 1], before pseudo-labels are used.
        pseudo_labels: "hard" (0 or 1, whichever the other network's affinity is nearer to) or "soft" (that affinity).
        entropy_filter: drop the most uncertain pseudo-labels of a batch.
        entropy_share: how many of them at first, in [0, 1]; decays to 0 with the power `entropy_power`.
        error_filter: train a third, small network to predict errors, and drop the pseudo-labels it takes for wrong.
        error_gate: share of the training before it is asked, if `warmup` is not longer.
        complete_instances: a labelled instance is labelled completely; False for strokes and other parts.
        background_known: edges between two background voxels are supervised, with target 0.
        released: the authors' code in two of its oddities: pseudo-labels carry gradients, and the short offsets' weight
            counts twice in the implicit affinities' consistency.
        min_size: voxels of the network's grid below which prediction leaves an instance out; None takes the size that
            all but 5 % of the labelled training instances reach, but at most a quarter of their median.
        optimizer: "adam" (rate 1e-3, decaying), "released" (Adam as the authors have it: 1e-4 throughout, eps 0.01,
            amsgrad) or "sgd" (nnU-Net's own).
        epochs, iterations_per_epoch: length of the training; 0 keeps nnU-Net's.
        seed: None, or a number from which the networks' first weights follow.
    """

    offsets: Sequence[Sequence[int]] | None = None
    embedding_channels: int = 16
    supervised_weight: float = 10.0
    short_weight: float = 10.0
    foreground_weight: float = 1.0
    consistency_weight: float = 10.0
    warmup: float = 0.1
    pseudo_labels: str = "hard"
    entropy_filter: bool = False
    entropy_share: float = 0.2
    entropy_power: float = 1.5
    error_filter: bool = False
    error_gate: float = 1 / 60
    complete_instances: bool = True
    background_known: bool = False
    released: bool = False
    min_size: int | None = None
    optimizer: str = "adam"
    epochs: int = 0
    iterations_per_epoch: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        one_of("pseudo_labels", self.pseudo_labels, ("soft", "hard"))
        one_of("optimizer", self.optimizer, ("adam", "released", "sgd"))
        for name in ("warmup", "entropy_share", "error_gate"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"Expected setting `{name}` to lie in [0, 1], but got {value}.")
        for name in ("supervised_weight", "short_weight", "foreground_weight", "consistency_weight", "entropy_power"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"Expected setting `{name}` to be a finite number of at least 0, but got {value}.")
        for name, least in (("embedding_channels", 2), ("epochs", 0), ("iterations_per_epoch", 0)):
            whole_number(name, getattr(self, name), least)
        if self.min_size is not None:
            whole_number("min_size", self.min_size, 0)
        if self.seed is not None:
            whole_number("seed", self.seed, 0)

    @classmethod
    def from_plans(
        cls, plans: Mapping[str, Any], default: CRACSettings | None = None, *, strict: bool = True
    ) -> CRACSettings:
        """The settings in a plans dictionary; see settings_from_plans()."""
        return settings_from_plans(cls, PLANS_KEY, plans, default, strict=strict)

    def to_plans(self) -> dict[str, Any]:
        """As JSON has it; offsets as lists."""
        plain = asdict(self)
        if self.offsets is not None:
            plain["offsets"] = [list(offset) for offset in self.offsets]
        return plain


__all__ = ["PLANS_KEY", "CRACSettings"]
