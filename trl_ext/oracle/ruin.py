"""Gambler's ruin: a token process whose values have closed forms.

From k of S, up with probability p and down with q = 1-p, until 0 or S. Reward 1 for reaching S.
With L = log q/p the win probability is expm1(kL)/expm1(SL); all formulas below are arranged so
that neither L → 0 (p = 1/2) cancels nor a large |SL| overflows.
"""

import math

import torch
from torch import Tensor

from trl_ext.oracle.enumeration import Enumeration, check_beta
from trl_ext.oracle.prefixes import IMPOSSIBLE

UP, DOWN = 1, 2


def ruin_win_probability(k: int, size: int, p: float) -> float:
    """f_S(k), the probability of reaching S = `size` before 0 from k. Equation E52.

    Raises:
        ValueError: not 0 ≤ k ≤ size, size < 1, or p outside of the open interval (0, 1).
    """
    log_odds = _log_odds(k, size, p)
    if log_odds == 0:
        return k / size
    if log_odds > 0:  # e^((k-S)L) taken out of both terms, which would overflow
        decay = math.exp((k - size) * log_odds)
        return decay * math.expm1(-k * log_odds) / math.expm1(-size * log_odds)
    return math.expm1(k * log_odds) / math.expm1(size * log_odds)


def ruin_duration(k: int, size: int, p: float) -> float:
    """h_S(k), the expected number of steps from k until 0 or S = `size`. Equation E52.

    With φ(z) = expm1(z)/z − 1 and q − p = tanh(L/2), (k − S f_S(k))/(q − p) becomes
    k (φ(SL) − φ(kL)) / ((1 + φ(SL)) tanh(L/2)), where nothing of order 1 cancels.

    Raises:
        ValueError: not 0 ≤ k ≤ size, size < 1, or p outside of the open interval (0, 1).
    """
    log_odds = _log_odds(k, size, p)
    if log_odds == 0:
        return float(k * (size - k))
    if log_odds > 0:  # the same game seen from the other side; L < 0 cannot overflow
        k, log_odds = size - k, -log_odds
    whole, part = _phi(size * log_odds), _phi(k * log_odds)
    return k * (whole - part) / ((1 + whole) * math.tanh(log_odds / 2))


def ruin_prefix_value(k: int, size: int, p: float, beta: float) -> float:
    """log E[exp(r/β) | k] = log(1 + f_S(k)(e^{1/β} − 1)), nats, r = 1 for a win. Equation E52.

    Raises:
        ValueError: beta is not positive, or what `ruin_win_probability` raises.
    """
    win = ruin_win_probability(k, size, p)
    check_beta(beta)
    if win == 0:
        return 0.0
    if beta >= 1:
        return math.log1p(win * math.expm1(1 / beta))
    return 1 / beta + math.log(win + (1 - win) * math.exp(-1 / beta))


def ruin_table(enumeration: Enumeration, start: int, size: int, p: float) -> Tensor:
    """The walk as a policy, (P, R, 3): letter 1 is up, 2 is down, the end token comes at 0 or S.

    Every prompt starts at `start`. A walk of T steps that is nowhere yet is truncated.

    Raises:
        ValueError: the vocabulary is not {end, up, down}, or what `ruin_win_probability` raises.
    """
    _log_odds(start, size, p)
    shape = enumeration.config
    if shape.vocab_size != 3:
        raise ValueError(f"a walk has vocab_size 3 (end, up, down), got {shape.vocab_size}")
    place = ruin_positions(enumeration.tokens[: shape.num_prefixes], start)
    absorbed = ((place <= 0) | (place >= size))[:, None]
    end = torch.tensor([0.0, IMPOSSIBLE, IMPOSSIBLE], dtype=torch.float64)
    step = torch.tensor([IMPOSSIBLE, math.log(p), math.log1p(-p)], dtype=torch.float64)
    return torch.where(absorbed, end, step).expand(shape.num_prompts, -1, -1)


def ruin_positions(tokens: Tensor, start: int) -> Tensor:
    """Where a walk stands after its tokens, (B, T) -> (B,); end tokens do not move it."""
    return start + (tokens == UP).sum(-1) - (tokens == DOWN).sum(-1)


def _log_odds(k: int, size: int, p: float) -> float:
    """L = log q/p, exactly 0 for p = 1/2."""
    if not 0 <= k <= size or size < 1 or not 0 < p < 1:
        raise ValueError(
            f"a ruin game needs size >= 1, 0 <= k <= size and 0 < p < 1, got k={k}, size={size}, "
            f"p={p}"
        )
    return math.log((1 - p) / p)


def _phi(z: float) -> float:
    """expm1(z)/z − 1 for z ≤ 0; by its series Σ_{n≥1} zⁿ/(n+1)! where the difference cancels."""
    if z < -1:
        return math.expm1(z) / z - 1
    term, total = 1.0, 0.0
    for n in range(1, 20):  # 1/20! < 1e-18
        term *= z / (n + 1)
        total += term
    return total
