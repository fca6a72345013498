"""Losses of comparisons against slow loops, of rankings against an enumeration of all orders."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.functional import (
    centering_loss,
    pairwise_loss,
    plackett_luce_loss,
    preference_margins,
)

NAN = float("nan")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def drawn(seed: int, prompts: int, completions: int, levels: int):
    """Rewards, ranks with ties among `levels` values, and a mask that leaves out a fifth."""
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, completions)
    rewards = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    ranks = torch.randint(1, levels + 1, shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.8
    return rewards, ranks, mask


def pairs_of(ranks, mask):
    """(winner, other) of one prompt, by the definition."""
    kept = [i for i in range(len(ranks)) if mask[i]]
    return [(w, o) for w in kept for o in kept if ranks[w] < ranks[o]]


CASES = given(
    seed=st.integers(0, 10_000),
    prompts=st.integers(1, 4),
    completions=st.integers(1, 6),
    levels=st.integers(1, 6),
)


@pytest.mark.equation("E51")
@CASES
def test_the_mean_over_pairs_and_its_gradient_are_those_of_a_loop(
    seed, prompts, completions, levels
):
    rewards, ranks, mask = drawn(seed, prompts, completions, levels)
    margin = torch.rand(prompts, completions, completions, dtype=torch.float64)
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    learned = rewards.clone().requires_grad_()
    found = pairwise_loss(learned, ranks, mask=mask, margin=margin, order_effect=alpha)
    slow, gradient, of_alpha = [], torch.zeros(prompts, completions), 0.0
    for b in range(prompts):
        pairs = pairs_of(ranks[b], mask[b])
        total = 0.0
        for w, o in pairs:
            sign = 1 if w < o else -1
            z = float(rewards[b, w] - rewards[b, o] - margin[b, w, o]) + 0.3 * sign
            total -= math.log(sigmoid(z))
            # d/dz −log σ(z) = −σ(−z)
            gradient[b, w] -= sigmoid(-z) / len(pairs)
            gradient[b, o] += sigmoid(-z) / len(pairs)
            of_alpha -= sign * sigmoid(-z) / len(pairs)
        slow.append(total / len(pairs) if pairs else 0.0)
    assert found.tolist() == pytest.approx(slow, abs=1e-9)
    found.sum().backward()
    torch.testing.assert_close(learned.grad, gradient.double(), rtol=0, atol=1e-6)
    assert alpha.grad is not None and alpha.grad.item() == pytest.approx(of_alpha, abs=1e-6)


@pytest.mark.equation("E50")
def test_two_completions_are_the_pairwise_loss():
    # r_w − r_l = 1.5 and −0.5; a margin of 1 takes as much from both.
    rewards = torch.tensor([[2.0, 0.5], [1.0, 0.5]], dtype=torch.float64)
    ranks = torch.tensor([[1, 2], [2, 1]])
    expected = [-math.log(sigmoid(1.5)), -math.log(sigmoid(-0.5))]
    assert pairwise_loss(rewards, ranks).tolist() == pytest.approx(expected)
    assert plackett_luce_loss(rewards, ranks).tolist() == pytest.approx(expected)
    ahead = pairwise_loss(rewards, ranks, margin=torch.ones(2)).tolist()
    assert ahead == pytest.approx([-math.log(sigmoid(0.5)), -math.log(sigmoid(-1.5))])
    assert preference_margins(rewards, ranks).tolist() == pytest.approx([1.5, -0.5])
    assert centering_loss(rewards, ranks).tolist() == pytest.approx([2.5**2, 1.5**2])


@pytest.mark.equation("E49")
def test_the_order_effect_is_for_the_one_shown_first():
    # The winner is shown first in one row, last in the other: σ(α + r_w − r_l), σ(r_w − r_l − α).
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = pairwise_loss(rewards, torch.tensor([[1, 2], [2, 1]]), order_effect=0.25)
    assert found.tolist() == pytest.approx([-math.log(sigmoid(1.25)), -math.log(sigmoid(0.75))])
    # Whoever wins, the two probabilities of one order sum to 1.
    ranks = torch.tensor([[1, 2], [2, 1]])
    both = pairwise_loss(torch.tensor([[0.4, -0.3]] * 2), ranks, order_effect=0.7)
    assert (-both).exp().sum().item() == pytest.approx(1, abs=1e-6)


@CASES
def test_centering_and_margins_are_over_the_same_pairs(seed, prompts, completions, levels):
    rewards, ranks, mask = drawn(seed, prompts, completions, levels)
    pairs = [pairs_of(ranks[b], mask[b]) for b in range(prompts)]
    slow = [
        sum(float(rewards[b, w] + rewards[b, o]) ** 2 for w, o in each) / max(len(each), 1)
        for b, each in enumerate(pairs)
    ]
    assert centering_loss(rewards, ranks, mask=mask).tolist() == pytest.approx(slow)
    margins = [
        float(rewards[b, w] - rewards[b, o]) for b, each in enumerate(pairs) for w, o in each
    ]
    assert preference_margins(rewards, ranks, mask=mask).tolist() == pytest.approx(margins)


def probability_of_ranks(rewards: list[float], ranks: list[int]) -> float:
    """The sum over all orders that agree with the ranks of the product of choice probabilities."""
    total = 0.0
    for order in itertools.permutations(range(len(rewards))):
        if any(ranks[a] > ranks[b] for a, b in itertools.pairwise(order)):
            continue
        probability = 1.0
        for k, chosen in enumerate(order):
            rest = sum(math.exp(rewards[j]) for j in order[k:])
            probability *= math.exp(rewards[chosen]) / rest
        total += probability
    return total


@given(st.lists(st.tuples(st.floats(-6, 6), st.integers(1, 4)), min_size=1, max_size=5))
def test_plackett_luce_is_the_enumeration_of_all_orders(rows):
    rewards, ranks = map(list, zip(*rows, strict=True))
    expected = -math.log(probability_of_ranks(rewards, ranks))
    found = plackett_luce_loss(torch.tensor([rewards], dtype=torch.float64), torch.tensor([ranks]))
    assert found.item() == pytest.approx(expected, abs=1e-9)
    single = plackett_luce_loss(torch.tensor([rewards]), torch.tensor([ranks]))
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("far", [-16.0, -40.0])
def test_what_hardly_ever_comes_first(far):
    rewards = [far, far - 0.5, 0.0]
    expected = -math.log(probability_of_ranks(rewards, [1, 1, 2]))
    rewards = torch.tensor([rewards], dtype=torch.float64)
    found = plackett_luce_loss(rewards, torch.tensor([[1, 1, 2]]))
    assert found.item() == pytest.approx(expected, abs=1e-10)


def test_the_probabilities_of_all_rankings_sum_to_one():
    rewards = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=torch.float64)
    strict = torch.tensor(list(itertools.permutations(range(1, 5))))
    nll = plackett_luce_loss(rewards.expand(24, 4), strict)
    assert (-nll).exp().sum().item() == pytest.approx(1)
    # The six choices of which two are in front, each pair tied.
    halves = torch.tensor(sorted(set(itertools.permutations([1, 1, 2, 2]))))
    nll = plackett_luce_loss(rewards.expand(6, 4), halves)
    assert (-nll).exp().sum().item() == pytest.approx(1)


def test_a_large_tied_block_has_the_probability_of_equal_chances():
    # All rewards equal: 40 given completions of 80 come first with probability 1/C(80, 40).
    ranks = torch.tensor([[1] * 40 + [2] * 40])
    nll = plackett_luce_loss(torch.zeros(1, 80, dtype=torch.float64), ranks)
    assert nll.item() == pytest.approx(math.log(math.comb(80, 40)), abs=1e-9)


def test_gradients():
    rewards, ranks, mask = drawn(3, 3, 5, 3)
    rewards.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: plackett_luce_loss(r, ranks, mask=mask), rewards)
    assert torch.autograd.gradcheck(lambda r: centering_loss(r, ranks, mask=mask), rewards)


LOSSES = {"pairwise": pairwise_loss, "plackett_luce": plackett_luce_loss}


@pytest.mark.parametrize("name", LOSSES)
def test_a_shift_changes_nothing(name):
    rewards, ranks, mask = drawn(5, 4, 6, 3)
    shift = torch.tensor([[100.0], [-7.0], [0.1], [1e3]], dtype=torch.float64)
    shifted = LOSSES[name](rewards + shift, ranks, mask=mask)
    torch.testing.assert_close(shifted, LOSSES[name](rewards, ranks, mask=mask))


@pytest.mark.parametrize("first", [1.0, 3.0])  # the other two are tied at the end, or in front
@pytest.mark.parametrize("name", [*LOSSES, "centering"])
def test_what_is_masked_is_not_there(name, first):
    loss = {**LOSSES, "centering": centering_loss}[name]
    kept, ranks = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[2.0, first, 2.0]])
    expected = loss(kept, ranks)
    padded = torch.tensor([[1.0, NAN, -2.0, math.inf, 0.5]], requires_grad=True)
    places = torch.tensor([[1, 0, 1, 0, 1]])
    wider = torch.tensor([[2.0, 0.0, first, 2.0, 2.0]])
    for found in (
        loss(padded, wider, mask=places),
        loss(padded, torch.where(places.bool(), wider, NAN)),
    ):
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found.sum(), padded)
        assert gradient.isfinite().all() and not gradient[0, [1, 3]].any()


@pytest.mark.parametrize("name", [*LOSSES, "centering"])
def test_without_a_pair_the_loss_is_0_and_counted(name):
    loss = {**LOSSES, "centering": centering_loss}[name]
    rewards = torch.tensor([[1.0, 5.0], [1.0, 5.0], [1.0, 5.0]], requires_grad=True)
    ranks = torch.tensor([[1, 1], [1, 2], [1, 2]])
    found = loss(rewards, ranks, mask=torch.tensor([[1, 1], [1, 0], [1, 1]]))
    assert found[:2].tolist() == [0.0, 0.0] and found[2] > 0
    found.mean().backward()
    assert rewards.grad is not None and not rewards.grad[:2].any() and rewards.grad[2].all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ranks", [[1, 2, 3], [3, 2, 1], [1, 1, 2], [2, 2, 1], [2, 1, 1]])
def test_rewards_of_any_size_have_a_finite_loss_and_gradient(name, ranks):
    rewards = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = LOSSES[name](rewards, torch.tensor([ranks]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert rewards.grad is not None and rewards.grad.isfinite().all()
    if ranks == [3, 2, 1]:
        # Every pair is wrong, where d/dx −log σ(−x) is 1: the first loses to both, a mean over
        # three pairs. In both stages of Plackett-Luce it has all the probability.
        first = 2 / 3 if name == "pairwise" else 2
        assert rewards.grad[0, 0].item() == pytest.approx(first)


def test_half_precision_is_computed_in_float32():
    found = pairwise_loss(torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16), torch.tensor([[1, 2]]))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(-math.log(sigmoid(2)), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"ranks": torch.ones(2, 2)}, r"got rewards \(2, 3\), ranks \(2, 2\)"),
        ({"mask": torch.ones(3)}, r"and mask \(3,\)"),
        ({"margin": torch.ones(3)}, r"here \(2,\) or \(2, 3, 3\), got \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit(arguments, says):
    with pytest.raises(ValueError, match=says):
        pairwise_loss(**({"rewards": torch.ones(2, 3), "ranks": torch.ones(2, 3)} | arguments))
    with pytest.raises(ValueError, match=r"must all be \(B, K\), got rewards \(3,\)"):
        plackett_luce_loss(torch.ones(3), torch.ones(3))
