"""A row of logged completions: what it must look like, and the numbers that weights come from."""

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from trl_ext.errors import DataError

# How far above 0 the rounding of half-precision sums may put a log-probability.
_ROUNDING = 1e-2
# Says of a row that was made of lists which it was: their row, and the place in them.
PLACE = "place_in_lists"
# Readers of CSV and of JSON arrays, and of lines that arrow does not take, give NaN as None.
_NONE = "is None (missing, or a nan that the reader of the file gives as None)"
A_COMPLETION = "It must be a text, or a list of messages {role, content}."


@dataclass(frozen=True)
class Needed:
    """Which columns are read beside prompt, completion and reward.

    Attributes:
        group: rows of one group are compared; without it rows of one prompt are.
        value: taken from the reward.
        log_ratio: `logp` and `ref_logp`, whose difference weighs a row.
        ids: `prompt_ids` and `completion_ids` stand for prompt and completion.
        place: `PLACE` says of errors which row they are about.
        vocabulary: token ids are below it; None: any.
    """

    group: bool
    value: bool
    log_ratio: bool
    ids: bool
    place: bool = False
    vocabulary: int | None = None

    @property
    def columns(self) -> list[str]:
        """The names of all columns that are read."""
        optional = {
            "group": self.group,
            "value": self.value,
            "logp": self.log_ratio,
            "ref_logp": self.log_ratio,
            "prompt_ids": self.ids,
            "completion_ids": self.ids,
            PLACE: self.place,
        }
        return [
            "prompt",
            "completion",
            "reward",
            *(name for name, read in optional.items() if read),
        ]


@dataclass(frozen=True)
class LoggedRow:
    """The numbers of one row; hashes stand for texts.

    Attributes:
        key: of all that its weight depends on: equal keys, equal weights.
        group: of the rows that it is compared with.
        prompt: of its prompt.
        reward: as logged.
        score: the reward, less `value` where that is read.
        log_ratio: ref_logp − logp, nats; 0 where it is not read.
    """

    key: int
    group: int
    prompt: int
    reward: float
    score: float
    log_ratio: float


class RowReader:
    """Checks rows one after the other, and counts them for its errors.

    Args:
        needed: which columns are read.
        name: what to call the dataset in errors.
    """

    def __init__(self, needed: Needed, name: str):
        self.needed = needed
        self.name = name
        self.number = -1
        self._place = ""
        self._kinds: tuple[bool, bool] | None = None

    def read(self, row: Mapping[str, Any]) -> LoggedRow:
        """The numbers of the next row.

        Raises:
            DataError: if a value is missing, or is not what its column holds.
        """
        self.number += 1
        self._place = row.get(PLACE, str(self.number))
        prompt, completion = row.get("prompt"), row.get("completion")
        self._check_texts(prompt, completion)
        numbers = [self._number(row, "reward")]
        if self.needed.value:
            numbers.append(self._number(row, "value"))
        if self.needed.log_ratio:
            numbers += [self._logp(row, "ref_logp"), self._logp(row, "logp")]
        if self.needed.ids:
            self._check_ids(row)
        of_prompt = _bytes_of(prompt)
        group = self._group(row) if self.needed.group else of_prompt
        key = [group, of_prompt, _bytes_of(completion), struct.pack(f"{len(numbers)}d", *numbers)]
        score = numbers[0] - (numbers[1] if self.needed.value else 0.0)
        log_ratio = numbers[-2] - numbers[-1] if self.needed.log_ratio else 0.0
        return LoggedRow(_hash(*key), _hash(group), _hash(of_prompt), numbers[0], score, log_ratio)

    def _check_texts(self, prompt: Any, completion: Any) -> None:
        kinds = (isinstance(prompt, str), isinstance(completion, str))
        for name, value, is_text in zip(
            ("prompt", "completion"), (prompt, completion), kinds, strict=True
        ):
            if not is_text and not _is_messages(value):
                raise self._wrong(name, value, A_COMPLETION)
        if kinds[0] != kinds[1]:
            named = {True: "a text", False: "messages"}
            raise self._wrong(
                "completion",
                completion,
                f"It is {named[kinds[1]]}, and the prompt {named[kinds[0]]}. Write both in one "
                'way: a completion in messages is [{"role": "assistant", "content": ...}].',
            )
        if self._kinds not in (None, kinds):
            raise self._wrong(
                "prompt", prompt, "Row 0 is written in the other way. Write all alike."
            )
        self._kinds = kinds

    def _number(self, row: Mapping[str, Any], name: str) -> float:
        value = row.get(name)
        if not isinstance(value, Real) or isinstance(value, bool | np.bool_):
            raise self._wrong(name, value, _a_number_instead_of(value))
        if not math.isfinite(value):
            raise self._wrong(name, value, "It must be finite. Leave such rows out, or mend them.")
        return float(value)

    def _logp(self, row: Mapping[str, Any], name: str) -> float:
        value = self._number(row, name)
        if value > _ROUNDING:
            raise self._wrong(
                name, value, "A log-probability of a whole completion, in nats, is at most 0."
            )
        return value

    def _check_ids(self, row: Mapping[str, Any]) -> None:
        for name in ("prompt_ids", "completion_ids"):
            ids = row.get(name)
            if not isinstance(ids, Sequence | np.ndarray) or not all(map(_is_id, ids)):
                raise self._wrong(
                    name, ids, "It must be a list of token ids, whole numbers from 0."
                )
            size = self.needed.vocabulary
            if size is not None and max(ids, default=0) >= size:
                raise self._wrong(
                    name,
                    ids,
                    f"{max(ids)} is out of the vocabulary of the model, which has {size} tokens. "
                    "Are the ids of another tokenizer? Then remove the columns prompt_ids and "
                    "completion_ids, and the texts are tokenised anew. Or leave the row out.",
                )
        if not len(row["completion_ids"]):
            raise self._wrong("completion_ids", [], "A completion has at least one token.")

    def _group(self, row: Mapping[str, Any]) -> bytes:
        group = row.get("group")
        if isinstance(group, bool) or not isinstance(group, str | Integral):
            raise self._wrong("group", group, "It must be a text or a whole number in every row.")
        return _bytes_of(group if isinstance(group, str) else [int(group)])

    def _wrong(self, name: str, value: Any, allowed: str) -> DataError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        what = _NONE if value is None else f"is {shown}"
        return DataError(
            f"{self.name}, row {self._place} (counted from 0): {name} {what}. {allowed}"
        )


def _a_number_instead_of(value: Any) -> str:
    allowed = "It must be a finite number in every row."
    if value is None:
        return f"{allowed} Leave such rows out, or mend them."
    if isinstance(value, bool | np.bool_):
        return f"{allowed} Write 1 for True and 0 for False."
    if isinstance(value, str):
        return f"{allowed} Write numbers as such, and not as texts."
    return allowed


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value)
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, str):
        return b"t" + value.encode("utf-8", "surrogatepass")
    return b"j" + json.dumps(value, sort_keys=True, default=str).encode()


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(struct.pack("Q", len(part)))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")
