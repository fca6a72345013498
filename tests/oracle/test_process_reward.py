"""Process rewards judged by enumeration: dense rewards have the optimum of the outcome."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle.small import (
    SHAPE,
    every_completion,
    make_trainer,
    move_away,
    reward_of,
    save_reference,
)
from trl_ext.grpo import GRPOTrainer
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    exact_gradient,
    gibbs_logps,
    kl_divergence,
    log_partition,
    regularised_reward,
    tabular_tokenizer,
)
from trl_ext.ppo import PPOTrainer
from trl_ext.reinforce import ReinforceTrainer
from trl_ext.rollout import MicroBatch, Rollout
from trl_ext.trl_adapter import PolicyTrainer

BETA = 1.5
SPACE = Enumeration(SHAPE)
REWARDS = SPACE.rewards(reward_of)
# "ab" and what follows it: a step ends with each b, in a completion of three letters.
STEPS: dict[str, Any] = {"process_level": "step", "process_steps": {"regex": "b"}}
LEVELS = pytest.mark.parametrize("level", [{}, STEPS], ids=["token", "step"])


@pytest.fixture
def start(tmp_path) -> str:
    return save_reference(tmp_path / "reference")


def target(start: str, beta: float = BETA) -> Tensor:
    """(1, N) of π* at this β."""
    return gibbs_logps(SPACE.logps(TabularLM.from_pretrained(start)).detach(), REWARDS, beta)


@pytest.fixture
def teacher(start, tmp_path) -> str:
    """π* at β on disk, set to it."""
    folder = tmp_path / "teacher"
    TabularLM(SHAPE).load_table(SPACE.table_of(target(start))).save_pretrained(folder)
    tabular_tokenizer(SHAPE.vocab_size).save_pretrained(folder)
    return str(folder)


def options(start: str, teacher: str, **others: Any) -> dict[str, Any]:
    """π* as the scorer, at the β that it belongs to."""
    named = {"process_reward": teacher, "process_reference": start, "process_beta": BETA}
    return named | {"process_baseline": "none"} | others


def filled(trainer: PolicyTrainer, policy: TabularLM, start: str, weight: float) -> Rollout:
    """Every completion in one rollout, with its reward times a weight."""
    batch = every_completion(policy, TabularLM.from_pretrained(start), SPACE)
    batch["prompt_ids"] = torch.ones(len(SPACE), 1, dtype=torch.long)
    batch["prompt_mask"] = torch.ones_like(batch["prompt_ids"])
    trainer.model.train()
    return Rollout(weight * REWARDS, batch, slice(0, len(SPACE)))


def expected_gradient(trainer: Any, old: TabularLM, start: str, weight: float) -> Tensor:
    """Σ_y π_old(y) ∇ Σ_t loss_t(y) of the trainer's own credit and loss, all completions in one."""
    rollout = filled(trainer, old, start, weight)
    credit = trainer.process_reward.added(trainer.assign_credit(rollout), rollout)
    logps = SPACE.token_logps(trainer.model)[0]
    micro_batch = MicroBatch(logps, SPACE.mask, credit, rollout.batch)
    of_each = (trainer.policy_loss(micro_batch) * SPACE.mask).sum(dim=1)
    loss = (SPACE.logps(old)[0].detach().exp() * of_each).sum()
    [gradient] = torch.autograd.grad(loss, trainer.model.model.table.weight)
    return gradient.double()


@pytest.mark.equation("E23", "E24")
def test_token_rewards_are_differences_of_the_potential(start, teacher):
    """β log E_h[exp(r/β) | y≤t] minus the same of y<t: free of Z, and r − β log Z in sum."""
    trainer = make_trainer(ReinforceTrainer, start, 4, beta=BETA, **options(start, teacher))
    reference = TabularLM.from_pretrained(start)
    rollout = filled(trainer, reference, start, 1.0)
    trainer.process_reward.added(trainer.assign_credit(rollout), rollout)
    given = rollout.batch["process_rewards"].double()
    potential = BETA * SPACE.prefix_values(reference, REWARDS, BETA)[0].detach()
    torch.testing.assert_close(given, potential.diff(dim=1) * SPACE.mask, rtol=0, atol=1e-5)
    log_z = log_partition(SPACE.logps(reference).detach(), REWARDS, BETA)
    torch.testing.assert_close(given.sum(1), REWARDS[0] - BETA * log_z, rtol=0, atol=1e-5)


@pytest.mark.equation("E23", "E24")
@LEVELS
@pytest.mark.parametrize(("outcome", "weight"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.5)])
def test_the_expected_gradient_is_that_of_the_weighted_outcome(
    start, teacher, level, outcome, weight
):
    """E[v r + w Σ ρ] − β KL = E[(v + w) r] − β KL − w β log Z, wherever the ρ of a token lies."""
    trainer = make_trainer(
        ReinforceTrainer,
        start,
        4,
        beta=BETA,
        baseline="none",
        **options(start, teacher, process_weight=weight, **level),
    )
    move_away(trainer)
    ref_logps = SPACE.logps(TabularLM.from_pretrained(start)).detach()
    exact = exact_gradient(
        lambda logps: regularised_reward(logps, ref_logps, (outcome + weight) * REWARDS, BETA),
        trainer.model,
        SPACE,
    )["model.table.weight"].double()
    ours = expected_gradient(trainer, trainer.model, start, outcome)
    assert exact.abs().max() > 0.05
    torch.testing.assert_close(ours, -exact, rtol=1e-4, atol=2e-5)


@pytest.mark.equation("E38")
@pytest.mark.parametrize("correction", ["prefix", "sequence"])
def test_off_policy_the_process_reward_is_weighted_like_the_reward(start, teacher, correction):
    """The rollout is the reference's, the policy has moved: the gradient is that of the policy."""
    trainer = make_trainer(
        ReinforceTrainer,
        start,
        4,
        beta=0.0,
        baseline="none",
        off_policy_correction=correction,
        **options(start, teacher, process_weight=0.5),
    )
    move_away(trainer)
    exact = exact_gradient(
        lambda logps: (logps.exp() * 1.5 * REWARDS).sum(-1), trainer.model, SPACE
    )["model.table.weight"].double()
    old = TabularLM.from_pretrained(start)
    ours = expected_gradient(trainer, old, start, 1.0)
    torch.testing.assert_close(ours, -exact, rtol=1e-4, atol=2e-5)


def test_off_policy_a_process_baseline_is_weighted_by_the_ratio_of_its_prefix(start, teacher):
    """Π_{s≤t} ρ_s b_t by a loop: with a baseline the expectation stays what it was without."""
    gradients = []
    for how in ("none", "group"):
        trainer = make_trainer(
            ReinforceTrainer,
            start,
            4,
            beta=0.0,
            baseline="none",
            **options(start, teacher) | {"process_baseline": how},
        )
        move_away(trainer)
        gradients.append(expected_gradient(trainer, TabularLM.from_pretrained(start), start, 1.0))
    # Within the enumeration a baseline is one number a position: its own expectation is 0.
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=2e-5)


K1_IN_REWARD: dict[str, Any] = {
    "kl_estimator": "k1",
    "kl_placement": "reward",
    "kl_is_correction": False,
    "scale_rewards": "none",
}
PPO: dict[str, Any] = {
    "critic_learning_rate": 0.1,
    "whiten_advantages": False,
    "num_iterations": 2,
}
KINDS = [(ReinforceTrainer, {}), (GRPOTrainer, K1_IN_REWARD), (PPOTrainer, PPO)]


@pytest.mark.slow
@pytest.mark.equation("E23", "E24")
@LEVELS
@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=["reinforce", "grpo", "ppo"])
def test_the_process_reward_alone_leads_to_the_optimum_of_the_outcome(
    start, teacher, kind, settings, level
):
    """120 steps of 128, rates that fall to 0, a reward of weight 0: KL(π‖π*) below 2e-3.

    At π* the reward that remains of each token, ρ − β log π*/π_ref, is 0: the noise of the gradient
    vanishes with the distance.
    """
    logps = trained(
        kind, start, reward_weights=[0.0], **settings, **options(start, teacher, **level)
    )
    before = kl_divergence(SPACE.logps(TabularLM.from_pretrained(start)).detach(), target(start))
    assert kl_divergence(logps, target(start)).item() < 2e-3 < before.item() / 50


@pytest.mark.slow
@pytest.mark.equation("E24")
def test_with_the_outcome_it_leads_to_a_sharper_optimum(start, teacher):
    """π* at β/2, which is a KL of 0.1 away from π* at β: 120 steps of 256, to a KL below 5e-3.

    The outcome's own noise stays, unlike above.
    """
    sharper, other = target(start, BETA / 2), target(start)
    settings = options(start, teacher, process_baseline="leave_one_out")
    logps = trained(ReinforceTrainer, start, 256, **settings)
    apart = kl_divergence(sharper, other).item()
    assert kl_divergence(logps, sharper).item() < 5e-3 < apart / 10
    assert kl_divergence(logps, other).item() > apart / 2


def trained(kind: Any, start: str, rows: int = 128, **settings: Any) -> Tensor:
    """(1, N) of the policy after training."""
    defaults = {"max_steps": 120, "learning_rate": 0.1, "lr_scheduler_type": "linear"}
    trainer = make_trainer(kind, start, rows, **(defaults | {"beta": BETA} | settings))
    trainer.train()
    return SPACE.logps(trainer.model).detach()
