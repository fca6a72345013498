"""Baselines: what a return is compared with before it becomes credit.

Σ_t ∇log π_t (Ψ_t − b_t) keeps its expectation for every b_t that does not depend on the
completion's own tokens from t on (Equation E34); a good one takes variance out of it.
"""

from typing import Literal

import torch
from torch import Tensor

from trl_ext.functional.masking import at_least_float32

Baseline = Literal["none", "batch", "group", "leave_one_out", "optimal"]


def held_returns(to_go: Tensor, mask: Tensor) -> Tensor:
    """Reward-to-go at every position: what an ended completion stands for, and a hole in one.

    Where no token is kept it is that of the next kept one, and after the end that of the last.
    Source: the padded process that waits in its last state; with a reward at the end alone and γ =
    1 it is that reward at every position.

    Args:
        to_go: (…, T) from `reward_to_go`; what is masked out is never touched.
        mask: (…, T), 1 or True = a token of the policy.

    Returns:
        (…, T) in units of the reward; 0 for a completion with no kept token.
    """
    keep, tokens = mask.bool(), mask.size(-1)
    positions = torch.arange(tokens, device=mask.device)
    last = torch.where(keep, positions, -1).amax(-1, keepdim=True)
    following = torch.where(keep, positions, tokens).flip(-1).cummin(-1).values.flip(-1)
    held = to_go.gather(-1, torch.minimum(following, last).clamp(min=0))
    return torch.where(last >= 0, held, 0.0)


def baseline(
    returns: Tensor, how: Baseline, *, keep: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """What each completion's return is compared with, at each position.

    Source: Williams (1992), Equation E34; "leave_one_out" Kool et al. (2019), "Buy 4 REINFORCE
    samples, get a baseline for free!"; "optimal" Equation E35, Greensmith et al. (2004).

    - "none": 0.
    - "batch": the mean over all prompts and completions; itself included, so that the expected
      gradient is (1 − 1/N) times the whole for N completions.
    - "group": the mean over a prompt's completions; likewise (1 − 1/G) times.
    - "leave_one_out": the mean over a prompt's other completions; unbiased.
    - "optimal": their weighted mean, Σ wΨ / Σ w with w = ‖∇log π(y)‖², which would minimise the
      variance if w were exact and the group large; unbiased. `score_norms` approximates w.

    Args:
        returns: (P, G, T) reward-to-go, held after the end (`held_returns`).
        how: see above.
        keep: (P, G) bool, completions that count; None: all. One without others gets 0. Returns
            and weights of the others are never touched.
        weights: (P, G) w ≥ 0 of "optimal".

    Returns:
        (P, G, T) in units of the reward, float32 (float64 for float64 input), without gradient.

    Raises:
        ValueError: if "optimal" comes without weights, or another with them.
    """
    if (how == "optimal") != (weights is not None):
        raise ValueError(f"weights belong to how='optimal' and to no other, got how={how!r}.")
    returns = at_least_float32(returns.detach())
    kept = torch.ones_like(returns[..., 0], dtype=torch.bool) if keep is None else keep.bool()
    of_each = torch.ones_like(returns[..., 0]) if weights is None else weights.detach().to(returns)
    weights_PG1 = torch.where(kept, of_each, 0.0)[..., None]
    weighted = weights_PG1 * torch.where(kept[..., None], returns, 0.0)
    if how == "none":
        return torch.zeros_like(returns)
    over = (0, 1) if how == "batch" else (1,)
    total, mass = weighted.sum(over, keepdim=True), weights_PG1.sum(over, keepdim=True)
    if how in ("leave_one_out", "optimal"):
        total, mass = total - weighted, mass - weights_PG1
        # What is left where the others weigh nothing is rounding.
        mass = mass.where(mass > 1e-6 * weights_PG1.amax(1, keepdim=True), 0.0)
    return torch.where(mass > 0, total / mass.where(mass > 0, 1.0), 0.0).expand_as(returns)


def score_norms(per_token_logps: Tensor, mask: Tensor) -> Tensor:
    """Σ_t (1 − π(y_t)): ‖∇log π(y)‖² by the logits, its expectation kept, with no gradient taken.

    Of one token, ‖∇ log softmax‖² = ‖e_a − π‖² by its logits, whose expectation over a is 1 − Σ π²,
    which is that of 1 − π(a) too. Steps add up as if no parameter served two of them. Equation E35.

    Args:
        per_token_logps: (…, T) log π of the sampled tokens, nats.
        mask: (…, T), 1 or True = keep.

    Returns:
        (…) between 0 and the number of kept tokens, without gradient.
    """
    missed = -torch.expm1(at_least_float32(per_token_logps.detach()))
    return torch.where(mask.bool(), missed, 0.0).sum(-1)
