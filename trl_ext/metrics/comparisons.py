"""How well differences of rewards forecast who is preferred."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trl_ext.functional.calibration import (
    Reliability,
    brier,
    expected_calibration_error,
    reliability,
)

# Edges of |r_w − r_l|, in reward units: σ of them is 62%, 73% and 88%.
MARGIN_EDGES = (0.0, 0.5, 1.0, 2.0, float("inf"))
BINS = 10


@dataclass(frozen=True)
class ComparisonScores:
    """What the rewards of preferred and of other completions say, over N comparisons.

    The forecast of a comparison is σ(|r_w − r_l|) for the one with the higher reward (Equation
    E49), which happens or not; so it does not matter which of the two is named first. Where both
    rewards are the same there is no forecast: it counts as wrong in `accuracy`, as TRL does, and
    is left out of `ece` and `bins`.

    Attributes:
        accuracy: part whose preferred completion has the higher reward.
        margin: mean of r_w − r_l, reward units.
        log_loss: mean of −log σ(r_w − r_l), nats.
        brier: mean of (1 − σ(r_w − r_l))².
        ece: expected calibration error of the forecasts; NaN without any.
        by_margin: (low, high, accuracy, count) for each range of |r_w − r_l| that has one.
        bins: forecast against outcome, in bins of the forecast between 0 and 1: the lower half is
            empty.
        num_ties: comparisons whose rewards are the same.
    """

    accuracy: float
    margin: float
    log_loss: float
    brier: float
    ece: float
    by_margin: list[tuple[float, float, float, int]]
    bins: Reliability
    num_ties: int


def comparison_scores(margins: Tensor, bins: int = BINS) -> ComparisonScores:
    """The measures of N comparisons.

    Args:
        margins: (N,) r_w − r_l, of the preferred completion minus the other, N ≥ 1. What is not
            finite is left out of `ece` and `bins`.
        bins: between a forecast of ½ and of 1.

    Raises:
        ValueError: if `bins` is no positive whole number.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be a positive whole number, got {bins!r}; 10 is usual.")
    margins = margins.double()
    forecast, outcome = margins.abs().sigmoid(), margins > 0
    # A loss that diverged shows in the other numbers.
    told = margins.isfinite() & (margins != 0)
    of_preferred = margins.nan_to_num(nan=0.0).sigmoid()
    return ComparisonScores(
        accuracy=outcome.double().mean().item(),
        margin=margins.mean().item(),
        log_loss=-torch.nn.functional.logsigmoid(margins).mean().item(),
        brier=brier(of_preferred, torch.ones_like(outcome)).item(),
        ece=expected_calibration_error(forecast, outcome, 2 * bins, mask=told).item(),
        by_margin=_by_margin(margins),
        bins=reliability(forecast, outcome, 2 * bins, mask=told),
        num_ties=int((margins == 0).sum()),
    )


def _by_margin(margins: Tensor) -> list[tuple[float, float, float, int]]:
    rows = []
    for low, high in pairwise(MARGIN_EDGES):
        within = margins[(margins.abs() >= low) & (margins.abs() < high)]
        if len(within):
            rows.append((low, high, (within > 0).double().mean().item(), len(within)))
    return rows
