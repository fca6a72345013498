"""Logged completions: what their rows must look like, and the numbers that weights come from."""

import hashlib
import json
import math
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from trl_ext.errors import DataError

# How far above 0 the rounding of half-precision sums may put a log-probability.
_ROUNDING = 1e-2
A_COMPLETION = "It must be a text, or a list of messages {role, content}."


@dataclass(frozen=True)
class Needed:
    """Which columns are read beside prompt, completion and reward.

    Attributes:
        group: rows of one group are compared; without it rows of one prompt are.
        value: taken from the reward.
        log_ratio: `logp` and `ref_logp`, whose difference weighs a row.
        ids: `prompt_ids` and `completion_ids` stand for prompt and completion.
    """

    group: bool
    value: bool
    log_ratio: bool
    ids: bool

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


@dataclass(frozen=True)
class LoggedRows:
    """Of all rows what `LoggedRow` has of each, as arrays (N,).

    `prompts` are None where prompts are the groups, `log_ratios` where none are read.
    """

    keys: np.ndarray
    groups: np.ndarray
    prompts: np.ndarray | None
    rewards: np.ndarray
    scores: np.ndarray
    log_ratios: np.ndarray | None

    def __len__(self) -> int:
        """N."""
        return len(self.keys)


def read_rows(
    batches: Iterable[Mapping[str, Sequence[Any]]], needed: Needed, name: str
) -> LoggedRows:
    """One pass over batches of columns, of which 24 bytes a row are kept, and 8 for each option.

    Args:
        batches: column -> values, for some rows after the other.
        needed: which columns count.
        name: what to call the dataset in errors.

    Raises:
        DataError: at the first row that has no place here, with its number; or if there is none.
    """
    names = {"keys": "Q", "groups": "Q", "rewards": "d"}
    names |= {"prompts": "Q"} if needed.group else {}
    names |= {"scores": "d"} if needed.value else {}
    names |= {"log_ratios": "d"} if needed.log_ratio else {}
    columns = {column: array(kind) for column, kind in names.items()}
    reader = RowReader(needed, name)
    for row in _rows_of(batches):
        read = reader.read(row)
        for column, values in columns.items():
            values.append(getattr(read, column.removesuffix("s")))
    if not columns["keys"]:
        raise DataError(f"{name} is empty: it has no row to train on.")
    # The arrays of Python hand over their memory as it is.
    arrays = {column: np.frombuffer(columns[column], kind) for column, kind in names.items()}
    return LoggedRows(**{"prompts": None, "scores": arrays["rewards"], "log_ratios": None} | arrays)


def _rows_of(batches: Iterable[Mapping[str, Sequence[Any]]]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


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
        self._kinds: tuple[bool, bool] | None = None

    def read(self, row: Mapping[str, Any]) -> LoggedRow:
        """The numbers of the next row.

        Raises:
            DataError: if a value is missing, or is not what its column holds.
        """
        self.number += 1
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
            raise self._wrong(name, value, "It must be a finite number in every row.")
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
        what = "is missing (None)" if value is None else f"is {shown}"
        return DataError(f"{self.name}, row {self.number}: {name} {what}. {allowed}")


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
