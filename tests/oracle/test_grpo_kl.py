"""The KL penalty of a policy trainer, judged by enumeration: sampled gradients against exact."""

from typing import Any

import pytest
import torch

from tests.oracle.small import (
    SHAPE,
    KeepGradients,
    make_trainer,
    move_away,
    reward_of,
    save_reference,
)
from trl_ext.functional import exact_kl
from trl_ext.grpo import GRPOTrainer
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    exact_gradient,
    expected_reward,
    gibbs_logps,
    kl_divergence,
)

LENGTH = SHAPE.max_completion_length
BETA = 1.5


@pytest.fixture
def start(tmp_path) -> str:
    return save_reference(tmp_path / "reference")


def grpo_trainer(start: str, group: int, callbacks=None, **options) -> GRPOTrainer:
    settings: dict[str, Any] = {"scale_rewards": "none", "beta": BETA} | options
    return make_trainer(GRPOTrainer, start, group, callbacks, **settings)


def kl_of_each_step(space: Enumeration, model, reference):
    """Σ_y π(y) Σ_t KL_t(y_<t), the probabilities of the prefixes held fixed."""
    rows = space.nodes[:, :-1].where(space.mask, 0)
    ref_logits = space.logits(reference)[0].detach()

    def objective(_):
        logits = space.logits(model)[0]
        weights = space.logps(model)[0].exp().detach()
        return (weights[:, None] * space.mask * exact_kl(logits, ref_logits)[rows]).sum()

    return objective


@pytest.mark.equation("E29", "E30", "E48")
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"kl_estimator": "k1", "kl_placement": "reward", "kl_is_correction": False}, "whole"),
        ({"kl_estimator": "k3", "loss_type": "dr_grpo"}, "per step"),  # TRL's own
        ({"kl_estimator": "k1"}, "per step"),
        ({"kl_estimator": "k2"}, "per step"),
        ({"kl_estimator": "k2", "kl_is_correction": False, "loss_type": "dr_grpo"}, "per step"),
        ({"kl_estimator": "exact", "kl_is_correction": False}, "per step"),
        ({"kl_estimator": "exact", "kl_placement": "both", "kl_is_correction": False}, "whole"),
    ],
    ids=str,
)
def test_gradient_of_reward_and_penalty(start, options, part):
    """30 gradients from 512 samples each, at a policy that differs from its reference and stays.

    The group mean contains each completion itself: what is centred has a gradient (1 − 1/G) times.
    """
    keep, steps, group = KeepGradients(), 30, 512
    trainer = grpo_trainer(
        start, group, callbacks=[keep], max_steps=steps, learning_rate=0.0, **options
    )
    space, reference = Enumeration(SHAPE), TabularLM.from_pretrained(start)
    move_away(trainer)
    model = trainer.model
    rewards, ref_logps = space.rewards(reward_of), space.logps(reference).detach()

    def gradient(objective):
        return exact_gradient(objective, model, space)["model.table.weight"].double().clone()

    of_reward = gradient(lambda logps: expected_reward(logps, rewards))
    of_kl = {
        "whole": gradient(lambda logps: kl_divergence(logps, ref_logps)),
        "per step": gradient(kl_of_each_step(space, model, reference)),
    }
    centred = 1 - 1 / group
    # What goes through the reward is centred; what is differentiated is not.
    differentiated = options.get("kl_placement") != "reward"
    of_penalty = differentiated * of_kl["per step"]
    if part == "whole":
        of_penalty += centred * (of_kl["whole"] - of_penalty)
    exact = -centred * of_reward + BETA * of_penalty
    trainer.train()
    sampled = torch.stack(keep.gradients)
    if options.get("loss_type") == "dr_grpo":
        sampled = sampled * LENGTH
    error = sampled.std(dim=0) / steps**0.5
    assert (sampled.mean(dim=0) - exact).abs().le(4 * error + 1e-7).all()
    # The other part is told apart, and so is no penalty at all.
    for wrong in (-centred * of_reward, exact + BETA * (of_kl["whole"] - of_kl["per step"]) * 2):
        assert not (sampled.mean(dim=0) - wrong).abs().le(4 * error + 1e-7).all()


@pytest.mark.slow
def test_with_k1_in_the_reward_grpo_comes_to_the_gibbs_policy(start):
    """600 steps of 256 samples, a learning rate that falls to 0: KL(π‖π*) below 1e-2."""
    trainer = grpo_trainer(
        start,
        256,
        kl_estimator="k1",
        kl_placement="reward",
        kl_is_correction=False,
        max_steps=600,
        learning_rate=0.05,
        lr_scheduler_type="linear",
    )
    space = Enumeration(SHAPE)
    rewards = space.rewards(reward_of)
    ref_logps = space.logps(TabularLM.from_pretrained(start)).detach()
    target = gibbs_logps(ref_logps, rewards, BETA)
    before = kl_divergence(ref_logps, target).item()
    trainer.train()
    after = kl_divergence(space.logps(trainer.model), target).item()
    assert after < 1e-2 < before / 5
