"""What one row of comparisons has to be."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any


class WrongRow(Exception):
    """What is wrong with a row; it becomes a `DataError` with the number of the row."""


def ranked(row: dict[str, Any]) -> dict[str, Any]:
    """A checked ranking: its `ranks`.

    Raises:
        WrongRow: if it is none.
    """
    kind, completions = _kind(row["prompt"], "prompt"), row["completions"]
    if not isinstance(completions, list):
        raise WrongRow(f"completions is {_short(completions)}; it must be a list of completions.")
    for k, completion in enumerate(completions):
        if _kind(completion, f"completion {k}") != kind:
            raise WrongRow(
                f"completion {k} is {_short(completion)}, and the prompt is {kind}. Write both in "
                "one way."
            )
    standings = []
    if row.get("ranks") is not None:
        ranks = _numbers(row["ranks"], "ranks", "rank", len(completions))
        standings.append(_standings(ranks))
    if row.get("scores") is not None:
        scores = _numbers(row["scores"], "scores", "score", len(completions))
        standings.append(_standings([-score for score in scores]))
    if not standings:
        raise WrongRow("it has neither ranks nor scores. Leave out rows that nobody ranked.")
    if standings[0] != standings[-1]:
        raise WrongRow(
            f"ranks {row['ranks']} and scores {row['scores']} order the completions differently: 1 "
            "is the best rank, and a higher score is better. Remove the column that is wrong."
        )
    return {"ranks": standings[0]}


def paired(row: dict[str, Any]) -> dict[str, Any]:
    """A checked pair; nothing is added to it.

    Raises:
        WrongRow: if it is none.
    """
    names = [name for name in ("prompt", "chosen", "rejected") if name in row]
    kinds = {name: _kind(row[name], name) for name in names}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise WrongRow(f"its parts are of different kinds: {told}. Write them in one way.")
    return {}


def _kind(value: Any, what: str) -> str:
    """What a prompt or completion is written as."""
    if isinstance(value, str):
        return "a text"
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return "messages"
    raise WrongRow(
        f"the {what} is {_short(value)}; it must be a text, or a list of messages with role and "
        "content."
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _numbers(values: Any, column: str, what: str, completions: int) -> list[float]:
    if not isinstance(values, list) or len(values) != completions:
        size = f"{len(values)} {column}" if isinstance(values, list) else f"{column} {values!r}"
        raise WrongRow(
            f"it has {completions} completions and {size}; each completion needs one {what}."
        )
    for k, value in enumerate(values):
        check_number(value, f"{what} of completion {k}", "a finite number")
        if what == "rank" and value < 1:
            raise WrongRow(
                f"the rank of completion {k} is {value!r}; ranks count from 1, the best. Numbers "
                "of which higher is better belong into the column 'scores'."
            )
    return values


def check_number(value: Any, what: str, allowed: str) -> None:
    """Whether a cell is a finite number.

    Raises:
        WrongRow: if not; with what it is, and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise WrongRow(f"the {what} is {_short(value)}; it must be {allowed}.")


def _standings(values: Sequence[float]) -> list[float]:
    """1 + how many are lower, of each."""
    return [1.0 + sum(other < value for other in values) for value in values]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
