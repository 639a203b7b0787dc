"""losses.py against the oracle, in values and gradients, and its properties on odd batches."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import TOLERANCE, WeakBatch
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.losses import DSPLoss, DSPLosses, dsp_losses
from nnunet_dsp.pseudo_labels import allowed_classes

SHAPES = {"2D": (4, 5), "3D": (3, 2, 4)}
KINDS = DSPLosses._fields
EVERY_KIND = ("tags", "points", "boxes", "complete", "mask", "outside", "partial")


def to_annotations(batch: WeakBatch) -> AnnotationBatch:
    dim, items = len(batch.shape), len(batch.logits)
    types = {"tags": torch.int8, "box_tight": torch.bool, "complete_boxes": torch.bool, "listed": torch.bool}
    types |= {"partial": torch.bool, "outside": torch.bool}
    tensors = {}
    for name, values in oracle.fields(batch).items():
        tensor = torch.tensor(values, dtype=types.get(name, torch.int64))
        if name == "box_line":
            tensor = tensor.reshape(-1, dim)
        if name in ("partial", "outside") and tensor.numel() > 0:
            tensor = tensor.reshape(items, *batch.shape)
        tensors[name] = tensor
    return AnnotationBatch(**tensors)


def to_tensor(maps: list[dict[Any, int]] | None, batch: WeakBatch, dtype: torch.dtype) -> torch.Tensor | None:
    if maps is None:
        return None
    return torch.tensor([[m[v] for v in batch.voxels()] for m in maps], dtype=dtype).reshape(-1, *batch.shape)


def to_logits(batch: WeakBatch, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = [[[scores[v] for v in batch.voxels()] for scores in item] for item in batch.logits]
    shape = (len(batch.logits), batch.num_classes, *batch.shape)
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype).requires_grad_()


def losses_of(batch: WeakBatch, logits: torch.Tensor, **options: Any) -> DSPLosses:
    return dsp_losses(
        logits,
        to_annotations(batch),
        target=to_tensor(batch.target, batch, torch.int16),
        components=to_tensor(batch.components, batch, torch.int32),
        ignore_label=batch.num_classes,
        **options,
    )


def values_of(losses: DSPLosses) -> dict[str, float]:
    return {kind: value.item() for kind, value in losses._asdict().items()}


def assert_finite_with_gradient(losses: DSPLosses, logits: torch.Tensor) -> None:
    for kind, loss in losses._asdict().items():
        assert torch.isfinite(loss), kind
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.isfinite(gradient).all(), kind


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("num_classes", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients_are_the_oracles(shape, num_classes, seed):
    batch = oracle.random_batch(seed, shape, num_classes)
    logits = to_logits(batch)
    losses = losses_of(batch, logits)
    expected, gradients = oracle.default_losses(batch), oracle.default_gradients(batch)
    for_values, for_gradients = TOLERANCE["float64"]
    for kind, loss in losses._asdict().items():
        assert loss.item() == pytest.approx(expected[kind], rel=for_values, abs=for_values), kind
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        wanted = torch.tensor(gradients[kind], dtype=torch.float64).view_as(gradient)
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=for_gradients * max(1e-3, wanted.abs().max().item()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["tags", "points", "boxes", "mask", "nothing"])
@pytest.mark.parametrize("seed", range(4))
def test_each_kind_alone_has_the_oracles_value_and_leaves_the_others_at_zero(shape, kind, seed):
    batch = oracle.random_batch(seed, shape, 3, items=3, kinds=frozenset({kind, "outside"}))
    values, expected = values_of(losses_of(batch, to_logits(batch))), oracle.default_losses(batch)
    assert values == pytest.approx(expected, rel=TOLERANCE["float64"][0], abs=1e-12)
    own = {"tags": "image", "points": "point", "boxes": "box", "mask": "mask"}.get(kind)
    assert {name for name, value in values.items() if value != 0} <= {own}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lower_precision_stays_within_the_tolerance_table(dtype, shape):
    batch = oracle.random_batch(5, shape, 3)
    logits = to_logits(batch, getattr(torch, dtype))
    reference = logits.detach().double().requires_grad_()
    losses, expected = losses_of(batch, logits), losses_of(batch, reference)
    for_values, for_gradients = TOLERANCE[dtype]
    for kind in KINDS:
        ours, theirs = getattr(losses, kind), getattr(expected, kind)
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(theirs.item(), rel=for_values, abs=for_values)
        (gradient,) = torch.autograd.grad(ours, logits, retain_graph=True)
        (wanted,) = torch.autograd.grad(theirs, reference, retain_graph=True)
        assert gradient.dtype == logits.dtype
        largest = wanted.abs().max().item()
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=for_gradients * largest + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    batch = oracle.random_batch(5, (4, 5), 3)
    logits = to_logits(batch, dtype)
    plain = values_of(losses_of(batch, logits))
    with torch.autocast("cpu", dtype=dtype):
        losses = losses_of(batch, logits)
    assert values_of(losses) == plain
    assert_finite_with_gradient(losses, logits)


def test_gradcheck_passes_where_the_four_losses_are_mixed_unevenly():
    batch = oracle.random_batch(7, (3, 4), 3)
    weights = {"image": 0.7, "box": 1.3, "point": 0.4, "mask": 2.1}

    def total(logits: torch.Tensor) -> torch.Tensor:
        return sum(weights[kind] * loss for kind, loss in losses_of(batch, logits)._asdict().items())

    assert torch.autograd.gradcheck(total, (to_logits(batch),))


@pytest.mark.parametrize("variant", ["default", "released"])
@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1), (4, 5), (3, 2, 4)], ids=str)
@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_odd_batches_are_finite_and_differentiable(variant, scale, shape, num_classes, dtype):
    for seed in range(3):
        batch = oracle.random_batch(seed, shape, num_classes, scale=scale)
        logits = to_logits(batch, dtype)
        assert_finite_with_gradient(losses_of(batch, logits, variant=variant), logits)
        batch.outside = [set(batch.voxels()) for _ in batch.items]
        assert_finite_with_gradient(losses_of(batch, logits, variant=variant), logits)


@pytest.mark.parametrize("variant", ["default", "released"])
def test_a_batch_about_which_nobody_said_anything_costs_zero_and_keeps_its_graph(variant):
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    losses = dsp_losses(logits, AnnotationBatch.empty(2, 3, 2), variant=variant)
    for loss in losses:
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert (gradient == 0).all()


def test_the_point_loss_is_exact_where_the_probability_underflows():
    logits = torch.tensor([300.0, 0.0]).reshape(1, 2, 1, 1).requires_grad_()
    nothing = AnnotationBatch.empty(1, 2, 2)
    loss = dsp_losses(logits, nothing._replace(points=torch.tensor([0]), point_class=torch.tensor([1]))).point
    assert loss.item() == pytest.approx(300, abs=1e-4)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([1.0, -1.0]))


def test_the_mass_of_negatives_stays_exact_where_one_class_fills_a_large_volume():
    # 1 - p summed voxel by voxel in float64, against float32 of a volume whose sum of p is a million
    logits = torch.zeros(1, 2, 64, 128, 128)
    logits[:, 0] = 12.0
    logits[:, 0, 0] = -12.0
    nothing = AnnotationBatch.empty(1, 2, 3)
    loss = dsp_losses(logits, nothing._replace(tags=torch.tensor([[1, -1]], dtype=torch.int8))).image
    p = logits.double().softmax(1)[:, 0]
    expected = math.log((1 - p).sum().item() + 1e-7) - math.log(p.mean().item() + 1e-7)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_item_without_annotations_adds_no_positives():
    batch = oracle.random_batch(3, (4, 5), 3, items=1)
    alone, gradients = losses_of(batch, to_logits(batch)), []
    more = oracle.random_batch(3, (4, 5), 3, items=1)
    for name in ("tags", "complete", "listed", "outside", "partial", "logits", "target", "components"):
        # an item outside all over, so that its voxels are no negatives either
        empty = {"tags": [-1] * 3, "complete": [False] * 3, "listed": [True] * 3, "partial": set()}
        empty |= {"outside": set(more.voxels()), "logits": [dict.fromkeys(more.voxels(), 1.0) for _ in range(3)]}
        empty |= {"target": dict.fromkeys(more.voxels(), 3), "components": dict.fromkeys(more.voxels(), 0)}
        getattr(more, name).append(empty[name])
    logits = to_logits(more)
    together = losses_of(more, logits)
    assert values_of(together) == pytest.approx(values_of(alone), rel=1e-12)
    for loss in together:
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        gradients.append(gradient)
    assert all((gradient[1] == 0).all() for gradient in gradients)
    assert any((gradient[0] != 0).any() for gradient in gradients)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(3)), dim=st.sampled_from(list(SHAPES)))
def test_the_order_of_items_does_not_matter(seed, order, dim):
    batch = oracle.random_batch(seed, SHAPES[dim], 3, items=3)
    before = values_of(losses_of(batch, to_logits(batch)))
    for name in ("tags", "complete", "listed", "outside", "partial", "logits", "target", "components"):
        values = getattr(batch, name)
        setattr(batch, name, [values[old] for old in order])
    new = {old: i for i, old in enumerate(order)}
    batch.points = [(new[b], c, v) for b, c, v in batch.points]
    for box in batch.boxes:
        box.item = new[box.item]
    batch.boxes.reverse()
    assert values_of(losses_of(batch, to_logits(batch))) == pytest.approx(before, rel=1e-9, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kinds=st.frozensets(st.sampled_from(EVERY_KIND)),
    num_classes=st.integers(1, 5),
    items=st.integers(1, 3),
    dim=st.sampled_from(list(SHAPES)),
)
def test_any_mixture_of_annotations_has_the_oracles_value(seed, kinds, num_classes, items, dim):
    batch = oracle.random_batch(seed, SHAPES[dim], num_classes, items=items, kinds=kinds)
    values = values_of(losses_of(batch, to_logits(batch)))
    assert values == pytest.approx(oracle.default_losses(batch), rel=1e-9, abs=1e-9)


def test_a_loose_box_promises_nothing_and_a_cut_line_neither():
    batch = oracle.random_batch(0, (4, 5), 2, items=1, kinds=frozenset())
    batch.boxes = [oracle.Box(0, 1, (0, 1), (3, 4))]
    tight = losses_of(batch, to_logits(batch)).box.item()
    batch.boxes[0].cut = frozenset({(0, 0)})
    cut = losses_of(batch, to_logits(batch)).box.item()
    batch.boxes[0].cut |= frozenset(batch.boxes[0].lines())
    assert losses_of(batch, to_logits(batch)).box.item() == 0
    batch.boxes[0].cut, batch.boxes[0].tight = frozenset(), False
    assert losses_of(batch, to_logits(batch)).box.item() == 0
    assert len({tight, cut, 0.0}) == 3


def test_the_number_of_components_may_be_given_or_not():
    batch = oracle.random_batch(1, (4, 5), 3, items=3, kinds=frozenset({"mask"}))
    highest = max(max(ids.values()) for ids in batch.components)
    without, given_exactly = (losses_of(batch, to_logits(batch), num_components=n).mask for n in (None, highest))
    assert without.item() != 0
    assert without.item() == pytest.approx(given_exactly.item(), rel=1e-12)


def test_targets_with_a_channel_axis_and_floating_targets_are_the_same_targets():
    batch = oracle.random_batch(1, (4, 5), 3, items=3)
    logits, annotations = to_logits(batch), to_annotations(batch)
    target = to_tensor(batch.target, batch, torch.int16)
    components = to_tensor(batch.components, batch, torch.int32)
    plain = values_of(losses_of(batch, logits))
    for dtype in (torch.uint8, torch.int64, torch.float32):
        losses = dsp_losses(
            logits, annotations, target=target[:, None].to(dtype), components=components[:, None], ignore_label=3
        )
        assert values_of(losses) == plain


def test_allowed_classes_may_be_handed_over_and_are_believed():
    batch = oracle.random_batch(1, (4, 5), 3, items=2)
    logits, annotations = to_logits(batch), to_annotations(batch)
    allowed = allowed_classes(annotations, to_tensor(batch.target, batch, torch.int16), 3, (4, 5), 3)
    assert values_of(losses_of(batch, logits, allowed=allowed)) == values_of(losses_of(batch, logits))
    everything = torch.ones_like(allowed)
    assert values_of(losses_of(batch, logits, allowed=everything)) != values_of(losses_of(batch, logits))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("entries", [1, 50])
def test_the_size_of_the_blocks_makes_no_difference(monkeypatch, shape, entries):
    batch = oracle.random_batch(2, shape, 3)
    logits = to_logits(batch)
    whole = losses_of(batch, logits)
    (expected,) = torch.autograd.grad(sum(whole), logits)
    monkeypatch.setattr("nnunet_dsp.blocks._BLOCK", entries)
    blocked = losses_of(batch, logits)
    (gradient,) = torch.autograd.grad(sum(blocked), logits)
    assert values_of(blocked) == pytest.approx(values_of(whole), rel=1e-12)
    torch.testing.assert_close(gradient, expected)


def test_logits_in_channels_last_memory_give_the_same_gradients():
    batch = oracle.random_batch(2, (4, 5), 3)
    logits = to_logits(batch)
    last = logits.detach().to(memory_format=torch.channels_last).requires_grad_()
    assert not last.is_contiguous()
    (expected,) = torch.autograd.grad(sum(losses_of(batch, logits)), logits)
    (gradient,) = torch.autograd.grad(sum(losses_of(batch, last)), last)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "relased"}, "`variant` to be one of default, released, but got 'relased'"),
        ({"target": torch.zeros(2, 4, 4)}, r"`target` to be of shape \(2, 4, 5\)"),
        ({"components": torch.zeros(2, 4, 5)}, "`target` to be given with `components`"),
        ({"allowed": torch.ones(2, 2, 4, 5, dtype=torch.bool)}, r"`allowed` to be of shape \(2, 3, 4, 5\)"),
        ({"annotations": AnnotationBatch.empty(2, 4, 2)}, r"got tags of shape \(2, 4\)"),
        ({"logits": torch.zeros(2, 3, 4)}, r"`logits` to be of shape \(B, C, \*S\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(options, message):
    arguments = {"logits": torch.zeros(2, 3, 4, 5), "annotations": AnnotationBatch.empty(2, 3, 2)} | options
    with pytest.raises(ValueError, match=message):
        dsp_losses(**arguments)


class NoLookAtData(TorchDispatchMode):
    """Fails at whatever would make the host wait for the device, or give a result whose size depends on values."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique",
        "unique_",
        "bincount",
        "repeat_interleave",
    )

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function)
        if any(word in name for word in self.FORBIDDEN):
            raise AssertionError(f"{name} needs the values on the host")
        if "index" in name and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for argument in arguments
            if isinstance(argument, (list, tuple))
            for index in argument
        ):
            raise AssertionError(f"{name} indexes by a boolean mask")
        return function(*arguments, **(keywords or {}))


def test_the_default_variant_never_looks_at_the_data_from_the_host():
    batch = oracle.random_batch(1, (4, 5), 3)
    logits, annotations = to_logits(batch), to_annotations(batch)
    target, ids = to_tensor(batch.target, batch, torch.int16), to_tensor(batch.components, batch, torch.int32)
    with pytest.raises(AssertionError, match="needs the values"), NoLookAtData():
        logits.sum().item()
    with pytest.raises(AssertionError, match=r"boolean mask|needs the values"), NoLookAtData():
        logits[logits > 0].sum()
    with NoLookAtData():
        sum(dsp_losses(logits, annotations, target=target, components=ids, ignore_label=3)).backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_default_variant_does_not_synchronise_on_cuda():
    batch = oracle.random_batch(1, (4, 5), 3)
    expected = values_of(losses_of(batch, to_logits(batch, torch.float32)))
    logits = to_logits(batch, torch.float32).detach().cuda().requires_grad_()
    annotations = to_annotations(batch).to("cuda")
    target = to_tensor(batch.target, batch, torch.int16).cuda()
    ids = to_tensor(batch.components, batch, torch.int32).cuda()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = dsp_losses(logits, annotations, target=target, components=ids, ignore_label=3)
        sum(losses).backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert values_of(losses) == pytest.approx(expected, rel=1e-5)


def test_the_module_weighs_each_kind_by_its_own_weight():
    batch = oracle.random_batch(1, (4, 5), 3)
    weights = {"image": 2.0, "box": 3.0, "point": 5.0, "mask": 7.0}
    total, losses = DSPLoss(**weights, ignore_label=3)(
        to_logits(batch),
        to_annotations(batch),
        to_tensor(batch.target, batch, torch.int16),
        to_tensor(batch.components, batch, torch.int32),
    )
    values = values_of(losses)
    assert all(value != 0 for value in values.values())
    assert total.item() == pytest.approx(sum(weights[kind] * value for kind, value in values.items()))
    with pytest.raises(ValueError, match="`variant` to be one of"):
        DSPLoss(variant="published")
