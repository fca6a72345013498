"""The Gibbs policy π*(y|x) ∝ π_ref(y|x)·exp(r(x,y)/β), seen through G samples of π_ref.

All logarithms are natural. β is the KL coefficient of E1, in units of the reward; λ = 1/β.
"""

import math

import torch
from torch import Tensor

from trl_ext.functional.masking import at_least_float32, masked_sum


def gibbs_weights(
    rewards: Tensor, beta: float, *, dim: int = -1, mask: Tensor | None = None
) -> Tensor:
    """softmax(r/β) over the completions of one prompt: self-normalised weights of π*/π_ref.

    w_n = exp(r_n/β) / Σ_m exp(r_m/β), the weights of Equation E8. Adding a constant to all rewards
    of a group
    changes nothing (Equation E9). β = inf gives uniform weights, plain supervised fine-tuning, and
    β = 0 gives the best of n, ties shared equally (Equation E10).

    Args:
        rewards: (…, G, …), any floating dtype. NaN marks a completion without a reward.
        beta: KL coefficient, 0 ≤ β ≤ inf, in reward units.
        dim: the group axis.
        mask: same shape as `rewards`, 1 or True = keep.

    Returns:
        Probabilities, same shape, float32 (float64 for float64 input). They sum to 1 over `dim`;
        masked and NaN entries get 0; a group with nothing kept is all 0.

    Raises:
        ValueError: if β is negative or NaN.
    """
    if not beta >= 0:
        raise ValueError(
            f"beta must be between 0 (best of n) and inf (uniform weights), got {beta}."
        )
    keep = _kept(rewards, mask)
    rewards = at_least_float32(rewards)
    best = torch.where(keep, rewards, -torch.inf).amax(dim, keepdim=True)
    # `below` is r - max r, without the NaN of inf - inf for infinite rewards.
    below = torch.where(rewards == best, 0.0, rewards - best)
    unnormalised = (below == 0).to(below.dtype) if beta == 0 else torch.exp(below / beta)
    unnormalised = torch.where(keep, unnormalised, 0.0)
    total = unnormalised.sum(dim, keepdim=True)
    return unnormalised / torch.where(total > 0, total, 1.0)


def log_mean_exp(
    rewards: Tensor, beta: float, *, dim: int = -1, mask: Tensor | None = None
) -> Tensor:
    """log (1/G) Σ_n exp(r_n/β): the plug-in estimate of log Z(x) from G samples of π_ref.

    Z(x) = E_{y~π_ref} exp(r(x,y)/β), Equation E3. The estimate of Z is unbiased; its logarithm is
    biased downwards by O(1/G).

    Args:
        rewards: (…, G, …), any floating dtype. NaN marks a completion without a reward.
        beta: KL coefficient, 0 < β ≤ inf, in reward units. β = inf gives 0.
        dim: the group axis.
        mask: same shape as `rewards`, 1 or True = keep.

    Returns:
        Nats, `rewards` without `dim`, float32 (float64 for float64 input). NaN where nothing is
        kept: there is no estimate.

    Raises:
        ValueError: if β is not positive: log Z diverges as β goes to 0.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive for log Z to be finite, got {beta}.")
    keep = _kept(rewards, mask)
    scaled = torch.where(keep, at_least_float32(rewards) / beta, -torch.inf)
    count = keep.sum(dim).to(scaled.dtype)
    return torch.where(
        count > 0, torch.logsumexp(scaled, dim) - count.clamp(min=1).log(), torch.nan
    )


def target_log_weights(rewards: Tensor, log_ratios: Tensor, beta: float) -> Tensor:
    """r/β + log π_ref/π: log weights of π* ∝ π_ref·exp(r/β) on samples of another policy π.

    log π*/π up to log Z, by Equation E4. At β = inf what is left is π_ref/π, by which samples of π
    serve supervised fine-tuning on those of π_ref: the weights P_data/π of Equation E12.

    Args:
        rewards: (…), any floating dtype.
        log_ratios: (…) log π_ref(y|x) − log π(y|x) of whole completions, nats.
        beta: KL coefficient, 0 < β ≤ inf, in reward units.

    Returns:
        Nats, as the arguments, float32 (float64 for float64 input): rewards for `gibbs_weights`
        with β = 1.

    Raises:
        ValueError: if β is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}: at 0 no policy is the target.")
    return at_least_float32(rewards) / beta + at_least_float32(log_ratios)


def clip_weights(
    weights: Tensor, limit: float, *, dim: int = -1, mask: Tensor | None = None
) -> Tensor:
    """min(w, limit/G): no sample weighs more than `limit` times what it would in a uniform group.

    Source: Ionides (2008), "Truncated importance sampling". It trades variance for bias: what is
    cut off is lost, the weights sum to less than 1.

    Args:
        weights: (…, G, …), non-negative, summing to 1 over `dim`.
        limit: 1 or more; inf cuts nothing.
        dim: the group axis.
        mask: same shape, 1 or True = keep; G counts what is kept.

    Returns:
        Weights, same shape and dtype; masked entries as they are.

    Raises:
        ValueError: if the limit is below 1.
    """
    if not limit >= 1:
        raise ValueError(f"limit must be at least 1 (uniform weights), got {limit}.")
    keep = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.bool()
    highest = limit / keep.sum(dim, keepdim=True).clamp(min=1)
    return torch.minimum(weights, highest.to(weights.dtype)).where(keep, weights)


def effective_sample_size(weights: Tensor, *, dim: int = -1) -> Tensor:
    """1/Σ w²: how many equally weighted samples carry as much information.

    Source: Kish (1965); between 1 (one sample has all the weight) and G (uniform).

    Args:
        weights: (…, G, …), non-negative, summing to 1 over `dim`.
        dim: the group axis.

    Returns:
        Number of samples, `weights` without `dim`; 0 for a group whose weights are all 0.
    """
    squares = at_least_float32(weights).square().sum(dim)
    return torch.where(squares > 0, 1 / torch.where(squares > 0, squares, 1.0), 0.0)


def optimism(reward_samples: Tensor, beta: float) -> Tensor:
    """(λ²/2)·V[r|x,y]: by how much a single noisy reward sample inflates the tilt λE[r|x,y].

    Equation E11: log E[exp(λr)|x,y] = λE[r|x,y] + (λ²/2)V[r|x,y] + O(λ³). Averaging k samples
    before weighting divides it by k.

    Args:
        reward_samples: (…, k) independent scores of the same completion, k ≥ 2.
        beta: KL coefficient, 0 < β ≤ inf, in reward units.

    Returns:
        Nats per completion, (…). The variance is the unbiased sample variance.

    Raises:
        ValueError: if k < 2 or β is not positive.
    """
    if reward_samples.shape[-1] < 2:
        raise ValueError(
            "The variance of a reward needs at least 2 samples of it, got "
            f"{reward_samples.shape[-1]}."
        )
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}.")
    variance = at_least_float32(reward_samples).var(dim=-1, correction=1)
    return torch.zeros_like(variance) if math.isinf(beta) else variance / (2 * beta**2)


def prefix_log_ratio(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """log π(y≤t|x)/π_ref(y≤t|x) for every prefix of a completion.

    Σ_{s≤t} log π(y_s|·) − log π_ref(y_s|·). By Equation E4 the last one is r/β − log Z(x) for π =
    π*, and by Equation E23 every prefix has the tilt that it promises.

    Args:
        logps: (B, T) per-token log-probabilities under π, nats.
        ref_logps: (B, T) the same under π_ref.
        mask: (B, T), 1 or True = keep.

    Returns:
        (B, T) nats, float32 (float64 for float64 input). A masked token adds 0, so behind the end
        of a completion the value of the whole completion is repeated.
    """
    difference = at_least_float32(logps) - at_least_float32(ref_logps)
    return torch.where(mask.bool(), difference, 0.0).cumsum(dim=-1)


def weight_entropy(weights: Tensor, *, dim: int = -1) -> Tensor:
    """−Σ w log w: entropy of the weights of a group.

    Source: Shannon; between 0 (one sample has all the weight) and log G (uniform).

    Args:
        weights: (…, G, …), non-negative, summing to 1 over `dim`.
        dim: the group axis.

    Returns:
        Nats, `weights` without `dim`; 0 for a group whose weights are all 0.
    """
    weights = at_least_float32(weights)
    return -masked_sum(torch.xlogy(weights, weights), weights > 0, dim)


def _kept(rewards: Tensor, mask: Tensor | None) -> Tensor:
    keep = ~rewards.isnan()
    return keep if mask is None else keep & mask.bool()
