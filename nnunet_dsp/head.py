"""The prototype head of DSP, and putting it in place of a network's last layer.

Pure torch: the head knows nothing of annotations, losses or nnU-Net beyond the shape of its decoder.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_dsp.blocks import first_order_backward
from nnunet_dsp.similarity import SMALLEST_NORM, at_least_float32, unit_length

_CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class _ChannelMixing(torch.autograd.Function):
    """The whole head, block by block, keeping nothing between the passes but its input.

    Everything in the head mixes channels of one voxel, except BatchNorm's two numbers a channel. Folded into the first
    convolution, those leave a chain that can be taken for a block of voxels at a time, in memory that stays small;
    the backward pass takes it again, which costs less than fetching what it would have kept.

    forward(features (B, F, V), mean (F,), reciprocal (F,) of the standard deviation, gamma (F,), beta (F,),
    first (E, F), first_bias (E,), second (E, E), second_bias (E,), prototypes (C, E), slope, training) returns the
    logits (B, C, V), at least float32. `training`: mean and deviation are those of `features`, so the gradient runs
    through them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        mean: Tensor,
        reciprocal: Tensor,
        gamma: Tensor,
        beta: Tensor,
        first: Tensor,
        first_bias: Tensor,
        second: Tensor,
        second_bias: Tensor,
        prototypes: Tensor,
        slope: float,
        training: bool,
    ) -> Tensor:
        weight, bias = _folded(mean, reciprocal, gamma, beta, first, first_bias)
        wide = prototypes.dtype if features.dtype != torch.float64 else torch.float64
        prototypes = prototypes.to(wide)
        logits = features.new_empty((features.shape[0], prototypes.shape[0], features.shape[2]), dtype=wide)
        length = features.new_empty((features.shape[0], features.shape[2]), dtype=wide)
        for item, voxels in _voxel_blocks(features, second.shape[0]):
            _, embeddings = _embed(features[item, :, voxels], weight, bias, second, second_bias, slope)
            embeddings = embeddings.to(wide)
            torch.sum(embeddings.square(), 0, out=length[item, voxels])
            length[item, voxels].sqrt_()
            torch.mm(prototypes, embeddings, out=logits[item, :, voxels])
        logits /= length.clamp_min(SMALLEST_NORM)[:, None]
        ctx.save_for_backward(
            features, mean, reciprocal, gamma, beta, first, first_bias, second, second_bias, prototypes, length
        )
        ctx.slope, ctx.training = slope, training
        return logits

    @staticmethod
    @first_order_backward
    def backward(ctx: Any, by_logits: Tensor) -> tuple[Tensor | None, ...]:
        (
            features, mean, reciprocal, gamma, beta, first, first_bias, second, second_bias, prototypes, lengths
        ) = ctx.saved_tensors  # fmt: skip
        weight, bias = _folded(mean, reciprocal, gamma, beta, first, first_bias)
        wide, narrow = by_logits.dtype, features.dtype
        by_features = torch.empty_like(features)
        by_weight, by_bias = torch.zeros_like(weight, dtype=wide), torch.zeros_like(bias, dtype=wide)
        by_second, by_second_bias = torch.zeros_like(second, dtype=wide), torch.zeros_like(second_bias, dtype=wide)
        by_prototypes = torch.zeros_like(prototypes)
        for item, voxels in _voxel_blocks(features, second.shape[0]):
            block = features[item, :, voxels]
            hidden, embeddings = _embed(block, weight, bias, second, second_bias, ctx.slope)
            embeddings = embeddings.to(wide)
            length = lengths[item, voxels].clamp_min(SMALLEST_NORM)
            by_similarity = by_logits[item, :, voxels] / length
            by_prototypes += by_similarity @ embeddings.T
            by_embeddings = prototypes.T @ by_similarity
            # logits = s / |e|: the part along e, which lengthens it, is taken away; too short ones were not divided
            along = (by_embeddings * embeddings).sum(0).div_(length.square())
            along.mul_(lengths[item, voxels] >= SMALLEST_NORM)
            by_embeddings.addcmul_(embeddings, along, value=-1)
            by_second_bias += by_embeddings.sum(1)
            by_embeddings = by_embeddings.to(narrow)
            by_second += (by_embeddings @ hidden.T).to(wide)
            by_hidden = second.to(narrow).T @ by_embeddings
            by_hidden = torch.ops.aten.leaky_relu_backward(by_hidden, hidden, ctx.slope, True)
            by_bias += by_hidden.sum(1, dtype=wide)
            by_weight += (by_hidden @ block.T).to(wide)
            torch.mm(weight.to(narrow).T, by_hidden, out=by_features[item, :, voxels])
        # From the folded convolution back to BatchNorm and the convolution.
        first = first.to(wide)
        mean, reciprocal = mean.to(wide), reciprocal.to(wide)
        scale = gamma.to(wide) * reciprocal
        through = first.T @ by_bias
        by_first = by_weight * scale + by_bias[:, None] * (beta.to(wide) - mean * scale)
        by_scale = (by_weight * first).sum(0) - through * mean
        if ctx.training:
            count = features.shape[0] * features.shape[2]
            by_mean = -scale * through / count
            by_variance = -0.5 * reciprocal**3 * by_scale * gamma.to(wide) / count
            slope = (2 * by_variance).to(narrow)[:, None]
            offset = (by_mean - 2 * by_variance * mean).to(narrow)[:, None]
            for item, voxels in _voxel_blocks(features, second.shape[0]):
                by_features[item, :, voxels].add_(offset).addcmul_(features[item, :, voxels], slope)
        return (
            by_features,
            None,
            None,
            (by_scale * reciprocal).to(gamma.dtype),
            through.to(beta.dtype),
            by_first.to(ctx.saved_tensors[5].dtype),
            by_bias.to(first_bias.dtype),
            by_second.to(second.dtype),
            by_second_bias.to(second_bias.dtype),
            by_prototypes,
            None,
            None,
        )


def _folded(
    mean: Tensor, reciprocal: Tensor, gamma: Tensor, beta: Tensor, first: Tensor, first_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """BatchNorm and the convolution after it as one: weight (E, F), bias (E,)."""
    scale = gamma * reciprocal.to(gamma.dtype)
    return first * scale, first_bias + first @ (beta - mean.to(gamma.dtype) * scale)


def _embed(
    block: Tensor, weight: Tensor, bias: Tensor, second: Tensor, second_bias: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    """Hidden values after the LeakyReLU and embeddings, both (E, V), of a block (F, V), in the block's type."""
    dtype = block.dtype
    hidden = torch.addmm(bias.to(dtype)[:, None], weight.to(dtype), block)
    hidden = F.leaky_relu_(hidden, slope)
    return hidden, torch.addmm(second_bias.to(dtype)[:, None], second.to(dtype), hidden)


def _voxel_blocks(features: Tensor, channels: int) -> list[tuple[int, slice]]:
    """Item and voxels of each block; on a CPU small enough for its cache, elsewhere an item at a time."""
    voxels = features.shape[2]
    step = max(1, 2**20 // channels) if features.device.type == "cpu" else max(1, voxels)
    return [
        (item, slice(start, start + step)) for item in range(features.shape[0]) for start in range(0, voxels, step)
    ]


class PrototypeHead(nn.Module):
    """Class scores from the cosine similarity of each voxel's embedding to the prototypes of each class.

    BatchNorm -> 1x1 convolution -> LeakyReLU -> 1x1 convolution -> L2 normalisation -> cosine similarity with the
    class's prototypes, averaged over them, divided by the temperature.

    The average of similarities is the similarity to the average of the normalised prototypes, and dividing by an
    embedding's length can wait until after the similarity. So the head is its two convolutions plus a third one to
    `num_classes` channels and one length per voxel: nothing of size voxels x classes x prototypes is formed, nor a
    normalised copy of the embeddings.

    Args:
        in_channels: channels of the features, at least 1.
        num_classes: channels of the result, at least 1.
        dim: spatial axes, 2 or 3.
        num_prototypes: prototypes per class, at least 1.
        embedding_channels: width of both convolutions; None: `in_channels`, but at least 32. (The paper's head is 64
            wide on 64 features. Cosine similarities in few dimensions are coarse, hence the floor.)
        temperature: similarities in [-1, 1] are divided by it; positive.
        negative_slope: of the LeakyReLU.
        learn_temperature: train the temperature too (its logarithm is the parameter, so it stays positive).

    Raises:
        ValueError: an argument is out of its range.

    Source: Reiss et al., Decoupled Semantic Prototypes, CVPR 2023. Same function as the released head (whose
    similarities are averaged after they are formed) up to rounding, except for embeddings shorter than 1e-6.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        dim: int,
        num_prototypes: int = 5,
        embedding_channels: int | None = None,
        temperature: float = 0.05,
        negative_slope: float = 0.1,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__()
        if dim not in _CONVOLUTION:
            raise ValueError(f"Expected argument `dim` to be 2 or 3, but got {dim}.")
        if embedding_channels is None:
            embedding_channels = max(32, in_channels)
        for name, value in (
            ("in_channels", in_channels),
            ("num_classes", num_classes),
            ("num_prototypes", num_prototypes),
            ("embedding_channels", embedding_channels),
        ):
            if value < 1:
                raise ValueError(f"Expected argument `{name}` to be at least 1, but got {value}.")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"Expected argument `temperature` to be positive and finite, but got {temperature}.")

        self.in_channels = in_channels
        self.out_channels = num_classes
        self.dim = dim
        self.embedding_channels = embedding_channels
        self.num_prototypes = num_prototypes
        convolution = _CONVOLUTION[dim]
        self.transform = nn.Sequential(
            _BATCH_NORM[dim](in_channels),
            convolution(in_channels, embedding_channels, 1),
            nn.LeakyReLU(negative_slope, inplace=True),
            convolution(embedding_channels, embedding_channels, 1),
        )
        self.prototypes = nn.Parameter(torch.empty(num_classes, num_prototypes, embedding_channels))
        self.log_temperature: nn.Parameter | None = None
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.empty(()))
        self.initial_temperature = float(temperature)
        self.negative_slope = negative_slope
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw everything anew: He initialisation for the convolutions, unit vectors in random directions for the
        prototypes."""
        for module in self.transform:
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                module.reset_parameters()
            elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, a=self.negative_slope)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.prototypes.copy_(F.normalize(torch.randn_like(self.prototypes), dim=-1))
            if self.log_temperature is not None:
                self.log_temperature.fill_(math.log(self.initial_temperature))

    @property
    def temperature(self) -> float | Tensor:
        """What similarities are divided by; a tensor, shape (), if it is learnt."""
        return self.initial_temperature if self.log_temperature is None else self.log_temperature.exp()

    def embed(self, features: Tensor) -> Tensor:
        """L2-normalised embeddings, for looking at; forward() does without them.

        Args:
            features: shape (B, in_channels, *spatial), floating.

        Returns:
            Shape (B, embedding_channels, *spatial), at least float32.
        """
        embeddings = self.transform(features)
        with torch.autocast(embeddings.device.type, enabled=False):
            return unit_length(embeddings, dim=1)

    def _in_blocks(self) -> bool:
        """Whether _ChannelMixing may do it: only SyncBatchNorm, whose statistics span processes, needs the modules."""
        return type(self.transform[0]) is _BATCH_NORM[self.dim]

    def forward(self, features: Tensor) -> Tensor:
        """Logits.

        Args:
            features: shape (B, in_channels, *spatial), floating.

        Returns:
            Shape (B, num_classes, *spatial), float32 (float64 for float64 features and parameters), within
            +-1 / temperature. Normalisation and similarity are computed in that type under autocast, too.
        """
        if not self._in_blocks():
            return self._forward_by_modules(features)
        device = features.device.type
        dtype = _autocast_dtype(device) or features.dtype
        layers: Any = self.transform
        norm, first, _, second = layers
        with torch.autocast(device, enabled=False):
            features = features.to(dtype)
            mean, reciprocal = self._statistics(features)
            logits: Tensor = _ChannelMixing.apply(
                features.reshape(*features.shape[:2], -1),
                mean,
                reciprocal,
                norm.weight,
                norm.bias,
                first.weight.flatten(1),
                first.bias,
                second.weight.flatten(1),
                second.bias,
                self._mean_prototypes(),
                self.negative_slope,
                norm.training,
            )
        return logits.view(features.shape[0], self.out_channels, *features.shape[2:])

    def _mean_prototypes(self) -> Tensor:
        """(num_classes, embedding_channels): the mean of each class's normalised prototypes, over the temperature."""
        return F.normalize(at_least_float32(self.prototypes), dim=-1).mean(1) / self.temperature

    def _statistics(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal standard deviation of each channel as BatchNorm takes them; keeps its running ones."""
        norm: Any = self.transform[0]
        if not norm.training:
            return norm.running_mean, (norm.running_var + norm.eps).rsqrt()
        with torch.no_grad():
            axes = [0, *range(2, features.ndim)]
            variance, mean = (at_least_float32(t) for t in torch.var_mean(features, axes, correction=0))
            count = features.numel() // features.shape[1]
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            unbiased = variance * (count / max(1, count - 1))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
            return mean, (variance + norm.eps).rsqrt()

    def _forward_by_modules(self, features: Tensor) -> Tensor:
        embeddings = self.transform(features)
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = at_least_float32(embeddings)
            weight = self._mean_prototypes()
            weight = weight.reshape(*weight.shape, *(1,) * self.dim)
            convolve = F.conv2d if self.dim == 2 else F.conv3d
            similarity = convolve(embeddings, weight.to(embeddings.dtype))
            length = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
            return similarity / length

    def extra_repr(self) -> str:
        learnt = ", learnt" if self.log_temperature is not None else ""
        return (
            f"num_classes={self.out_channels}, num_prototypes={self.num_prototypes}, "
            f"temperature={self.initial_temperature:g}{learnt}"
        )


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on this kind of device; None where it is off."""
    if hasattr(torch, "get_autocast_dtype"):  # torch 2.4
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def replace_last_layer(
    network: nn.Module,
    *,
    num_prototypes: int = 5,
    temperature: float = 0.05,
    embedding_channels: int | None = None,
    learn_temperature: bool = False,
) -> nn.Module:
    """Put a PrototypeHead in place of the layer that makes the full-resolution output, in the network itself.

    That is ``network.decoder.seg_layers[-1]``, a 1x1 convolution, in nnU-Net's U-Nets (PlainConvUNet,
    ResidualEncoderUNet and whatever else uses its UNetDecoder). Channels, classes, dimensions, device and dtype are
    read off the layer that goes. The lower deep-supervision outputs keep their layers. The head's parameters keep
    ``.seg_layers.`` in their names, which nnU-Net's loading of pretrained weights skips.

    Args:
        network: changed in place.
        num_prototypes, temperature, embedding_channels, learn_temperature: see PrototypeHead.

    Returns:
        `network`.

    Raises:
        NotImplementedError: the network has no such layer.
    """
    seg_layers = getattr(getattr(network, "decoder", None), "seg_layers", None)
    name = type(network).__name__
    advice = (
        "Use a configuration with one of nnU-Net's U-Nets (PlainConvUNet, ResidualEncoderUNet), or the trainer variant "
        "that keeps the standard head."
    )
    if not isinstance(seg_layers, nn.ModuleList) or len(seg_layers) == 0:
        raise NotImplementedError(
            f"The prototype head replaces decoder.seg_layers[-1], but the network {name} has no such layer. {advice}"
        )
    old = seg_layers[-1]
    if not isinstance(old, (nn.Conv2d, nn.Conv3d)):
        raise NotImplementedError(
            f"The prototype head replaces decoder.seg_layers[-1] where that is a Conv2d or Conv3d, but in the network "
            f"{name} it is a {type(old).__name__}. {advice}"
        )
    head = PrototypeHead(
        old.in_channels,
        old.out_channels,
        dim=2 if isinstance(old, nn.Conv2d) else 3,
        num_prototypes=num_prototypes,
        embedding_channels=embedding_channels,
        temperature=temperature,
        learn_temperature=learn_temperature,
    )
    seg_layers[-1] = head.to(device=old.weight.device, dtype=old.weight.dtype)
    return network
