"""Reward-weighted regression judged by enumeration."""

import math
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.oracle.small import PLAIN, SHAPE, KeepGradients, reward, reward_of, save_reference
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    exact_gradient,
    gibbs_logps,
    kl_divergence,
    projection_loss,
)
from trl_ext.rwr import RWRConfig, RWRTrainer


@pytest.fixture
def start(tmp_path) -> str:
    return save_reference(tmp_path / "reference")


def rwr_trainer(start: str, group: int, groups: int = 1, callbacks=None, **options):
    settings: dict[str, Any] = PLAIN | {
        "output_dir": start + "-trained",
        "num_generations": group,
        "per_device_train_batch_size": group * groups,
        "drop_uniform_groups": False,
    }
    return RWRTrainer(
        model=start,
        reward_funcs=reward,
        args=RWRConfig(**(settings | options)),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * groups}),
        callbacks=callbacks,
    )


@pytest.mark.equation("E7", "E8")
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_gradient_is_that_of_the_forward_projection(start, beta):
    """40 gradients from 256 samples of h each, at a policy that does not move: n = 10 240.

    The self-normalised weights are biased by O(1/G), below half a standard error of the mean here.
    """
    keep, steps = KeepGradients(), 40
    trainer = rwr_trainer(
        start, 256, callbacks=[keep], beta=beta, max_steps=steps, learning_rate=0.0
    )
    trainer.train()
    space, model = Enumeration(SHAPE), TabularLM.from_pretrained(start)
    rewards = space.rewards(reward_of)
    ref_logps = space.logps(model).detach()
    exact = exact_gradient(
        lambda logps: projection_loss(logps, ref_logps, rewards, beta), model, space
    )["model.table.weight"].double()
    sampled = torch.stack(keep.gradients)
    standard_error = sampled.std(dim=0) / steps**0.5
    assert (sampled.mean(dim=0) - exact).abs().le(4 * standard_error + 1e-7).all()
    assert exact.abs().max() > 20 * standard_error.median(), "the test has no power"


def monte_carlo_floor(space, ref_logps, rewards, beta, samples) -> float:
    """E KL(π*‖π̂) of the best fit to N weighted samples of h, to second order in 1/√N.

    π̂(y) is a self-normalised importance-weighted frequency: by the delta method its variance is
    (1/N) E_h[(π*/h)²(1[·=y] − π*(y))²], and KL(π*‖π̂) ≈ ½ Σ_y (π̂(y) − π*(y))²/π*(y).
    """
    h = ref_logps.exp()[0]
    target = gibbs_logps(ref_logps, rewards, beta).exp()[0]
    ratio_squared = (target / h).square()
    indicator = torch.eye(len(target), dtype=torch.float64)
    variance = ((indicator - target).square() * (h * ratio_squared)[:, None]).sum(0) / samples
    return 0.5 * (variance / target).sum().item()


@pytest.mark.equation("E3", "E7", "E8")
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_regression_on_one_rollout_reaches_the_monte_carlo_floor(start, beta):
    """2048 samples of h, 300 steps of regression on them: KL(π*‖π) is what sampling leaves.

    14 free probabilities: KL/floor is about a χ²₁₄/14 variable, sd 0.38; the bound is 4 sd up.
    """
    samples, steps = 2048, 300
    trainer = rwr_trainer(
        start, samples, beta=beta, num_iterations=steps, max_steps=steps, learning_rate=0.05
    )
    space = Enumeration(SHAPE)
    rewards = space.rewards(reward_of)
    ref_logps = space.logps(TabularLM.from_pretrained(start)).detach()
    target = gibbs_logps(ref_logps, rewards, beta)
    before = kl_divergence(target, ref_logps).item()
    trainer.train()
    after = kl_divergence(target, space.logps(trainer.model).detach()).item()
    floor = monte_carlo_floor(space, ref_logps, rewards, beta, samples)
    assert after <= 2.5 * floor
    assert before > 4 * floor, "the test has no power"


@pytest.mark.equation("E3")
def test_a_fixed_reference_converges_to_pi_star_and_a_moving_one_passes_it(start):
    """150 rollouts of 256: a fixed π_ref holds the policy at π*; else each tilts it once more."""
    space, beta = Enumeration(SHAPE), 2.0
    rewards = space.rewards(reward_of)
    ref_logps = space.logps(TabularLM.from_pretrained(start)).detach()
    target = gibbs_logps(ref_logps, rewards, beta)
    distance = {}
    for kind in ("fixed", "moving"):
        trainer = rwr_trainer(
            start, 256, beta=beta, reference=kind, max_steps=150, learning_rate=0.05
        )
        trainer.train()
        distance[kind] = kl_divergence(target, space.logps(trainer.model).detach()).item()
    floor = monte_carlo_floor(space, ref_logps, rewards, beta, 256)
    assert distance["fixed"] <= 2 * floor
    assert distance["moving"] > 10 * distance["fixed"]


@pytest.mark.equation("E9")
@pytest.mark.parametrize("kind", ["moving", "fixed"])
def test_adding_a_constant_to_all_rewards_changes_nothing(start, kind):
    tables = []
    for constant in (0.0, 8.0):
        trainer = rwr_trainer(start, 64, beta=2.0, reference=kind, max_steps=5, learning_rate=0.05)
        trainer.reward_funcs = [lambda c=constant, **kwargs: [r + c for r in reward(**kwargs)]]
        trainer.train()
        tables.append(trainer.model.model.table.weight.detach())
    # r + 8 rounds r to 2⁻²¹; five steps of size 0.05 amplify nothing.
    torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=1e-4)


@pytest.mark.equation("E10")
@pytest.mark.parametrize("beta", [math.inf, 0.0])
def test_limits_are_supervised_fine_tuning_on_all_samples_and_on_the_best(start, beta):
    """One SGD step of size 1 moves the table by −gradient, computed here in a loop over samples."""
    drawn = []

    def recording(completion_ids, **kwargs):
        drawn.extend(completion_ids)
        return reward(completion_ids)

    group, groups = 16, 4
    trainer = rwr_trainer(
        start, group, groups, beta=beta, max_steps=1, learning_rate=1.0, optim="sgd"
    )
    trainer.reward_funcs = [recording]
    trainer.train()

    space, model = Enumeration(SHAPE), TabularLM.from_pretrained(start)
    logps = space.logps(model)[0]
    loss = torch.zeros((), dtype=torch.float64)
    for start in range(0, group * groups, group):
        completions = drawn[start : start + group]
        values = [reward_of(1, ids) for ids in completions]
        best = [y for y, r in zip(completions, values, strict=True) if r == max(values)]
        regressed = completions if beta == math.inf else best
        for ids in regressed:
            padded = torch.tensor([ids + [0] * (SHAPE.max_completion_length - len(ids))])
            loss = loss - logps[space.index(padded)[0]] / len(regressed) / groups
    (gradient,) = torch.autograd.grad(loss, [model.model.table.weight])
    step = trainer.model.model.table.weight.detach() - model.model.table.weight.detach()
    torch.testing.assert_close(step, -gradient, rtol=1e-4, atol=1e-6)


def test_accumulation_changes_nothing(start):
    tables = []
    for accumulation in (1, 4):
        trainer = rwr_trainer(
            start,
            8,
            8,
            beta=2.0,
            max_steps=5,
            learning_rate=0.05,
            per_device_train_batch_size=64 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        tables.append(trainer.model.model.table.weight.detach())
    torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=1e-5)
