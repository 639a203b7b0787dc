"""The prototype head of DSP, and putting it in place of a network's last layer.

Pure torch: the head knows nothing of annotations, losses or nnU-Net beyond the shape of its decoder.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_SMALLEST_NORM = 1e-6
"""Embeddings shorter than this are divided by this instead: their direction is noise and its gradient unbounded."""


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
            return F.normalize(_at_least_float32(embeddings), dim=1, eps=_SMALLEST_NORM)

    def forward(self, features: Tensor) -> Tensor:
        """Logits.

        Args:
            features: shape (B, in_channels, *spatial), floating.

        Returns:
            Shape (B, num_classes, *spatial), float32 (float64 for float64 features and parameters), within
            +-1 / temperature. Normalisation and similarity are computed in that type under autocast, too.
        """
        embeddings = self.transform(features)
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = _at_least_float32(embeddings)
            prototypes = F.normalize(_at_least_float32(self.prototypes), dim=-1).mean(1) / self.temperature
            weight = prototypes.reshape(*prototypes.shape, *(1,) * self.dim)
            convolve = F.conv2d if self.dim == 2 else F.conv3d
            similarity = convolve(embeddings, weight.to(embeddings.dtype))
            length = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True).clamp_min(_SMALLEST_NORM)
            return similarity / length

    def extra_repr(self) -> str:
        learnt = ", learnt" if self.log_temperature is not None else ""
        return (
            f"num_classes={self.out_channels}, num_prototypes={self.num_prototypes}, "
            f"temperature={self.initial_temperature:g}{learnt}"
        )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


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
