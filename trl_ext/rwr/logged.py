"""Logged completions, all rows: one pass over a dataset of any size, and what is kept of it."""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_ext.errors import DataError
from trl_ext.rwr.logged_row import Needed, RowReader


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


@contextmanager
def as_utf8(name: str) -> Iterator[None]:
    """What is read of a dataset in the body must be UTF-8, which nothing looks at before.

    Raises:
        DataError: if it is not.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} holds a text that is not UTF-8: {error}. Write its file as UTF-8, as with "
            "`iconv -f latin1 -t utf-8 FILE`."
        ) from error


def _rows_of(batches: Iterable[Mapping[str, Sequence[Any]]]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))
