"""Which of several completions of a prompt to answer with: by scores, by answers, or by both."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trl_ext.errors import ConfigError, DataError
from trl_ext.functional import gibbs_weights
from trl_ext.gibbs_prm.ranking import rank_prefixes
from trl_ext.gibbs_prm.scored import MonteCarloScores, PrefixScores
from trl_ext.metrics.agreement import check_numbers
from trl_ext.rewards.reading import NUMBER, completion_text, lenient_answer

By = Literal["best", "majority", "weighted_majority"]
Aggregation = Literal["last", "min", "mean"]

# Two sums of the same weights in another order differ by less than this part of them.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Choice:
    """One of N completions.

    Attributes:
        index: of the completion, from 0.
        answer: the answer chosen, or that of the best completion; None where it has none.
        votes: answer -> its share of the votes, which add up to 1; the first voted for first.
            Empty where nobody voted.
    """

    index: int
    answer: Hashable | None
    votes: dict[Hashable, float] = field(default_factory=dict)


def choose(
    scored: Sequence[PrefixScores],
    answers: Sequence[Hashable | None] | None = None,
    *,
    by: By = "best",
    aggregation: Aggregation = "last",
) -> Choice:
    """Choose among N completions of one prompt by their scores, their answers, or both.

    "best": the highest score, of equals the first. "majority": the answer given most often.
    "weighted_majority": the answer with the largest Σ exp(score/β) over its completions. That sum
    is an importance weight: exp(score/β) = π(y|x)/π_ref(y|x), so that completions sampled from
    π_ref vote as samples of the policy π would. It needs aggregation "last", and is only as
    reliable as a few large weights allow. Tied answers: the higher sum of scores, then the first.
    An answer of None does not vote; where nobody votes it is the best by score. Equations E22, E24.

    Args:
        scored: what one scorer said of N completions of one prompt.
        answers: N of them, equal where they mean the same; None: the completion has none.
        by: how to choose.
        aggregation: of prefix scores to the score of a completion: "last": that of the whole, what
            a Gibbs scorer means; "min" and "mean": of the prefixes that end with its steps.

    Returns:
        `Choice`; by a majority its index is of the highest score among those with the answer.

    Raises:
        ConfigError: `by` or `aggregation` is not known, they do not fit, or answers are missing.
        DataError: there is nothing to choose from, the scores do not compare (another prompt or β,
            NaN), or there are not as many answers as completions.
    """
    _check_ways(by, aggregation, has_answers=answers is not None)
    _check_comparable(scored)
    of_each = _listed(answers, len(scored))
    if len(of_each) != len(scored):
        raise DataError(
            f"There are {len(scored)} completions and {len(of_each)} answers; give one each, None "
            "for a completion without an answer."
        )
    scores = check_numbers([_score(each, scored[0], aggregation) for each in scored], "score")
    votes = {} if by == "best" else _votes(of_each, scores, scored[0].beta, by)
    if not votes:
        best = int(scores.argmax())
        return Choice(best, of_each[best])
    winner = _winner(votes, of_each, scores)
    members = [row for row, answer in enumerate(of_each) if answer == winner]
    return Choice(max(members, key=lambda row: scores[row].item()), winner, votes)


def answers_of(completions: Iterable[Any], *, numbers: bool = False) -> list[str | None]:
    """What completions answer, read as the lenient rewards read them; to give to `choose`.

    Args:
        completions: texts, or lists of messages.
        numbers: the answers are numbers: the tagged one, else the last one. False: the tagged
            answer, else the first line.

    Returns:
        An answer each; None where there is none.
    """
    expected = "0" if numbers else None  # the reader looks for what looks like this
    found = [lenient_answer(completion_text(each), expected) for each in completions]
    return [a if a and (not numbers or NUMBER.fullmatch(a)) else None for a in found]


def _check_ways(by: Any, aggregation: Any, *, has_answers: bool) -> None:
    for name, value, ways in (
        ("by", by, get_args(By)),
        ("aggregation", aggregation, _AGGREGATIONS),
    ):
        if not isinstance(value, str) or value not in ways:
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(ways)}.")
    if by != "best" and not has_answers:
        raise ConfigError(
            f"by is {by!r}, which counts answers, and there are none. Give answers=, for example "
            "answers_of(completions), or take by='best'."
        )
    if by == "weighted_majority" and aggregation != "last":
        raise ConfigError(
            f"aggregation is {aggregation!r} with by='weighted_majority': only the score of the "
            "whole completion is a log-ratio that can weigh a vote. Take aggregation='last'."
        )


def _listed(answers: Any, size: int) -> list[Hashable | None]:
    """The answers, of which each can be compared with the others."""
    if answers is None:
        return [None] * size
    answers = answers.tolist() if hasattr(answers, "tolist") else answers
    if isinstance(answers, str) or not isinstance(answers, Sequence):
        raise DataError(f"answers is {answers!r}; it must be a list of one answer a completion.")
    for row, answer in enumerate(answers):
        # NaN is not equal to itself: no two of them would be one answer.
        if not isinstance(answer, Hashable) or answer != answer:
            raise DataError(
                f"Answer {row} is {answer!r}, which cannot be counted. Give a text or a number, or "
                "None for a completion without an answer."
            )
    return list(answers)


def _check_comparable(scored: Any) -> None:
    if not isinstance(scored, Sequence):
        raise DataError(
            f"scored is a {type(scored).__name__}; it must be a list of what a scorer's score() "
            "returns."
        )
    for row, each in enumerate(scored):
        if not isinstance(each, PrefixScores):
            raise DataError(f"Completion {row} is {each!r}; give what a scorer's score() returns.")
    rank_prefixes(scored, level="completion")  # refuses what does not compare


_AGGREGATIONS = {"last": lambda x: x[-1], "min": torch.min, "mean": torch.mean}


def _score(scored: PrefixScores, first: PrefixScores, aggregation: Aggregation) -> float:
    # The empty prefix has 0, and an empty completion no other.
    prefixes = torch.tensor(scored.prefix_scores or [0.0], dtype=torch.float64)
    value = _AGGREGATIONS[aggregation](prefixes).item()
    if isinstance(scored, MonteCarloScores) and isinstance(first, MonteCarloScores):
        # Each call of a Monte-Carlo scorer has its own log Z; all relative to the first.
        value += 0.0 if scored.log_z == first.log_z else first.beta * (scored.log_z - first.log_z)
    return value


def _votes(
    answers: list[Hashable | None], scores: Tensor, beta: float, by: By
) -> dict[Hashable, float]:
    """answer -> its share of the votes, in the order of their first; empty where nobody votes."""
    voters = [row for row, answer in enumerate(answers) if answer is not None]
    if not voters:
        return {}
    is_weighted = by == "weighted_majority"
    weights = gibbs_weights((scores if is_weighted else torch.zeros_like(scores))[voters], beta)
    votes: dict[Hashable, float] = {}
    for row, weight in zip(voters, weights.tolist(), strict=True):
        votes[answers[row]] = votes.get(answers[row], 0.0) + weight
    return votes


def _winner(
    votes: dict[Hashable, float], answers: list[Hashable | None], scores: Tensor
) -> Hashable:
    most = max(votes.values()) * (1 - _ROUNDING)
    totals = {
        answer: math.fsum(scores[row].item() for row, a in enumerate(answers) if a == answer)
        for answer, share in votes.items()
        if share >= most
    }
    return max(totals, key=lambda answer: totals[answer])
