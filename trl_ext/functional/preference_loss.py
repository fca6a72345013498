"""Losses of reward models that learn from comparisons of K completions of one prompt.

Ranks are numbers of which lower is better, 1 for the best; completions of equal rank are tied.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trl_ext.functional.masking import at_least_float32, masked_sum
from trl_ext.functional.ranking import kept

# The trapezoid rule for the integral over y of a tied block. Less than 1e-13 of it lies outside.
# Its peak is as wide as one over the root of the block's size: for blocks of up to hundreds a step
# of 0.05 errs by less than rounding does.
_LOW, _HIGH, _STEP = -30.0, 7.0, 0.05


def pairwise_loss(
    rewards: Tensor,
    ranks: Tensor,
    *,
    mask: Tensor | None = None,
    margin: Tensor | None = None,
    order_effect: Tensor | float | None = None,
) -> Tensor:
    """−(1/pairs) Σ_{w beats l} log σ(r_w − r_l − margin_wl + α·s_wl): Bradley-Terry, K-wise.

    Equation E51; for K = 2 it is Equation E50. The mean is over the pairs whose ranks differ: a tie
    says nothing of who wins, and counts nothing. With an order effect α (Equation E49) s_wl is +1
    if w was shown before l, and −1 if after.

    Args:
        rewards: (B, K) in the order in which the completions were shown, any floating dtype.
        ranks: (B, K), lower is better. NaN marks a completion without a rank.
        mask: (B, K), 1 or True = keep.
        margin: (B,) of all pairs of a prompt or (B, K, K) of [winner, loser]; by how much the
            winner should be ahead, in reward units.
        order_effect: α, a scalar in reward units; None is 0.

    Returns:
        (B,) nats, float32 (float64 for float64 input); 0 for a prompt without two kept completions
        of different rank.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    beats, differences = _pairs(rewards, ranks, mask)
    if margin is not None:
        differences = differences - _per_pair(margin, beats)
    if order_effect is not None:
        differences = differences + order_effect * _shown_first(rewards)
    # What is no pair may be inf − inf: 0 in its place keeps its gradient 0.
    losses = -logsigmoid(torch.where(beats, differences, 0.0))
    return _mean_of_pairs(losses, beats)


def centering_loss(rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """(1/pairs) Σ_{w beats l} (r_w + r_l)²: draws the rewards of a prompt towards mean 0.

    Source: Eisenstein et al. (2023), arXiv 2312.09244, Equation 2, for K = 2; here the mean over
    the pairs of different rank, as in `pairwise_loss`.

    Args:
        rewards: (B, K), any floating dtype.
        ranks: (B, K), lower is better. NaN marks a completion without a rank.
        mask: (B, K), 1 or True = keep.

    Returns:
        (B,) squared reward units, float32 (float64 for float64 input); 0 for a prompt without a
        pair.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    beats, _ = _pairs(rewards, ranks, mask)
    rewards = at_least_float32(rewards)
    sums = rewards.unsqueeze(-1) + rewards.unsqueeze(-2)
    return _mean_of_pairs(torch.where(beats, sums, 0.0).square(), beats)


def preference_margins(rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """r_w − r_l of every pair of different rank: positive where the rewards order it rightly.

    The exponent of Equation E49: σ of it is the probability of what happened.

    Args:
        rewards: (B, K), any floating dtype.
        ranks: (B, K), lower is better. NaN marks a completion without a rank.
        mask: (B, K), 1 or True = keep.

    Returns:
        (N,) reward units, of the N pairs of all prompts; float32 (float64 for float64 input).

    Raises:
        ValueError: if the shapes do not fit together.
    """
    beats, differences = _pairs(rewards, ranks, mask)
    return differences[beats]


def plackett_luce_loss(rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """−log P(ranking): the best is chosen with probability softmax(r), then the next of the rest.

    Source: Plackett (1975), "The analysis of permutations", and Luce (1959). For a ranking
    y_1 ≻ … ≻ y_K it is −Σ_k log exp(r_k)/Σ_{j≥k} exp(r_j); for K = 2 it is Equation E50. Ties are
    exact, too: the probability of all orders that agree with the ranks, without enumerating them.
    A tied block S precedes all that is worse, R, with probability
    ∫ Π_{i∈S} (1 − exp(−e^{y + d_i})) e^{y − e^y} dy, d_i = r_i − log Σ_{j∈R} exp(r_j): exponential
    arrival times with rates exp(r), Yellott (1977).

    Args:
        rewards: (B, K), any floating dtype.
        ranks: (B, K), lower is better. NaN marks a completion without a rank.
        mask: (B, K), 1 or True = keep.

    Returns:
        (B,) nats of the whole ranking, float32 (float64 for float64 input); 0 for a prompt without
        two kept completions of different rank.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    beats, _ = _pairs(rewards, ranks, mask)
    keep = kept(ranks, mask)
    rewards = at_least_float32(rewards)
    tied = (ranks.unsqueeze(-1) == ranks.unsqueeze(-2)) & keep.unsqueeze(-1) & keep.unsqueeze(-2)
    # One stage for each distinct rank but the worst, at the first completion that has it.
    stages = beats.any(-1) & ~tied.tril(-1).any(-1)
    worse = torch.where(beats, rewards.unsqueeze(-2), -torch.inf)[stages]
    rest = torch.logsumexp(worse, -1)
    block = tied[stages]
    ahead = rewards.unsqueeze(-2).expand_as(beats)[stages] - rest.unsqueeze(-1)
    alone = logsigmoid(masked_sum(ahead, block))
    several = block.sum(-1) > 1
    nll = -alone.masked_scatter(several, _log_block_first(ahead[several], block[several]))
    per_prompt = torch.zeros_like(rewards[:, 0])
    return per_prompt.index_add(0, stages.nonzero()[:, 0], nll)


def _log_block_first(ahead: Tensor, block: Tensor) -> Tensor:
    """log P(all of a block precede the rest): (N, K) r − log Σ_rest exp(r), (N, K) bool -> (N,)."""
    y = torch.arange(_LOW, _HIGH, _STEP, dtype=ahead.dtype, device=ahead.device)
    arrived = masked_sum(_log_minus_expm1(ahead.unsqueeze(-1) + y), block.unsqueeze(-1), dim=-2)
    return torch.logsumexp(arrived + y - y.exp(), -1) + math.log(_STEP)


def _log_minus_expm1(z: Tensor) -> Tensor:
    """log(1 − exp(−e^z)), which is z for z → −∞ and 0 for z → ∞."""
    # Below −15 the series z − e^z/2 + … is exact to 1e-14; above 15 the value is 0.
    small, large = z.clamp(max=-15), z.clamp(min=-15, max=15)
    return torch.where(z < -15, z - small.exp() / 2, torch.log(-torch.expm1(-large.exp())))


def _pairs(rewards: Tensor, ranks: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, K, K) bool, row beats column, and (B, K, K) r_row − r_column."""
    if rewards.dim() != 2 or any(x.shape != rewards.shape for x in (ranks, mask) if x is not None):
        masked = "" if mask is None else f" and mask {tuple(mask.shape)}"
        raise ValueError(
            "rewards, ranks and mask must all be (B, K), got rewards "
            f"{tuple(rewards.shape)}, ranks {tuple(ranks.shape)}{masked}."
        )
    keep = kept(ranks, mask)
    beats = ranks.unsqueeze(-1) < ranks.unsqueeze(-2)
    rewards = at_least_float32(rewards)
    differences = rewards.unsqueeze(-1) - rewards.unsqueeze(-2)
    return beats & keep.unsqueeze(-1) & keep.unsqueeze(-2), differences


def _per_pair(margin: Tensor, beats: Tensor) -> Tensor:
    if margin.shape == beats.shape:
        return margin
    if margin.shape == beats.shape[:1]:
        return margin[:, None, None]
    raise ValueError(
        f"margin must be (B,) or (B, K, K), here {tuple(beats.shape[:1])} or "
        f"{tuple(beats.shape)}, got {tuple(margin.shape)}."
    )


def _shown_first(rewards: Tensor) -> Tensor:
    """(K, K): +1 where the row stands before the column, −1 where behind."""
    position = torch.arange(rewards.size(-1), device=rewards.device)
    return (position - position.unsqueeze(-1)).sign()


def _mean_of_pairs(values: Tensor, beats: Tensor) -> Tensor:
    count = beats.sum((-2, -1)).clamp(min=1)
    return torch.where(beats, values, 0.0).sum((-2, -1)) / count
