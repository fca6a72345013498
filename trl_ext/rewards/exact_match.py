"""One point for the right answer and nothing else."""

from collections.abc import Sequence
from typing import Any

from trl_ext.errors import RewardError
from trl_ext.rewards.reading import completion_text


def exact_match(
    completions: Sequence[Any],
    answer: Sequence[Any] | None = None,
    ignore_case: bool = False,
    **columns: Any,
) -> list[float]:
    """1 where a completion equals the column `answer`, else 0; white space around it is ignored."""
    if answer is None:
        raise RewardError("The reward exact_match needs the dataset to have a column 'answer'.")

    def normal(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    return [
        float(normal(completion_text(completion)) == normal(str(right)))
        for completion, right in zip(completions, answer, strict=True)
    ]
