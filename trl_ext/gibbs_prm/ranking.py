"""Which prefix of a prompt is best, how sure that is, and whether two scorers agree on it.

log Z(x) is common to all prefixes of one prompt and cancels in their differences (Equation E24),
so ranking needs none; between prompts it does not cancel, so nothing here ranks across them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from trl_ext.errors import ConfigError, DataError
from trl_ext.functional.ranking import mean_ranks, pairwise_differences, probability_greater
from trl_ext.gibbs_prm.scored import MonteCarloScores, PrefixScores
from trl_ext.metrics.agreement import (
    Agreement,
    check_numbers,
    rows_by_name,
    score_agreement,
)

Level = Literal["prefix", "completion"]


class Label(NamedTuple):
    """Where a ranked entry is from.

    Attributes:
        completion: its place in the input, from 0.
        step: the step that the prefix ends with, from 0; None for a plain number and for a
            completion without steps.
    """

    completion: int
    step: int | None


@dataclass(frozen=True, eq=False)
class Ranking:
    """N prefixes of one prompt in order. Equation E24.

    Attributes:
        labels: N, where each entry is from.
        order: indices of the entries, best first; equals in the order of the input.
        ranks: N, 1 for the best; equals share the mean of their ranks.
        differences: (N, N) score of the row minus score of the column, in units of the reward.
        standard_errors: (N, N) of the differences, as of independent estimates.
        probabilities: (N, N) that the row is better than the column, by a normal estimate; 0, 0.5
            or 1 where the scores are exact.
    """

    labels: list[Label]
    order: list[int]
    ranks: list[float]
    differences: Tensor
    standard_errors: Tensor
    probabilities: Tensor


def rank_prefixes(
    scores: Sequence[PrefixScores] | Sequence[float] | Tensor,
    standard_errors: Sequence[float] | Tensor | None = None,
    *,
    level: Level = "prefix",
) -> Ranking:
    """Order the prefixes of one prompt by their scores. Equation E24.

    Args:
        scores: what a scorer said of completions of one prompt; or N plain numbers, of prefixes
            of one prompt, in units of the reward.
        standard_errors: N, of plain numbers, in the same unit; None: they are exact.
            `PrefixScores` bring their own.
        level: "prefix": the prefixes of all completions compete; "completion": the whole ones.

    Returns:
        `Ranking`.

    Raises:
        DataError: if there is nothing to rank; prompts, values of β or kinds of scorers are mixed;
            a number is NaN or a standard error negative.
        ConfigError: if `level` is not known.
    """
    labels, values, errors = _entries(scores, standard_errors, level)
    if not labels:
        raise DataError("There is nothing to rank: give at least one prefix, got none.")
    differences, of_differences = pairwise_differences(values, errors)
    return Ranking(
        labels=labels,
        order=values.argsort(descending=True, stable=True).tolist(),
        ranks=mean_ranks(-values).tolist(),
        differences=differences,
        standard_errors=of_differences,
        probabilities=probability_greater(differences, of_differences),
    )


def agreement(
    one: Sequence[PrefixScores], other: Sequence[PrefixScores], *, level: Level = "prefix"
) -> Agreement:
    """Rank correlations of two scorers on the same completions, within prompts.

    Args:
        one: what a scorer said of completions, of any number of prompts in any order.
        other: what another said of the same completions, in the same order.
        level: "prefix": all prefixes of a prompt are compared; "completion": the whole ones.

    Returns:
        `Agreement`.

    Raises:
        DataError: if the two are not of the same completions and steps; within a prompt values of
            β or kinds of scorers are mixed in one of them; a score is NaN; or no prompt has two
            entries that both tell apart.
        ConfigError: if `level` is not known.
    """
    _check_aligned(one, other, level)
    first, second, groups = [], [], []
    for prompt, rows in rows_by_name([repr(scores.prompt) for scores in one]).items():
        of_one, of_other = (
            _entries([scores[row] for row in rows], None, level)[1].tolist()
            for scores in (one, other)
        )
        first, second = first + of_one, second + of_other
        groups += [prompt] * len(of_one)
    return score_agreement(first, second, groups)


def _entries(
    scores: Any, standard_errors: Any, level: Level
) -> tuple[list[Label], Tensor, Tensor | None]:
    """Labels, scores that may be subtracted from each other, and their standard errors."""
    if level not in get_args(Level):
        raise ConfigError(f"level must be 'prefix' or 'completion', got {level!r}.")
    if not isinstance(scores, Iterable):
        raise DataError(
            f"scores is a {type(scores).__name__}; it must be a list: of what a scorer's score() "
            "returns, or of numbers."
        )
    scores = scores if isinstance(scores, Tensor) else list(scores)
    if not any(isinstance(each, PrefixScores) for each in scores):
        values = check_numbers(scores, "score")
        labels = [Label(index, None) for index in range(len(values))]
        return labels, values, _errors(standard_errors, len(values))
    _check_comparable(scores)
    if standard_errors is not None:
        raise DataError(
            "standard_errors belong to plain numbers: PrefixScores bring their own. Leave it out."
        )
    found = [entry for index in range(len(scores)) for entry in _of_one(scores, index, level)]
    labels = [label for label, _, _ in found]
    values = check_numbers([value for _, value, _ in found], "score")
    return labels, values, _errors([error for _, _, error in found], len(values))


def _of_one(
    scores: Sequence[PrefixScores], index: int, level: Level
) -> list[tuple[Label, float, float]]:
    """Label, score and standard error of the prefixes of completion `index` that compete."""
    one = scores[index]
    log_z = [each.log_z for each in (scores[0], one) if isinstance(each, MonteCarloScores)]
    # Each call of a Monte-Carlo scorer has its own estimate of log Z; the difference of two would
    # not cancel, so all are taken relative to the first.
    offset = one.beta * (log_z[1] - log_z[0]) if log_z and log_z[0] != log_z[1] else 0.0
    if level == "completion" and not one.prefix_scores:
        # The empty prefix: its score is 0 relative to log Z, which may be an estimate.
        error = one.beta * one.log_z_standard_error if isinstance(one, MonteCarloScores) else 0.0
        return [(Label(index, None), offset, error)]
    errors = one.standard_errors or [0.0] * len(one.prefix_scores)
    entries = [
        (Label(index, step), score + offset, error)
        for step, (score, error) in enumerate(zip(one.prefix_scores, errors, strict=True))
    ]
    return entries if level == "prefix" else entries[-1:]


def _check_comparable(scores: Sequence[PrefixScores]) -> None:
    for index, each in enumerate(scores):
        if not isinstance(each, PrefixScores):
            raise DataError(
                f"Entry {index} is {each!r} among PrefixScores; give one kind or the other."
            )
        if each.prompt != scores[0].prompt:
            raise DataError(
                f"Entry {index} is of the prompt {each.prompt!r}, entry 0 of {scores[0].prompt!r}: "
                "log Z does not cancel between prompts. Rank each prompt by itself."
            )
        if each.beta != scores[0].beta:
            raise DataError(
                f"Entry {index} has beta {each.beta}, entry 0 has {scores[0].beta}: their scores "
                "do not compare. Score all completions with one beta."
            )
        if isinstance(each, MonteCarloScores) != isinstance(scores[0], MonteCarloScores):
            raise DataError(
                f"Entry {index} is {type(each).__name__}, entry 0 {type(scores[0]).__name__}: "
                "their log Z differ. Rank each scorer's by itself, and compare with agreement()."
            )


def _check_aligned(
    one: Sequence[PrefixScores], other: Sequence[PrefixScores], level: Level
) -> None:
    if len(one) != len(other):
        raise DataError(
            f"The scorers must have scored the same completions, got {len(one)} and {len(other)}."
        )
    parts = ["prompt", "completion", *(["step_ends"] if level == "prefix" else [])]
    for index, (first, second) in enumerate(zip(one, other, strict=True)):
        for part in parts:
            if getattr(first, part) != getattr(second, part):
                raise DataError(
                    f"Entry {index} differs in its {part}: {getattr(first, part)!r} and "
                    f"{getattr(second, part)!r}. Give both scorers the same completions in the "
                    "same order, split into the same steps."
                )


def _errors(standard_errors: Sequence[float] | Tensor | None, size: int) -> Tensor | None:
    if standard_errors is None:
        return None
    errors = check_numbers(standard_errors, "standard error")
    if len(errors) != size:
        raise DataError(f"Each of {size} scores needs a standard error, got {len(errors)}.")
    if (errors < 0).any():
        raise DataError(f"A standard error cannot be negative, got {errors.min().item()}.")
    return errors
