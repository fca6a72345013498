"""Where the reward of a step lies."""

import torch
from torch import Tensor

from trl_ext.functional.masking import at_least_float32


def at_step_ends(rewards: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
    """The sum of each step's rewards, on its last token; the others get 0.

    Source: a potential Φ that is read at the ends of steps only: by Equation E24 the rewards of
    neighbouring tokens are its differences, and so are their sums over a step. The sum over a
    completion stays what it was.

    Args:
        rewards: (B, T) reward of each token; what is masked out is never touched.
        ends: (B, T) bool, True = a step ends with this token; what follows the last end is a step
            too.
        mask: (B, T), 1 or True = a token of the policy. A step lies on the last of these in it.

    Returns:
        (B, T) in units of the reward, float32 (float64 for float64 input). A step without a token
        of the policy has no reward.
    """
    keep, ended = mask.bool(), ends.long()
    step = ended.cumsum(1) - ended
    rewards = torch.where(keep, at_least_float32(rewards), 0.0)
    sums = torch.zeros_like(rewards).scatter_add(1, step, rewards)
    places = torch.arange(mask.size(1), device=mask.device).where(keep, -1)
    last = torch.full_like(places, -1).scatter_reduce(1, step, places, "amax")
    return torch.where(keep & (places == last.gather(1, step)), sums.gather(1, step), 0.0)
