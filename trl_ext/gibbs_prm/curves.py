"""How often each way of choosing among n completions is right, and what n completions cost."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext.errors import ConfigError, DataError
from trl_ext.functional.selection import best_of_n_accuracy, majority_accuracy
from trl_ext.metrics.agreement import means_and_intervals

_NONE = -1  # the number of no answer


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts.

    Attributes:
        mean: of the prompts.
        interval: 95%, by bootstrap over prompts; None for one prompt.
    """

    mean: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class AccuracyRow:
    """How often the answer is right if n completions are drawn of each prompt.

    All rows and columns have the same bootstrap draws of prompts.

    Attributes:
        n: completions drawn of each prompt, without replacement from those that it has.
        tokens: that they cost a prompt, n times the mean length.
        best: chosen by the highest score.
        majority: chosen by most votes.
        weighted_majority: by votes that count exp(score/β).
        random: one of them, whichever.
        pass_at_n: whether any of them is right: what no choice can exceed.
        best_minus_majority: the difference of the two, of the same prompts.
        best_minus_weighted_majority: likewise.
    """

    n: int
    tokens: float
    best: Estimate
    majority: Estimate
    weighted_majority: Estimate
    random: Estimate
    pass_at_n: Estimate
    best_minus_majority: Estimate
    best_minus_weighted_majority: Estimate


def accuracy_curve(
    scores_PG: Any,
    correct_PG: Any,
    answers_PG: Any,
    lengths_PG: Any,
    ns: Sequence[int],
    *,
    beta: float,
    max_subsets: int = 10_000,
    seed: int = 0,
) -> list[AccuracyRow]:
    """How often each way of choosing is right, by the number of completions, in expectation.

    The expectation is over which n of the G completions are drawn (`trl_ext.functional.selection`),
    so that one lucky draw decides nothing; intervals are of the prompts.

    Args:
        scores_PG: (P, G) scores of P prompts' G completions, in units of the reward. NaN: there is
            no such completion.
        correct_PG: (P, G) 0 or 1.
        answers_PG: (P, G) answers, equal where they mean the same; None: the completion has none
            and does not vote. Where none of a draw votes, one of them is taken, whichever.
        lengths_PG: (P, G) numbers of tokens.
        ns: numbers of completions, from 1 to the fewest that a prompt has.
        beta: of the scores, in the same unit, β > 0; weighted votes count exp(score/β).
        max_subsets: up to how many draws a prompt are enumerated, and how many are sampled else.
        seed: of the sampled draws.

    Returns:
        A row for each n.

    Raises:
        DataError: the shapes differ, there is no prompt, n is out of range, or a completion with a
            score is neither right nor wrong, or has no length.
        ConfigError: β is not a positive number, max_subsets is no whole number from 2, or seed is
            none from 0.
    """
    scores, correct, lengths = (
        _numbers(name, values)
        for name, values in (
            ("scores", scores_PG),
            ("correct", correct_PG),
            ("lengths", lengths_PG),
        )
    )
    answers = _numbered(answers_PG)
    _check_sampling(max_subsets, seed)
    _check(scores, correct, lengths, answers, ns, beta)
    table = _Table(scores, correct, answers, lengths, beta, max_subsets, seed)
    return [table.row(n) for n in ns]


@dataclass(frozen=True)
class _Table:
    """The arguments of `accuracy_curve`, (P, G) each; answer −1 is none."""

    scores: Tensor
    correct: Tensor
    answers: Tensor
    lengths: Tensor
    beta: float
    max_subsets: int
    seed: int

    def row(self, n: int) -> AccuracyRow:
        keep = ~self.scores.isnan()
        majority = self._majority(torch.zeros_like(self.scores), n)
        weighted = self._majority(self.scores / self.beta, n)
        best = best_of_n_accuracy(self.scores, self.correct, n, keep)
        # Equal scores share the choice equally.
        random = best_of_n_accuracy(torch.zeros_like(self.scores), self.correct, n, keep)
        return AccuracyRow(
            n=n,
            tokens=n * _mean(self.lengths, keep),
            best=_estimate(best),
            majority=_estimate(majority),
            weighted_majority=_estimate(weighted),
            random=_estimate(random),
            pass_at_n=_estimate(best_of_n_accuracy(self.correct, self.correct, n, keep)),
            best_minus_majority=_estimate(best - majority),
            best_minus_weighted_majority=_estimate(best - weighted),
        )

    def _majority(self, log_votes: Tensor, n: int) -> Tensor:
        # A vote of 0 counts against any other, and as one of equals where there is no other.
        log_votes = log_votes.masked_fill(self.answers == _NONE, -math.inf)
        accuracy, _ = majority_accuracy(
            self.answers,
            self.correct,
            n,
            weights=log_votes,
            mask=~self.scores.isnan(),
            max_subsets=self.max_subsets,
            seed=self.seed,
        )
        return accuracy


def _estimate(of_prompts: Tensor) -> Estimate:
    [(mean, interval)] = means_and_intervals(of_prompts[None])
    return Estimate(mean, interval)


def _mean(values: Tensor, keep: Tensor) -> float:
    """The mean over prompts of the mean over what a prompt has."""
    return (torch.where(keep, values, 0.0).sum(-1) / keep.sum(-1)).mean().item()


def _numbers(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}_PG is no table of numbers: {error}. Give P rows of G numbers each; where a "
            "prompt has fewer completions, fill its row of scores up with NaN."
        ) from error


def _numbered(answers: Any) -> Tensor:
    """(P, G) int64: equal answers of a prompt have equal numbers."""
    rows = answers.tolist() if hasattr(answers, "tolist") else answers
    if not isinstance(rows, list | tuple) or not all(isinstance(r, list | tuple) for r in rows):
        raise DataError("answers_PG is no table; give P rows of G answers, None for no answer.")
    numbers = []
    for row in rows:
        known: dict[Any, int] = {None: _NONE}
        if wrong := [a for a in row if not isinstance(a, Hashable) or a != a]:
            raise DataError(f"answers_PG holds {wrong[0]!r}; give a text, a number or None.")
        numbers.append([known.setdefault(answer, len(known)) for answer in row])
    sizes = sorted({len(row) for row in numbers})
    if len(sizes) != 1:
        raise DataError(f"answers_PG must have rows of one length, got the lengths {sizes}.")
    return torch.tensor(numbers)


def _check(
    scores: Tensor, correct: Tensor, lengths: Tensor, answers: Tensor, ns: Any, beta: Any
) -> None:
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not beta > 0:
        raise ConfigError(f"beta is {beta!r}; it must be a number greater than 0.")
    shapes = [tuple(each.shape) for each in (scores, correct, answers, lengths)]
    if len(set(shapes)) > 1 or scores.dim() != 2 or not scores.numel():
        raise DataError(
            "Scores, correct, answers and lengths must be tables of one shape (prompts, "
            f"completions), got {', '.join(map(str, shapes))}."
        )
    keep = ~scores.isnan()
    if not ((correct == 0) | (correct == 1))[keep].all():
        wrong = correct[keep & (correct != 0) & (correct != 1)][0].item()
        raise DataError(f"correct_PG holds {wrong}; a completion is right, 1, or wrong, 0.")
    if not (lengths[keep] >= 0).all() or lengths[keep].isinf().any():
        raise DataError("lengths_PG must hold a number of tokens, 0 or more, of each completion.")
    _check_ns(ns, keep.sum(-1))


def _check_sampling(max_subsets: Any, seed: Any) -> None:
    for name, value, least in (("max_subsets", max_subsets, 2), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number, {least} or more.")


def _check_ns(ns: Any, sizes: Tensor) -> None:
    fewest = int(sizes.min())
    if not isinstance(ns, Sequence) or isinstance(ns, str):
        raise DataError(f"ns is {ns!r}; it must be a list of whole numbers from 1 to {fewest}.")
    for n in ns:
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= fewest:
            raise DataError(
                f"ns holds {n!r}; it must be a whole number from 1 to {fewest}, the completions of "
                f"prompt {int(sizes.argmin())}, which has the fewest."
            )
