import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from trl_ext.functional import masked_mean, masked_moments, masked_sum, weighted_nll


def test_masked_sum_and_mean_never_touch_what_is_masked():
    values = torch.tensor([[1.0, 2.0, torch.nan], [torch.inf, 5.0, torch.nan]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    total = masked_sum(values, mask)
    assert total.tolist() == [3.0, 0.0]
    assert masked_mean(values, mask).tolist() == [1.5, 0.0]
    total.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_masks_broadcast():
    values = torch.arange(6.0).view(2, 3)
    assert masked_mean(values, torch.tensor([1, 0, 1])).tolist() == [1.0, 4.0]
    assert masked_sum(values, torch.tensor([[1], [0]]), dim=0).tolist() == [0.0, 1.0, 2.0]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 6))
def test_masked_moments_are_those_of_what_is_kept(seed, rows, tokens):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, tokens, generator=generator) < 0.6
    values = torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    garbage = [torch.nan, torch.inf, -torch.inf][seed % 3]
    mean, deviation = masked_moments(values.where(mask, garbage), mask)
    kept = values[mask]
    expected = (kept.mean(), kept.std(correction=0)) if len(kept) else (0.0, 0.0)
    assert mean.item() == pytest.approx(float(expected[0]), abs=1e-14)
    assert deviation.item() == pytest.approx(float(expected[1]), abs=1e-14)


def test_masked_moments_by_hand():
    """1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9)/4."""
    values = torch.tensor([[1.0, 3.0, torch.nan], [5.0, 7.0, torch.inf]])
    mean, deviation = masked_moments(values, torch.tensor([1, 1, 0]))
    assert (mean.item(), deviation.item()) == pytest.approx((4.0, 5**0.5))
    assert [each.item() for each in masked_moments(values, torch.zeros(3))] == [0.0, 0.0]
    one = masked_moments(values, torch.tensor([[0, 0, 0], [1, 0, 0]]))
    assert [each.item() for each in one] == [5.0, 0.0]


def test_masked_moments_of_half_precision_are_those_of_float32():
    """1 and its neighbour in bfloat16: their mean lies between the two, where bfloat16 has none."""
    values = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)
    mean, deviation = masked_moments(values, torch.ones(2))
    assert (mean.item(), deviation.item()) == (1.00390625, 0.00390625)
    large = torch.full((4096,), 100.0, dtype=torch.float16)  # a sum beyond 65504
    assert [each.item() for each in masked_moments(large, torch.ones(4096))] == [100.0, 0.0]


@pytest.mark.equation("E7", "E8")
def test_weighted_nll_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -1.0, -7.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    weights = torch.tensor([0.25, 0.75], requires_grad=True)
    loss = weighted_nll(logps, weights, mask)
    assert loss.tolist() == [0.25 * 7, 0.75 * 4]
    per_token = weighted_nll(logps, weights, mask, token_reduction="mean")
    assert per_token.tolist() == pytest.approx([0.25 * 7 / 3, 0.75 * 2])
    loss.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [[-0.25] * 3, [-0.75, -0.75, 0.0]]
    assert weights.grad is None, "weights are constants of the regression"


def test_a_completion_without_tokens_costs_nothing():
    logps = torch.full((1, 2), torch.nan)
    for reduction in ("sum", "mean"):
        assert (
            weighted_nll(logps, torch.ones(1), torch.zeros(1, 2), token_reduction=reduction).item()
            == 0.0
        )
