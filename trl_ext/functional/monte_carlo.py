"""How far to trust log (1/K) Σ exp(r/β) of K rollouts: its standard error, and when to believe it.

All logarithms are natural. β is the KL coefficient of E1, in units of the reward; λ = 1/β.
"""

import math

import torch
from torch import Tensor

from trl_ext.functional.gibbs import effective_sample_size
from trl_ext.functional.masking import at_least_float32

# Of a Poisson count n of mean 10 the interval n ± 1.96·√n covers 93%, of mean 5 only 87%.
LEAST_EFFECTIVE = 10.0


def log_mean_exp_standard_error(
    rewards: Tensor, beta: float, *, dim: int = -1, mask: Tensor | None = None
) -> Tensor:
    """Standard error of `log_mean_exp`: sd(w)/(mean(w)·√K) for w_k = exp(r_k/β).

    The delta method on the mean of K independent weights, Equation E25; sd² is the sample variance
    with K − 1. A constant added to all rewards changes nothing. It says nothing of what no rollout
    has shown: see `standard_error_is_believed`.

    Args:
        rewards: (…, K, …), any floating dtype. NaN marks a rollout without a reward.
        beta: KL coefficient, 0 < β ≤ inf, in reward units. β = inf gives 0.
        dim: the axis of the rollouts.
        mask: same shape as `rewards`, 1 or True = keep.

    Returns:
        Nats, `rewards` without `dim`, float32 (float64 for float64 input). 0 for equal rewards;
        NaN where fewer than 2 are kept.

    Raises:
        ValueError: if β is not positive.
    """
    deviations, mean, count = _weights_about_their_mean(rewards, beta, dim, mask)
    variance = deviations.square().sum(dim) / (count - 1).clamp(min=1)
    error = variance.sqrt() / (mean * count.clamp(min=1).sqrt())
    return torch.where(count < 2, torch.nan, error)


def standard_error_is_believed(
    rewards: Tensor,
    beta: float,
    *,
    dim: int = -1,
    mask: Tensor | None = None,
    least_effective: float = LEAST_EFFECTIVE,
) -> Tensor:
    """Whether ±1.96 of `log_mean_exp_standard_error` is a 95% interval. Equation E25.

    Both must hold, with w_k = exp(r_k/β), m their mean and d_k = (w_k − m)²:

        (Σ w)²/Σ w² ≥ least_effective     few rollouts do not carry the mean. As the squared
                                          standard error is (K/that − 1)/(K − 1), it also keeps
                                          the error below 0.32 nats, where the log is straight
        (Σ d)²/Σ d² ≥ least_effective     nor do few of them carry the variance. This is K over
                                          the kurtosis of the weights; 0 where all are equal

    Rewards 0 and 1 with small β have the numbers of wins and, where they are the fewer, of losses
    in these two places. Equal rewards are never believed, however many: K rollouts without a win
    leave its probability anywhere up to 3/K (the rule of three, 95%), and with it the log anywhere
    up to log(1 + 3/K·(exp(Δ/β) − 1)) higher, for wins Δ above what was seen.

    Args:
        rewards, beta, dim, mask: as for `log_mean_exp_standard_error`.
        least_effective: number of samples, > 0.

    Returns:
        Bool, `rewards` without `dim`. False for a group with fewer kept than `least_effective`.

    Raises:
        ValueError: if β or `least_effective` is not positive.
    """
    if not least_effective > 0:
        raise ValueError(f"least_effective must be positive, got {least_effective}.")
    deviations, mean, count = _weights_about_their_mean(rewards, beta, dim, mask)
    squares = deviations.square()
    total = squares.sum(dim, keepdim=True)
    behind_variance = effective_sample_size(squares / torch.where(total > 0, total, 1.0), dim=dim)
    # Σw² = K·m² + Σ(w − m)²
    second = count * mean.square() + total.squeeze(dim)
    behind_mean = (count * mean).square() / torch.where(second > 0, second, 1.0)
    return (behind_mean >= least_effective) & (behind_variance >= least_effective)


def _weights_about_their_mean(
    rewards: Tensor, beta: float, dim: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """w − m like `rewards` (0 where not kept), m and K without `dim`; the largest w is 1."""
    if not beta > 0:
        raise ValueError(f"beta must be positive for log Z to be finite, got {beta}.")
    keep = ~rewards.isnan() if mask is None else ~rewards.isnan() & mask.bool()
    rewards = at_least_float32(rewards)
    best = torch.where(keep, rewards, -torch.inf).amax(dim, keepdim=True)
    # The difference first: with r/β its rounding would be that of the rewards' size.
    below = torch.where(keep & (rewards != best), rewards - best, 0.0)
    # w − 1, which keeps its digits where β is large and all weights are close to 1.
    excess = torch.zeros_like(below) if math.isinf(beta) else torch.expm1(below / beta)
    count = keep.sum(dim, keepdim=True).to(excess.dtype)
    mean = excess.sum(dim, keepdim=True) / count.clamp(min=1)
    deviations = torch.where(keep, excess - mean, 0.0)
    return deviations, (1 + mean).squeeze(dim), count.squeeze(dim)
