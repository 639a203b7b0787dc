"""The prompt network: classes by the vote of a labelled example's voxels, after Kato & Hotta (CVPRW 2023).

Pure torch: it knows the shape of nnU-Net's decoder and nothing else of nnU-Net. Where the example comes from is in
prompt_choice.py, what the similarities are made of in similarity.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_dsp.head import PrototypeHead
from nnunet_dsp.prompt_settings import PromptSettings
from nnunet_dsp.similarity import KeyGroup, at_least_float32, class_log_sums, class_means, deal_keys, unit_length

FLOOR = 1e-6
"""Probability of a class that the prompt does not show, and the least that a region's complement can have."""

LOWEST_IN_PREDICTION = -500.0
"""nnU-Net adds up ten times what the network returns in half precision, which ends at 65504."""

NOT_A_KEY = -1
GROUPS_ON_CPU = 8
"""The exponentials of all voxels with 1024 keys take longer than a small network; an eighth of them is affordable."""


def unwrapped(network: nn.Module) -> Any:
    """The network itself, out of DistributedDataParallel and torch.compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


class PromptBuffers(nn.Module):
    """The prompt: part of the state_dict, of whatever size it has when it is loaded.

    Buffers:
        image: (P, channels, *S) float32, preprocessed windows with what surrounds them; empty before there is a prompt.
        label: (P, *S) int64, row of the label among the dataset's, NOT_A_KEY where nothing is known.
        membership: (R, L) bool, which labels make up which region; empty where labels are plain.
    """

    image: Tensor
    label: Tensor
    membership: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("image", torch.zeros(0))
        self.register_buffer("label", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("membership", torch.zeros(0, dtype=torch.bool))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in list(self.named_buffers(recurse=False)):
            loaded = state_dict.get(prefix + name)
            if loaded is not None and loaded.shape != buffer.shape:
                setattr(self, name, torch.empty(loaded.shape, dtype=buffer.dtype, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Keys(NamedTuple):
    vectors: Tensor  # (M, D)
    groups: list[KeyGroup]
    classes: list[int]


class PromptNetwork(nn.Module):
    """One of nnU-Net's U-Nets embeds a target and the prompt; the prompt's labelled voxels vote on each target voxel.

    With f the embedding of a voxel, k_j and c_j embedding and label of the j-th key, and t the temperature,

        out_c = sum over j with c_j = c of softmax_j( <f, k_j> / t )

    and what is returned is log(out), so nnU-Net's losses and its softmax at prediction see the probabilities as they
    are. It is computed as log-softmax over the classes of the log-sum-exp over each class's keys, which is the same.
    Regions get logit(out_r), which is what nnU-Net's sigmoid wants.

    The parameters keep nnU-Net's names (encoder, decoder). There is no deep supervision: lower resolutions would need
    keys of their own, and a window of 64 voxels leaves few of them, none at a border between thin structures. Layers
    that only deep supervision uses are dropped (DistributedDataParallel refuses parameters without gradient).

    Args:
        network: one of nnU-Net's U-Nets, taken over: its segmentation layers are removed.
        num_outputs: channels of the result.
        settings: see PromptSettings.

    Raises:
        NotImplementedError: the network has no encoder and decoder of nnU-Net's kind.

    Source: Kato & Hotta, One-shot and Partially-Supervised Cell Image Segmentation Using Small Visual Prompt, CVPR
    workshops 2023. Re-implemented from a description of the released code; differs from it by nnU-Net's network, an
    embedding of 16 channels instead of 2, cosine similarity, and the loss on log-probabilities; docs/prompt.md.
    """

    def __init__(self, network: nn.Module, num_outputs: int, settings: PromptSettings) -> None:
        super().__init__()
        encoder: Any = getattr(network, "encoder", None)
        decoder: Any = getattr(network, "decoder", None)
        seg_layers = getattr(decoder, "seg_layers", None)
        last = seg_layers[-1] if isinstance(seg_layers, nn.ModuleList) and len(seg_layers) else None
        if not isinstance(encoder, nn.Module) or not isinstance(last, (nn.Conv2d, nn.Conv3d)):
            raise NotImplementedError(
                "The prompt network reads the features before decoder.seg_layers[-1], but the network "
                f"{type(network).__name__} has no such layer. Use a configuration with one of nnU-Net's U-Nets "
                "(PlainConvUNet, ResidualEncoderUNet)."
            )
        self.settings = settings
        self.num_outputs = num_outputs
        self.encoder = encoder
        self.decoder = decoder
        self.decoder.deep_supervision = False
        self.embedding: nn.Module = nn.Identity()
        if settings.embedding_channels:
            # not in seg_layers: -pretrained_weights passes those over, but this layer knows no classes and is worth
            # keeping
            self.embedding = type(last)(last.in_channels, settings.embedding_channels, 1)
            nn.init.kaiming_normal_(self.embedding.weight, a=1)
            nn.init.zeros_(self.embedding.bias)  # type: ignore[arg-type]
        self.decoder.seg_layers = nn.ModuleList(nn.Identity() for _ in self.decoder.seg_layers)
        # the name, with ".seg_layers." in it, makes -pretrained_weights keep this training's own prompt
        self.prompt = nn.ModuleDict({"seg_layers": PromptBuffers()})
        self._cached: _Keys | None = None
        self._positions: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(lambda module, _: module.forget_keys())

    # --- the prompt

    @property
    def _buffers_of_prompt(self) -> PromptBuffers:
        return cast(PromptBuffers, self.prompt["seg_layers"])

    @property
    def has_prompt(self) -> bool:
        return self._buffers_of_prompt.image.numel() > 0

    def set_prompt(self, image: Tensor, label: Tensor, membership: Tensor | None = None) -> None:
        """Takes a prompt, in place of any it had.

        Args:
            image: (P, channels, *S), floating, preprocessed; S must suit the network's strides.
            label: (P, *S), integer: row of each voxel's label among the dataset's, NOT_A_KEY where it is no key.
            membership: (num_outputs, L) bool, which labels make up which region; None: labels are plain.

        Raises:
            ValueError: shapes do not fit together, a label is out of range, or there is no key.
        """
        if image.ndim < 4 or label.shape != (image.shape[0], *image.shape[2:]):
            raise ValueError(
                f"Expected a prompt of shapes (P, C, *S) and (P, *S), but got {tuple(image.shape)} and "
                f"{tuple(label.shape)}."
            )
        number = self.num_outputs if membership is None else membership.shape[1]
        if label.min() < NOT_A_KEY or label.max() >= number:
            raise ValueError(f"Expected labels of a prompt from -1 to {number - 1}, but got up to {int(label.max())}.")
        if not (label >= 0).any():
            raise ValueError("Expected a prompt with at least one labelled voxel, but it has none.")
        buffers = self._buffers_of_prompt
        device = buffers.image.device
        buffers.image = image.detach().float().to(device)
        buffers.label = label.detach().long().to(device)
        buffers.membership = (torch.zeros(0) if membership is None else membership).bool().to(device)
        self.forget_keys()

    def forget_keys(self) -> None:
        """Embeddings of the prompt are computed anew when next needed; whoever changes weights by hand calls this."""
        self._cached = None
        self._positions = None

    def train(self, mode: bool = True) -> PromptNetwork:
        self._cached = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> PromptNetwork:  # .to(), .half() and the like
        self.forget_keys()
        return super()._apply(*args, **kwargs)

    # --- forward

    def embed(self, image: Tensor) -> Tensor:
        """(B, channels, *S) -> (B, D, *S); not yet of unit length."""
        embeddings: Tensor = self.embedding(self.decoder(self.encoder(image)))
        return embeddings

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (B, channels, *S).

        Returns:
            (B, num_outputs, *S), at least float32: log-probabilities (regions: logits). In training with variant
            "released": probabilities.

        Raises:
            RuntimeError: there is no prompt yet.
        """
        if not self.has_prompt:
            raise RuntimeError("The prompt network has no prompt yet: call set_prompt() or load a trained model.")
        embedded_prompt = None
        if self.training or torch.is_grad_enabled():
            embedded_prompt = self.embed(self._buffers_of_prompt.image)
        return self._vote(self.embed(x), embedded_prompt)

    def _keys(self, embedded_prompt: Tensor | None) -> _Keys:
        """The keys among the prompt's embeddings; without them, in prediction, those embedded when first needed."""
        if embedded_prompt is not None:
            return self._draw_keys(embedded_prompt)
        if self._cached is None:
            self._cached = self._draw_keys(self.embed(self._buffers_of_prompt.image))
        return self._cached

    def _draw_keys(self, embedded_prompt: Tensor) -> _Keys:
        settings, buffers = self.settings, self._buffers_of_prompt
        if self._positions is None:
            positions = torch.nonzero(buffers.label.flatten() >= 0).flatten()
            self._positions = positions, buffers.label.flatten()[positions].cpu()
        positions, key_class = self._positions
        number = buffers.membership.shape[1] if buffers.membership.numel() else self.num_outputs
        if self.training:
            count = settings.key_groups or (GROUPS_ON_CPU if positions.device.type == "cpu" else 1)
            classes, groups = deal_keys(key_class, number, max_keys=settings.max_keys, groups=count)
        else:
            classes, groups = deal_keys(key_class, number, max_keys=settings.max_keys_prediction, shuffle=False)
        # only what was drawn is gathered: the groups' indices then count the gathered keys
        drawn = torch.unique(torch.cat([group.index for group in groups]))
        groups = [
            KeyGroup(torch.searchsorted(drawn, group.index).to(positions.device), group.counts, group.log_weights)
            for group in groups
        ]
        embeddings = embedded_prompt.flatten(2)
        where = positions[drawn.to(positions.device)]
        size = embeddings.shape[2]
        item = torch.div(where, size, rounding_mode="floor")
        vectors = at_least_float32(embeddings[item, :, where % size])
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = unit_length(vectors, dim=1) if settings.similarity == "cosine" else vectors
        return _Keys(vectors, groups, classes)

    @torch.compiler.disable
    def _vote(self, embeddings: Tensor, embedded_prompt: Tensor | None) -> Tensor:
        settings, membership = self.settings, self._buffers_of_prompt.membership
        keys = self._keys(embedded_prompt)
        with torch.autocast(embeddings.device.type, enabled=False):
            queries = at_least_float32(embeddings).flatten(2)
            log_sums = class_log_sums(
                queries,
                keys.vectors.to(queries.dtype),
                keys.groups,
                temperature=settings.temperature,
                cosine=settings.similarity == "cosine",
            )
            if membership.numel():
                log_out = region_logits(log_sums, membership[:, keys.classes])
            else:
                log_out = log_sums.log_softmax(1)
                if len(keys.classes) < self.num_outputs:
                    shown = log_out
                    log_out = shown.new_full((shown.shape[0], self.num_outputs, shown.shape[2]), math.log(FLOOR))
                    log_out[:, keys.classes] = shown
            if not self.training:
                log_out = log_out.clamp_min(LOWEST_IN_PREDICTION)
            elif settings.variant == "released":
                log_out = log_out.exp()
            return log_out.unflatten(2, embeddings.shape[2:])


def region_logits(log_sums: Tensor, membership: Tensor) -> Tensor:
    """Logits of regions from the log sums of plain labels: log out_r - log(1 - out_r), both at least FLOOR.

    Args:
        log_sums: (B, L, N).
        membership: (R, L) bool.

    Returns:
        (B, R, N).
    """
    log_out = log_sums.log_softmax(1)
    regions = []
    for members in membership:
        parts = []
        for chosen in (members, ~members):
            if chosen.any():
                parts.append(log_out[:, chosen].logsumexp(1).clamp_min(math.log(FLOOR)))
            else:
                parts.append(log_out.new_full((log_out.shape[0], log_out.shape[2]), math.log(FLOOR)))
        regions.append(parts[0] - parts[1])
    return torch.stack(regions, dim=1)


class VotesAsLogits(nn.Module):
    """Cross entropy of the released code: the votes, which are probabilities, are taken for logits.

    A perfect vote between two classes costs log(1 + 1/e) = 0.3133, a wholly wrong one 1.3133. Nothing but the variant
    "released" should want this.

    Args:
        ignore_label: value of voxels that do not count, or None.
    """

    def __init__(self, ignore_label: int | None) -> None:
        super().__init__()
        self.ignore_label = ignore_label

    def forward(self, votes: Tensor, target: Tensor) -> Tensor:
        """`votes` (B, C, *S); `target` (B, 1, *S). Zero where no voxel counts."""
        target = target[:, 0].long()
        ignored = -100 if self.ignore_label is None else self.ignore_label
        known = (target != ignored).sum()
        total: Tensor = nn.functional.cross_entropy(votes, target, ignore_index=ignored, reduction="sum")
        return total / known.clamp_min(1)


@torch.no_grad()
def initialise_prototypes(network: nn.Module, image: Tensor, label: Tensor) -> list[int]:
    """Sets the prototypes of a DSP network to what a prompt's voxels look like to it, class by class.

    Worth doing on a pre-trained network: an untrained one's embeddings say little. Classes that the prompt does not
    show keep the prototypes they have.

    Args:
        network: with a PrototypeHead at decoder.seg_layers[-1], as replace_last_layer() leaves it; its mode (train or
            eval) is restored, and running statistics are not touched. A head that has seen no batch yet normalises by
            the prompt's own statistics, as training will by each batch's.
        image: (P, channels, *S), preprocessed.
        label: (P, *S) integer class map, negative where nothing is known.

    Returns:
        The classes whose prototypes were set.

    Raises:
        NotImplementedError: the network has no PrototypeHead.
    """
    seg_layers: Sequence[Any] = getattr(getattr(network, "decoder", None), "seg_layers", None) or [None]
    head = seg_layers[-1]
    if not isinstance(head, PrototypeHead):
        raise NotImplementedError(
            f"Prototypes can be initialised in a network with a prototype head only; {type(network).__name__} has none."
        )
    features: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, arguments: features.append(arguments[0]))
    was_training = network.training
    network.eval()
    try:
        network(image.to(head.prototypes.device, head.prototypes.dtype))
        norm: Any = head.transform[0]
        kept = copy.deepcopy(norm.state_dict())
        norm.train(not int(norm.num_batches_tracked))
        embeddings = head.embed(features[0]).flatten(2).transpose(1, 2).flatten(0, 1)
        norm.load_state_dict(kept)
    finally:
        handle.remove()
        network.train(was_training)
    vectors, found = class_means(
        embeddings, label.flatten().to(embeddings.device), head.out_channels, head.num_prototypes
    )
    head.prototypes[found] = vectors[found].to(head.prototypes.dtype)
    return [int(c) for c in torch.nonzero(found).flatten()]
