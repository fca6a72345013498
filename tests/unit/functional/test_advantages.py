"""Returns and advantages against loops that do one step at a time."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from trl_ext.functional import (
    gae,
    importance_weights,
    next_values,
    off_policy_credit,
    reward_to_go,
)

FRACTIONS = st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0])


def batch(seed: int, rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask with holes; garbage where the mask is 0."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, tokens, generator=generator) < 0.7
    return rewards.where(mask, torch.nan), values.where(mask, torch.inf), mask


def policy_tokens(mask: Tensor, row: int) -> list[int]:
    return mask[row].nonzero().flatten().tolist()


@pytest.mark.equation("E33")
@pytest.mark.equation("E36")
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 9), FRACTIONS)
def test_reward_to_go_is_the_double_loop(seed, rows, tokens, gamma):
    rewards, _, mask = batch(seed, rows, tokens)
    result = reward_to_go(rewards, mask, gamma=gamma)
    expected = torch.zeros_like(result)
    for row in range(rows):
        kept = policy_tokens(mask, row)
        for i, t in enumerate(kept):
            for steps, s in enumerate(kept[i:]):
                expected[row, t] += gamma**steps * rewards[row, s]
    torch.testing.assert_close(result, expected)


@pytest.mark.equation("E42")
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 9), FRACTIONS, FRACTIONS)
def test_gae_is_the_recursion(seed, rows, tokens, gamma, lam):
    rewards, values, mask = batch(seed, rows, tokens)
    last = torch.arange(rows, dtype=torch.float64) - 1
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, last_values=last)
    for row in range(rows):
        advantage, following = 0.0, last[row].item()
        for t in reversed(policy_tokens(mask, row)):
            value = values[row, t].item()
            advantage = rewards[row, t].item() + gamma * following - value + gamma * lam * advantage
            following = value
            assert advantages[row, t].item() == pytest.approx(advantage, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(advantage + value, abs=1e-12)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@pytest.mark.equation("E40")
def test_lambda_0_is_the_td_error_by_hand():
    """r = (1, 0, 2), V = (3, 5, 7), γ = ½: δ = (1 + 2.5 − 3, 3.5 − 5, 2 − 7)."""
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[3.0, 5.0, 7.0]])
    advantages, _ = gae(rewards, values, torch.ones(1, 3), gamma=0.5, lam=0.0)
    assert advantages.tolist() == [[0.5, -1.5, -5.0]]
    bootstrapped, _ = gae(
        rewards, values, torch.ones(1, 3), gamma=0.5, lam=0.0, last_values=torch.tensor([4.0])
    )
    assert bootstrapped.tolist() == [[0.5, -1.5, -3.0]]


@pytest.mark.equation("E41")
def test_lambda_1_is_the_return_minus_the_value():
    rewards, values, mask = batch(seed=3, rows=4, tokens=50)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    to_go = reward_to_go(rewards, mask, gamma=0.9)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages[mask], (to_go - values)[mask])


def test_half_precision_is_summed_in_float32():
    """4096 rewards of 1 in bfloat16, whose neighbours above 256 are 2 apart."""
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    result = reward_to_go(ones, torch.ones(1, 4096))
    assert result.dtype == torch.float32
    assert result[0].tolist() == list(range(4096, 0, -1))


def test_no_gradient_flows_into_a_target():
    values = torch.zeros(1, 3, requires_grad=True)
    advantages, returns = gae(torch.ones(1, 3), values, torch.ones(1, 3), gamma=1.0, lam=0.9)
    assert not advantages.requires_grad and not returns.requires_grad


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_bad_discount(gamma):
    with pytest.raises(ValueError, match="gamma must be between 0 and 1"):
        reward_to_go(torch.zeros(1, 1), torch.ones(1, 1), gamma=gamma)
    with pytest.raises(ValueError, match="lam must be between 0 and 1"):
        gae(*torch.zeros(3, 1, 1), gamma=1.0, lam=gamma)


@pytest.mark.equation("E38")
@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("truncation", [None, 1.2])
def test_off_policy_credit_is_the_triple_loop(gamma, truncation):
    """Past and later ratios of a reward are one product, and it is the product that is cut."""
    rewards, log_ratios, mask = batch(seed=5, rows=3, tokens=6)
    result = off_policy_credit(rewards, log_ratios, mask, gamma=gamma, truncation=truncation)
    cut = 0
    for row in range(3):
        kept = policy_tokens(mask, row)
        for i, t in enumerate(kept):
            past = sum(log_ratios[row, s].item() for s in kept[: i + 1])
            expected = 0.0
            for steps, s in enumerate(kept[i:]):
                later = sum(log_ratios[row, u].item() for u in kept[i + 1 : i + 1 + steps])
                weight = math.exp(past + later)
                if truncation is not None and weight > truncation:
                    weight, cut = truncation, cut + 1
                expected += gamma**steps * rewards[row, s].item() * weight
            assert result[row, t].item() == pytest.approx(expected)
    assert (result[~mask] == 0).all()
    assert truncation is None or cut > 3


def test_on_policy_it_is_the_reward_to_go():
    rewards, _, mask = batch(seed=6, rows=3, tokens=9)
    on_policy = off_policy_credit(rewards, torch.zeros(3, 9), mask, gamma=0.9)
    torch.testing.assert_close(on_policy, reward_to_go(rewards, mask, gamma=0.9))


def test_a_truncation_that_nothing_reaches_changes_nothing():
    rewards, log_ratios, mask = batch(seed=7, rows=3, tokens=9)
    whole = off_policy_credit(rewards, log_ratios, mask)
    assert torch.equal(off_policy_credit(rewards, log_ratios, mask, truncation=1e9), whole)
    with pytest.raises(ValueError, match="gamma must be between 0 and 1"):
        off_policy_credit(rewards, log_ratios, mask, gamma=2.0)


@pytest.mark.equation("E38")
@pytest.mark.parametrize("how", ["token", "prefix", "sequence"])
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 9), st.sampled_from([None, 0.5, 1.2]))
def test_importance_weights_are_the_products(how, seed, rows, tokens, truncation):
    _, log_ratios, mask = batch(seed, rows, tokens)
    weights = importance_weights(log_ratios, mask, how, truncation=truncation)
    for row in range(rows):
        kept = policy_tokens(mask, row)
        for i, t in enumerate(kept):
            chosen = {"token": [t], "prefix": kept[: i + 1], "sequence": kept}[how]
            product = math.prod(math.exp(log_ratios[row, s].item()) for s in chosen)
            limited = product if truncation is None else min(product, truncation)
            assert weights[row, t].item() == pytest.approx(limited)
    assert (weights[~mask] == 0).all()


def test_importance_weights_by_hand():
    """ρ = 2, 3, ½ with a hole after the first."""
    log_ratios = torch.tensor([[2.0, torch.nan, 3.0, 0.5]]).log()
    mask = torch.tensor([[1, 0, 1, 1]])

    def of(how, truncation=None):
        weights = importance_weights(log_ratios, mask, how, truncation=truncation)
        return pytest.approx(weights[0].tolist())

    assert of("token") == [2.0, 0.0, 3.0, 0.5]
    assert of("prefix") == [2.0, 0.0, 6.0, 3.0]
    assert of("sequence") == [3.0, 0.0, 3.0, 3.0]
    assert of("prefix", 5.0) == [2.0, 0.0, 5.0, 3.0], "the product is cut, and not its factors"


def test_the_prefix_of_the_last_token_is_the_sequence():
    _, log_ratios, mask = batch(seed=8, rows=6, tokens=7)
    prefix, sequence = (importance_weights(log_ratios, mask, how) for how in ("prefix", "sequence"))
    for row in range(6):
        last = policy_tokens(mask, row)[-1]
        assert prefix[row, last].item() == pytest.approx(sequence[row, last].item())
        assert len(set(sequence[row, mask[row]].tolist())) == 1


@pytest.mark.parametrize("how", ["token", "prefix", "sequence"])
def test_on_policy_every_weight_is_1(how):
    _, _, mask = batch(seed=9, rows=4, tokens=6)
    zeros = torch.zeros(4, 6).where(mask, torch.inf)
    weights = importance_weights(zeros, mask, how, truncation=1.0)
    assert torch.equal(weights, mask.float())


def test_weights_are_finite_where_they_are_cut_and_constants_in_float32():
    log_ratios = torch.full((1, 300), 1.0, dtype=torch.bfloat16, requires_grad=True)
    weights = importance_weights(log_ratios, torch.ones(1, 300), "prefix", truncation=2.0)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    assert weights[0].tolist() == [2.0] * 300
    # 300 times 2^-8, whose sum bfloat16 would lose beyond 1.
    small = torch.full((1, 300), 2**-8, dtype=torch.bfloat16)
    sequence = importance_weights(small, torch.ones(1, 300), "sequence")
    assert sequence[0, 0].item() == pytest.approx(math.exp(300 / 256))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 9))
def test_next_values_is_the_loop(seed, rows, tokens):
    _, values, mask = batch(seed, rows, tokens)
    after = torch.arange(rows, dtype=torch.float64) - 0.5
    result = next_values(values, mask, after)
    for row in range(rows):
        for t in range(tokens):
            later = [s for s in policy_tokens(mask, row) if s > t]
            expected = values[row, later[0]] if later else after[row]
            assert result[row, t].item() == expected.item()


def test_next_values_by_hand():
    values = torch.tensor([[1.0, torch.nan, 3.0, torch.inf], [torch.nan] * 4])
    keep = torch.tensor([[True, False, True, False], [False] * 4])
    result = next_values(values, keep, torch.tensor([9.0, 7.0]))
    assert result.tolist() == [[3.0, 3.0, 9.0, 9.0], [7.0] * 4]
    half = next_values(values.bfloat16(), keep, torch.tensor([9.0, 7.0]))
    assert half.dtype == torch.bfloat16 and half.tolist() == result.tolist()
