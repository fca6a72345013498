"""ProcessBench's measure of predicted first errors: Zheng et al. (2024), arXiv 2412.06559.

Steps are counted from 0; −1 says that all are right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from trl_ext.errors import DataError


@dataclass(frozen=True)
class FirstErrorScores:
    """How often the first error is found.

    Attributes:
        accuracy_error: part of the erroneous solutions whose first error is predicted exactly.
        accuracy_correct: part of the correct solutions that are predicted to have none.
        f1: harmonic mean of the two; 0 if both are.
        num_error: number of erroneous solutions.
        num_correct: number of correct solutions.
    """

    accuracy_error: float
    accuracy_correct: float
    f1: float
    num_error: int
    num_correct: int


def f1(predicted: Sequence[int], labels: Sequence[int]) -> FirstErrorScores:
    """ProcessBench's measure: accuracy on erroneous and on correct solutions, harmonic mean.

    Args:
        predicted: N first errors, counted from 0, −1 for none.
        labels: N true ones.

    Returns:
        `FirstErrorScores`, as parts of 1, where ProcessBench prints percentages.

    Raises:
        DataError: if the lengths differ, an entry is no step, or there is no erroneous or no
            correct solution.
    """
    if len(predicted) != len(labels):
        raise DataError(
            f"Each solution needs a prediction and a label, got {len(predicted)} and {len(labels)}."
        )
    check_steps(predicted, "prediction")
    check_steps(labels, "label")
    hits = [guess == label for guess, label in zip(predicted, labels, strict=True)]
    num_error, num_correct = count_classes(labels)
    correct_hits = sum(hit for hit, label in zip(hits, labels, strict=True) if label == -1)
    return FirstErrorScores(
        **scores_of_hits(sum(hits) - correct_hits, correct_hits, num_error, num_correct)
    )


def scores_of_hits(
    error_hits: int, correct_hits: int, num_error: int, num_correct: int
) -> dict[str, Any]:
    """The measure by its numbers of right predictions, as the fields of `FirstErrorScores`."""
    # One division of whole numbers, so that equal measures are equal floats.
    weight = error_hits * num_correct + correct_hits * num_error
    return {
        "accuracy_error": error_hits / num_error,
        "accuracy_correct": correct_hits / num_correct,
        "f1": 2 * error_hits * correct_hits / weight if weight else 0.0,
        "num_error": num_error,
        "num_correct": num_correct,
    }


def count_classes(labels: Sequence[int]) -> tuple[int, int]:
    """Numbers of erroneous and of correct solutions.

    Raises:
        DataError: if one is 0.
    """
    num_correct = sum(label == -1 for label in labels)
    num_error = len(labels) - num_correct
    if not (num_error and num_correct):
        raise DataError(
            "F1 needs erroneous solutions and correct ones (label −1), got "
            f"{num_error} and {num_correct}. Add solutions of the other class."
        )
    return num_error, num_correct


def check_steps(steps: Sequence[int], what: str) -> None:
    """Refuse what is no step.

    Raises:
        DataError: if an entry is not a whole number of at least −1.
    """
    for index, step in enumerate(steps):
        if isinstance(step, bool) or not isinstance(step, Integral) or step < -1:
            raise DataError(
                f"The {what} of solution {index} must be a step, counted from 0, or −1 for no "
                f"error, got {step!r}."
            )
