"""CRACLoss against a transcription with loops; which network learns from what; what is never NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from nnunet_dsp.crac_loss import TERMS, CRACLoss, balance
from nnunet_dsp.instances.network import CRACOutput
from nnunet_dsp.instances.settings import CRACSettings

IGNORE = 5
OFFSETS = ((-1, 0), (0, -1), (0, -3))
SHAPE = (6, 7)
AT_ONCE = {"warmup": 0.0}


def make(seed=0, requires_grad=False):
    """An output of random values and labels with instances, background and unlabelled voxels; float64."""
    generator = torch.Generator().manual_seed(seed)
    size = (2, len(OFFSETS), *SHAPE)
    implicit = torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1
    explicit = torch.randn(size, generator=generator, dtype=torch.float64)
    foreground = torch.randn(2, 1, *SHAPE, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, IGNORE, IGNORE])[torch.randint(5, (2, 1, *SHAPE), generator=generator)]
    tensors = [t.requires_grad_(requires_grad) for t in (implicit, explicit, foreground)]
    return CRACOutput(*tensors), target.to(torch.int16)


def oracle(output, target, short_weight, consistency, pseudo_labels="hard"):
    """The four affinity terms by loops: (implicit, explicit, implicit consistency, explicit consistency)."""
    known, candidates = [], []
    for item, channel, y, x in itertools.product(range(2), range(len(OFFSETS)), range(SHAPE[0]), range(SHAPE[1])):
        other = y + OFFSETS[channel][0], x + OFFSETS[channel][1]
        if not (0 <= other[0] < SHAPE[0] and 0 <= other[1] < SHAPE[1]):
            continue
        a, b = int(target[item, 0, y, x]), int(target[(item, 0, *other)])
        if {a, b} & {1, 2}:
            known.append((item, channel, y, x, float(a == b)))
        elif not a == b == 0:
            candidates.append((item, channel, y, x))
    share = min(0.99, max(0.05, sum(e[-1] for e in known) / len(known)))
    inside, between = (1.0, share / (1 - share)) if share > 0.5 else ((1 - share) / share, 1.0)

    def sigmoid(v):
        return 1 / (1 + math.exp(-v))

    def mean_of_channels(errors):
        means = [(short_weight if c < 2 else 1.0, errors[c]) for c in errors if errors[c]]
        return sum(w * sum(e) / len(e) for w, e in means) / sum(w for w, _ in means)

    sums = [{c: [] for c in range(len(OFFSETS))} for _ in range(4)]
    for *where, same in known:
        s, h = float(output.implicit[tuple(where)]), sigmoid(float(output.explicit_logits[tuple(where)]))
        weight = inside if same else between
        sums[0][where[1]].append(weight * (s - same) ** 2)
        sums[1][where[1]].append(weight * (h - same) ** 2)
    for where in candidates if consistency else []:
        s, h = float(output.implicit[where]), sigmoid(float(output.explicit_logits[where]))
        said = (float(h > 0.5), float(s > 0.5)) if pseudo_labels == "hard" else (h, max(0.0, s))
        sums[2][where[1]].append((s - said[0]) ** 2)
        sums[3][where[1]].append((h - said[1]) ** 2)
    return [mean_of_channels(part) if any(part.values()) else 0.0 for part in sums]


@pytest.mark.parametrize("pseudo_labels", ["hard", "soft"])
@pytest.mark.parametrize("seed", range(3))
def test_the_terms_are_those_of_a_loop_over_every_edge(seed, pseudo_labels):
    output, target = make(seed)
    loss = CRACLoss(OFFSETS, CRACSettings(short_weight=7.0, pseudo_labels=pseudo_labels, **AT_ONCE), IGNORE)
    loss(output, target)
    terms = dict(zip(TERMS, loss.terms.tolist(), strict=True))
    expected = oracle(output, target, 7.0, True, pseudo_labels)
    names = ("implicit", "explicit", "implicit_consistency", "explicit_consistency")
    for name, value in zip(names, expected, strict=True):
        assert terms[name] == pytest.approx(value, rel=1e-5), name
    assert terms["kept"] == 1.0


def test_the_foregrounds_term_is_the_balanced_cross_entropy_of_labelled_voxels():
    output, target = make(3)
    loss = CRACLoss(OFFSETS, CRACSettings(), IGNORE)
    loss(output, target)
    labelled = [
        (float(v), int(t) > 0)
        for v, t in zip(output.foreground_logits.flatten(), target.flatten(), strict=True)
        if int(t) != IGNORE
    ]
    share = sum(inside for _, inside in labelled) / len(labelled)
    inside, outside = (1.0, share / (1 - share)) if share > 0.5 else ((1 - share) / share, 1.0)
    values = [
        inside * math.log1p(math.exp(-v)) if positive else outside * math.log1p(math.exp(v)) for v, positive in labelled
    ]
    assert loss.terms[TERMS.index("foreground")].item() == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_the_sum_is_weighted_as_the_settings_say():
    output, target = make(1)
    settings = CRACSettings(supervised_weight=3.0, foreground_weight=5.0, consistency_weight=7.0, **AT_ONCE)
    loss = CRACLoss(OFFSETS, settings, IGNORE)
    total = float(loss(output, target))
    implicit, explicit, foreground, one, other, error, _ = loss.terms.tolist()
    assert error == 0
    assert total == pytest.approx(3 * (implicit + explicit) + 5 * foreground + 7 * (one + other), rel=1e-5)


def test_pseudo_labels_are_detached_so_each_consistency_term_moves_one_network_only():
    for released, moved in ((False, False), (True, True)):
        output, target = make(2, requires_grad=True)
        settings = CRACSettings(released=released, pseudo_labels="soft", **AT_ONCE)
        loss = CRACLoss(OFFSETS, settings, IGNORE)
        edges_only = CRACOutput(output.implicit, output.explicit_logits.detach().requires_grad_(), *output[2:])
        loss(edges_only, target)
        parts = loss._consistency(
            edges_only,
            edges_only.explicit_logits.float().sigmoid(),
            torch.ones_like(output.implicit, dtype=torch.bool),
            torch.ones(len(OFFSETS)),
        )
        (of_explicit,) = torch.autograd.grad(
            parts.implicit, edges_only.explicit_logits, retain_graph=True, allow_unused=True
        )
        (of_implicit,) = torch.autograd.grad(parts.explicit, edges_only.implicit, allow_unused=True)
        for gradient in (of_explicit, of_implicit):
            assert (gradient is not None and bool(gradient.abs().sum() > 0)) is moved


def test_unlabelled_voxels_and_edges_beyond_the_border_give_no_supervised_gradient():
    output, _ = make(4, requires_grad=True)
    target = torch.full((2, 1, *SHAPE), IGNORE, dtype=torch.int16)
    target[:, :, 2:4, 2:4] = 1
    CRACLoss(OFFSETS, CRACSettings(consistency_weight=0.0), IGNORE)(output, target).backward()
    touched = torch.zeros(2, len(OFFSETS), *SHAPE, dtype=torch.bool)
    labelled = target[:, 0] == 1
    for channel, (dy, dx) in enumerate(OFFSETS):
        for y, x in itertools.product(range(SHAPE[0]), range(SHAPE[1])):
            if 0 <= y + dy < SHAPE[0] and 0 <= x + dx < SHAPE[1]:
                touched[:, channel, y, x] = labelled[:, y, x] | labelled[:, y + dy, x + dx]
    assert torch.equal(output.implicit.grad != 0, touched)
    assert torch.equal(output.explicit_logits.grad != 0, touched)
    assert torch.equal(output.foreground_logits.grad[:, 0] != 0, labelled)


@pytest.mark.parametrize(
    "settings",
    [{}, {"entropy_filter": True, "error_filter": True}, {"released": True}, {"pseudo_labels": "soft"}],
)
@pytest.mark.parametrize("value", [0, 1, IGNORE])
def test_extreme_outputs_and_labels_of_one_kind_give_finite_losses_and_gradients(settings, value):
    size = (1, len(OFFSETS), *SHAPE)
    implicit = torch.full(size, 1 + 1e-7, requires_grad=True)
    explicit = torch.full(size, 200.0, requires_grad=True)
    errors = [torch.full(size, -200.0, requires_grad=True)] * 2 if settings.get("error_filter") else [None, None]
    output = CRACOutput(implicit, explicit, torch.full((1, 1, *SHAPE), -200.0), *errors, implicit.detach())
    target = torch.full((1, 1, *SHAPE), value, dtype=torch.int16)
    loss = CRACLoss(OFFSETS, CRACSettings(**settings), IGNORE)
    loss.progress = 0.5
    total = loss(output, target)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(loss.terms).all()
    assert torch.isfinite(implicit.grad).all() and torch.isfinite(explicit.grad).all()


def test_pseudo_labels_wait_for_the_warm_up_and_uncertain_ones_are_dropped():
    output, target = make(5)
    loss = CRACLoss(OFFSETS, CRACSettings(warmup=0.3, entropy_filter=True, entropy_share=0.5), IGNORE)
    kept = []
    for progress in (0.0, 0.29, 0.3, 0.99):
        loss.progress = progress
        loss(output, target)
        terms = dict(zip(TERMS, loss.terms.tolist(), strict=True))
        assert (terms["implicit_consistency"] > 0) is (progress >= 0.3)
        kept.append(terms["kept"])
    assert kept[2] == pytest.approx(1 - 0.5 * 0.7**1.5, abs=0.02)
    assert kept[3] > 0.99


def test_each_network_learns_where_the_other_one_is_sure():
    target = torch.full((1, 1, *SHAPE), IGNORE, dtype=torch.int16)
    size = (1, len(OFFSETS), *SHAPE)
    left = torch.zeros(size, dtype=torch.bool)
    left[..., :3] = True
    unsure = torch.where(left, 0.55, 0.95).requires_grad_()  # the implicit one on the left
    logits = torch.where(left, 4.0, 0.1).requires_grad_()  # the explicit one on the right
    settings = CRACSettings(warmup=0.0, entropy_filter=True, entropy_share=0.72)  # 27 of 95 edges are on the left
    loss = CRACLoss(OFFSETS, settings, IGNORE)
    loss(CRACOutput(unsure, logits, torch.zeros(1, 1, *SHAPE)), target).backward()
    moved = unsure.grad != 0
    assert moved.any() and not (moved & ~left).any(), "the implicit one where the explicit one is sure"
    moved = logits.grad != 0
    assert moved.any() and not (moved & left).any()


def test_the_error_predictor_learns_which_labelled_edges_are_wrong():
    target = torch.full((1, 1, *SHAPE), 1, dtype=torch.int16)  # every edge is inside one instance
    judged = torch.full((1, len(OFFSETS), *SHAPE), 0.9)
    judged[..., 0] = 0.1
    logits = torch.zeros_like(judged, requires_grad=True)
    output = CRACOutput(judged.clone(), torch.full_like(judged, 3.0), torch.zeros(1, 1, *SHAPE), logits, logits, judged)
    loss = CRACLoss(OFFSETS, CRACSettings(error_filter=True, consistency_weight=0.0), IGNORE)
    loss(output, target)
    everywhere = torch.ones_like(judged, dtype=torch.bool)
    loss._error(logits, judged, everywhere, everywhere).backward()
    assert (logits.grad[..., 0] < 0).all(), "wrong edges: the logit must rise"
    assert (logits.grad[..., 1:] > 0).all()
    wrong, right = logits.grad[..., 0].abs().sum(), logits.grad[..., 1:].abs().sum()
    assert wrong == pytest.approx(float(right), rel=0.4), "the few wrong ones weigh about as much as the many right"


def test_balance_lets_both_kinds_of_edges_weigh_alike_and_counts_only_those_asked_for():
    same = torch.zeros(1000, dtype=torch.bool)
    same[:200] = True
    among = torch.ones(1000, dtype=torch.bool)
    among[900:] = False
    weight = balance(same, among)
    assert float(weight[same].sum()) == pytest.approx(float(weight[~same].sum()), rel=1e-5)
    assert not weight[900:].any()
    assert float(balance(torch.ones(10, dtype=torch.bool), torch.ones(10, dtype=torch.bool)).max()) == 1.0


def test_without_labelled_background_the_foreground_is_no_term_but_stays_in_the_graph():
    output, target = make(6, requires_grad=True)
    loss = CRACLoss(OFFSETS, CRACSettings(), IGNORE)
    loss.foreground_learnt = False
    loss(output, target).backward()
    assert output.foreground_logits.grad is not None
    assert not output.foreground_logits.grad.any()
