"""PPO judged by enumeration: its critic against exact values, its fixed point against π*."""

from typing import Any

import pytest
import torch

from tests.oracle.small import SHAPE, make_trainer, move_away, reward_of, save_reference
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    TabularLMConfig,
    gibbs_logps,
    kl_divergence,
    ruin_positions,
    ruin_table,
    ruin_win_probability,
    tabular_tokenizer,
)
from trl_ext.oracle.ruin import DOWN, UP
from trl_ext.ppo import PPOTrainer

BETA = 1.5
SPACE = Enumeration(SHAPE)
REWARDS = SPACE.rewards(reward_of)


@pytest.fixture
def start(tmp_path) -> str:
    return save_reference(tmp_path / "reference")


def values_of(trainer: PPOTrainer) -> torch.Tensor:
    """(N, T) what the critic says of the state before each token of each completion."""
    ids = torch.cat([torch.ones(len(SPACE), 1, dtype=torch.long), SPACE.tokens], dim=1)
    hidden = trainer.model.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return trainer.critic.of_hidden(hidden.last_hidden_state)[:, :-1].detach()


def exact_values(policy, reference=None) -> torch.Tensor:
    """(N, T) E_π[Σ_{s≥t} r_s | y_<t] with the KL to a reference in the reward."""
    if reference is None:
        return SPACE.expected_values(policy, REWARDS)[0, :, :-1].detach()
    per_token = BETA * (SPACE.token_logps(policy) - SPACE.token_logps(reference))[0].detach()
    whole = SPACE.expected_values(policy, REWARDS - per_token.sum(1))[0, :, :-1].detach()
    return whole + per_token.cumsum(1) - per_token  # what was paid before t is no part of V_t


def error_of_values(values: torch.Tensor, exact: torch.Tensor, policy) -> float:
    """Root mean square over the states as the policy meets them."""
    weights = SPACE.logps(policy)[0].exp().detach()[:, None] * SPACE.mask
    return (weights * (values - exact).square()).sum().div(weights.sum()).sqrt().item()


CRITIC_ONLY: dict[str, Any] = {
    "learning_rate": 0.0,
    "critic_learning_rate": 0.1,
    "lr_scheduler_type": "linear",
}


@pytest.mark.equation("E39", "E41")
@pytest.mark.parametrize("lam", [1.0, 0.0], ids=["Monte Carlo", "bootstrapped"])
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_the_critic_of_a_policy_that_stays_learns_its_values(start, lam, beta):
    """300 steps of 64: both kinds of target lead to E_π[what is to come | prefix]."""
    trainer = make_trainer(
        PPOTrainer, start, 64, beta=beta, critic_lam=lam, max_steps=300, **CRITIC_ONLY
    )
    reference = TabularLM.from_pretrained(start)
    move_away(trainer)
    before = SPACE.logps(trainer.model).detach()
    exact = exact_values(trainer.model, reference if beta else None)
    untrained = error_of_values(values_of(trainer), exact, trainer.model)
    trainer.train()
    assert torch.equal(SPACE.logps(trainer.model).detach(), before), "the policy stays"
    assert error_of_values(values_of(trainer), exact, trainer.model) < 0.15 < untrained / 5


@pytest.mark.equation("E52", "E54")
def test_the_critic_of_gamblers_ruin_learns_the_closed_form(tmp_path):
    """V of a walk that stands at k is f_S(k); the mean return from the start is f_S(start)."""
    start, size, p = 1, 3, 0.45
    shape = TabularLMConfig(vocab_size=3, max_completion_length=8)
    space = Enumeration(shape)
    folder = tmp_path / "walk"
    # e^-9 for what cannot happen: the table is a part of the critic's input, and -1e4 swamps it.
    table = ruin_table(space, start, size, p).clamp(min=-9.0)
    TabularLM(shape).load_table(table).save_pretrained(folder)
    tabular_tokenizer(3).save_pretrained(folder)
    returns: list[float] = []

    def won(completion_ids, **kwargs):
        places = [start + ids.count(UP) - ids.count(DOWN) for ids in completion_ids]
        returns.extend(float(place == size) for place in places)
        return returns[-len(places) :]

    trainer = make_trainer(
        PPOTrainer,
        str(folder),
        128,
        reward_funcs=won,
        beta=0.0,
        max_steps=300,
        max_completion_length=shape.max_completion_length,
        **CRITIC_ONLY,
    )
    trainer.train()
    mean, wins = sum(returns) / len(returns), ruin_win_probability(start, size, p)
    error = (wins * (1 - wins) / len(returns)) ** 0.5
    assert abs(mean - wins) <= 4 * error + 4e-3  # 0.4% of walks are cut off after 8 steps
    # Four steps deep; what is rarer was seen too seldom to be learnt.
    inside = [row for row in range(2**5 - 1) if _is_under_way(space, row, start, size)]
    hidden = torch.zeros(len(inside), shape.hidden_size)
    hidden[range(len(inside)), [shape.vocab_size + row for row in inside]] = 1.0
    hidden[:, : shape.vocab_size] = table[0, inside]
    values = trainer.critic.of_hidden(hidden).detach()
    places = ruin_positions(space.tokens[inside], start).tolist()
    expected = torch.tensor([ruin_win_probability(place, size, p) for place in places])
    assert set(places) == {1, 2} and (values - expected).abs().max() < 0.05, (values, expected)


def _is_under_way(space: Enumeration, row: int, start: int, size: int) -> bool:
    """Whether a walk can come to this prefix and is at neither end."""
    letters = space.tokens[row, space.tokens[row] != 0]
    places = [ruin_positions(letters[None, :n], start).item() for n in range(len(letters) + 1)]
    return all(0 < place < size for place in places)


@pytest.mark.slow
@pytest.mark.equation("E45", "E46")
@pytest.mark.parametrize(
    "options",
    [{}, {"surrogate": "penalty", "old_kl_target": 0.003}, {"lam": 1.0, "value_clip": 1.0}],
    ids=["clip", "penalty", "value clip"],
)
def test_ppo_comes_to_the_gibbs_policy_and_its_critic_to_the_soft_values(start, options):
    """300 rollouts of 256, two epochs of one minibatch: far below the KL(π‖π*) of 1e-2 asked for.

    At π* a state's value is β log E_ref[exp(r/β) | prefix] (Equation E23).
    """
    settings: dict[str, Any] = {
        "beta": BETA,
        "num_iterations": 2,
        "max_steps": 600,
        "learning_rate": 0.05,
        "critic_learning_rate": 0.1,
        "lr_scheduler_type": "linear",
        "whiten_advantages": False,
    }
    trainer = make_trainer(PPOTrainer, start, 256, **(settings | options))
    reference = TabularLM.from_pretrained(start)
    ref_logps = SPACE.logps(reference).detach()
    target = gibbs_logps(ref_logps, REWARDS, BETA)
    before = kl_divergence(ref_logps, target).item()
    trainer.train()
    after = kl_divergence(SPACE.logps(trainer.model), target).item()
    values = values_of(trainer)
    soft = BETA * SPACE.prefix_values(reference, REWARDS, BETA)[0, :, :-1]
    # Where the values are right, r − β log π/π_ref = V for every sample: no noise is left at π*.
    assert after < 1e-4 < before / 100
    exact = exact_values(trainer.model, reference)
    assert error_of_values(values, exact, trainer.model) < 0.02
    assert error_of_values(values, soft, trainer.model) < 0.02
