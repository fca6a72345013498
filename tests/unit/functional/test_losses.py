import pytest
import torch

from trl_ext.functional import masked_mean, masked_sum, weighted_nll


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
