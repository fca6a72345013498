"""The first wrong step of a solution: predicted by a threshold, tuned and judged by labels.

Steps are counted from 0; −1 says that all are right. The measure is ProcessBench's: Zheng et al.
(2024), arXiv 2412.06559.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, Literal, get_args

import torch

from trl_ext.errors import ConfigError, DataError
from trl_ext.functional.calibration import success_probability
from trl_ext.gibbs_prm.scored import MonteCarloScores, PrefixScores
from trl_ext.metrics.processbench import (
    FirstErrorScores,
    check_steps,
    count_classes,
    f1,
    scores_of_hits,
)

__all__ = ["FirstErrorScores", "StepValue", "Threshold", "f1", "predict", "step_values", "tune"]

StepValue = Literal["step_reward", "prefix_score", "probability"]


@dataclass(frozen=True)
class Threshold(FirstErrorScores):
    """A threshold with the scores that it reaches where it was tuned.

    Attributes:
        threshold: a step is wrong if its value is below.
        lower: the same scores are reached by every threshold above this
        upper: and not above this.
    """

    threshold: float
    lower: float
    upper: float


def step_values(
    scores: Sequence[PrefixScores],
    kind: StepValue = "step_reward",
    *,
    log_z: Sequence[float] | None = None,
) -> list[list[float]]:
    """One number a step, low for a step that looks wrong.

    Args:
        scores: of N completions.
        kind: "step_reward": what the step changes; "prefix_score": where it leads; "probability":
            of success behind it, if a success has reward 1, else 0, limited to [0, 1].
        log_z: N values of log Z(x), nats, for "probability"; None: those of `MonteCarloScores`.

    Returns:
        N lists, as long as the completions have steps.

    Raises:
        ConfigError: if `kind` is not known.
        DataError: if "probability" lacks log Z.
    """
    if kind not in get_args(StepValue):
        raise ConfigError(f"kind must be one of {', '.join(get_args(StepValue))}, got {kind!r}.")
    if kind == "step_reward":
        return [each.step_rewards for each in scores]
    if kind == "prefix_score":
        return [list(each.prefix_scores) for each in scores]
    of_each = _log_zs(scores) if log_z is None else list(log_z)
    if len(of_each) != len(scores):
        raise DataError(f"Each of {len(scores)} completions needs a log_z, got {len(of_each)}.")
    return [_probabilities(each, z) for each, z in zip(scores, of_each, strict=True)]


def predict(values: Sequence[Sequence[float]], threshold: float) -> list[int]:
    """The first step of each solution whose value is below the threshold; −1 if none is.

    Args:
        values: N lists of a number a step.
        threshold: in the unit of the values.

    Returns:
        N steps, counted from 0.

    Raises:
        DataError: if a value or the threshold is NaN.
    """
    if math.isnan(threshold):
        raise DataError("The threshold must be a number, got NaN; tune() finds one.")
    _check_values(values)
    return [
        next((step for step, value in enumerate(steps) if value < threshold), -1)
        for steps in values
    ]


def tune(values: Sequence[Sequence[float]], first_errors: Sequence[int]) -> Threshold:
    """The threshold with the highest F1 on a validation split, in O(N log N) for N steps.

    As the threshold rises, a solution's prediction moves to an earlier step only where it passes
    the lowest value so far, so that each solution is right within one interval of thresholds; the
    sum of these intervals is swept once. Among thresholds that are equally good it is the middle of
    the widest interval: ±inf where that has no end, and −inf, which reports no error, where no
    threshold finds any.

    Args:
        values: N lists of a number a step.
        first_errors: N true first errors, counted from 0, −1 for none.

    Returns:
        `Threshold`.

    Raises:
        DataError: if the lengths differ, a value is NaN, a label is no step of its solution, or
            there is no erroneous or no correct solution.
    """
    _check_values(values)
    _check_labels(values, first_errors)
    num_error, num_correct = count_classes(first_errors)
    # No threshold is above inf: a step of that value is never predicted.
    ends = sorted({value for steps in values for value in steps if value != math.inf})
    found = [
        scores_of_hits(errors, corrects, num_error, num_correct)
        for errors, corrects in zip(*_sweep(values, first_errors, ends), strict=True)
    ]
    lower, upper, first = _widest_best(found, ends)
    threshold = -math.inf if first == 0 else _between(lower, upper)
    return Threshold(**found[first], threshold=threshold, lower=lower, upper=upper)


def _widest_best(found: list[dict[str, Any]], ends: list[float]) -> tuple[float, float, int]:
    """Ends of the widest run of intervals with the best F1 and the same scores; its first one."""
    bounds = [-math.inf, *ends, math.inf]
    best = max(each["f1"] for each in found)
    runs = []
    for scores, group in groupby(range(len(found)), key=lambda index: found[index]):
        run = list(group)
        if scores["f1"] == best:
            runs.append((bounds[run[0]], bounds[run[-1] + 1], run[0]))
    # Without any error found all is equally bad, and the first run reports none.
    return max(runs, key=lambda run: run[1] - run[0]) if best else runs[0]


def _sweep(
    values: Sequence[Sequence[float]], first_errors: Sequence[int], ends: list[float]
) -> tuple[list[int], list[int]]:
    """Right predictions of erroneous and of correct solutions, for thresholds in each interval.

    Interval i is (ends[i−1], ends[i]], the first without a lower end, the last without an upper.
    """
    changes = {True: [0] * (len(ends) + 2), False: [0] * (len(ends) + 2)}
    for steps, label in zip(values, first_errors, strict=True):
        # Step k is predicted by thresholds above its value and not above any value before it.
        is_error = label != -1
        before = min(steps[:label] if is_error else steps, default=math.inf)
        start = bisect_left(ends, steps[label]) + 1 if is_error else 0
        stop = bisect_left(ends, before) + 1
        if start < stop:
            changes[is_error][start] += 1
            changes[is_error][stop] -= 1
    errors, corrects = (list(accumulate(changes[is_error]))[:-1] for is_error in (True, False))
    return errors, corrects


def _between(lower: float, upper: float) -> float:
    """A number above `lower` and not above `upper`, in the middle where there is one."""
    middle = lower / 2 + upper / 2  # of an infinite end: that end, or NaN of two
    return middle if lower < middle else upper


def _log_zs(scores: Sequence[PrefixScores]) -> list[float]:
    for index, each in enumerate(scores):
        if not isinstance(each, MonteCarloScores):
            raise DataError(
                f"A probability needs log Z(x), and entry {index} is {type(each).__name__}, which "
                "does not know it. Give log_z, or use kind='step_reward'."
            )
    return [each.log_z for each in scores if isinstance(each, MonteCarloScores)]


def _probabilities(scores: PrefixScores, log_z: float) -> list[float]:
    log_ratios = torch.tensor(scores.prefix_scores, dtype=torch.float64) / scores.beta
    return success_probability(log_ratios, log_z, scores.beta, clip=True).tolist()


def _check_values(values: Sequence[Sequence[float]]) -> None:
    for index, steps in enumerate(values):
        for step, value in enumerate(steps):
            if isinstance(value, bool) or math.isnan(value):
                raise DataError(
                    f"Step {step} of solution {index} must have a number, got {value!r}; leave out "
                    "the solution, or score it again."
                )


def _check_labels(values: Sequence[Sequence[float]], labels: Sequence[int]) -> None:
    if len(values) != len(labels):
        raise DataError(
            f"Each solution needs values and a label, got {len(values)} and {len(labels)}."
        )
    check_steps(labels, "label")
    for index, (steps, label) in enumerate(zip(values, labels, strict=True)):
        if label >= len(steps):
            raise DataError(
                f"The label of solution {index} is step {label}, but it has {len(steps)} steps, "
                "counted from 0. Label and score the same steps."
            )
