"""Log sums over keys against loops written from the formula, values and gradients; drawing and dealing of keys."""

import math

import pytest
import torch

from nnunet_dsp import similarity
from nnunet_dsp.similarity import KeyGroup, class_log_sums, class_means, deal_keys, fair_shares, unit_length


def naive_log_sums(queries, keys, groups, group_of, temperature, cosine):
    """The formula with loops; `group_of(item, position)` says which group a query sees."""
    batch, dim, number = queries.shape
    rows = []
    for b in range(batch):
        columns = []
        for n in range(number):
            group = groups[group_of(b, n)]
            f = queries[b, :, n]
            length = f.square().sum().sqrt() if cosine else 1.0
            sums, position = [], 0
            for count, weight in zip(group.counts, group.log_weights, strict=True):
                terms = []
                for j in group.index[position : position + count].tolist():
                    s = sum(f[d] * keys[j, d] for d in range(dim)) / length / temperature
                    terms.append(s)
                position += count
                highest = max(float(s.detach()) for s in terms)  # exp(1600) is beyond float64
                sums.append(torch.log(sum(torch.exp(s - highest) for s in terms) * math.exp(weight)) + highest)
            columns.append(torch.stack(sums))
        rows.append(torch.stack(columns, dim=1))
    return torch.stack(rows)


def example(seed=0, classes=3, keys=11, batch=2, number=9, dim=4):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, dim, number, generator=generator, dtype=torch.float64)
    vectors = torch.randn(keys, dim, generator=generator, dtype=torch.float64)
    key_class = torch.randint(0, classes, (keys,), generator=generator)
    return queries, vectors, key_class


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.005])  # the last: exponents that overflow float32 unshifted
def test_log_sums_and_their_gradients_equal_the_formula(cosine, temperature):
    queries, vectors, key_class = example()
    classes, groups = deal_keys(key_class, 3, max_keys=100)
    weight = torch.randn(2, len(classes), 9, dtype=torch.float64)
    results = []
    for function in (
        lambda q, k: class_log_sums(q, k, groups, temperature=temperature, cosine=cosine),
        lambda q, k: naive_log_sums(q, k, groups, lambda b, n: 0, temperature, cosine),
    ):
        q, v = queries.clone().requires_grad_(), vectors.clone().requires_grad_()
        out = function(q, unit_length(v, 1) if cosine else v)
        (out * weight).sum().backward()
        results.append((out.detach(), q.grad, v.grad))
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9 * max(1.0, float(expected.abs().max())))


def test_float32_is_as_exact_as_float32_can_be_where_exponents_are_large():
    queries, vectors, key_class = example(dim=16, keys=40)
    classes, groups = deal_keys(key_class, 3, max_keys=100)
    keys = unit_length(vectors, 1)
    for temperature in (0.1, 0.0201, 0.01):  # 1 / 0.0201 is below SAFE_EXPONENT, 1 / 0.01 above
        exact = class_log_sums(queries, keys, groups, temperature=temperature, cosine=True)
        short = class_log_sums(queries.float(), keys.float(), groups, temperature=temperature, cosine=True)
        assert torch.isfinite(short).all()
        assert (short.double() - exact).abs().max() < 2e-6 / temperature


def test_softmax_of_the_log_sums_is_the_attention_weighted_vote():
    queries, vectors, key_class = example(classes=4, keys=30)
    classes, groups = deal_keys(key_class, 4, max_keys=100)
    got = class_log_sums(queries, vectors, groups, temperature=0.5).softmax(1)
    one_hot = torch.nn.functional.one_hot(key_class, 4).double()
    attention = torch.softmax(queries.transpose(1, 2) @ vectors.T / 0.5, dim=-1)
    assert torch.allclose(got, (attention @ one_hot).transpose(1, 2)[:, classes], atol=1e-12)
    assert torch.allclose(got.sum(1), torch.ones(2, 9, dtype=torch.float64))


@pytest.mark.parametrize("cosine", [True, False])
def test_gradients_taken_under_autocast_are_those_in_full_precision(cosine):
    queries, vectors, key_class = (t.float() if t.is_floating_point() else t for t in example())
    _, groups = deal_keys(key_class, 3, max_keys=100)
    results = []
    for lower in (False, True):
        q, v = queries.clone().requires_grad_(), unit_length(vectors, 1).requires_grad_()
        loss = class_log_sums(q, v, groups, temperature=0.1, cosine=cosine).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            loss.backward()
        results.append((q.grad, v.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_groups_take_turns_and_each_is_exact(monkeypatch):
    monkeypatch.setattr(similarity, "_BLOCK_ON_CPU", 1)  # the least block, 64 queries; groups make it smaller
    queries, vectors, key_class = example(keys=24, number=10)
    _, groups = deal_keys(key_class, 3, max_keys=24, groups=3)
    seen = []
    for item, first, last, turn in similarity._blocks(queries, groups):
        seen += [(item, n, turn) for n in range(first, last)]
    assert sorted((b, n) for b, n, _ in seen) == [(b, n) for b in range(2) for n in range(10)]
    assert {turn for b, _, turn in seen if b == 0} == {0, 1, 2}, "a group has no turn in the first image"
    turn_of = {(b, n): turn for b, n, turn in seen}
    results = []
    for function in (
        lambda q, k: class_log_sums(q, k, groups, temperature=0.3, cosine=True),
        lambda q, k: naive_log_sums(q, k, groups, lambda b, n: turn_of[b, n], 0.3, True),
    ):
        q, v = queries.clone().requires_grad_(), vectors.clone().requires_grad_()
        out = function(q, unit_length(v, 1))
        out.square().sum().backward()
        results.append((out.detach(), q.grad, v.grad))
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, atol=1e-9)


def test_a_query_of_almost_no_length_has_a_bounded_gradient():
    keys = unit_length(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 1)
    _, groups = deal_keys(torch.tensor([0, 1]), 2, max_keys=2)
    results = []
    for function in (
        lambda q: class_log_sums(q, keys, groups, temperature=0.1, cosine=True),
        lambda q: class_log_sums(unit_length(q, 1), keys, groups, temperature=0.1),
    ):
        query = torch.tensor([[[3e-7, 0.0, 1.0], [1e-7, 0.0, -2.0]]], requires_grad=True)
        (function(query) * torch.tensor([[[1.0], [-0.5]]])).sum().backward()
        results.append(query.grad)
    assert torch.isfinite(results[0]).all()
    assert torch.allclose(*results, rtol=1e-4)


def test_weights_make_up_for_keys_that_were_not_drawn():
    torch.manual_seed(0)
    vectors = torch.randn(4000, 5, dtype=torch.float64)
    key_class = (torch.arange(4000) >= 3600).long()  # nine of class 0 to one of class 1
    queries = torch.randn(1, 5, 6, dtype=torch.float64)
    _, everyone = deal_keys(key_class, 2, max_keys=4000)
    exact = class_log_sums(queries, vectors, everyone, temperature=2.0).exp()
    estimates = []
    for _ in range(200):
        _, groups = deal_keys(key_class, 2, max_keys=200, groups=2)
        assert [sum(group.counts[c] for group in groups) for c in (0, 1)] == [100, 100]
        estimates.append(class_log_sums(queries, vectors, groups, temperature=2.0).exp())
    mean, spread = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / math.sqrt(200)
    assert ((mean - exact).abs() < 5 * spread).all()


@pytest.mark.parametrize(
    ("available", "total", "shares"),
    [([10, 10], 8, [4, 4]), ([2, 100], 50, [2, 48]), ([100, 3, 5], 20, [12, 3, 5]), ([4, 4], 100, [4, 4]),
     ([9, 9, 9], 2, [1, 1, 1]), ([1, 1, 50, 50], 11, [1, 1, 4, 5])],
)  # fmt: skip
def test_shares_are_even_as_far_as_the_keys_reach(available, total, shares):
    assert sorted(fair_shares(available, total)) == sorted(shares)
    assert all(0 < s <= a for s, a in zip(fair_shares(available, total), available, strict=True))


def test_keys_are_dealt_out_once_each_and_rare_classes_to_every_group():
    key_class = torch.tensor([0] * 50 + [2] * 3)
    classes, groups = deal_keys(key_class, 4, max_keys=43, groups=4)
    assert classes == [0, 2]
    common = torch.cat([group.index[: group.counts[0]] for group in groups])
    assert len(common) == len(common.unique()) == 40 and (common < 50).all()
    for group in groups:
        assert group.counts == (10, 3)
        assert sorted(group.index[10:].tolist()) == [50, 51, 52]
        assert group.log_weights == pytest.approx((math.log(5), 0.0))


def test_without_shuffling_the_same_keys_come_evenly_spaced():
    key_class = torch.zeros(100, dtype=torch.int64)
    draws = [deal_keys(key_class, 1, max_keys=10, shuffle=False)[1][0].index.tolist() for _ in range(2)]
    assert draws[0] == draws[1] == list(range(0, 100, 10))


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least one key"):
        deal_keys(torch.tensor([-1]), 2, max_keys=5)
    with pytest.raises(ValueError, match="`groups` to be at least 1, but got 0"):
        deal_keys(torch.tensor([0]), 2, max_keys=5, groups=0)


def test_class_means_are_directions_of_the_classes_and_tell_what_is_missing():
    embeddings = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 1.0], [3.0, 3.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0, -1])
    vectors, found = class_means(embeddings, labels, 3, per_class=2)
    assert found.tolist() == [True, True, False]
    assert torch.allclose(vectors[0], torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5]]))
    assert torch.allclose(vectors[1], torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert (vectors[2] == 0).all()
    single, _ = class_means(embeddings, labels, 3, per_class=1)
    bisector = torch.tensor([math.cos(math.pi / 8), math.sin(math.pi / 8)])  # lengths do not count: 45 degrees halved
    assert torch.allclose(single[0, 0], bisector)
    more_than_there_are, _ = class_means(embeddings[:1], labels[:1], 1, per_class=3)
    assert torch.allclose(more_than_there_are[0], torch.tensor([[1.0, 0.0]] * 3))


def test_a_group_keeps_its_classes_apart():
    group = KeyGroup(torch.tensor([0, 1]), (1, 1), (0.0, 0.0))
    keys = torch.eye(2)
    out = class_log_sums(torch.tensor([[[1.0], [0.0]]]), keys, [group], temperature=0.5)
    assert torch.allclose(out[0, :, 0], torch.tensor([2.0, 0.0]))
