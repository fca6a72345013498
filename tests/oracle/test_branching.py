"""Branching against its roots by hand, simulation, and the scorer on a language with a stack."""

import math
import random

import pytest
import torch

from trl_ext.gibbs_prm import GibbsScorer
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    TabularLMConfig,
    branching_prefix_value,
    extinction_probability,
    generation_moments,
    tabular_tokenizer,
)
from trl_ext.oracle.prefixes import IMPOSSIBLE

pytestmark = pytest.mark.equation("E56")

SUPERCRITICAL = [0.3, 0.2, 0.5]  # 0.5 s² − 0.8 s + 0.3 = 0: s = 0.6 or 1


@pytest.mark.parametrize(
    ("offspring", "root"),
    [
        (SUPERCRITICAL, 0.6),
        ([0.25, 0, 0.75], 1 / 3),  # brackets: q/p, as in gambler's ruin without a ceiling
        ([0.5, 0, 0.5], 1.0),  # critical
        ([0.7, 0.1, 0.2], 1.0),
        ([0.0, 0.5, 0.5], 0.0),
        ([0.0, 1.0], 0.0),  # for ever one
        ([1.0], 1.0),
        ([0.2, 0, 0, 0.8], (math.sqrt(2) - 1) / 2),  # 4s³ − 5s + 1 = (s − 1)(4s² + 4s − 1)
    ],
)
def test_the_smallest_root(offspring, root):
    assert extinction_probability(offspring) == pytest.approx(root, abs=1e-12)
    assert extinction_probability(offspring, 3) == pytest.approx(root**3, abs=1e-12)
    assert extinction_probability(offspring, 0) == 1.0


def test_near_the_critical_case():
    """p_2 = (1+ε)/2: the root is (1 − ε)/(1 + ε)."""
    for epsilon in (1e-2, 1e-4, 1e-6):
        found = extinction_probability([(1 - epsilon) / 2, 0, (1 + epsilon) / 2])
        assert found == pytest.approx((1 - epsilon) / (1 + epsilon), abs=1e-9)


def test_moments_of_generations():
    """μ = 1.2, σ² = 0.2 + 4·0.5 − 1.44 = 0.76. Var X_2 = μ²σ² + σ²μ = 0.76·(1.44 + 1.2)."""
    assert generation_moments(SUPERCRITICAL, 0) == (1.0, 0.0)
    assert generation_moments(SUPERCRITICAL, 1) == pytest.approx((1.2, 0.76))
    assert generation_moments(SUPERCRITICAL, 2) == pytest.approx((1.44, 0.76 * 2.64))


def test_simulated_generations_and_ends():
    """20,000 processes: the means of X_4 and X_4², and the share that has died out by then."""
    rng, runs = random.Random(0), 20_000
    sizes = []
    for _ in range(runs):
        alive = 1
        for _ in range(4):
            alive = sum(rng.choices([0, 1, 2], SUPERCRITICAL, k=alive)) if alive else 0
        sizes.append(alive)
    mean, variance = generation_moments(SUPERCRITICAL, 4)
    assert sum(sizes) / runs == pytest.approx(mean, abs=4 * math.sqrt(variance / runs))
    squares = [(size - mean) ** 2 for size in sizes]
    spread = sum(squares) / runs
    error = math.sqrt(sum((s - spread) ** 2 for s in squares) / runs / runs)
    assert spread == pytest.approx(variance, abs=4 * error)
    dead = 0.0
    for _ in range(4):  # P(X_n = 0) = G(P(X_{n−1} = 0))
        dead = sum(p * dead**k for k, p in enumerate(SUPERCRITICAL))
    share = sizes.count(0) / runs
    assert share == pytest.approx(dead, abs=4 * math.sqrt(dead * (1 - dead) / runs))
    assert dead < extinction_probability(SUPERCRITICAL)


@pytest.mark.parametrize("beta", [0.3, 3.0])
@pytest.mark.equation("E23", "E56")
def test_the_scorer_on_a_language_with_a_stack(beta):
    """Letters a, b, c leave 0, 1, 2 items for one; reward 1 if the text ever ends.

    π* is the Doob transform: from height k the letter that leads to k' has p·u(k')/u(k), u(k) = 1 +
    ρ^k (e^{1/β} − 1). A text of any length scores β·log u(k)/u(1), however it came to height k.
    """
    length = 6
    shape = TabularLMConfig(vocab_size=4, max_completion_length=length)
    space = Enumeration(shape)
    prefixes = space.tokens[: shape.num_prefixes]
    heights = (1 + (prefixes == 3).sum(-1) - (prefixes == 1).sum(-1)).tolist()
    value = [branching_prefix_value(SUPERCRITICAL, k, beta) for k in range(length + 2)]
    rows, tilted = [], []
    for height in heights:
        if height <= 0:
            rows.append([0.0] + [IMPOSSIBLE] * 3)
            tilted.append(rows[-1])
            continue
        step = [math.log(p) for p in SUPERCRITICAL]
        rows.append([IMPOSSIBLE, *step])
        gains = [value[height + change] - value[height] for change in (-1, 0, 1)]
        tilted.append([IMPOSSIBLE, *(s + g for s, g in zip(step, gains, strict=True))])
    reference, policy = (
        TabularLM(shape).double().load_table(torch.tensor([table], dtype=torch.float64))
        for table in (rows, tilted)
    )
    texts = []
    for tokens in space.tokens.tolist():
        for size in range(1, length + 1):
            part = tokens[:size]
            reached = [1 + part[:t].count(3) - part[:t].count(1) for t in range(size)]
            if 0 not in part and min(reached) > 0:
                texts.append(part)
    tokenizer = tabular_tokenizer(4)
    scorer = GibbsScorer(policy, reference, tokenizer, beta)
    scored = scorer.score(
        ["a"] * len(texts), [tokenizer.decode(t) for t in texts], "token", completion_ids=texts
    )
    seen = set()
    for part, each in zip(texts, scored, strict=True):
        places = [1 + part[:t].count(3) - part[:t].count(1) for t in range(1, len(part) + 1)]
        seen |= set(places)
        wanted = [beta * (value[k] - value[1]) for k in places]
        assert each.prefix_scores == pytest.approx(wanted, abs=1e-5)
    assert seen == set(range(length + 2))


def test_what_is_no_branching():
    for offspring in ([0.5, 0.4], [-0.1, 1.1], [], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="offspring must be probabilities"):
            extinction_probability(offspring)
    with pytest.raises(ValueError, match="pending items are a whole number from 0, got -1"):
        extinction_probability([1.0], -1)
    with pytest.raises(ValueError, match="a generation is a whole number from 0, got True"):
        generation_moments([1.0], True)
    with pytest.raises(ValueError, match="beta must be a positive number"):
        branching_prefix_value([1.0], 1, 0.0)
