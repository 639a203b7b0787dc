"""Filters and schedules: which pseudo-labels are kept, and when."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_dsp.filters import Chain, ConfidenceThreshold, EntropyPercentile, ErrorPredictor, FilterContext, entropy
from nnunet_dsp.schedules import PolynomialDecay, WarmUp, progress_of

CONTEXT = FilterContext()


def test_entropy_is_that_of_the_formula_and_finite_at_and_beyond_the_ends():
    for p in (0.1, 0.5, 0.9):
        expected = -(p * math.log(p) + (1 - p) * math.log(1 - p))
        assert float(entropy(torch.tensor(p, dtype=torch.float64))) == pytest.approx(expected)
    ends = entropy(torch.tensor([0.0, 1.0, 1 + 1e-7, -1e-7]))
    assert torch.isfinite(ends).all() and (ends < 1e-4).all()
    classes = torch.tensor([[0.2], [0.3], [0.5]], dtype=torch.float64)
    assert float(entropy(classes, 0)) == pytest.approx(-sum(p * math.log(p) for p in (0.2, 0.3, 0.5)))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.55, 1.0])
def test_the_percentile_keeps_the_stated_share_of_the_candidates_and_the_most_certain_ones(share):
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    candidates = torch.rand(2, 3, 8, 8, generator=generator) < 0.4
    kept = EntropyPercentile(lambda _: share)(probability, candidates, CONTEXT)
    number = int(candidates.sum())
    assert int(kept.sum()) == math.ceil((1 - share) * number)
    assert not (kept & ~candidates).any()
    distance = (probability - 0.5).abs()  # the further from one half, the more certain
    if 0 < share < 1:
        assert distance[kept].min() >= distance[candidates & ~kept].max()


def test_certain_edges_that_are_no_candidates_do_not_shift_the_percentile():
    probability = torch.tensor([0.9, 0.8, 0.7, 0.6])
    candidates = torch.ones(4, dtype=torch.bool)
    alone = EntropyPercentile(lambda _: 0.5)(probability, candidates, CONTEXT)
    more = torch.cat([probability, torch.zeros(96)])
    among = torch.cat([candidates, torch.zeros(96, dtype=torch.bool)])
    together = EntropyPercentile(lambda _: 0.5)(more, among, CONTEXT)
    assert alone.tolist() == [True, True, False, False] == together[:4].tolist()
    assert not together[4:].any()


def test_a_filter_without_candidates_keeps_nothing_and_does_not_fail():
    nothing = torch.zeros(5, dtype=torch.bool)
    for judge in (EntropyPercentile(lambda _: 0.2), ConfidenceThreshold(0.8), ErrorPredictor(gate=0.9)):
        assert not judge(torch.rand(5), nothing, FilterContext(progress=0.0)).any()


def test_the_error_predictor_is_asked_from_its_gate_on():
    judge = ErrorPredictor(gate=0.5)
    candidates = torch.tensor([True, True, False])
    logits = torch.tensor([3.0, -3.0, -3.0])
    early = judge(torch.rand(3), candidates, FilterContext(0.49, logits))
    late = judge(torch.rand(3), candidates, FilterContext(0.5, logits))
    assert early.tolist() == [True, True, False]
    assert late.tolist() == [False, True, False]
    with pytest.raises(ValueError, match="error_logits"):
        judge(torch.rand(3), candidates, FilterContext(0.5))


def test_confidence_counts_both_answers_and_a_chain_keeps_what_all_keep():
    probability = torch.tensor([0.05, 0.5, 0.95, 0.7])
    candidates = torch.tensor([True, True, True, True])
    sure = ConfidenceThreshold(0.9)
    assert sure(probability, candidates, CONTEXT).tolist() == [True, False, True, False]
    chain = Chain([sure, ErrorPredictor()])
    logits = torch.tensor([-5.0, -5.0, 5.0, -5.0])
    assert chain(probability, candidates, FilterContext(1.0, logits)).tolist() == [True, False, False, False]
    assert Chain([])(probability, candidates, CONTEXT).all()
    by_class = torch.tensor([[0.95, 0.4], [0.05, 0.6]])
    assert ConfidenceThreshold(0.9, 0)(by_class, torch.ones(2, dtype=torch.bool), CONTEXT).tolist() == [True, False]


def test_schedules_depend_on_progress_alone():
    assert [WarmUp(0.1, 2.0)(p) for p in (0.0, 0.0999, 0.1, 1.0)] == [0.0, 0.0, 2.0, 2.0]
    decay = PolynomialDecay(0.2, 1.5)
    assert decay(0) == 0.2 and decay(1) == 0.0
    assert decay(0.5) == pytest.approx(0.2 * 0.5**1.5)
    assert progress_of(3, 25, 50, 10) == pytest.approx(0.35)
    assert progress_of(12, 0, 50, 10) == 1.0
