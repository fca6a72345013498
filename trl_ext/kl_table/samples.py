"""What a formula for a KL penalty may look at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trl_ext.functional import off_policy_credit, reward_to_go


@dataclass(frozen=True)
class Samples:
    """B completions of at most T tokens, drawn from π_old, and what three policies say of them.

    Attributes:
        logps: (B, T) log π of the sampled tokens, nats, with gradient.
        old_logps: (B, T) log π_old, that of the policy that sampled. On-policy equal to `logps`.
        ref_logps: (B, T) log π_ref.
        logits: (B, T, V) of π at each prefix, with gradient.
        ref_logits: (B, T, V) of π_ref.
        mask: (B, T) bool, 1 = token.
    """

    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    logits: Tensor
    ref_logits: Tensor
    mask: Tensor

    @property
    def ratio(self) -> Tensor:
        """(B, T) ρ = π/π_old of each token, with gradient."""
        return (self.logps - self.old_logps).exp()


Formula = Callable[[Samples], Tensor]
"""Samples -> (B, T) nats per token: an estimate of the KL penalty."""

Placement = Literal["loss", "reward", "return", "corrected reward", "reward and loss"]


def penalty_terms(samples: Samples, formula: Formula, placement: Placement) -> Tensor:
    """(B,) the term of each completion whose gradient is that of the penalty in training.

    What part of ∇KL its expectation is, Equation E29 says for each placement; the reward is that
    of Equation E30.

    Args:
        samples: with gradient in `logps` and `logits`.
        formula: the per-token estimate.
        placement: "loss": added to the loss and differentiated. "reward": subtracted from the
            reward of its token, reaching the gradient through reward-to-go and the ratio.
            "return": summed up and subtracted from the reward of the completion, so that every
            token gets all of it. "corrected reward": as "reward", with the importance weights of
            Equation E38. "reward and loss": what follows a token through the reward, the token's
            own part differentiated in the loss.
    """
    each = torch.where(samples.mask, formula(samples), 0.0)
    if placement == "loss":
        return each.sum(dim=1)
    ratio = torch.where(samples.mask, samples.ratio, 0.0)
    to_go = reward_to_go(each.detach(), samples.mask)
    if placement == "reward":
        return (to_go * ratio).sum(dim=1)
    if placement == "return":
        return (to_go[:, :1] * ratio).sum(dim=1)
    if placement == "corrected reward":
        log_ratio = (samples.logps - samples.old_logps).detach()
        credit = off_policy_credit(each.detach(), log_ratio, samples.mask)
        return (credit * torch.where(samples.mask, samples.logps, 0.0)).sum(dim=1)
    return ((to_go - each.detach()) * ratio + each).sum(dim=1)
