"""Gambler's ruin: closed forms against exact fractions, a linear system, and an enumeration."""

import math
from fractions import Fraction

import pytest
import torch

from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    TabularLMConfig,
    absorption,
    ruin_duration,
    ruin_positions,
    ruin_prefix_value,
    ruin_table,
    ruin_win_probability,
)

# Even odds, so near to even that 1 - (q/p)^k loses all its digits, and far from even.
ODDS = [0.5, 0.5 + 1e-15, 0.5 - 1e-9, 0.5 + 1e-5, 0.49, 0.3, 0.9, 1e-3, 1 - 1e-3]


def exact(k, size, p):
    """E52 as it is printed, in rational arithmetic: (win probability, duration)."""
    p = Fraction(p)
    q = 1 - p
    if p == q:
        return Fraction(k, size), Fraction(k * (size - k))
    ratio = q / p
    win = (ratio**k - 1) / (ratio**size - 1)
    return win, (k - size * (1 - ratio**k) / (1 - ratio**size)) / (q - p)


@pytest.mark.equation("E52")
@pytest.mark.parametrize("size", [1, 2, 10, 60])
@pytest.mark.parametrize("p", ODDS)
def test_closed_forms_against_fractions(p, size):
    for k in range(size + 1):
        win, duration = exact(k, size, p)
        assert ruin_win_probability(k, size, p) == pytest.approx(float(win), rel=1e-11)
        assert ruin_duration(k, size, p) == pytest.approx(float(duration), rel=1e-11)


def ruin_chain(size, p):
    """Steps among 1..S-1, and from them to 0 and to S."""
    up, down = (torch.full((size - 2,), each, dtype=torch.float64) for each in (p, 1 - p))
    out = torch.zeros(size - 1, 2, dtype=torch.float64)
    out[0, 0], out[-1, 1] = 1 - p, p
    return torch.diag(up, 1) + torch.diag(down, -1), out


@pytest.mark.equation("E52", "E54")
@pytest.mark.parametrize("p", [0.5, 0.3, 0.8])
def test_closed_forms_against_the_absorbing_chain(p):
    """Losses and wins (I-Q)^-1 R, durations (I-Q)^-1 1."""
    size, states = 12, range(1, 12)
    ends, durations = absorption(*ruin_chain(size, p), torch.ones(size - 1))
    wins = [ruin_win_probability(k, size, p) for k in states]
    assert ends[:, 1].tolist() == pytest.approx(wins)
    assert ends[:, 0].tolist() == pytest.approx([1 - win for win in wins])
    assert durations.tolist() == pytest.approx([ruin_duration(k, size, p) for k in states])


@pytest.mark.equation("E54")
def test_absorption_is_where_the_powers_of_the_chain_go():
    """A random chain of 5 states and 3 ends: P^n, and Σ_n Q^n c step by step."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(5, 8, generator=generator, dtype=torch.float64) ** 3
    steps /= steps.sum(1, keepdim=True)
    within, out = steps[:, :5], steps[:, 5:]
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    ends, totals = absorption(within, out, rewards)
    whole = torch.eye(8, dtype=torch.float64)
    whole[:5] = steps
    far = torch.linalg.matrix_power(whole, 10_000)
    torch.testing.assert_close(far[:5], torch.cat([torch.zeros_like(within), ends], dim=1))
    place, collected = torch.eye(5, dtype=torch.float64), torch.zeros_like(rewards)
    for _ in range(2000):
        collected, place = collected + place @ rewards, place @ within
    assert place.max() < 1e-12
    torch.testing.assert_close(totals, collected)


@pytest.mark.equation("E54")
def test_absorption_by_hand():
    """A coin tossed while it shows tails, 0.4: heads 0.5, its edge 0.1, which is worth 3.

    The ends 5/6 and 1/6 after 1/0.6 tosses; a toss is worth 0.3, all of them 3/6.
    """
    out = torch.tensor([[0.5, 0.1]], dtype=torch.float64)
    ends, total = absorption(1 - out.sum(1, keepdim=True), out, torch.tensor([0.3]))
    assert ends[0].tolist() == pytest.approx([5 / 6, 1 / 6])
    assert total.item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("within", "out", "says"),
    [
        ([[0.5]], [[0.4]], r"sum to 1, got sums \[0.9"),
        ([[1.5]], [[-0.5]], r"a least entry of -0.5"),
        # 1 and 2 lead to each other for ever; their block of I - Q is singular but for rounding.
        ([[0.5, 0.2, 0.1], [0, 0.3, 0.7], [0, 0.6, 0.4]], [[0.2], [0], [0]], r"states \[1, 2\]"),
        ([[1.0]], [[0.0]], r"states \[0\]"),
    ],
)
def test_a_chain_that_is_none_or_never_ends_is_refused(within, out, says):
    q, r = (torch.tensor(each, dtype=torch.float64) for each in (within, out))
    with pytest.raises(ValueError, match=says):
        absorption(q, r, torch.ones(len(q)))


def test_large_games_do_not_overflow():
    assert ruin_win_probability(1000, 5000, 0.4) == 0.0
    assert ruin_win_probability(4999, 5000, 0.4) == pytest.approx(2 / 3)
    assert ruin_win_probability(1, 5000, 0.6) == pytest.approx(1 / 3)
    # Drift 0.2 a step: about 1000/0.2 steps down to 0.
    assert ruin_duration(1000, 5000, 0.4) == pytest.approx(5000)
    assert ruin_duration(4000, 5000, 0.6) == pytest.approx(5000)


@pytest.mark.equation("E52")
@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 3.0, 1e12, math.inf])
def test_prefix_value(beta):
    """log(1 + f (e^{1/β} − 1)); for large β it is f/β, for small β 1/β + log f."""
    win = ruin_win_probability(2, 5, 0.4)
    value = ruin_prefix_value(2, 5, 0.4, beta)
    if beta < 0.01:
        assert value == pytest.approx(1 / beta + math.log(win), rel=1e-12)
    elif beta > 1e6:
        assert value == pytest.approx(win / beta, rel=1e-10)
    else:
        assert value == pytest.approx(math.log(1 + win * (math.exp(1 / beta) - 1)), rel=1e-12)
    assert ruin_prefix_value(0, 5, 0.4, beta) == 0
    assert ruin_prefix_value(5, 5, 0.4, beta) == pytest.approx(1 / beta)


def double(values):
    return torch.tensor(list(values), dtype=torch.float64)


@pytest.fixture
def walk():
    """At most 7 steps, the vocabulary end, up, down."""
    return Enumeration(TabularLMConfig(vocab_size=3, max_completion_length=7))


@pytest.mark.equation("E52")
@pytest.mark.parametrize("p", [0.5, 0.35])
def test_the_walk_as_a_policy(walk, p):
    """A truncated walk is given the closed form of where it stands, so that every prefix that can
    occur must have the closed form of where *it* stands: the value is a martingale."""
    start, size, beta = 2, 4, 0.3
    policy = ruin_table(walk, start, size, p)
    final = ruin_positions(walk.tokens, start)
    possible = walk.logps(policy)[0] > -1000
    assert (walk.mask.sum(-1) < 7).logical_and(possible).any()
    assert set(final[possible].tolist()) == {0, 1, 3, 4}  # 7 steps from 2 end on odd places
    place = final.clamp(0, size).tolist()
    wins = double(ruin_win_probability(k, size, p) for k in place)
    tilts = double(ruin_prefix_value(k, size, p, beta) for k in place)
    values = walk.expected_values(policy, wins)[0]
    tilted = walk.prefix_values(policy, beta * tilts, beta)[0]
    for n in possible.nonzero()[:, 0].tolist():
        for t in range(8):
            k = int(ruin_positions(walk.tokens[n : n + 1, :t], start))
            assert values[n, t].item() == pytest.approx(ruin_win_probability(k, size, p), abs=1e-12)
            assert tilted[n, t].item() == pytest.approx(
                ruin_prefix_value(k, size, p, beta), abs=1e-12
            )


def sampled(model, count, length):
    ids = torch.ones(count, 1, dtype=torch.long)
    out = model.generate(ids, attention_mask=ids, do_sample=True, max_new_tokens=length)
    return out[:, 1:]


def test_the_walk_is_generated(walk):
    """A TabularLM with the walk's table stops exactly at 0 or S."""
    model = TabularLM(walk.config).load_table(ruin_table(walk, 1, 3, 0.5).float())
    numbers = walk.index(sampled(model, 500, 7))
    final = ruin_positions(walk.tokens[numbers], 1)
    ended = walk.mask[numbers].sum(-1) > (walk.tokens[numbers] > 0).sum(-1)
    assert ended.float().mean() > 0.9
    assert set(final[ended].tolist()) == {0, 3}


@pytest.mark.parametrize("game", [(-1, 5, 0.5), (6, 5, 0.5), (0, 0, 0.5), (1, 5, 0.0), (1, 5, 1.0)])
def test_impossible_games_are_refused(walk, game):
    for function in (ruin_win_probability, ruin_duration):
        with pytest.raises(ValueError, match="a ruin game needs"):
            function(*game)
    with pytest.raises(ValueError, match="a ruin game needs"):
        ruin_table(walk, *game)
    with pytest.raises(ValueError, match="beta must be"):
        ruin_prefix_value(1, 5, 0.5, 0)
    with pytest.raises(ValueError, match="vocab_size 3"):
        ruin_table(Enumeration(TabularLMConfig()), 1, 5, 0.5)
