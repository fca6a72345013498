"""How well scores tell right completions from wrong ones."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext.errors import DataError
from trl_ext.gibbs_prm.row_values import as_texts
from trl_ext.metrics.agreement import (
    check_numbers,
    means_and_intervals,
    rows_by_name,
)


@dataclass(frozen=True)
class Separation:
    """How often a right completion scores higher than a wrong one of the same prompt.

    Attributes:
        probability: the mean over prompts; 0.5 says nothing, 1 separates them. Between prompts
            scores do not compare: log Z does not cancel (Equation E24).
        interval: 95%, by bootstrap over prompts; None for one prompt.
        num_prompts: prompts with a right and a wrong completion; the others say nothing.
        num_pairs: pairs of a right and a wrong one.
    """

    probability: float
    interval: tuple[float, float] | None
    num_prompts: int
    num_pairs: int


def separation(
    scores: Sequence[float], correct: Sequence[bool], prompts: Sequence[Hashable]
) -> Separation:
    """The probability that a right completion scores higher than a wrong one, ties counting half.

    It is the area under the ROC curve of each prompt, averaged.

    Args:
        scores: of N completions.
        correct: of each, whether it is right.
        prompts: of each, the name of its prompt.

    Raises:
        DataError: if the lengths differ, a score is NaN, correct holds texts, or no prompt has a
            right and a wrong one.
    """
    if not len(scores) == len(correct) == len(prompts):
        raise DataError(
            f"Each completion needs a score, whether it is right, and a prompt, got {len(scores)}, "
            f"{len(correct)} and {len(prompts)}."
        )
    values = check_numbers(scores, "score")
    if texts := [each for each in correct if isinstance(each, str)]:
        raise DataError(
            f"correct holds {texts[0]!r}; it must be true or false of each.{as_texts(texts)}"
        )
    right = torch.tensor([bool(each) for each in correct])
    areas, pairs = [], 0
    for rows in rows_by_name(prompts).values():
        is_right = right[rows]
        one, other = values[rows][is_right], values[rows][~is_right]
        if len(one) and len(other):
            areas.append(_share_above(one, other))
            pairs += len(one) * len(other)
    if not areas:
        raise DataError(
            "No prompt has both a right and a wrong completion: there is nothing to separate. Give "
            "several completions of each prompt."
        )
    [(mean, interval)] = means_and_intervals(torch.stack(areas)[None])
    return Separation(mean, interval, len(areas), pairs)


def _share_above(right: Tensor, wrong: Tensor) -> Tensor:
    """Of the pairs of a right and a wrong one, in how many the right one is above."""
    difference = right[:, None] - wrong
    # Two infinities are equal.
    difference = torch.where(right[:, None] == wrong, 0.0, difference)
    return (difference.sign() + 1).mean() / 2
