"""Estimators of KL(π‖π_ref) from sampled tokens, y ~ π.

KL(p‖q) = E_p[log p/q] = H(p,q) − H(p) (Equation E26). Source of the names: John Schulman,
"Approximating KL Divergence" (2020).
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
