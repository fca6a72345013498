"""Exact quantities: identities of the Gibbs policy, brute force, and gradients."""

import math
from functools import partial

import pytest
import torch

from tests.oracle import brute
from trl_ext.functional import gae, k3, reward_to_go
from trl_ext.oracle import (
    exact_gradient,
    expected_reward,
    gibbs_logps,
    kl_divergence,
    log_partition,
    projection_loss,
    regularised_reward,
)

BETAS = [0.1, 1.0, 20.0]
close = partial(torch.testing.assert_close, atol=1e-10, rtol=1e-12)


@pytest.fixture
def logps(space, model):
    return space.logps(model).detach()


@pytest.fixture
def ref_logps(space, reference):
    return space.logps(reference).detach()


@pytest.mark.equation("E3", "E4")
@pytest.mark.parametrize("beta", BETAS)
def test_gibbs_policy_against_sums(logps, rewards, beta):
    """π* = h exp(r/β)/Z term by term, in plain Python."""
    target = gibbs_logps(logps, rewards, beta)
    for x in range(2):
        masses = [
            math.exp(h) * math.exp(r / beta)
            for h, r in zip(logps[x].tolist(), rewards[x].tolist(), strict=True)
        ]
        z = sum(masses)
        assert log_partition(logps, rewards, beta)[x].item() == pytest.approx(math.log(z))
        assert target[x].exp().tolist() == pytest.approx([m / z for m in masses])
    implicit = beta * (target - logps) + beta * log_partition(logps, rewards, beta)[:, None]
    close(implicit, rewards)


@pytest.mark.equation("E9", "E10")
def test_shift_and_limits(logps, rewards):
    """r + c(x) gives the same π*; β → ∞ is h, β → 0 the best completion."""
    shifted = rewards + torch.tensor([[3.0], [-50.0]])
    close(gibbs_logps(logps, shifted, 0.5), gibbs_logps(logps, rewards, 0.5))
    close(gibbs_logps(logps, rewards, math.inf), logps)
    assert log_partition(logps, rewards, math.inf).abs().max() < 1e-12
    best = gibbs_logps(logps, rewards, 1e-5).exp()
    assert torch.equal(best.argmax(-1), rewards.argmax(-1)) and best.amax(-1).min() == 1.0


@pytest.mark.parametrize("beta", [0, -1.0, math.nan])
def test_beta_must_be_positive(logps, rewards, beta):
    for function in (log_partition, gibbs_logps):
        with pytest.raises(ValueError, match="beta must be a positive number or infinity"):
            function(logps, rewards, beta)


@pytest.mark.equation("E1", "E5")
@pytest.mark.parametrize("beta", BETAS)
def test_the_gibbs_policy_is_the_optimum(logps, ref_logps, rewards, beta):
    """E_π[r] − β KL(π‖h) = β log Z − β KL(π‖π*), for any π, and its maximum at π*."""
    target = gibbs_logps(ref_logps, rewards, beta)
    value = regularised_reward(logps, ref_logps, rewards, beta)
    log_z = log_partition(ref_logps, rewards, beta)
    gap = kl_divergence(logps, target)
    close(value, beta * log_z - beta * gap)
    best = regularised_reward(target, ref_logps, rewards, beta)
    close(best, beta * log_z)
    assert (value < best).all()


@pytest.mark.equation("E6")
@pytest.mark.parametrize("beta", BETAS)
def test_reverse_projection_is_the_same_problem(logps, ref_logps, rewards, beta):
    """E_π[log π/h − r/β] = KL(π‖π*) − log Z, the expectation as a sum over completions."""
    loss = (logps.exp() * (logps - ref_logps - rewards / beta)).sum(-1)
    gap = kl_divergence(logps, gibbs_logps(ref_logps, rewards, beta))
    close(loss, gap - log_partition(ref_logps, rewards, beta))
    value = regularised_reward(logps, ref_logps, rewards, beta)
    close(value, -beta * loss)


@pytest.mark.equation("E2")
def test_forms_of_the_objective(logps, ref_logps, rewards):
    """E_π[r − β log π/h] = E_π[r + β log h] + β H(π)."""
    beta = 0.4
    sampled = expected_reward(logps, rewards - beta * (logps - ref_logps))
    entropy = -(logps.exp() * logps).sum(-1)
    max_entropy = expected_reward(logps, rewards + beta * ref_logps) + beta * entropy
    value = regularised_reward(logps, ref_logps, rewards, beta)
    close(value, sampled)
    close(value, max_entropy)


@pytest.mark.equation("E7")
@pytest.mark.parametrize("beta", BETAS)
def test_forward_projection(logps, ref_logps, rewards, beta):
    """−E_{π*}[log π] is KL(π*‖π) + H(π*), and −E_h[(exp(r/β)/Z) log π]."""
    target = gibbs_logps(ref_logps, rewards, beta)
    loss = projection_loss(logps, ref_logps, rewards, beta)
    entropy = -(target.exp() * target).sum(-1)
    close(loss, kl_divergence(target, logps) + entropy)
    ratio = (rewards / beta - log_partition(ref_logps, rewards, beta)[:, None]).exp()
    close(loss, -(ref_logps.exp() * ratio * logps).sum(-1))


@pytest.mark.equation("E26")
def test_kl_against_brute_force(space, model, reference, logps, ref_logps):
    """The sum over completions, by recursion; and H(p,q) − H(p)."""
    p, q = (brute.read_table(m.model.table.weight[13:].tolist(), 4, 3) for m in (model, reference))
    by_hand = brute.expectation(
        p, lambda y: math.log(brute.probability(p, y) / brute.probability(q, y))
    )
    divergence = kl_divergence(logps, ref_logps)
    assert divergence[1].item() == pytest.approx(by_hand, rel=1e-12)
    cross = -(logps.exp() * ref_logps).sum(-1)
    close(divergence, cross + (logps.exp() * logps).sum(-1))
    assert kl_divergence(logps, logps).abs().max() == 0


def test_kl_with_zeros():
    """Completions that p never gives count nothing; those that q never gives make it infinite."""
    p = torch.tensor([[0.5, 0.5, 0.0]]).double().log()
    q = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.25, 0.5], [1.0, 0.0, 0.0]]).double().log()
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(p, q).tolist() == pytest.approx([first, math.log(2), math.inf])


def test_projection_with_zeros():
    """−0·log 0 is 0; a completion of π* that π cannot give costs infinitely much."""
    ref_logps = torch.tensor([0.5, 0.5, 0.0]).double().log()
    logps = torch.tensor([[0.25, 0.75, 0.0], [0.0, 1.0, 0.0]]).double().log()
    loss = projection_loss(logps, ref_logps, torch.zeros(3), 1.0)
    assert loss.tolist() == pytest.approx([math.log(4) - 0.5 * math.log(3), math.inf])


def objectives(ref_logps, rewards):
    """Each objective as a function of the policy's log-probabilities alone."""
    beta = 0.6
    target = gibbs_logps(ref_logps, rewards, beta)
    return {
        "expected reward": lambda p: expected_reward(p, rewards),
        "regularised reward": lambda p: regularised_reward(p, ref_logps, rewards, beta),
        "forward projection": lambda p: projection_loss(p, ref_logps, rewards, beta),
        "KL to the optimum": lambda p: kl_divergence(p, target),
        "KL to the reference": lambda p: kl_divergence(p, ref_logps),
        "forward KL": lambda p: kl_divergence(ref_logps, p),
    }


NAMES = [
    "expected reward",
    "regularised reward",
    "forward projection",
    "KL to the optimum",
    "KL to the reference",
    "forward KL",
]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences(space, reference, rewards, name):
    """gradcheck of table -> objective, with an upstream gradient for each prompt."""
    objective = objectives(space.logps(reference).detach(), rewards)[name]
    table = torch.randn(2, 13, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: objective(space.logps(t)), table)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_model(space, model, ref_logps, rewards, name):
    """exact_gradient goes through the model's forward; here it is taken of the table instead."""
    objective = objectives(ref_logps, rewards)[name]
    gradient = exact_gradient(objective, model, space)
    assert list(gradient) == ["model.table.weight"]
    table = model.model.table.weight.detach().view(2, 13, 4).requires_grad_()
    objective(space.logps(table)).sum().div(2).backward()
    close(gradient["model.table.weight"].view(2, 13, 4), table.grad)
    assert model.model.table.weight.grad is None


def visits(table, prefix):
    """Probability that a completion passes through `prefix`."""
    return brute.probability(table, prefix)


def test_policy_gradient_in_closed_form(space, model, rewards):
    """∂J/∂logit(s, a) = d(s) π(a|s) (Q(s, a) − V(s)), by recursion, over the mean of 2 prompts."""
    gradient = exact_gradient(lambda p: expected_reward(p, rewards), model, space)
    rows = gradient["model.table.weight"].view(2, 13, 4).tolist()
    for x in range(2):
        table = brute.read_table(model.model.table.weight.view(2, 13, 4)[x].tolist(), 4, 3)
        value = {
            tuple(t[m].tolist()): r
            for t, m, r in zip(space.tokens, space.mask, rewards[x].tolist(), strict=True)
        }
        for row, (prefix, probabilities) in zip(rows[x], table.items(), strict=True):
            v = brute.expectation(table, value.__getitem__, prefix)
            by_hand = [
                visits(table, prefix)
                * p
                * (brute.expectation(table, value.__getitem__, (*prefix, a)) - v)
                / 2
                for a, p in enumerate(probabilities)
            ]
            assert row == pytest.approx(by_hand, abs=1e-14)


def rewards_of_tokens(space):
    """(2, N, T) random rewards that depend on the prefix up to their token alone; 0 on padding."""
    of_node = torch.randn(2, 2 * len(space), dtype=torch.float64)
    return of_node[:, space.nodes[:, 1:]] * space.mask


def score_gradient(space, model, credit):
    """E_π[Σ_t ∇log π(y_t|y_<t) Ψ_t] for credit Ψ (2, N, T), of the mean over the prompts."""
    logps = space.token_logps(model)
    weights = logps.sum(-1, keepdim=True).detach().exp()
    surrogate = (weights * logps * credit).sum() / 2
    return torch.autograd.grad(surrogate, model.model.table.weight)[0]


@pytest.mark.equation("E32", "E33", "E34")
def test_return_reward_to_go_and_baseline_have_one_gradient(space, model):
    """∇E[R] is E[Σ_t ∇log π_t Ψ_t] with all of R, with what follows t, and less any b(y_<t)."""
    rewards = rewards_of_tokens(space)
    whole = rewards.sum(-1, keepdim=True).expand_as(rewards)
    to_go = torch.stack([reward_to_go(each, space.mask) for each in rewards])
    baseline = torch.randn(2, 2 * len(space), dtype=torch.float64)[:, space.nodes[:, :-1]]
    exact = exact_gradient(lambda p: expected_reward(p, whole[..., 0]), model, space)
    for credit in (whole, to_go, to_go - baseline, whole - baseline):
        close(score_gradient(space, model, credit), exact["model.table.weight"])
    past = whole - to_go
    assert past.abs().max() > 1 and score_gradient(space, model, past).abs().max() < 1e-12
    # A token's own reward is no past one, and what knows the token itself is no baseline.
    knowing = torch.randn(2, 2 * len(space), dtype=torch.float64)[:, space.nodes[:, 1:]]
    for wrong in (to_go - rewards, to_go - knowing):
        off = score_gradient(space, model, wrong) - exact["model.table.weight"]
        assert off.abs().max() > 0.01


@pytest.mark.equation("E39", "E43")
@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_the_difference_of_two_policies_is_the_advantages_of_one(space, model, reference, gamma):
    """J(π) − J(old) = E_π[Σ γ^t A_old], A = Q − V with V by enumeration, J = E[V(s_0)]."""
    rewards, mask = rewards_of_tokens(space), space.mask
    discounts = gamma ** torch.arange(mask.size(1), dtype=torch.float64)
    discounted = rewards * discounts
    # What was paid before t is no part of V_t.
    paid = torch.nn.functional.pad(discounted.cumsum(-1), (1, 0))
    expected = space.expected_values(reference, discounted.sum(-1))
    values = (expected - paid)[..., :-1] / discounts
    advantages = torch.stack(
        [
            gae(r, v, mask, gamma=gamma, lam=0.0)[0]
            for r, v in zip(rewards, values.detach(), strict=True)
        ]
    )
    new, old = (space.logps(each).detach() for each in (model, reference))
    returns = [expected_reward(each, discounted.sum(-1)) for each in (new, old)]
    close(values[:, 0, 0], returns[1])
    difference = expected_reward(new, (discounts * advantages).sum(-1))
    close(difference, returns[0] - returns[1])
    assert difference.abs().min() > 0.01
    # V is the mean of Q over the old policy's actions, in each state.
    for probabilities, of_each in zip(old.exp(), advantages, strict=True):
        weighted = (probabilities[:, None] * of_each)[mask]
        of_state = (
            torch.zeros(len(space)).double().index_add(0, space.nodes[:, :-1][mask], weighted)
        )
        assert of_state.abs().max() < 1e-14 and weighted.abs().max() > 0.01


@pytest.mark.equation("E39")
def test_advantages_are_neighbouring_values_of_the_enumeration(space, model, rewards):
    """With one reward at the end, V_{t+1} − V_t is the one-step advantage."""
    at_end = rewards[..., None] * (space.mask.cumsum(1) == space.mask.sum(1, keepdim=True))
    values = space.expected_values(model, rewards).detach()
    for r, v in zip(at_end * space.mask, values, strict=True):
        close(v.diff(dim=-1), gae(r, v[:, :-1], space.mask, gamma=1.0, lam=0.0)[0])


@pytest.mark.equation("E46")
def test_k3_of_old_samples_is_the_penalty_of_ppo(space, model, reference):
    """E_old[Σ_t k3(π_old, π)] is KL(π_old‖π) of sequences, and so is its gradient."""
    old_logps = space.token_logps(reference).detach()
    weights = old_logps.sum(-1).exp()
    ours = (weights * (k3(old_logps, space.token_logps(model)) * space.mask).sum(-1)).sum(-1)
    close(ours, kl_divergence(old_logps.sum(-1), space.logps(model)))
    (gradient,) = torch.autograd.grad(ours.mean(), model.model.table.weight)
    exact = exact_gradient(lambda p: kl_divergence(old_logps.sum(-1), p), model, space)
    close(gradient, exact["model.table.weight"])


@pytest.mark.equation("E7")
def test_projection_gradient_in_closed_form(space, model, reference, ref_logps, rewards):
    """∂ℓ/∂logit(s, a) = d*(s) (π(a|s) − π*(a|s)): zero exactly where π = π*."""
    beta = 0.6
    optimum = space.table_of(gibbs_logps(ref_logps, rewards, beta))
    gradient = exact_gradient(lambda p: projection_loss(p, ref_logps, rewards, beta), model, space)[
        "model.table.weight"
    ].view(2, 13, 4)
    for x in range(2):
        table = brute.read_table(model.model.table.weight.view(2, 13, 4)[x].tolist(), 4, 3)
        target = brute.read_table(optimum[x].tolist(), 4, 3)
        for row, prefix in zip(gradient[x].tolist(), table, strict=True):
            pairs = zip(table[prefix], target[prefix], strict=True)
            by_hand = [visits(target, prefix) * (p - q) / 2 for p, q in pairs]
            assert row == pytest.approx(by_hand, abs=1e-14)
    model.load_table(optimum)
    at_optimum = exact_gradient(
        lambda p: projection_loss(p, ref_logps, rewards, beta), model, space
    )
    assert at_optimum["model.table.weight"].abs().max() < 1e-15


def test_gradient_of_an_unused_parameter_is_zero(space, model, rewards):
    model.extra = torch.nn.Linear(2, 1)
    gradient = exact_gradient(lambda p: expected_reward(p, rewards), model, space)
    assert not gradient["extra.weight"].any() and gradient["model.table.weight"].any()


@pytest.mark.parametrize("name", ["regularised reward", "forward projection"])
def test_following_the_gradient_leads_to_the_gibbs_policy(space, model, ref_logps, rewards, name):
    """Both projections have one optimum, π* (β = 0.6 as in `objectives`); rare prefixes, which
    hardly count in the KL, are the last to arrive."""
    objective = objectives(ref_logps, rewards)[name]
    sign = -1 if name == "regularised reward" else 1
    target = gibbs_logps(ref_logps, rewards, 0.6)
    assert kl_divergence(space.logps(model), target).min() > 0.5
    weight = model.model.table.weight
    optimizer = torch.optim.Adam([weight], lr=0.1)
    for _ in range(200):
        gradient = exact_gradient(objective, model, space)
        weight.grad = sign * gradient["model.table.weight"]
        optimizer.step()
    assert kl_divergence(space.logps(model), target).max() < 2e-3
