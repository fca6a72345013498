"""Scores from rollouts against the exact values of prefixes, and their intervals' coverage."""

import math
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from tests.oracle.small import SHAPE, reward, reward_of
from trl_ext.functional.gibbs import log_mean_exp
from trl_ext.functional.monte_carlo import (
    log_mean_exp_standard_error,
    standard_error_is_believed,
)
from trl_ext.gibbs_prm.monte_carlo import MonteCarloScorer
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    TabularLMConfig,
    ruin_positions,
    ruin_prefix_value,
    ruin_table,
    tabular_tokenizer,
)

REPLICATIONS, ROLLOUTS = 200, 100
TOTAL = REPLICATIONS * ROLLOUTS
# Every prefix of one and of two letters; none of them has ended.
COMPLETIONS = ["aa", "ab", "ba", "bb"]


def scored_by(model, reward_func, beta, num_rollouts, completions) -> list[Any]:
    """Token by token, of the prompt a."""
    scorer = MonteCarloScorer(
        model,
        reward_func,
        beta,
        num_rollouts,
        tokenizer=tabular_tokenizer(3),
        max_completion_length=model.config.max_completion_length,
        batch_size=num_rollouts,
    )
    return scorer.score(["a"] * len(completions), completions, "token")


def letters(completion):
    return [" ab".index(letter) for letter in completion]


def begins_with(space, completion):
    """A completion of the enumeration that does: its number tells the nodes of its prefixes."""
    tokens = letters(completion)
    return next(n for n, row in enumerate(space.tokens.tolist()) if row[: len(tokens)] == tokens)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(1)
    return TabularLM(SHAPE)


@pytest.fixture(scope="module")
def space():
    return Enumeration(SHAPE)


@pytest.fixture(scope="module")
def scored(policy):
    return scored_by(policy, reward, 2.0, TOTAL, COMPLETIONS)


@pytest.mark.equation("E25")
def test_intervals_cover_the_exact_values(policy, space, scored):
    """Six prefixes, 200 independent replications of 100 rollouts each.

    A coverage of 95% has the standard deviation √(.95·.05/200) = 1.5% for one prefix, and 0.63%
    for the 1200 intervals of all. Four of these are allowed.
    """
    exact = space.prefix_values(policy, space.rewards(reward_of), 2.0)[0]
    shares = {}
    for completion, each in zip(COMPLETIONS, scored, strict=True):
        for t in (1, 2):
            value = exact[begins_with(space, completion), t]
            rewards = torch.tensor(each.rollout_rewards[t - 1], dtype=torch.float64)
            rewards = rewards.view(REPLICATIONS, ROLLOUTS)
            assert standard_error_is_believed(rewards, 2.0).double().mean() > 0.95
            error = log_mean_exp_standard_error(rewards, 2.0)
            covers = (log_mean_exp(rewards, 2.0) - value).abs() <= 1.96 * error
            shares[completion[:t]] = covers.double().mean().item()
    assert len(shares) == 6
    one = math.sqrt(0.95 * 0.05 / REPLICATIONS)
    assert min(shares.values()) >= 0.95 - 4 * one
    assert abs(sum(shares.values()) / 6 - 0.95) <= 4 * one / math.sqrt(6)


@pytest.mark.equation("E23", "E25")
def test_scores_are_the_exact_ones(policy, space, scored):
    """20 000 rollouts: within 4 standard errors, that of log Z among them."""
    exact = 2.0 * space.prefix_values(policy, space.rewards(reward_of), 2.0)[0]
    for completion, each in zip(COMPLETIONS, scored, strict=True):
        values = exact[begins_with(space, completion)]
        of_z = 2.0 * each.log_z_standard_error
        assert abs(2.0 * each.log_z - values[0]) <= 4 * of_z
        for t in (1, 2):
            error = math.hypot(each.standard_errors[t - 1], of_z)
            assert abs(each.prefix_scores[t - 1] - (values[t] - values[0])) <= 4 * error
            assert error < 0.05
        assert each.is_believed == [True, True]


def test_large_beta_gives_the_expected_reward(policy, space):
    """β·log (1/K) Σ exp(r/β) is the mean reward up to V[r]/(2β), here below 1e-5; 5000 rollouts."""
    beta = 1e6
    exact = space.expected_values(policy, space.rewards(reward_of))[0]
    for completion, each in zip(
        COMPLETIONS, scored_by(policy, reward, beta, 5000, COMPLETIONS), strict=True
    ):
        for t in (1, 2):
            mean = each.prefix_scores[t - 1] + beta * each.log_z
            assert mean == pytest.approx(sum(each.rollout_rewards[t - 1]) / 5000, abs=1e-5)
            error = each.standard_errors[t - 1]
            assert abs(mean - exact[begins_with(space, completion), t]) <= 4 * error
            spread = torch.tensor(each.rollout_rewards[t - 1]).std().item() / math.sqrt(5000)
            assert error == pytest.approx(spread, rel=1e-4)


@pytest.mark.equation("E25", "E52")
@pytest.mark.parametrize(("p", "beta"), [(0.5, 0.5), (0.4, 0.3)])
def test_the_gamblers_ruin_from_every_place(p, beta):
    """From 2 of 4, 5000 walks from each place; within 4 standard errors.

    A walk of 7 steps that is nowhere yet gets the closed form of where it stands as its reward,
    which leaves the value of every prefix what it is without a limit.
    """
    start, size = 2, 4
    walk = Enumeration(TabularLMConfig(vocab_size=3, max_completion_length=7))
    model = TabularLM(walk.config).load_table(ruin_table(walk, start, size, p).float())

    def win(completion_ids, **kwargs):
        walks = pad_sequence([torch.tensor(ids) for ids in completion_ids], batch_first=True)
        places = ruin_positions(walks, start).tolist()
        worth = [beta * ruin_prefix_value(k, size, p, beta) for k in range(size + 1)]
        return [worth[place] for place in places]

    seen = set()
    completions = ["aa", "bb", "ab"]
    for completion, each in zip(
        completions, scored_by(model, win, beta, 5000, completions), strict=True
    ):
        for t in range(3):
            k = int(ruin_positions(torch.tensor([letters(completion[:t])]), start))
            seen.add(k)
            value, error = each.log_z, each.log_z_standard_error
            if t:
                value += each.prefix_scores[t - 1] / beta
                error = each.standard_errors[t - 1] / beta
            exact = ruin_prefix_value(k, size, p, beta)
            # From 0 and 4 no step is made, and nothing is random.
            assert (error == 0) == (k in (0, size))
            assert abs(value - exact) <= 4 * error + 1e-9
    assert seen == set(range(size + 1))
