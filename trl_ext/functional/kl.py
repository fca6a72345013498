"""Estimators of KL(π‖π_ref), y ~ π: from the sampled tokens alone, or over the vocabulary.

KL(p‖q) = E_p[log p/q] = H(p,q) − H(p) (Equation E26). Source of the names k1, k2, k3: John
Schulman, "Approximating KL Divergence" (2020).
"""

import math

import torch
from torch import Tensor

from trl_ext.functional.masking import at_least_float32

# Below this |x| the difference exp(x) - 1 - x has lost more than 3 bits to cancellation, so a
# series is used.
_SERIES_BELOW = 0.25
# Terms after which x**n / (n+2)! is under the float64 rounding of the sum for |x| < _SERIES_BELOW.
_SERIES_TERMS = 12


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """log π/π_ref: unbiased for the KL, either sign, high variance. Equation E28.

    Args:
        logps: (B, T) per-token log-probabilities under π, nats; y ~ π.
        ref_logps: (B, T) the same under π_ref.

    Returns:
        (B, T) nats per token, float32 (float64 for float64 input).
    """
    return at_least_float32(logps) - at_least_float32(ref_logps)


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """½ (log π/π_ref)²: biased for the KL, non-negative, with the KL's gradient. Equation E28.

    Args:
        logps: (B, T) per-token log-probabilities under π, nats; y ~ π.
        ref_logps: (B, T) the same under π_ref.

    Returns:
        (B, T) nats per token, float32 (float64 for float64 input).
    """
    return 0.5 * k1(logps, ref_logps).square()


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """π_ref/π − 1 + log π/π_ref: unbiased, non-negative, low variance near π_ref. Equation E28.

    Exact to rounding near 0, where exp(d) − 1 − d computed as written is 0 in float32 for |d| ≤
    3e-4. Where π_ref/π overflows the dtype (88 nats in float32) it saturates at the largest
    exponential that does not, with gradient 0 from that term, so that neither value nor gradient is
    inf or NaN.

    Args:
        logps: (B, T) per-token log-probabilities under π, nats; y ~ π.
        ref_logps: (B, T) the same under π_ref.

    Returns:
        (B, T) nats per token, float32 (float64 for float64 input).
    """
    return _exp_minus_1_minus_x(-k1(logps, ref_logps))


def _exp_minus_1_minus_x(x: Tensor) -> Tensor:
    """exp(x) − 1 − x ≥ 0, to rounding for every x."""
    small = x.abs() < _SERIES_BELOW
    # One less than the logarithm of the largest number, so that sums of a few saturated terms stay
    # finite.
    direct = torch.expm1(x.clamp(max=math.log(torch.finfo(x.dtype).max) - 1)) - x
    # The inner `where` keeps powers of a large x out of the graph: 0 * inf would make its gradient
    # NaN.
    return torch.where(small, _series(torch.where(small, x, 0.0)), direct)


def _series(x: Tensor) -> Tensor:
    """x²/2! + x³/3! + …, by Horner's rule."""
    total = torch.zeros_like(x)
    for n in range(_SERIES_TERMS + 2, 2, -1):
        total = (1 + total) * x / n
    return x * x / 2 * (1 + total)


def exact_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(π‖π_ref) of the next token at each prefix, over the whole vocabulary. Equation E27.

    Summed over the prefixes of a completion y ~ π it is the Rao-Blackwellised estimate of the
    sequence KL: unbiased, and of lower variance than any estimate from the sampled tokens alone.

    Args:
        logits: (…, V) of π.
        ref_logits: (…, V) of π_ref; −inf on tokens where π too has probability 0 is allowed.
        temperature: both are divided by it; TRL's sampling temperature.

    Returns:
        (…) nats, float32 (float64 for float64 input), with gradient.
    """
    logps = _log_softmax(logits, temperature)
    return _sum_of_p_log_ratio(logps, _log_softmax(ref_logits, temperature))


def exact_forward_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(π_ref‖π) of the next token at each prefix: covers what π_ref does. Equation E26.

    Over prefixes drawn from π it is not a divergence of sequences: KL(π_ref‖π) of sequences takes
    its prefixes from π_ref.

    Args:
        logits: (…, V) of π.
        ref_logits: (…, V) of π_ref.
        temperature: both are divided by it.

    Returns:
        (…) nats, float32 (float64 for float64 input), with gradient.
    """
    return exact_kl(ref_logits, logits, temperature=temperature)


def topk_kl(logits: Tensor, ref_logits: Tensor, k: int, *, temperature: float = 1.0) -> Tensor:
    """KL(π‖π_ref) with all but the k likeliest tokens of π merged into one: a lower bound.

    Source: the chain rule of KL, applied to the partition {a_1}, …, {a_k}, all others.
    Σ_{a in top k} π log π/π_ref + π(tail) log π(tail)/π_ref(tail); the log-sum inequality makes it
    at most `exact_kl`, and k ≥ V makes it equal.

    Args:
        logits: (…, V) of π.
        ref_logits: (…, V) of π_ref.
        k: tokens that count one by one, at least 1.
        temperature: both are divided by it.

    Returns:
        (…) nats, float32 (float64 for float64 input), with gradient.

    Raises:
        ValueError: if k is less than 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    logps, ref_logps = (_log_softmax(each, temperature) for each in (logits, ref_logits))
    top = logps.topk(min(k, logps.size(-1))).indices
    return _sum_of_p_log_ratio(_with_tail(logps, top), _with_tail(ref_logps, top))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (at_least_float32(logits) / temperature).log_softmax(-1)


def _with_tail(logps: Tensor, top: Tensor) -> Tensor:
    """(…, V) log-probabilities -> (…, k+1): those at `top`, and that of all the others."""
    kept = logps.gather(-1, top)
    if top.size(-1) == logps.size(-1):
        return kept
    # Summed up over the others and not 1 minus the kept: a small tail would cancel.
    others = logps.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, others], dim=-1)


def _sum_of_p_log_ratio(logps: Tensor, other_logps: Tensor) -> Tensor:
    """Σ p log p/q; a token of probability 0 under p counts nothing, whatever q is there."""
    possible = logps > -torch.inf
    log_ratio = logps.where(possible, 0.0) - other_logps.where(possible, 0.0)
    return (logps.exp() * log_ratio).sum(-1)
