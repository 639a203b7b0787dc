"""The loss nnUNetTrainerDSP trains with: nnU-Net's own on the masks, DSP's on everything, pseudo-labels on the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.losses import dsp_losses
from nnunet_dsp.pseudo_labels import allowed_classes, box_cover
from nnunet_dsp.schedules import PolynomialDecay
from nnunet_dsp.set_losses import SetLosses, set_losses
from nnunet_dsp.settings import DSPSettings

TERMS = ("mask_loss", "dsp_image", "dsp_box", "dsp_point", "dsp_mask", "pseudo_label", "marginal")


class BatchKnowledge(NamedTuple):
    """What a training batch brings beside images and targets; see DSPDataLoader."""

    annotations: AnnotationBatch
    num_masked: int
    components: Tensor | None = None
    num_components: int = 0


class CombinedLoss(nn.Module):
    """nnU-Net's loss on the masks, plus the weighted DSP losses, pseudo-label loss and marginal cross entropy.

    The signature is that of nnU-Net's losses, so that nnU-Net's own training and validation steps call it. What else
    a batch says is put into `knowledge` beforehand; without it (in validation) this is nnU-Net's loss and nothing else.

    The mask loss sees the masked items only: a Dice averaged over items would otherwise count each weak one as perfect.
    The others learn by the same loss from their pseudo-labels, once these are used. The DSP losses and the marginal
    cross entropy act on the full resolution only.

    Two weights depend on how far the training has come: see set_progress().

    Args:
        mask_loss: nnU-Net's, deep supervision included.
        settings: weights, schedules and variant.
        ignore_label: the dataset's, or None.
        gathers: the mask loss gathers each item's sums from all ranks (a Dice over the batch, with DDP). All ranks must
            then hand it as many items, so it gets the whole batch, `ignore` all over where an item is not meant; in
            a Dice over the batch these count for nothing.
    """

    def __init__(
        self, mask_loss: nn.Module, settings: DSPSettings, ignore_label: int | None, gathers: bool = False
    ) -> None:
        super().__init__()
        self.mask_loss = mask_loss
        self.settings = settings
        self.ignore_label = ignore_label
        self.gathers = gathers
        self.knowledge: BatchKnowledge | None = None
        self.warmed_up = False
        self.dsp_weight = settings.dsp_weight
        self.terms: Tensor | None = None

    def set_progress(self, progress: float) -> None:
        """End the warm-up of what pseudo-labels need, and lower the DSP losses' weight as `dsp_schedule` says.

        In the warm-up the masks teach: DSPDataLoader deals no other cases, unless there are none with masks. The
        marginal loss waits with the pseudo-labels: complete boxes make nearly all of a weak image background and say
        nothing of their inside, and a network that is taught so from the start finds no object for long. Batches
        without any masked item have it from the start; nothing else would teach.

        The evidence of a tag, a point or a box is that a class is there, never that it is not, so the DSP losses raise
        the share of annotated classes. That finds objects early, and makes them too large late: "linear" leaves the end
        of the training to masks and pseudo-labels.

        Args:
            progress: the share of the training that is done, in [0, 1].
        """
        self.warmed_up = progress >= self.settings.pseudo_label_warmup
        if self.settings.dsp_schedule == "linear":
            self.dsp_weight = PolynomialDecay(self.settings.dsp_weight, power=1)(progress)

    def forward(self, output: Tensor | list[Tensor], target: Tensor | list[Tensor]) -> Tensor:
        """
        Args:
            output: logits (B, C, *S), or with deep supervision a list of them, full resolution first.
            target: (B, 1, *S) class maps, likewise.

        Returns:
            The weighted sum. `terms` then holds the unweighted ones, detached, in the order of TERMS.
        """
        if self.knowledge is None:
            result: Tensor = self.mask_loss(output, target)
            return result
        annotations, num_masked, components, num_components = self.knowledge
        settings = self.settings
        logits = output[0] if isinstance(output, (list, tuple)) else output
        classes = (target[0] if isinstance(target, (list, tuple)) else target)[:, 0]
        num_weak = logits.shape[0] - num_masked
        use_pseudo_labels = self.warmed_up and settings.pseudo_label_weight > 0
        partial = annotations.partial if annotations.partial.numel() > 0 else None
        everywhere = self.warmed_up or num_masked == 0
        use_marginal = settings.marginal_weight > 0 and (everywhere or partial is not None)
        as_masks = use_pseudo_labels and settings.pseudo_label_loss == "nnunet" and self.ignore_label is not None
        of_sets: SetLosses | None = None
        mask_loss = self._loss_on_masks(output, target, num_masked)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            zero = logits.new_zeros(())
            allowed = allowed_classes(annotations, classes, logits.shape[1], logits.shape[2:], self.ignore_label)
            image = box = point = mask = pseudo = marginal = zero
            if self.dsp_weight > 0:
                image, box, point, mask = dsp_losses(
                    logits,
                    annotations,
                    target=classes,
                    components=components,
                    num_components=num_components,
                    allowed=allowed,
                    ignore_label=self.ignore_label,
                    variant=settings.variant,
                )
            if self.ignore_label is not None:
                unmasked = classes == self.ignore_label
                if annotations.outside.numel() > 0:
                    unmasked = unmasked & ~annotations.outside
                if not everywhere and partial is not None:
                    unmasked = unmasked & partial
                if use_marginal or use_pseudo_labels:
                    boxes = None
                    doubted = use_pseudo_labels and settings.pseudo_labels_in_boxes == "boxed"
                    if doubted and annotations.box_voxels.shape[0] > 0:
                        boxes = box_cover(annotations, logits.shape[1], logits.shape[2:])
                    first = num_weak if as_masks else 0
                    of_sets = set_losses(
                        logits, allowed, unmasked, boxes, first, apart=use_pseudo_labels, partial=partial
                    )
                    marginal = of_sets.marginal if use_marginal else zero
                    pseudo = of_sets.pseudo_label if use_pseudo_labels else zero
        if as_masks and of_sets is not None:
            pseudo = pseudo + self._loss_on_pseudo_labels(output, target, of_sets, num_weak)
        with torch.autocast(logits.device.type, enabled=False):
            dsp = (
                settings.image_weight * image
                + settings.box_weight * box
                + settings.point_weight * point
                + settings.mask_weight * mask
            )
            total = (
                mask_loss.float()
                + self.dsp_weight * dsp
                + settings.pseudo_label_weight * pseudo
                + settings.marginal_weight * marginal
            )
        self.terms = torch.stack([t.detach().float() for t in (mask_loss, image, box, point, mask, pseudo, marginal)])
        return total

    def _loss_on_pseudo_labels(
        self, output: Tensor | list[Tensor], target: Tensor | list[Tensor], of_sets: SetLosses, num_weak: int
    ) -> Tensor:
        """nnU-Net's loss on the items without mask, the first `num_weak`, with their pseudo-labels as targets."""
        outputs = list(output) if isinstance(output, (list, tuple)) else [output]
        dtype = (target[0] if isinstance(target, (list, tuple)) else target).dtype
        if num_weak == 0 and not (dist.is_available() and dist.is_initialized()):
            return outputs[0].new_zeros((), dtype=torch.float32)
        # Without weak items the whole batch goes in, blank: the value is constant, and DDP's gathering stays in step.
        number = outputs[0].shape[0] if self.gathers else num_weak or outputs[0].shape[0]
        counts = of_sets.counts[:number, None].clone()
        counts[num_weak:] = False
        full = torch.where(counts, of_sets.label[:number, None].float(), float(self.ignore_label or 0))
        shrunk = [F.interpolate(full, o.shape[2:], mode="nearest-exact").to(dtype) for o in outputs]  # as nnU-Net does
        outputs = [o[:number] for o in outputs]
        deep = isinstance(output, (list, tuple))
        result: Tensor = self.mask_loss(outputs, shrunk) if deep else self.mask_loss(outputs[0], shrunk[0])
        return result.float()

    def _loss_on_masks(
        self, output: Tensor | list[Tensor], target: Tensor | list[Tensor], num_masked: int
    ) -> Tensor:
        first = (output[0] if isinstance(output, (list, tuple)) else output).shape[0] - num_masked
        # without any masked item the whole batch goes in: the value is constant, and DDP's gathering stays in step
        if 0 < first and num_masked > 0 and not self.gathers:
            output = [o[first:] for o in output] if isinstance(output, (list, tuple)) else output[first:]
            target = [t[first:] for t in target] if isinstance(target, (list, tuple)) else target[first:]
        result: Tensor = self.mask_loss(output, target)
        return result
