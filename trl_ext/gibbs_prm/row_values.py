"""The values of a row: of which kind each key must be, and the error where one is not."""

import difflib
import math
from collections.abc import Callable
from typing import Any

from trl_ext.errors import DataError
from trl_ext.gibbs_prm.encoding import short

# What a plain row may say of each completion: the first of these keys that it has.
STEPS, ANSWERS = ("steps",), ("answer", "answers")
LABELS = ("label", "labels", "correct", "reward", "rewards")


def take(
    row: dict[str, Any],
    key: str,
    where: str,
    is_right: Callable[[Any], bool],
    allowed: str,
    parent: str = "",
) -> Any:
    """The value of a key that must be there and of its kind."""
    if key not in row:
        close = difflib.get_close_matches(key, list(row), n=1)
        hint = f" Did you mean to rename {close[0]!r}?" if close else ""
        raise DataError(
            f"{where}: there is no key {parent + key!r}, but {short(list(row))}.{hint} It is "
            f"{allowed}."
        )
    if not is_right(row[key]):
        raise DataError(f"{where}: {parent}{key} is {short(row[key])}; it must be {allowed}.")
    return row[key]


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(is_right, value))


def is_said(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)
    )


def _is_label(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_steps(value: Any) -> bool:
    return isinstance(value, list) and (all(map(is_text, value)) or all(map(is_count, value)))


def are_rated(value: Any) -> bool:
    return isinstance(value, list) and all(
        is_object(c) and is_text(c.get("text")) and c.get("rating") in (-1, 0, 1, None)
        for c in value
    )


SAID = 'a text or a list of messages {"role": "user", "content": "…"}'
RATED = 'a list of objects with "text" and "rating" (-1, 0, 1 or null)'


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (_are_steps, "a list of texts, or of the characters at which they end"),
    **dict.fromkeys(LABELS, (_is_label, "true, false or a finite number")),
    "correct": (is_bool, "true or false"),
    **dict.fromkeys(ANSWERS, (is_text, "a text")),
}
