"""Credit for each token: returns, generalised advantages, baselines.

A mask may have zeros inside a completion (a tool's answer): such a token is no action of the
policy. It is passed over, and takes no step of discount.
"""

from typing import Literal

import torch
from torch import Tensor

from trl_ext.functional.masking import at_least_float32


def reward_to_go(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Σ_{s≥t} γ^{s−t} r_s: what follows token t, itself included. Equations E33, E36.

    Source: Williams (1992), "Simple statistical gradient-following algorithms", as causality
    allows it.

    Args:
        rewards: (B, T) reward of each token; what is masked out is never touched.
        mask: (B, T), 1 or True = a token of the policy.
        gamma: discount γ a token, 0 ≤ γ ≤ 1.

    Returns:
        (B, T) in units of the reward, float32 (float64 for float64 input); 0 where masked out.

    Raises:
        ValueError: if γ is not in [0, 1].
    """
    _check_fraction("gamma", gamma)
    keep = mask.bool()
    rewards = torch.where(keep, at_least_float32(rewards), 0.0)
    return torch.where(keep, _discounted_suffix_sums(rewards, keep, gamma), 0.0)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage A_t = δ_t + γλ A_{t+1}, δ_t = r_t + γ V_{t+1} − V_t. Equation E42.

    Source: Schulman et al. (2016), "High-dimensional continuous control using generalized advantage
    estimation". λ = 0 is the one-step advantage δ (Equation E40), λ = 1 the return minus the value.

    Args:
        rewards: (B, T) reward of each token.
        values: (B, T) V of the state in which token t is chosen, before it is seen.
        mask: (B, T), 1 or True = a token of the policy; nothing else is touched.
        gamma: discount γ a token, 0 ≤ γ ≤ 1.
        lam: λ, 0 ≤ λ ≤ 1: from the critic's word to the sampled rewards'.
        last_values: (B,) V after the last token, for completions that were cut off; 0 for those
            that ended. None: all ended.

    Returns:
        Advantages and returns A + V (the critic's targets, Equation E41), each (B, T) in units of
        the reward, float32 (float64 for float64 input), without gradient; 0 where masked out.

    Raises:
        ValueError: if γ or λ is not in [0, 1].
    """
    _check_fraction("gamma", gamma)
    _check_fraction("lam", lam)
    keep = mask.bool()
    rewards, values = (
        torch.where(keep, at_least_float32(each.detach()), 0.0) for each in (rewards, values)
    )
    after_all = values.new_zeros(len(values)) if last_values is None else last_values.detach()
    deltas = rewards + gamma * next_values(values, keep, after_all) - values
    deltas = torch.where(keep, deltas, 0.0)
    advantages = torch.where(keep, _discounted_suffix_sums(deltas, keep, gamma * lam), 0.0)
    return advantages, advantages + values


def importance_weights(
    log_ratios: Tensor,
    mask: Tensor,
    how: Literal["token", "prefix", "sequence"],
    *,
    truncation: float | None = None,
) -> Tensor:
    """Weights of samples of π_old under π, ρ = π/π_old. Equation E38.

    "token": ρ_t, which leaves out how the prefix came about. "prefix": Π_{s≤t} ρ_s, the weight of
    the prefix that ends in token t. "sequence": Π_s ρ_s, that of the completion, for each token.

    Args:
        log_ratios: (B, T) log π − log π_old of the sampled tokens, nats.
        mask: (B, T), 1 or True = a token of the policy.
        how: see above.
        truncation: weights are at most this: less variance, and a bias. None: as they are.

    Returns:
        (B, T), float32 (float64 for float64 input), without gradient; 0 where masked out.
    """
    keep = mask.bool()
    logs = torch.where(keep, at_least_float32(log_ratios.detach()), 0.0)
    if how == "prefix":
        logs = logs.cumsum(dim=1)
    elif how == "sequence":
        logs = logs.sum(dim=1, keepdim=True).expand_as(logs)
    weights = logs.exp() if truncation is None else logs.exp().clamp(max=truncation)
    return torch.where(keep, weights, 0.0)


def off_policy_credit(
    rewards: Tensor,
    log_ratios: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    truncation: float | None = None,
) -> Tensor:
    """(Π_{s≤t} ρ_s) Σ_{s≥t} γ^{s−t} r_s Π_{t<u≤s} ρ_u: reward-to-go from another policy's samples.

    Times ∇log π_t, and averaged over samples of π_old, it is the policy gradient of π (Equation
    E38): the past ratios make the prefix one of π, the later ones what follows.

    Args:
        rewards: (B, T) reward of each token.
        log_ratios: (B, T) log ρ = log π − log π_old of the sampled tokens, nats.
        mask: (B, T), 1 or True = a token of the policy.
        gamma: discount γ a token, 0 ≤ γ ≤ 1.
        truncation: products of ratios are at most this. None: as they are.

    Returns:
        (B, T) in units of the reward, float32 (float64 for float64 input), without gradient; 0
        where masked out.

    Raises:
        ValueError: if γ is not in [0, 1].
    """
    # Past and later ratios together are ρ_1 … ρ_s for the reward of s, whatever t.
    weights = importance_weights(log_ratios, mask, "prefix", truncation=truncation)
    rewards = torch.where(mask.bool(), at_least_float32(rewards.detach()), 0.0)
    return reward_to_go(weights * rewards, mask, gamma=gamma)


def next_values(values: Tensor, keep: Tensor, after_all: Tensor) -> Tensor:
    """What is at the next kept token, and after the last one.

    Source: definition.

    Args:
        values: (B, T).
        keep: (B, T) bool, True = a token of the policy.
        after_all: (B,) what stands after the last.

    Returns:
        (B, T), in the units and dtype of `values`.
    """
    values = values.masked_fill(~keep, 0.0)
    ended = torch.cat([values, after_all.to(values)[:, None]], dim=1)
    kept = torch.cat([keep, torch.ones_like(keep[:, :1])], dim=1)
    # Each kept value replaces all that follows: a suffix sum with factor 0 there, 1 elsewhere.
    return _suffix_scan(ended, torch.ones_like(ended).masked_fill(kept, 0.0))[:, 1:]


def _discounted_suffix_sums(terms: Tensor, keep: Tensor, factor: float) -> Tensor:
    """S_t = x_t + c S_{t+1} with c = `factor`, and c = 1 where a token is passed over."""
    return _suffix_scan(terms, torch.ones_like(terms).masked_fill(keep, factor))


def _suffix_scan(terms: Tensor, factors: Tensor) -> Tensor:
    """S_t = x_t + c_t S_{t+1}, S after the end 0, in log2 T steps instead of T.

    After the step of width n, S_t sums up the next 2n terms and c_t is the product of their
    factors.
    """
    sums, width = terms, 1
    while width < terms.size(1):
        beyond = sums.new_zeros(len(sums), width)
        sums = sums + factors * torch.cat([sums[:, width:], beyond], dim=1)
        factors = factors * torch.cat([factors[:, width:], beyond], dim=1)
        width *= 2
    return sums


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}.")
