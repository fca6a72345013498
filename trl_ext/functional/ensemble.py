"""One score out of the scores of several judges, and how far the judges are apart."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from trl_ext.functional.masking import at_least_float32, masked_mean

Combine = Literal["mean", "min", "uncertainty"]


def ensemble_score(
    scores: Tensor, how: Combine = "mean", *, penalty: float = 1.0, dim: int = 0
) -> Tensor:
    """The score that an ensemble gives: mean, min_k r_k, or mean − c·std.

    Source: "mean" and "min" (worst case) Coste et al. (2023), "Reward model ensembles help mitigate
    overoptimization"; "uncertainty" Zhai et al. (2024), "Uncertainty-penalized RLHF with diverse
    reward LoRA ensembles", whose penalty is on the standard deviation (Coste et al. penalise the
    variance). The standard deviation is `ensemble_spread`, of the population.

    Args:
        scores: (K, …), any floating dtype. NaN: a member that gives no score; it is left out.
        how: which of the three.
        penalty: c ≥ 0, without unit; read by "uncertainty" alone. 0 is the mean.
        dim: the axis of the K members.

    Returns:
        `scores` without `dim`, in their unit, float32 (float64 for float64 input); NaN where no
        member gives a score.

    Raises:
        ValueError: if `how` is none of the three, the penalty is negative or not finite, or there
            are no members.
    """
    if how not in get_args(Combine):
        raise ValueError(f"how is {how!r}; it must be one of {', '.join(get_args(Combine))}.")
    if not 0 <= penalty < math.inf:
        raise ValueError(f"penalty is {penalty!r}; it must be 0 or more, and finite.")
    if not scores.shape[dim]:
        raise ValueError("An ensemble needs at least one member, got none.")
    scores = at_least_float32(scores)
    scored = ~scores.isnan()
    if how == "min":
        found = torch.where(scored, scores, math.inf).amin(dim)
    else:
        found = masked_mean(scores, scored, dim)
        if how == "uncertainty":
            found = found - penalty * ensemble_spread(scores, dim=dim)
    return torch.where(scored.any(dim), found, math.nan)


def ensemble_spread(scores: Tensor, *, dim: int = 0) -> Tensor:
    """Standard deviation of the members' scores: sqrt((1/K) Σ_k (r_k − mean)²).

    Source: Zhai et al. (2024), the uncertainty of an ensemble. It divides by the K members that
    give a score: they are the whole population, and one member alone disagrees with nobody.

    Args:
        scores: (K, …), any floating dtype. NaN: a member that gives no score; it is left out.
        dim: the axis of the K members.

    Returns:
        `scores` without `dim`, in their unit, float32 (float64 for float64 input); 0 for one
        score, NaN for none.
    """
    scores = at_least_float32(scores)
    scored = ~scores.isnan()
    mean = masked_mean(scores, scored, dim).unsqueeze(dim)
    spread = masked_mean((scores - mean).square(), scored, dim).sqrt()
    return torch.where(scored.any(dim), spread, math.nan)
