"""The masked arithmetic under the losses: the same as torch.where(), which is slow on a CPU."""

import pytest
import torch

from nnunet_dsp.blocks import as_numbers, scores_within


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_within_leaves_what_the_mask_holds_and_lowers_the_rest(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(2, 5, 6, 7, generator=generator) * 20).to(dtype)
    mask = torch.rand(scores.shape, generator=generator) < 0.5
    mask[:, 2] = True

    result = scores_within(scores, mask)

    assert result.dtype == dtype
    assert torch.equal(result[mask], scores[mask])
    assert (result[~mask] < -60000).all()
    expected = torch.where(mask, scores, -torch.inf)
    assert torch.equal(result.max(1).indices, expected.max(1).indices)
    assert torch.equal(result.softmax(1), expected.softmax(1))


def test_scores_within_of_a_strided_part() -> None:
    scores = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)
    mask = scores.int() % 3 == 0
    assert torch.equal(scores_within(scores, mask)[mask], scores[mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_numbers_is_one_where_the_mask_holds(dtype: torch.dtype) -> None:
    mask = torch.tensor([[True, False], [False, True]])
    for part in (mask, mask[:, 1], mask.t()):
        result = as_numbers(part, dtype)
        assert result.dtype == dtype
        assert torch.equal(result, part.to(dtype))
