"""From scores to probabilities of success, and how far such probabilities can be believed."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trl_ext.functional.masking import at_least_float32
from trl_ext.functional.ranking import counts_below

Binning = Literal["width", "mass"]


class Reliability(NamedTuple):
    """What was predicted and what happened, by bins of the predicted probability.

    Attributes:
        mean_predicted: (bins,) mean probability; NaN for an empty bin.
        observed: (bins,) rate of successes; NaN for an empty bin.
        count: (bins,) int64, number of predictions.
        standard_error: (bins,) of the observed rate, √(o(1−o)/(count−1)); NaN below two
            predictions.
    """

    mean_predicted: Tensor
    observed: Tensor
    count: Tensor
    standard_error: Tensor


def success_probability(
    log_ratio: Tensor, log_z: Tensor | float, beta: float, *, clip: bool = False
) -> Tensor:
    """Probability that the reference succeeds from a prefix, if a success has reward 1, else 0.

    E_h[exp(r/β) | prefix] = 1 + p·(e^{1/β} − 1), the last line of Equation E52, and its logarithm
    is log_ratio + log Z(x) (Equation E23). So p = expm1(log_ratio + log Z)/expm1(1/β), computed
    without overflow for small β and without cancellation for large.

    Args:
        log_ratio: (…) log π*(prefix|x)/π_ref(prefix|x), nats: a prefix score divided by β.
        log_z: log Z(x), nats, broadcastable to `log_ratio`.
        beta: KL coefficient, 0 < β < inf, in units of the reward.
        clip: limit to [0, 1] what an estimate or an imperfect policy puts outside.

    Returns:
        (…) probabilities, float32 (float64 for float64 input). Without `clip` below 0 where the
        two logarithms add up to less than 0, and above 1 where they do to more than 1/β.

    Raises:
        ValueError: if β is not positive and finite: in both limits p cannot be told.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}.")
    tilt = at_least_float32(log_ratio) + log_z
    above, below = tilt.clamp(min=0), tilt.clamp(max=0)
    # Numerator and denominator are both taken times exp(-1/β); one of the two terms is always 0.
    scaled = math.exp(-1 / beta) * torch.expm1(below)
    scaled = scaled - torch.exp(above - 1 / beta) * torch.expm1(-above)
    probability = scaled / -math.expm1(-1 / beta)
    return probability.clamp(0, 1) if clip else probability


def reliability(
    probabilities: Tensor,
    outcomes: Tensor,
    bins: int = 10,
    *,
    binning: Binning = "width",
    mask: Tensor | None = None,
) -> Reliability:
    """Predicted probability against observed rate, in bins of the prediction.

    Source: Murphy and Winkler (1977), "Reliability of subjective probability forecasts".

    Args:
        probabilities: (N,) or any shape, in [0, 1].
        outcomes: the same shape, 1 or True for a success, else 0.
        bins: number of bins.
        binning: "width": bin k is [k/bins, (k+1)/bins), the last with its end; "mass": as many
            predictions in each as ties allow, equal predictions in the same bin.
        mask: the same shape, 1 or True = keep. What is masked is never touched.

    Returns:
        `Reliability`, (bins,) each, float64.

    Raises:
        ValueError: if a kept probability is outside [0, 1], an outcome is no 0 or 1, or `bins` or
            `binning` is not known.
    """
    predicted, observed = _checked(probabilities, outcomes, mask)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be a positive whole number, got {bins!r}; 10 is usual.")
    bin_of = _bin_of(predicted, bins, binning)
    predicted, observed = predicted.double(), observed.double()
    count = torch.bincount(bin_of, minlength=bins)
    rate = torch.bincount(bin_of, observed, minlength=bins) / count
    return Reliability(
        mean_predicted=torch.bincount(bin_of, predicted, minlength=bins) / count,
        observed=rate,
        count=count,
        standard_error=(rate * (1 - rate) / (count - 1)).sqrt(),  # 0/0 for a single prediction
    )


def expected_calibration_error(
    probabilities: Tensor,
    outcomes: Tensor,
    bins: int = 10,
    *,
    binning: Binning = "width",
    mask: Tensor | None = None,
) -> Tensor:
    """Σ_b (n_b/N)·|observed_b − mean predicted_b|: how far predictions are off, on average.

    Source: Naeini et al. (2015), "Obtaining well calibrated probabilities using Bayesian binning".
    It depends on the bins, and is above 0 for perfect predictions of finitely many outcomes.

    Args:
        probabilities: (N,) or any shape, in [0, 1].
        outcomes: the same shape, 1 or True for a success, else 0.
        bins: number of bins.
        binning: "width" or "mass", as for `reliability`.
        mask: the same shape, 1 or True = keep.

    Returns:
        Scalar in [0, 1], float64; NaN where nothing is kept.

    Raises:
        ValueError: as `reliability` does.
    """
    found = reliability(probabilities, outcomes, bins, binning=binning, mask=mask)
    gaps = torch.where(found.count > 0, (found.observed - found.mean_predicted).abs(), 0.0)
    return (gaps * found.count).sum() / found.count.sum()


def brier(probabilities: Tensor, outcomes: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """(1/N) Σ (p − o)²: the mean squared error of the predicted probabilities.

    Source: Brier (1950), "Verification of forecasts expressed in terms of probability".

    Args:
        probabilities: (N,) or any shape, in [0, 1].
        outcomes: the same shape, 1 or True for a success, else 0.
        mask: the same shape, 1 or True = keep.

    Returns:
        Scalar in [0, 1], float64; NaN where nothing is kept.

    Raises:
        ValueError: if a kept probability is outside [0, 1], or an outcome is no 0 or 1.
    """
    predicted, observed = _checked(probabilities, outcomes, mask)
    return (predicted.double() - observed.double()).square().mean()


def _checked(probabilities: Tensor, outcomes: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is kept, flat, once it is known to be probabilities and outcomes."""
    if probabilities.shape != outcomes.shape:
        raise ValueError(
            "probabilities and outcomes must have the same shape, got "
            f"{tuple(probabilities.shape)} and {tuple(outcomes.shape)}."
        )
    keep = torch.ones_like(outcomes, dtype=torch.bool) if mask is None else mask.bool()
    predicted, observed = at_least_float32(probabilities[keep]), outcomes[keep]
    outside = ~((predicted >= 0) & (predicted <= 1))
    if outside.any():
        raise ValueError(
            f"probabilities must be between 0 and 1, got {predicted[outside][0].item()}; "
            "success_probability(..., clip=True) limits its estimates, a mask leaves entries out."
        )
    unknown = (observed != 0) & (observed != 1)
    if unknown.any():
        raise ValueError(f"outcomes must be 0 or 1, got {observed[unknown][0].item()}.")
    return predicted, observed


def _bin_of(predicted: Tensor, bins: int, binning: Binning) -> Tensor:
    if binning == "width":
        # In the dtype of the predictions, so that the float32 of 0.7 is at the edge 0.7, not below.
        edges = (torch.arange(1, bins, dtype=torch.float64) / bins).to(predicted)
        return torch.bucketize(predicted, edges, right=True)
    if binning == "mass":
        below, not_above = counts_below(predicted)
        # The sum is 2·(mean rank) − 1, below 2N, so that the bin is below `bins`.
        return (below + not_above) * bins // (2 * max(len(predicted), 1))
    raise ValueError(f"binning must be 'width' or 'mass', got {binning!r}.")
