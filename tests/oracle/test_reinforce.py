"""REINFORCE judged by enumeration: what its gradient expects, on and off the policy."""

import pytest
import torch

from tests.oracle.small import (
    SHAPE,
    KeepGradients,
    every_completion,
    make_trainer,
    move_away,
    reward_of,
    save_reference,
)
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    exact_gradient,
    expected_reward,
    gibbs_logps,
    kl_divergence,
    regularised_reward,
)
from trl_ext.reinforce import ReinforceTrainer
from trl_ext.rollout import MicroBatch, Rollout

BETA = 1.5
SPACE = Enumeration(SHAPE)
REWARDS = SPACE.rewards(reward_of)


@pytest.fixture
def start(tmp_path) -> str:
    return save_reference(tmp_path / "reference")


def expected_gradient(trainer: ReinforceTrainer, old, reference, baseline=None) -> torch.Tensor:
    """Σ_y π_old(y) ∇ Σ_t loss_t(y) of the trainer's own credit and loss, all completions in one."""
    batch = every_completion(old, reference, SPACE)
    trainer.model.train()
    rollout = Rollout(REWARDS, batch, slice(0, len(SPACE)))
    batch["advantages"] = trainer.assign_credit(rollout)
    if baseline is not None:
        batch["advantages"] = (batch["advantages"] - baseline) * SPACE.mask
        batch["baseline"] = baseline * SPACE.mask
    logps = SPACE.token_logps(trainer.model)[0]
    per_token = trainer.policy_loss(MicroBatch(logps, SPACE.mask, batch["advantages"], batch))
    of_each = (per_token * SPACE.mask).sum(dim=1)
    loss = (SPACE.logps(old)[0].detach().exp() * of_each).sum()
    [gradient] = torch.autograd.grad(loss, trainer.model.model.table.weight)
    return gradient.double()


def gradient_of(objective, model) -> torch.Tensor:
    return exact_gradient(objective, model, SPACE)["model.table.weight"].double()


@pytest.mark.equation("E32", "E33", "E37", "E30")
@pytest.mark.parametrize("correction", ["none", "token", "prefix", "sequence"])
def test_on_policy_the_expected_gradient_is_that_of_reward_minus_kl(start, correction):
    trainer = make_trainer(
        ReinforceTrainer, start, 4, beta=BETA, baseline="none", off_policy_correction=correction
    )
    reference = TabularLM.from_pretrained(start)
    move_away(trainer)
    ref_logps = SPACE.logps(reference).detach()
    exact = gradient_of(
        lambda logps: regularised_reward(logps, ref_logps, REWARDS, BETA), trainer.model
    )
    ours = expected_gradient(trainer, trainer.model, reference)
    torch.testing.assert_close(ours, -exact, rtol=1e-4, atol=1e-5)


@pytest.mark.equation("E31", "E34", "E38", "E44")
@pytest.mark.parametrize(
    ("correction", "truncation", "what"),
    [
        ("prefix", None, "the whole"),
        ("sequence", None, "the whole"),
        ("token", None, "token ratios"),
        ("none", None, "the gradient where it was sampled"),
        ("prefix", 1.2, "truncated"),
        ("sequence", 1.2, "truncated"),
    ],
)
def test_off_policy_the_expected_gradient_is_what_theory_says(start, correction, truncation, what):
    """The rollout is the reference's, the policy has moved; a baseline of each position is on."""
    trainer = make_trainer(
        ReinforceTrainer,
        start,
        4,
        beta=BETA,
        baseline="none",
        off_policy_correction=correction,
        off_policy_truncation=truncation,
    )
    old = TabularLM.from_pretrained(start)
    reference = TabularLM(SHAPE)  # another, so that the KL reward is not 0
    move_away(trainer)
    baseline = torch.tensor([0.7, -0.4, 1.1])
    ours = expected_gradient(trainer, old, reference, baseline)

    old_logps = SPACE.token_logps(old)[0].detach()
    per_token = -BETA * (old_logps - SPACE.token_logps(reference)[0].detach())
    per_token = (per_token + REWARDS.T * (SPACE.mask.sum(1, keepdim=True) == STEPS)) * SPACE.mask
    given = per_token.sum(dim=1)
    whole = gradient_of(lambda logps: expected_reward(logps, given), trainer.model)
    if what == "the whole":
        torch.testing.assert_close(ours, -whole, rtol=1e-4, atol=1e-5)
        return
    assert (ours + whole).abs().max() > 1e-2, "biased, and far enough from the whole to tell"
    if what == "truncated":
        return
    logps = SPACE.token_logps(trainer.model)[0]
    credit = (per_token.flip(1).cumsum(1).flip(1) - baseline) * SPACE.mask
    terms = (logps - old_logps).exp() if what == "token ratios" else logps
    surrogate = (old_logps.sum(1).exp() * (terms * credit).sum(1)).sum()
    [theory] = torch.autograd.grad(surrogate, trainer.model.model.table.weight)
    torch.testing.assert_close(ours, -theory.double(), rtol=1e-4, atol=1e-5)


STEPS = torch.arange(1, SHAPE.max_completion_length + 1)


@pytest.mark.equation("E36")
def test_the_discount_is_of_what_follows(start):
    """E Σ_t ∇log π_t Σ_{s≥t} γ^{s−t} r_s, by loops over completions and tokens."""
    gamma = 0.6
    trainer = make_trainer(ReinforceTrainer, start, 4, beta=0.0, baseline="none", gamma=gamma)
    logps = SPACE.token_logps(trainer.model)[0]
    surrogate = torch.zeros((), dtype=torch.float64)
    for n, kept in enumerate(SPACE.mask.sum(1).tolist()):
        for t in range(kept):
            weight = logps[n].sum().exp().detach()
            surrogate = surrogate + weight * gamma ** (kept - 1 - t) * REWARDS[0, n] * logps[n, t]
    [theory] = torch.autograd.grad(surrogate, trainer.model.model.table.weight)
    ours = expected_gradient(trainer, trainer.model, trainer.model)
    torch.testing.assert_close(ours, -theory.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.equation("E27", "E34", "E35")
@pytest.mark.parametrize(
    ("baseline", "factor", "options"),
    [
        ("none", 1.0, {}),
        ("batch", 1 - 1 / 512, {}),
        ("group", 1 - 1 / 8, {}),
        ("leave_one_out", 1.0, {}),
        ("optimal", 1.0, {}),
        ("leave_one_out", 1.0, {"kl_estimator": "exact", "kl_placement": "both"}),
    ],
    ids=str,
)
def test_gradients_of_real_steps_with_each_baseline(start, baseline, factor, options):
    """30 steps of 64 groups of 8: unbiased, but for what a completion adds to its own baseline."""
    keep, steps = KeepGradients(), 30
    trainer = make_trainer(
        ReinforceTrainer,
        start,
        512,
        [keep],
        num_generations=8,
        max_steps=steps,
        learning_rate=0.0,
        beta=BETA,
        baseline=baseline,
        **options,
    )
    move_away(trainer)
    ref_logps = SPACE.logps(TabularLM.from_pretrained(start)).detach()
    exact = factor * gradient_of(
        lambda logps: regularised_reward(logps, ref_logps, REWARDS, BETA), trainer.model
    )
    trainer.train()
    sampled = torch.stack(keep.gradients)
    error = sampled.std(dim=0) / steps**0.5
    assert (sampled.mean(dim=0) + exact).abs().le(4 * error + 1e-7).all()
    assert not (sampled.mean(dim=0) + 0.7 * exact).abs().le(4 * error + 1e-7).all()


def test_rewards_given_token_by_token_are_credited_where_they_are(start):
    """A list a completion: each number is the reward of its token, and only earlier ones see it."""

    def dense(completion_ids, **kwargs):
        return [[float(token == 1) for token in ids] for ids in completion_ids]

    seen = []

    class Spy(ReinforceTrainer):
        def assign_credit(self, rollout):
            credit = super().assign_credit(rollout)
            seen.append((rollout, credit))
            return credit

    make_trainer(Spy, start, 16, reward_funcs=dense, max_steps=1, beta=0.0, baseline="none").train()
    [(rollout, credit)] = seen
    hits = (rollout.batch["completion_ids"] == 1) * rollout.mask
    assert hits.sum() > 0
    expected = hits.float().flip(1).cumsum(1).flip(1) * rollout.mask
    torch.testing.assert_close(credit, expected)
    torch.testing.assert_close(rollout.rewards_PG[0], hits.sum(1).float())


def test_what_no_reward_scores_moves_nothing(start):
    def half(completion_ids, **kwargs):
        return [None if i % 2 else reward_of(1, ids) for i, ids in enumerate(completion_ids)]

    seen = []

    class Spy(ReinforceTrainer):
        def assign_credit(self, rollout):
            seen.append((rollout, super().assign_credit(rollout)))
            return seen[-1][1]

    make_trainer(Spy, start, 16, reward_funcs=half, max_steps=1, beta=0.0).train()
    [(rollout, credit)] = seen
    assert (credit[1::2] == 0).all() and (credit[::2] != 0).any()
    scored = rollout.rewards_PG[0, ::2]
    others = (scored.sum() - scored) / (len(scored) - 1)
    torch.testing.assert_close(credit[::2, 0], scored - others, rtol=1e-4, atol=1e-4)


def test_the_entropy_bonus_is_added(start):
    """With a reward of 0 the gradient is that of the bonus: the mean entropy of a token."""
    keep, steps, coefficient = KeepGradients(), 30, 0.5
    trainer = make_trainer(
        ReinforceTrainer,
        start,
        512,
        [keep],
        reward_funcs=lambda completion_ids, **_: [0.0] * len(completion_ids),
        num_generations=8,
        max_steps=steps,
        learning_rate=0.0,
        beta=0.0,
        entropy_coef=coefficient,
    )
    logits = SPACE.logits(trainer.model)[0]
    entropies = -(logits.log_softmax(-1) * logits.softmax(-1)).sum(-1)
    rows = SPACE.nodes[:, :-1].where(SPACE.mask, 0)
    weights = SPACE.logps(trainer.model)[0].exp().detach()[:, None] * SPACE.mask
    bonus = coefficient * (weights * entropies[rows]).sum() / weights.sum()
    [exact] = torch.autograd.grad(bonus, trainer.model.model.table.weight)
    trainer.train()
    sampled = torch.stack(keep.gradients)
    error = sampled.std(dim=0) / steps**0.5
    assert (sampled.mean(dim=0) + exact).abs().le(4 * error + 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_iterations": 3}], ids=["on policy", "three uses"])
def test_reinforce_comes_to_the_gibbs_policy(start, options):
    """600 steps of 256 samples, a learning rate that falls to 0: KL(π‖π*) below 1e-2."""
    trainer = make_trainer(
        ReinforceTrainer,
        start,
        256,
        beta=BETA,
        max_steps=600,
        learning_rate=0.05,
        lr_scheduler_type="linear",
        **options,
    )
    ref_logps = SPACE.logps(TabularLM.from_pretrained(start)).detach()
    target = gibbs_logps(ref_logps, REWARDS, BETA)
    before = kl_divergence(ref_logps, target).item()
    trainer.train()
    after = kl_divergence(SPACE.logps(trainer.model), target).item()
    assert after < 1e-2 < before / 5
