"""The truth table against loops, closed forms, quadrature and the oracle's own gradient."""

import math

import pytest
import torch

from trl_ext.errors import ConfigError
from trl_ext.functional import k1, k2, k3
from trl_ext.kl_table import (
    OTHERS,
    OURS,
    Bench,
    Method,
    distance_after_training,
    graded,
    markdown,
    user_method,
)
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    TabularLMConfig,
    exact_gradient,
    kl_divergence,
)

BY_NAME = {method.name: method for method in OURS}
ON, OFF = Bench(seed=3), Bench(seed=3, off_policy=0.4)


@pytest.mark.equation("E27", "E29", "E30")
def test_every_claim_of_ours_is_borne_out():
    """What CI guards: a formula of ours that lost its soundness would be called by name."""
    rows = graded(OURS, steps=2)
    assert [line for row in rows for line in row.contradictions] == []
    assert sum(method.claim is not None for method in OURS) == 8


@pytest.mark.parametrize(
    ("name", "on_policy", "off_policy"),
    [
        ("k1 in the loss", "zero", "biased"),
        ("k3 in the loss", "forward per step", "biased"),
        ("k2 in the loss", "per step", "biased"),
        ("k3 in the reward", "biased", "biased"),
        ("exact in the reward", "biased", "biased"),
        ("exact in reward and loss", "whole", "biased"),
        ("k1 in the reward", "whole", "biased"),
        ("k1 in the reward, corrected", "whole", "whole"),
    ],
)
def test_what_each_gradient_is(name, on_policy, off_policy):
    assert ON.grade(BY_NAME[name]).part == on_policy
    assert OFF.grade(BY_NAME[name]).part == off_policy


def test_the_formulas_of_others_are_what_they_amount_to():
    parts = {(m.source, m.name): ON.grade(m).part for m in OTHERS}
    assert parts["TRL", "GRPO"] == "per step"
    assert parts["TRL", "GRPO, use_bias_correction_kl false"] == "forward per step"
    assert parts["TRL", "RLOO"] == "whole"
    assert parts["verl", "kl"] == "zero"
    straight_through = [part for (_, name), part in parts.items() if name.endswith("+")]
    assert straight_through == ["per step"] * 4
    corrected = [m for m in OTHERS if m.name.endswith("unbiased_gradient")]
    assert [(ON.grade(m).part, OFF.grade(m).part) for m in corrected] == [("per step",) * 2] * 3


def test_the_clamps_of_others_bite():
    """log-ratios of −30 and 30: verl's k3 stays at 10, k1 clamped at ±10, as they are defined."""
    zeros, far = torch.zeros(1, 2), torch.tensor([[30.0, -30.0]])
    samples = ON.samples(ON.table, ON.old_table)
    fields = vars(samples) | {"logps": far, "old_logps": far, "ref_logps": zeros}
    of_far = type(samples)(**fields)
    methods = {(m.source, m.name): m.formula for m in OTHERS}
    assert methods["verl", "low_var_kl"](of_far).tolist() == [[10.0, 10.0]]
    assert methods["others", "k1 in the loss, clamp ±10"](of_far).tolist() == [[10.0, -10.0]]
    plus = methods["verl", "low_var_kl+"](of_far)
    assert plus.tolist() == [[10.0, 10.0]]


@pytest.mark.parametrize(("name", "value"), [("k1", 2.0), ("k2", 2.0), ("k3", math.exp(-2) + 1)])
def test_openrlhfs_unbiased_gradient_by_hand(name, value):
    """log π/π_ref = 2 and 12, ρ = 3 and 20: gradients 3·2 and 10·12; values as of the estimate."""
    logps = torch.tensor([[2.0, 12.0]], dtype=torch.float64, requires_grad=True)
    old_logps = (logps - torch.tensor([[3.0, 20.0]]).log()).detach()
    samples = ON.samples(ON.table, ON.old_table)
    fields = {"logps": logps, "old_logps": old_logps, "ref_logps": torch.zeros(1, 2)}
    methods = {(m.source, m.name): m.formula for m in OTHERS}
    values = methods["OpenRLHF", f"{name}, unbiased_gradient"](
        type(samples)(**vars(samples) | fields)
    )
    assert values.tolist()[0] == pytest.approx([value, 10.0])
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    assert gradient.tolist()[0] == pytest.approx([6.0, 120.0])


@pytest.mark.equation("E29", "E30")
def test_k1_in_the_reward_by_a_loop_over_completions():
    """Σ_y π(y) Σ_t (e_{y_t} − π(·|y_<t)) Σ_{s≥t} k1_s, in plain loops, is ∇KL and its variance."""
    probabilities = ON.table.detach()[0].softmax(-1)
    reference = ON.ref_table[0].softmax(-1)
    expected, second_moment = torch.zeros_like(probabilities), 0.0
    space = ON.space
    for tokens, mask, nodes in zip(space.tokens, space.mask, space.nodes, strict=True):
        steps = [(int(nodes[t]), int(tokens[t])) for t in range(3) if mask[t]]
        weight = math.prod(probabilities[row, token].item() for row, token in steps)
        penalties = [
            math.log(probabilities[row, token] / reference[row, token]) for row, token in steps
        ]
        gradient = torch.zeros_like(probabilities)
        for t, (row, token) in enumerate(steps):
            score = -probabilities[row].clone()
            score[token] += 1
            gradient[row] += score * sum(penalties[t:])
        expected += weight * gradient
        second_moment += weight * gradient.square().sum().item()
    whole = ON.targets()["whole"].view_as(expected)
    torch.testing.assert_close(expected, whole, rtol=0, atol=1e-12)
    grade = ON.grade(BY_NAME["k1 in the reward"])
    variance = second_moment - whole.square().sum().item()
    assert grade.gradient_sd == pytest.approx(variance**0.5 / whole.norm().item())


def test_the_whole_gradient_is_the_oracles():
    config = TabularLMConfig(vocab_size=4, max_completion_length=3)
    model = TabularLM(config).double()
    model.load_table(ON.table.detach())
    space = Enumeration(config)
    gradients = exact_gradient(
        lambda logps: kl_divergence(logps, space.logps(ON.ref_table)), model, space
    )
    (gradient,) = [g for g in gradients.values() if g.abs().max() > 0]
    ours = ON.targets()["whole"]
    assert gradient.norm().item() == pytest.approx(ours.norm().item())
    assert sorted(gradient.flatten().abs().tolist())[-5:] == pytest.approx(
        sorted(ours.abs().tolist())[-5:]
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in OURS if m.claim == "whole"], ids=lambda m: m.name)
def test_a_whole_gradient_trains_to_the_gibbs_policy(method):
    assert distance_after_training(method) < 1e-4


@pytest.mark.slow
def test_the_other_gradients_come_to_rest_elsewhere():
    assert distance_after_training(BY_NAME["k2 in the loss"]) > 0.05
    assert distance_after_training(BY_NAME["k3 in the loss"]) > 0.05
    assert distance_after_training(BY_NAME["k1 in the loss"]) > 1.0


@pytest.mark.parametrize(
    ("kl", "spreads", "biases"),
    [(0.005, (20, 1.42, 1.42), (0, 0.002, 0)), (0.5, (2, 1.73, 1.70), (0, 0.25, 0))],
)
def test_schulmans_anchor(kl, spreads, biases):
    """N(0,1) against N(μ,1), KL = μ²/2, by quadrature on a grid that ends 12 sd out."""
    mu = (2 * kl) ** 0.5
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    density /= density.sum()
    logps, ref_logps = -(x**2) / 2, -((x - mu) ** 2) / 2
    for estimate, spread, bias in zip((k1, k2, k3), spreads, biases, strict=True):
        values = estimate(logps, ref_logps)
        mean = (density * values).sum()
        sd = (density * (values - mean).square()).sum().sqrt()
        assert sd.item() / kl == pytest.approx(spread, rel=0.005)
        assert (mean.item() - kl) / kl == pytest.approx(bias, abs=0.002)


def test_a_false_claim_is_called_by_name():
    liar = Method("k1 in the loss", "yours", BY_NAME["k1 in the loss"].formula, "loss", "whole")
    (row,) = graded([liar], steps=1)
    assert row.contradictions == [
        "k1 in the loss: its on-policy gradient is said to be whole, and is zero."
    ]


def test_a_users_formula_is_graded_as_ours():
    own = user_method("mine:half_square", lambda logps, ref: (logps - ref) ** 2 / 2, "loss")
    assert ON.grade(own) == ON.grade(BY_NAME["k2 in the loss"])
    own = user_method("mine:difference", lambda logps, ref: logps - ref, "reward")
    assert ON.grade(own) == ON.grade(BY_NAME["k1 in the reward"])


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda logps, ref: 1.0, r"got float"),
        (lambda logps, ref: logps.sum(), r"one number a token.* got \(\)"),
        (lambda logps, ref: logps * torch.nan, "gave NaN or an infinity"),
        (lambda logps: logps, r"mine:broken raised TypeError.*called with \(logps, ref_logps\)"),
        (lambda logps, ref: {}[logps], "mine:broken raised KeyError"),
        (lambda logps, ref: (logps - ref).detach(), "mine:broken has no gradient"),
        (5, r"mine:broken is no function.*called with \(logps, ref_logps\)"),
    ],
)
def test_a_users_formula_that_is_none(function, says):
    with pytest.raises(ConfigError, match=says):
        ON.grade(user_method("mine:broken", function, "loss"))


def test_a_reward_needs_no_gradient():
    own = user_method("mine:difference", lambda logps, ref: (logps - ref).detach(), "reward")
    assert ON.grade(own) == ON.grade(BY_NAME["k1 in the reward"])


def test_the_markdown_has_a_row_a_method():
    text = markdown(graded(OURS[:2], steps=1))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({line.count("|") for line in rows}) == 1
    assert "| k1 in the loss | trl_ext |" in rows[2]
