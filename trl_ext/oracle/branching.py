"""Branching: a token language with a stack, whose texts end with a probability in closed form.

Each pending item is replaced by k new ones with probability p_k, and a text ends when nothing is
pending: brackets to close, goals to prove. Written item by item, from one pending item, the text
is the walk of the stack's height; counted by generations it is a Galton-Watson process, which dies
out with the same probability.
"""

import math
from collections.abc import Sequence

# Newton's steps at most: far from the critical case six are enough, near it each halves the error.
_MOST_STEPS = 200


def offspring_moments(offspring: Sequence[float]) -> tuple[float, float]:
    """Mean μ and variance σ² of the number of new items.

    Args:
        offspring: p_0, p_1, …, p_K: probabilities of 0 to K new items in place of one.

    Raises:
        ValueError: if they are no probabilities.
    """
    check_offspring(offspring)
    mean = math.fsum(k * p for k, p in enumerate(offspring))
    return mean, math.fsum((k - mean) ** 2 * p for k, p in enumerate(offspring))


def generation_moments(offspring: Sequence[float], generation: int) -> tuple[float, float]:
    """Mean μ^n and variance of the items in generation n, from one item. Equation E56.

    Var X_0 = 0 and Var X_{n+1} = μ² Var X_n + σ² μ^n.

    Raises:
        ValueError: if the probabilities are none, or the generation is no count from 0.
    """
    if isinstance(generation, bool) or not isinstance(generation, int) or generation < 0:
        raise ValueError(f"a generation is a whole number from 0, got {generation!r}")
    mean, variance = offspring_moments(offspring)
    spread = 0.0
    for n in range(generation):
        spread = mean**2 * spread + variance * mean**n
    return mean**generation, spread


def extinction_probability(offspring: Sequence[float], items: int = 1) -> float:
    """The probability that nothing is pending some day, from k items. Equation E56.

    From one item it is the smallest root s ≥ 0 of G(s) = s, G(s) = Σ p_k s^k; from k items its
    k-th power, as items are independent. It is 1 if μ ≤ 1, but for p_1 = 1, where it is 0. G is
    convex, so that Newton's method from 0 rises to the smallest root. A language with this stack
    ends its texts with this probability; 1 minus it is their rate of truncation at any length,
    in the limit.

    Args:
        offspring: as for `offspring_moments`.
        items: k pending items, k ≥ 0.

    Raises:
        ValueError: if the probabilities are none, or k is no count from 0.
    """
    if isinstance(items, bool) or not isinstance(items, int) or items < 0:
        raise ValueError(f"the pending items are a whole number from 0, got {items!r}")
    mean, variance = offspring_moments(offspring)
    if offspring[0] == 0:
        return float(items == 0)
    if mean <= 1 and variance > 0:
        return 1.0
    root = 0.0
    for _ in range(_MOST_STEPS):
        value = math.fsum(p * root**k for k, p in enumerate(offspring)) - root
        slope = math.fsum(k * p * root ** (k - 1) for k, p in enumerate(offspring) if k) - 1
        if not value > 0 or not slope < 0:
            break
        root -= value / slope
    return min(root, 1.0) ** items


def branching_prefix_value(offspring: Sequence[float], items: int, beta: float) -> float:
    """log E[exp(r/β) | k items pending] = log(1 + ρ^k (e^{1/β} − 1)), nats; r = 1 for an end.

    Equations E23, E56: ρ is the extinction probability; a text that never ends has reward 0.

    Raises:
        ValueError: β is not positive, or what `extinction_probability` raises.
    """
    if not beta > 0:
        raise ValueError(f"beta must be a positive number, got {beta}")
    ends = extinction_probability(offspring, items)
    if beta >= 1:
        return math.log1p(ends * math.expm1(1 / beta))
    # The exponential taken out, which would overflow.
    return 1 / beta + math.log(ends + (1 - ends) * math.exp(-1 / beta))


def check_offspring(offspring: Sequence[float]) -> None:
    """Whether these are the probabilities of 0, 1, … new items.

    Raises:
        ValueError: if not.
    """
    total = math.fsum(offspring) if all(p >= 0 for p in offspring) else math.nan
    if not abs(total - 1) <= 1e-9:
        raise ValueError(
            f"offspring must be probabilities of 0, 1, ... new items, which add up to 1, got "
            f"{list(offspring)}"
        )
