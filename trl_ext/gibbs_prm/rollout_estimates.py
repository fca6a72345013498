"""What the rewards of a prefix's rollouts say of its value, and what a reader should know of it."""

from dataclasses import dataclass

import torch

from trl_ext.functional.gibbs import effective_sample_size, gibbs_weights, log_mean_exp
from trl_ext.functional.monte_carlo import (
    log_mean_exp_standard_error,
    standard_error_is_believed,
)


@dataclass(frozen=True)
class Estimate:
    """log E_h[exp(r/β) | prefix], as K rollouts have it. Equation E25.

    Attributes:
        value, error: of the logarithm, nats.
        rewards: of the rollouts that have one.
        size: effective number of samples of the weights exp(r/β).
        is_believed: whether ±1.96 `error` is a 95% interval.
        dropped: rollouts without a reward.
    """

    value: float
    error: float
    rewards: list[float]
    size: float
    is_believed: bool
    dropped: int = 0


def estimated(rewards: list[list[float | None]], beta: float) -> list[Estimate]:
    """Of the rollouts of each prefix, equally many. Equation E25.

    Args:
        rewards: of each prefix those of its K rollouts; None is left out, one at least is there.
        beta: 0 < β < inf, in units of the reward.
    """
    missing = float("nan")
    table = torch.tensor(
        [[missing if value is None else value for value in values] for values in rewards],
        dtype=torch.float64,
    )
    columns = (
        log_mean_exp(table, beta),
        log_mean_exp_standard_error(table, beta),
        effective_sample_size(gibbs_weights(table, beta)),
        standard_error_is_believed(table, beta),
    )
    estimates = []
    for values, *numbers in zip(rewards, *(column.tolist() for column in columns), strict=True):
        kept = [value for value in values if value is not None]
        value, error, size, believed = numbers
        estimates.append(Estimate(value, error, kept, size, believed, len(values) - len(kept)))
    return estimates


def notes_of(log_z: Estimate, along: list[Estimate]) -> list[str]:
    """What the numbers alone do not say, of the prompt's estimate and those along a completion."""
    named = [("the prompt", log_z)]
    named += [(f"step {step}", each) for step, each in enumerate(along)]
    notes = [
        f"the reward does not apply to {each.dropped} of "
        f"{each.dropped + len(each.rewards)} rollouts of {name}, which are left out"
        for name, each in named
        if each.dropped
    ]
    if not log_z.is_believed:
        notes.append(
            "the standard error of log Z may not be believed; differences between prefixes of the "
            "prompt do not depend on it"
        )
    return notes
