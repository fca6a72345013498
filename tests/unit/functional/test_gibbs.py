import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trl_ext.functional import (
    effective_sample_size,
    gibbs_weights,
    log_mean_exp,
    optimism,
    prefix_log_ratio,
    weight_entropy,
)

finite_rewards = arrays("float64", (3, 5), elements=st.floats(-50, 50, width=32))
betas = st.floats(0.01, 100)


def slow_weights(rewards, beta):
    """The definition, one exponential at a time; it overflows where r/β is large."""
    exponentials = [math.exp(reward / beta) for reward in rewards]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.equation("E8")
def test_weights_by_hand():
    # λ = 1/β = ln 2: exp(λr) = 1, 2, 4; sum 7.
    weights = gibbs_weights(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), 1 / math.log(2))
    assert weights.tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=1e-12)


@given(finite_rewards, betas)
def test_weights_equal_the_definition(rewards, beta):
    if abs(rewards / beta).max() > 300:
        return  # the definition itself overflows there
    weights = gibbs_weights(torch.from_numpy(rewards), beta)
    for got, row in zip(weights.tolist(), rewards.tolist(), strict=True):
        assert got == pytest.approx(slow_weights(row, beta), rel=1e-9, abs=1e-12)


@pytest.mark.equation("E9")
@given(finite_rewards, betas, st.floats(-1000, 1000, width=32))
def test_a_constant_changes_nothing_and_weights_sum_to_one(rewards, beta, constant):
    rewards = torch.from_numpy(rewards)
    weights = gibbs_weights(rewards, beta)
    assert torch.all(weights >= 0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))
    # Adding the constant itself rounds each reward by up to 1e-13, which r/β magnifies by 1/β ≤
    # 100.
    torch.testing.assert_close(
        gibbs_weights(rewards + constant, beta), weights, rtol=1e-9, atol=1e-10
    )


@pytest.mark.equation("E10")
def test_limits_are_uniform_and_best_of_n():
    rewards = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    assert gibbs_weights(rewards, math.inf).tolist() == [[0.25] * 4]
    assert gibbs_weights(rewards, 0.0).tolist() == [[0.0, 0.5, 0.0, 0.5]]
    # The limits are continuous: β = 1e9 and 1e-9 are there to rounding.
    torch.testing.assert_close(gibbs_weights(rewards, 1e9), gibbs_weights(rewards, math.inf))
    torch.testing.assert_close(gibbs_weights(rewards, 1e-9), gibbs_weights(rewards, 0.0))


@pytest.mark.parametrize("beta", [0.0, 0.3, math.inf])
def test_masking_equals_slicing(beta):
    rewards = torch.tensor([5.0, 1.0, float("nan"), 2.0])
    mask = torch.tensor([0, 1, 1, 1])
    weights = gibbs_weights(rewards, beta, mask=mask)
    assert weights[[0, 2]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(weights[[1, 3]], gibbs_weights(torch.tensor([1.0, 2.0]), beta))


@pytest.mark.parametrize("beta", [0.0, 0.3, math.inf])
def test_an_empty_group_has_no_weight(beta):
    assert gibbs_weights(torch.full((2, 3), torch.nan), beta).tolist() == [[0.0] * 3] * 2


def test_infinite_rewards_have_a_limit_and_no_nan():
    rewards = torch.tensor([[torch.inf, 1.0, torch.inf], [-torch.inf, 1.0, -torch.inf]])
    assert gibbs_weights(rewards, 1.0).tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]


def test_half_precision_is_computed_in_float32():
    rewards = torch.arange(64, dtype=torch.bfloat16) / 64
    weights = gibbs_weights(rewards, 0.5)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, gibbs_weights(rewards.double(), 0.5).float())


@pytest.mark.parametrize("beta", [-1.0, math.nan])
def test_a_beta_that_is_none_is_refused(beta):
    with pytest.raises(ValueError, match="between 0"):
        gibbs_weights(torch.zeros(2), beta)


@pytest.mark.equation("E3")
def test_log_mean_exp_by_hand():
    # β = 1/ln 2: (1 + 2 + 4)/3.
    rewards = torch.tensor([0.0, 1.0, 2.0, torch.nan], dtype=torch.float64)
    assert log_mean_exp(rewards, 1 / math.log(2)).item() == pytest.approx(
        math.log(7 / 3), abs=1e-12
    )
    assert log_mean_exp(rewards, math.inf).item() == 0.0
    # A reward of 1000 at β = 1 overflows exp but not its logarithm.
    assert log_mean_exp(torch.tensor([1000.0, 1000.0]), 1.0).item() == 1000.0
    assert log_mean_exp(torch.tensor([torch.nan]), 1.0).isnan()
    with pytest.raises(ValueError, match="positive"):
        log_mean_exp(rewards, 0.0)


@given(finite_rewards, betas)
def test_log_z_is_between_mean_and_maximum_of_the_tilt(rewards, beta):
    tilt = torch.from_numpy(rewards) / beta
    log_z = log_mean_exp(torch.from_numpy(rewards), beta)
    rounding = 1e-12 * (1 + tilt.abs().amax(-1))  # log G is rounded even where the tilt is 0
    assert torch.all(log_z >= tilt.mean(-1) - rounding)  # Jensen
    assert torch.all(log_z <= tilt.amax(-1) + rounding)


def test_effective_sample_size_and_entropy_of_uniform_one_hot_and_nothing():
    weights = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.0] * 4, [0.5, 0.5, 0.0, 0.0]])
    assert effective_sample_size(weights).tolist() == [4.0, 1.0, 0.0, 2.0]
    torch.testing.assert_close(
        weight_entropy(weights), torch.tensor([math.log(4), 0.0, 0.0, math.log(2)])
    )


@pytest.mark.equation("E11")
def test_optimism_is_the_second_order_of_the_tilt():
    """r is 0 or 1 with probability ½: log E exp(λr) − λE[r] = λ²/8 + O(λ⁴), and V = ¼."""
    for beta in (100.0, 1000.0):
        exact = math.log(0.5 + 0.5 * math.exp(1 / beta)) - 0.5 / beta
        # The sample variance of (0, 1) is ½, its expectation over two independent draws is ¼ = ½·½.
        expected = 0.5 * optimism(torch.tensor([0.0, 1.0], dtype=torch.float64), beta).item()
        assert expected == pytest.approx(exact, rel=1 / beta**2)


@pytest.mark.equation("E11")
def test_single_sample_weights_are_optimistic_by_that_much():
    """E exp(λr) of a noisy reward of mean 0 is exp(λ²V/2), not 1; the mean of k samples: /k."""
    generator = torch.Generator().manual_seed(0)
    beta, draws = 4.0, 400_000
    for k in (1, 4):
        noisy = torch.randn(draws, k, generator=generator, dtype=torch.float64).mean(-1)
        tilt = torch.exp(noisy / beta)
        standard_error = tilt.std() / draws**0.5
        predicted = 1 / (2 * beta**2 * k)
        # log E exp = λ²V/2k exactly for a Gaussian.
        assert abs(tilt.mean().item() - math.exp(predicted)) <= 4 * standard_error.item()


@pytest.mark.equation("E4", "E23")
def test_prefix_log_ratio_accumulates_and_then_stays():
    logps = torch.tensor([[-1.0, -2.0, -9.0]])
    ref_logps = torch.tensor([[-1.5, -1.0, 5.0]])
    assert prefix_log_ratio(logps, ref_logps, torch.tensor([[1, 1, 0]])).tolist() == [
        [0.5, -0.5, -0.5]
    ]
    poisoned = torch.tensor([[-1.0, -2.0, torch.nan]])
    assert prefix_log_ratio(poisoned, ref_logps, torch.tensor([[1, 1, 0]])).tolist() == [
        [0.5, -0.5, -0.5]
    ]
