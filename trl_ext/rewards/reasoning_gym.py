"""The reward of reasoning-gym: a task's own verifier judges each completion."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

from trl_ext.errors import RewardError
from trl_ext.rewards.reading import completion_text, lenient_answer, strict_answer

READERS = {"strict": strict_answer, "lenient": lenient_answer}


def reasoning_gym(
    completions: Sequence[Any],
    task: Sequence[str] | None = None,
    entry: Sequence[str] | None = None,
    question: Sequence[str] | None = None,
    answer: Sequence[str | None] | None = None,
    reader: Literal["strict", "lenient"] = "strict",
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float]:
    """Score completions of `dataset_name: reasoning_gym/<task>`, mostly in [0, 1].

    Some verifiers give part of a point to an answer that merely contains the right one; the
    metric `reasoning_gym/solved` is the share of full points.

    Args:
        completions: texts or lists of messages.
        task, entry, question, answer: the dataset's columns.
        reader: "strict" hands the verifier the whole completion, stripped; "lenient" what is in
            its last <answer></answer>, else its last number where one is expected, else its first
            line.
        log_metric: TRL's; logs the share solved.
    """
    if reader not in READERS:
        raise RewardError(
            f"reasoning_gym: reader is {reader!r}; it must be {' or '.join(READERS)}."
        )
    if task is None or entry is None or question is None or answer is None:
        raise RewardError(
            "The reward reasoning_gym needs the columns task, entry, question and answer, which "
            "`dataset_name: reasoning_gym/<task>` makes. For other data take exact_match or your "
            "own function."
        )
    read = READERS[reader]
    scores = [
        _score(read(completion_text(said), right), name, stored, asked, right)
        for said, name, stored, asked, right in zip(
            completions, task, entry, question, answer, strict=True
        )
    ]
    if log_metric is not None:
        log_metric("reasoning_gym/solved", sum(s >= 1 for s in scores) / max(len(scores), 1))
    return scores


def _score(reply: str, task: str, entry: str, question: str, answer: str | None) -> float:
    stored = json.loads(entry)
    verifier = _verifier(task, json.dumps(stored["settings"]))
    try:
        return float(
            verifier(
                reply, {"question": question, "answer": answer, "metadata": stored["metadata"]}
            )
        )
    except Exception:
        # Some verifiers raise on a reply they cannot parse ("int('seven')"). That is the reply's
        # fault: the same entry was judged without an error when the dataset was made.
        return 0.0


@lru_cache(maxsize=64)
def _verifier(task: str, settings: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym.factory import create_dataset

    return create_dataset(task, **json.loads(settings), seed=0, size=1).score_answer
