"""The standard error of log-mean-exp by hand, in its limits, and where its interval fails."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.functional.gibbs import effective_sample_size, gibbs_weights, log_mean_exp
from trl_ext.functional.monte_carlo import (
    log_mean_exp_standard_error,
    standard_error_is_believed,
)

DRAWS = 4000
# Of a coverage of 95% over DRAWS samples.
COVERAGE_ERROR = math.sqrt(0.95 * 0.05 / DRAWS)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.equation("E25")
def test_by_hand():
    """w = 1, 2, 3: mean 2, sample variance 1, so 1/(2·√3)."""
    rewards = double([0.0, math.log(2), math.log(3)])
    error = log_mean_exp_standard_error(rewards, 1.0)
    assert error.item() == pytest.approx(1 / (2 * math.sqrt(3)))
    assert log_mean_exp_standard_error(3 * rewards, 3.0).item() == pytest.approx(error.item())


def test_the_weights_of_three_wins_among_ten():
    """w is 3 three times and 1 seven times: mean 1.6, Σ(w − m)² = 3·1.4² + 7·0.6² = 8.4."""
    rewards = double([math.log(3)] * 3 + [0.0] * 7)
    expected = math.sqrt(8.4 / 9) / (1.6 * math.sqrt(10))
    assert log_mean_exp_standard_error(rewards, 1.0).item() == pytest.approx(expected)


@given(
    st.lists(st.floats(-30, 30), min_size=2, max_size=8),
    st.floats(0.3, 50),
    st.floats(-1e3, 1e3),
)
def test_against_the_plain_formula(rewards, beta, shift):
    """Mean and deviation of exp(r/β) from the standard library, with a constant added or not."""
    weights = [math.exp(reward / beta) for reward in rewards]
    spread = statistics.stdev(weights) / statistics.fmean(weights) / math.sqrt(len(weights))
    error = log_mean_exp_standard_error(double(rewards) + shift, beta).item()
    assert error == pytest.approx(spread, rel=1e-6, abs=1e-9)


def test_equal_rewards_have_no_spread_and_one_reward_has_none_to_tell():
    assert log_mean_exp_standard_error(double([0.7] * 5), 0.1).item() == 0
    assert log_mean_exp_standard_error(double([0.7]), 0.1).isnan()
    assert log_mean_exp_standard_error(double([0.7, math.nan]), 0.1).isnan()
    assert log_mean_exp_standard_error(double([0.0, 1.0]), math.inf).item() == 0


def test_extreme_rewards_stay_finite():
    """w = 0 and 1 up to e^-2000: mean 1/2, sd √½, so (√½)/(½·√2) = 1."""
    error = log_mean_exp_standard_error(double([1000.0, 3000.0]), 1.0)
    assert error.item() == pytest.approx(1.0)
    for rewards in ([-math.inf, 3000.0], [math.inf, 0.0]):
        assert log_mean_exp_standard_error(double(rewards), 1.0).item() == pytest.approx(1.0)
    assert log_mean_exp_standard_error(double([math.inf, math.inf]), 1.0).item() == 0


def test_a_mask_beside_missing_rewards():
    """Kept: w = 1, 2, 3."""
    rewards = double([0.0, math.nan, math.log(2), math.log(3), 9.0])
    error = log_mean_exp_standard_error(rewards, 1.0, mask=double([1, 1, 1, 1, 0]))
    assert error.item() == pytest.approx(1 / (2 * math.sqrt(3)))


def test_large_beta_keeps_its_digits():
    """w ≈ 1 + r/β: the error is sd(r)/(β·√K), also in float32 and where r/β is 1e-9."""
    rewards = [0.0, 1.0, 2.0, 5.0]
    expected = statistics.stdev(rewards) / math.sqrt(4) / 1e9
    error = log_mean_exp_standard_error(torch.tensor(rewards), 1e9)
    assert error.dtype == torch.float32
    assert error.item() == pytest.approx(expected, rel=1e-5)


def test_masking_equals_slicing_on_any_axis():
    rewards = torch.randn(3, 6, 2, dtype=torch.float64)
    mask = torch.ones_like(rewards)
    mask[:, 4:] = 0
    sliced = log_mean_exp_standard_error(rewards[:, :4], 0.5, dim=1)
    torch.testing.assert_close(log_mean_exp_standard_error(rewards, 0.5, dim=1, mask=mask), sliced)
    missing = rewards.masked_fill(mask == 0, math.nan)
    torch.testing.assert_close(log_mean_exp_standard_error(missing, 0.5, dim=1), sliced)
    wide = torch.randn(3, 60, 2, dtype=torch.float64).mul(0.1)
    masked = torch.ones_like(wide)
    masked[:, 12:] = 0
    kept = standard_error_is_believed(wide[:, :12], 0.5, dim=1, least_effective=4)
    torch.testing.assert_close(
        standard_error_is_believed(wide, 0.5, dim=1, mask=masked, least_effective=4), kept
    )
    assert not standard_error_is_believed(wide, 0.5, dim=1, mask=0 * masked).any()


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_a_beta_that_is_not_positive(beta):
    with pytest.raises(ValueError, match=r"beta must be positive .*got"):
        log_mean_exp_standard_error(double([0.0, 1.0]), beta)
    with pytest.raises(ValueError, match=r"beta must be positive .*got"):
        standard_error_is_believed(double([0.0, 1.0]), beta)
    with pytest.raises(ValueError, match="least_effective must be positive, got 0"):
        standard_error_is_believed(double([0.0, 1.0]), 1.0, least_effective=0)


@pytest.mark.parametrize(
    ("wins", "losses", "believed"),
    [
        # Behind the mean as many as there are wins, where a win is worth e^20 losses.
        (9, 91, False),
        (11, 89, True),
        (0, 100, False),
        # Behind the variance K·p(1−p)/(1 − 3p(1−p)), about as many as there are losses.
        (92, 8, False),
        (86, 14, True),
        (100, 0, False),
        (100_000, 0, False),
    ],
)
def test_wins_and_losses_are_counted(wins, losses, believed):
    """p = .92: 7.36/.7792 = 9.45 < 10; p = .86: 12.04/.6388 = 18.8; p = .11: 9.79/.7063 = 13.9."""
    rewards = double([1.0] * wins + [0.0] * losses)
    assert standard_error_is_believed(rewards, 0.05).item() is believed


def test_the_two_sizes_against_a_slow_loop():
    """The smaller of both decides: least_effective just below and just above it."""
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 3.0):
        rewards = spread * torch.randn(40, generator=generator, dtype=torch.float64)
        weights = [math.exp(reward) for reward in rewards.tolist()]
        mean = statistics.fmean(weights)
        squares = [(weight - mean) ** 2 for weight in weights]
        sizes = [sum(each) ** 2 / sum(x * x for x in each) for each in (weights, squares)]
        kish = effective_sample_size(gibbs_weights(rewards, 1.0)).item()
        assert sizes[0] == pytest.approx(kish)
        for factor, expected in ((0.999, True), (1.001, False)):
            least = factor * min(sizes)
            believed = standard_error_is_believed(rewards, 1.0, least_effective=least)
            assert believed.item() is expected


def simulated(probability, count, beta):
    """Of DRAWS samples of `count` rewards 0 and 1: what the interval covers, what is believed."""
    generator = torch.Generator().manual_seed(1)
    draws = torch.rand(DRAWS, count, generator=generator, dtype=torch.float64)
    rewards = (draws < probability).double()
    exact = math.log1p(probability * math.expm1(1 / beta))
    miss = (log_mean_exp(rewards, beta) - exact).abs()
    covers = miss <= 1.96 * log_mean_exp_standard_error(rewards, beta)
    return covers, standard_error_is_believed(rewards, beta)


@pytest.mark.equation("E25")
@pytest.mark.parametrize(
    ("probability", "count", "beta"),
    [(0.5, 200, 0.05), (0.2, 200, 0.05), (0.05, 1000, 0.02), (0.3, 200, 1.0), (0.8, 500, 0.1)],
)
def test_the_interval_covers_where_it_is_believed(probability, count, beta):
    """4000 samples; 4 standard errors are 1.4%. The normal approximation itself is off by less."""
    covers, believed = simulated(probability, count, beta)
    assert believed.double().mean() > 0.99
    assert abs(covers.double().mean().item() - 0.95) <= 4 * COVERAGE_ERROR


@pytest.mark.parametrize(
    ("probability", "count"),
    [(0.01, 100), (0.02, 100), (0.97, 100), (0.99, 100), (0.001, 1000)],
)
def test_where_the_interval_fails_it_is_not_believed(probability, count):
    """Few wins or few losses: far below 95% of 4000 intervals cover, and hardly one is believed."""
    covers, believed = simulated(probability, count, 0.05)
    assert covers.double().mean() < 0.95 - 20 * COVERAGE_ERROR
    assert believed.double().mean() < 0.01
