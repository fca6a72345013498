"""Losses of a policy, per sequence or per token; the caller takes the mean and says over what."""

from typing import Literal

import torch
from torch import Tensor

from trl_ext.functional.masking import at_least_float32, masked_mean, masked_sum


def weighted_nll(
    per_token_logps: Tensor,
    weights: Tensor,
    mask: Tensor,
    *,
    token_reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """−w_n·log π(y_n|x): one completion's term of reward-weighted regression.

    Σ_n of it is the plug-in estimate, Equation E8, of the forward projection ℓ(θ) = −E_{π*}[log π]
    + const, Equation E7, if the y_n are samples of π_ref and w = gibbs_weights(r, β). The weights
    are constants: no gradient flows through them.

    Args:
        per_token_logps: (B, T) log-probabilities of the completion tokens under π, nats.
        weights: (B,) non-negative; those of one prompt sum to 1.
        mask: (B, T), 1 or True = keep.
        token_reduction: "sum" is log π(y_n|x), as derived; "mean" divides it by the number of kept
            tokens, which gives each completion the same say per token and is no longer a projection
            of π*.

    Returns:
        (B,) nats per sequence (per token with "mean"); 0 for a completion with no kept token.
    """
    reduce = {"sum": masked_sum, "mean": masked_mean}[token_reduction]
    return -weights.detach() * reduce(per_token_logps, mask)


def clipped_surrogate(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """−min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A), ρ = π/π_old: the loss of PPO-clip. Equation E45.

    Source: Schulman et al. (2017), "Proximal policy optimization algorithms". At π = π_old its
    gradient is −A ∇log π, that of the surrogate −A log π (Equation E37); without clipping it is
    the importance-sampled surrogate −ρA (Equation E44).

    Args:
        logps: (B, T) per-token log-probabilities under π, nats, with gradient.
        old_logps: (B, T) the same under the policy that sampled, without gradient.
        advantages: (B,) or (B, T), without gradient.
        clip_low: ε_low ≥ 0. 1 or more never clips from below.
        clip_high: ε_high ≥ 0; inf never clips from above.

    Returns:
        (B, T) loss per token in units of the advantage, float32 (float64 for float64 input).

    Raises:
        ValueError: if ε_low or ε_high is negative.
    """
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")
    ratio = (at_least_float32(logps) - at_least_float32(old_logps.detach())).exp()
    advantages = at_least_float32(advantages.detach())
    advantages = advantages[:, None] if advantages.dim() < ratio.dim() else advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def value_loss(
    values: Tensor, returns: Tensor, *, old_values: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """½(V − R)²; clipped, ½ max((V − R)², (V_clip − R)²), V_clip = V_old + clip(V − V_old, ±c).

    The regression of a critic on its targets (Equation E41). Source of the clipping: Schulman's
    implementation of PPO; it keeps the critic within `clip` of the one that made the rollout.

    Args:
        values: (B, T) V now, with gradient.
        returns: (B, T) targets, without gradient.
        old_values: (B, T) V when the rollout was made.
        clip: c > 0, in units of the return. None: no clipping.

    Returns:
        (B, T) loss per token, float32 (float64 for float64 input).

    Raises:
        ValueError: if `clip` is not positive, or is given without `old_values`.
    """
    values, returns = at_least_float32(values), at_least_float32(returns.detach())
    loss = (values - returns).square()
    if clip is None:
        return 0.5 * loss
    if old_values is None or not clip > 0:
        raise ValueError(f"clip={clip} must be positive and comes with old_values.")
    old = at_least_float32(old_values.detach())
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum(loss, (clipped - returns).square())
