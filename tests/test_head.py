"""head.py: the function the paper describes, in both dimensions, and its place in nnU-Net's networks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_dsp import head as head_module
from nnunet_dsp.head import PrototypeHead, replace_last_layer

FEATURES = {2: (6, 7), 3: (3, 4, 5)}
UNITS = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}


def plainly(head: PrototypeHead, features: torch.Tensor) -> torch.Tensor:
    """Every similarity of every voxel to every prototype, then averaged."""
    embeddings = F.normalize(head.transform(features), dim=1)
    prototypes = F.normalize(head.prototypes, dim=-1)
    similarity = torch.einsum("be...,cpe->bcp...", embeddings, prototypes)
    return similarity.mean(2) / head.temperature


def network_of(kind: type, dim: int, deep_supervision: bool = True, num_classes: int = 4) -> nn.Module:
    convolution, norm = UNITS[dim]
    blocks = {"n_conv_per_stage": 1} if kind is PlainConvUNet else {"n_blocks_per_stage": 1}
    torch.manual_seed(0)
    return kind(
        input_channels=1,
        n_stages=3,
        features_per_stage=[6, 8, 10],
        conv_op=convolution,
        kernel_sizes=3,
        strides=[1, 2, 2],
        num_classes=num_classes,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=deep_supervision,
        **blocks,
    )


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("learn_temperature", [True, False])
def test_the_head_is_the_mean_similarity_to_each_class_prototypes(dim, training, learn_temperature):
    head = PrototypeHead(5, 3, dim=dim, num_prototypes=4, temperature=0.2, learn_temperature=learn_temperature)
    head.double().train(training)
    features = torch.randn(2, 5, *FEATURES[dim], dtype=torch.float64, requires_grad=True)
    logits, expected = head(features), plainly(head, features)
    assert tuple(logits.shape) == (2, 3, *FEATURES[dim])
    torch.testing.assert_close(logits, expected)
    weight = torch.randn_like(logits)
    leaves = [features, *head.parameters()]
    ours = torch.autograd.grad((logits * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for gradient, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_logits_are_bounded_by_the_temperature_and_embeddings_are_unit_vectors():
    head = PrototypeHead(5, 3, dim=2, temperature=0.05)
    features = torch.randn(2, 5, 6, 7) * 100
    assert head(features).abs().max() <= 1 / 0.05
    norms = head.eval().embed(features).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_fresh_head_starts_unsure():
    torch.manual_seed(0)
    for channels in (4, 32):
        logits = PrototypeHead(channels, 5, dim=2)(torch.randn(2, channels, 32, 32))
        assert logits.std() < 4
        assert logits.softmax(1).mean((0, 2, 3)).max() < 0.9
    norms = PrototypeHead(4, 3, dim=2).prototypes.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalisation_and_similarity_stay_in_float32_under_autocast(dtype):
    head = PrototypeHead(5, 3, dim=2).eval()
    with torch.no_grad():
        head.transform[3].bias.fill_(300.0)  # its square leaves the range of float16
    features = torch.randn(2, 5, 6, 7)
    with torch.autocast("cpu", dtype=dtype):
        logits = head(features)
        assert head.embed(features).dtype == torch.float32
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, head(features), rtol=0, atol=0.2)


def test_embeddings_of_length_zero_are_finite_and_differentiable():
    head = PrototypeHead(5, 3, dim=2)
    with torch.no_grad():
        head.transform[3].weight.zero_()
    features = torch.randn(2, 5, 6, 7, requires_grad=True)
    logits = head(features)
    assert (logits == 0).all()
    logits.sum().backward()
    assert torch.isfinite(features.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters() if parameter.grad is not None)


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_nothing_of_size_voxels_by_classes_by_prototypes_is_formed():
    head = PrototypeHead(4, 20, dim=2, num_prototypes=50, embedding_channels=8)
    features = torch.randn(1, 4, 32, 32)
    with _LargestTensor() as largest:
        head(features).sum().backward()
    assert largest.numel <= 20 * 32 * 32  # the logits themselves; all similarities would be fifty times as many


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_the_last_layer_is_replaced_in_nnunets_networks(kind, dim):
    network = network_of(kind, dim)
    untouched = network.decoder.seg_layers[0]
    assert replace_last_layer(network, num_prototypes=3, temperature=0.1, embedding_channels=16) is network
    head = network.decoder.seg_layers[-1]
    assert isinstance(head, PrototypeHead)
    assert (head.in_channels, head.out_channels, head.dim, head.embedding_channels) == (6, 4, dim, 16)
    assert (head.num_prototypes, head.temperature) == (3, 0.1)
    assert network.decoder.seg_layers[0] is untouched
    image = torch.randn(2, 1, *(8,) * dim)
    with_supervision = network.eval()(image)
    assert [tuple(o.shape) for o in with_supervision] == [(2, 4, *(size,) * dim) for size in (8, 4)]
    network.decoder.deep_supervision = False
    torch.testing.assert_close(network(image), with_supervision[0])


def test_every_parameter_of_the_head_is_skipped_by_nnunets_loading_of_pretrained_weights():
    network = replace_last_layer(network_of(PlainConvUNet, 2), learn_temperature=True)
    # nnU-Net skips by this string; see run/load_pretrained_weights.py
    added = set(network.state_dict()) - set(network_of(PlainConvUNet, 2).state_dict())
    assert added
    assert all(".seg_layers." in name for name in added)


def test_a_network_rebuilt_from_the_same_settings_takes_the_state_over():
    settings = {"num_prototypes": 3, "temperature": 0.1, "embedding_channels": 16}
    first = replace_last_layer(network_of(PlainConvUNet, 2, deep_supervision=False), **settings)
    second = replace_last_layer(network_of(PlainConvUNet, 2, deep_supervision=False), **settings)
    second.load_state_dict(first.state_dict())
    image = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(first.eval()(image), second.eval()(image), rtol=0, atol=0)


def test_the_head_takes_over_dtype_and_device():
    network = replace_last_layer(network_of(PlainConvUNet, 2).double())
    assert {p.dtype for p in network.decoder.seg_layers[-1].parameters()} == {torch.float64}
    network = network_of(PlainConvUNet, 2).to("meta")
    assert {p.device.type for p in replace_last_layer(network).parameters()} == {"meta"}


def test_other_networks_are_refused_with_their_name_and_what_to_do():
    class Transformer(nn.Module):
        pass

    with pytest.raises(NotImplementedError, match=r"network Transformer has no such layer.*standard head"):
        replace_last_layer(Transformer())
    network = network_of(PlainConvUNet, 2)
    network.decoder.seg_layers[-1] = nn.Identity()
    with pytest.raises(NotImplementedError, match="network PlainConvUNet it is a Identity"):
        replace_last_layer(network)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 1}, "`dim` to be 2 or 3, but got 1"),
        ({"num_prototypes": 0}, "`num_prototypes` to be at least 1, but got 0"),
        ({"num_classes": 0}, "`num_classes` to be at least 1"),
        ({"embedding_channels": 0}, "`embedding_channels` to be at least 1, but got 0"),
        ({"temperature": 0.0}, "`temperature` to be positive and finite, but got 0.0"),
        ({"temperature": float("nan")}, "`temperature` to be positive and finite"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrototypeHead(**{"in_channels": 4, "num_classes": 3, "dim": 2} | options)


def _outputs_and_gradients(head, forward, features):
    features = features.detach().clone().requires_grad_()
    head.zero_grad(set_to_none=True)
    logits = forward(features)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights).sum().backward()
    found = {"logits": logits.detach(), "features": features.grad}
    found |= {name: p.grad.clone() for name, p in head.named_parameters()}
    return found | {name: b.clone() for name, b in head.named_buffers()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 5)])
def test_block_by_block_is_the_head_module_by_module(shape, training, monkeypatch):
    torch.manual_seed(0)
    head = PrototypeHead(3, 4, dim=len(shape), embedding_channels=6, learn_temperature=True).double().train(training)
    norm = head.transform[0]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
        norm.running_mean.copy_(torch.tensor([0.1, 0.2, -0.3]))
        norm.running_var.copy_(torch.tensor([0.5, 1.5, 2.5]))
        for convolution in (head.transform[1], head.transform[3]):
            convolution.bias.normal_()
    twin = copy.deepcopy(head)
    features = torch.randn(2, 3, *shape, dtype=torch.float64) * 2 + 1
    monkeypatch.setattr(head_module, "_voxel_blocks", lambda f, c: [
        (item, slice(start, start + 11)) for item in range(len(f)) for start in range(0, f.shape[2], 11)
    ])
    ours = _outputs_and_gradients(head, head, features)
    expected = _outputs_and_gradients(twin, twin._forward_by_modules, features)
    assert list(ours) == list(expected)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_head_keeps_nothing_between_the_passes_but_its_input():
    head = PrototypeHead(4, 3, dim=2, embedding_channels=32)
    features = torch.randn(1, 4, 16, 16, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        head(features)
    assert max(sizes) == features.numel()


def test_embeddings_without_length_give_finite_gradients():
    head = PrototypeHead(2, 3, dim=2, embedding_channels=4)
    with torch.no_grad():
        for convolution in (head.transform[1], head.transform[3]):
            convolution.weight.zero_()
            convolution.bias.zero_()
    features = torch.randn(1, 2, 4, 4, requires_grad=True)
    head(features).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    assert torch.isfinite(features.grad).all()


def test_under_autocast_gradients_are_close_to_those_in_full_precision():
    torch.manual_seed(0)
    head = PrototypeHead(8, 3, dim=2)
    features = torch.randn(2, 8, 12, 12)
    expected = _outputs_and_gradients(head, head, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = _outputs_and_gradients(head, head, features)
    assert ours["logits"].dtype == torch.float32
    for name in ("logits", "features", "prototypes"):
        assert (ours[name] - expected[name]).norm() < 0.05 * expected[name].norm(), name


def test_a_synchronised_batch_norm_takes_the_modules_way():
    head = PrototypeHead(3, 2, dim=2)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(head))
    assert head._in_blocks()
    assert not synchronised._in_blocks()
    features = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(head.eval()(features), synchronised.eval()(features))
