"""A column of a data file; what is wrong with it is said of the file, not of a recipe's keys."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_ext.errors import DataError
from trl_ext.tasks.loading import BUILDERS, load_splits, says_no_rows


def column_of(name: str, column: str, kind: Any = str) -> list[Any]:
    """A column of a dataset's `train` split, as a list.

    Args:
        name: of a .jsonl, .json, .parquet or .csv file, or of a dataset's folder.
        column: that holds the rows.
        kind: the types that a row may have.

    Raises:
        DataError: if it cannot be read, or has no such column.
    """
    dataset = _dataset(name, column)
    columns = dataset.column_names or []
    if column not in columns:
        raise DataError(
            f"{name} has no column {column!r}; its columns are {', '.join(columns)}. Name the one "
            "that is meant, or rename it."
        )
    rows = list(dataset[column])
    wrong = next((index for index, row in enumerate(rows) if not isinstance(row, kind)), None)
    if wrong is not None:
        raise DataError(
            f"{name}, row {wrong}: the column {column!r} holds a {type(rows[wrong]).__name__}, "
            "not a text. Name a column of texts."
        )
    return rows


def _dataset(name: str, column: str) -> Any:
    path = Path(name).expanduser()
    if not path.is_file() and not path.is_dir():
        raise DataError(
            f"{name} is a pipe or a device, and a {path.suffix} is read as a whole. Save it to a "
            "file first, or give plain text, one text a line."
        )
    try:
        with _progress_on_terminals_only():
            return load_splits({"dataset_name": name})[0]
    except DataError as error:
        cause = error.__cause__
        reason = cause and (cause.__cause__ or cause)
        if reason is None:
            raise DataError(
                f"{name} has no split 'train', which is the one that is read. Save the rows as "
                "that split, or as one file."
            ) from error
        if says_no_rows(reason):
            raise DataError(
                f"{name} has no rows. Write at least one, with the column {column!r}."
            ) from error
        first_line = (str(reason).strip() or "no reason given").splitlines()[0].rstrip(".")
        raise DataError(
            f"{name} cannot be read: {type(reason).__name__}: {first_line}. Is it cut, or of "
            f"another format than its name says? It may be a {', '.join(BUILDERS)} file, or plain "
            "text with one text a line, called .txt."
        ) from error


@contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    from datasets import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
