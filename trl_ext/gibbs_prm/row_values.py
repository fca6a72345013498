"""The values of a row: of which kind each key must be, and the error where one is not."""

import difflib
import json
import sys
from collections.abc import Callable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from trl_ext.errors import DataError
from trl_ext.gibbs_prm.encoding import short

# What a plain row may say of each completion: the first of these keys that it has.
STEPS, ANSWERS = ("steps",), ("answer", "answers")
LABELS = ("label", "labels", "correct", "reward", "rewards")
FLAGS = (*LABELS, "final_answer_correct")  # true, false or a number
_NAMED = 4  # different texts that an error names


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
        hint = as_texts(row[key]) if key in FLAGS else ""
        raise DataError(f"{where}: {parent}{key} is {short(row[key])}; it must be {allowed}.{hint}")
    return row[key]


def as_texts(labels: Any) -> str:
    """A sentence on labels that are texts, such as "right" or "no"; nothing where none is."""
    found = labels if isinstance(labels, list | tuple) else [labels]
    texts = list(dict.fromkeys(repr(label) for label in found if isinstance(label, str)))
    if not texts:
        return ""
    named = " and ".join(texts[:_NAMED]) + (" and others" if len(texts) > _NAMED else "")
    kind = "is a text" if len(texts) == 1 else "are texts"
    return f" {named} {kind}: write true for what is right and false for what is not, unquoted."


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is finite, also as a float: JSON has whole numbers of any size."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) <= sys.float_info.max


def is_list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(is_right, value))


def is_said(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)
    )


def _is_label(value: Any) -> bool:
    return is_bool(value) or is_number(value)


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


def _are(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _is_place(value: Any) -> bool:
    return is_count(value) and value >= 0


# Of a scored completion: what must be there, and what may.
_SCORED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "row": (_is_place, "a whole number from 0"),
    "sample": (_is_place, "a whole number from 0"),
    "prompt": (is_said, SAID),
    "completion": (is_said, SAID),
    "beta": (lambda value: is_number(value) and value > 0, "a number greater than 0"),
    "steps": (_are(is_text), "a list of texts"),
    "step_ends": (_are(is_count), "a list of whole numbers"),
    "prefix_scores": (_are(is_number), "a list of finite numbers"),
    "merged_into": (_are(_is_place), "a list of whole numbers from 0"),
    "notes": (_are(is_text), "a list of texts"),
    "tokens": (_are(is_text), "a list of texts"),
    "token_log_ratios": (_are(is_number), "a list of finite numbers"),
}
_KNOWN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "label": KINDS["label"],
    "answer": KINDS["answer"],
    "first_error": (lambda value: is_count(value) and value >= -1, "a whole number from -1"),
}


def check_scored(record: Any, where: str) -> None:
    """Whether a row is a scored completion, as `trl_ext score` writes them.

    Raises:
        DataError: if not; with the key.
    """
    missing = sorted(set(_SCORED) - set(record if is_object(record) else ()))
    if missing:
        raise DataError(
            f"{where}: this is no scored completion: there is no {missing[0]!r}. `trl_ext score` "
            "writes them."
        )
    for key, (is_right, allowed) in (_SCORED | _KNOWN).items():
        value = record.get(key)
        if not is_right(value) and (value is not None or key in _SCORED):
            raise DataError(f"{where}: {key} is {short(value)}; it must be {allowed}.")
    _check_counts(record, where)


def _check_counts(record: dict[str, Any], where: str) -> None:
    """Whether the lists of a scored completion belong together."""
    pairs = (("step_ends", "steps"), ("prefix_scores", "steps"), ("token_log_ratios", "tokens"))
    for one, other in pairs:
        if len(record[one]) != len(record[other]):
            raise DataError(
                f"{where}: {one} has {len(record[one])} entries, and {other} has "
                f"{len(record[other])}. Score the completion once more."
            )
    merged, number = record["merged_into"], len(record["steps"])
    asked = len(merged) or number
    first_error = record.get("first_error")
    if any(step >= number for step in merged) or (first_error or 0) >= max(asked, 1):
        raise DataError(
            f"{where}: merged_into {short(merged)} or first_error {first_error} names a step that "
            f"is not there: the completion has {number}. Steps are counted from 0."
        )


def line_of(record: Mapping[str, Any]) -> str:
    """A row as a line of JSON that every reader takes.

    Dates and decimals of a parquet file are texts, NaN and infinity null; half a character, which
    UTF-8 has not, is written as its number.

    Raises:
        DataError: if a column holds what JSON has not, such as bytes.
    """

    def plain(value: Any) -> str:
        if isinstance(value, date | time | timedelta | Decimal):
            return value.isoformat() if isinstance(value, date | time) else str(value)
        raise DataError(
            f"Row {record.get('row')} of the input has a column with {short(value)}, a "
            f"{type(value).__name__}, which JSON does not have. Leave the column out of the input."
        )

    try:
        text = json.dumps(record, ensure_ascii=False, default=plain, allow_nan=False)
    except ValueError:  # NaN
        finite = json.loads(json.dumps(record, default=plain), parse_constant=lambda _: None)
        text = json.dumps(finite, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text))
    return text + "\n"
