"""Logged completions as lists, one a prompt, turned into rows."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from trl_ext.errors import DataError
from trl_ext.rwr.logged_row import PLACE

# List form -> row form: each list has a value for each completion.
_LISTS = {
    "completions": "completion",
    "rewards": "reward",
    "logps": "logp",
    "ref_logps": "ref_logp",
    "completion_ids": "completion_ids",
}


def flattened(
    dataset: Dataset | IterableDataset, name: str, columns: list[str]
) -> Dataset | IterableDataset:
    """Row form of list form: a row for each completion, with what its prompt's row has beside.

    The column `PLACE` says of each where it was.

    Args:
        dataset: with the column `completions`, and other lists with one entry for each of them.
        name: what to call it in errors.
        columns: all of its columns.

    Raises:
        DataError: if a list is none or has another length, a column clashes, or all lists are
            empty.
    """
    lists = [column for column in _LISTS if column in columns]
    others = [column for column in columns if column not in lists]
    clash = [row for column, row in _LISTS.items() if row != column and row in others]
    if clash:
        raise DataError(
            f"{name} has the columns {clash[0]!r} and completions: give rows of one completion, or "
            f"of lists, which are {', '.join(_LISTS)}, and not both."
        )

    def flatten(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        flat: dict[str, list] = {_LISTS[column]: [] for column in lists}
        flat |= {column: [] for column in (*others, PLACE)}
        for at, number in enumerate(numbers):
            row = {column: batch[column][at] for column in columns}
            size = _length(row, lists, name, number)
            for column in lists:
                flat[_LISTS[column]] += row[column]
            for column in others:
                flat[column] += [row[column]] * size
            flat[PLACE] += [f"{number}, completion {place}" for place in range(size)]
        return flat

    rows = dataset.map(flatten, with_indices=True, batched=True, remove_columns=columns)
    if isinstance(rows, Dataset) and not len(rows):
        raise DataError(f"{name} has no completion: all of its lists are empty.")
    return rows


def _length(row: Mapping[str, Any], lists: list[str], name: str, number: int) -> int:
    for column in lists:
        if not isinstance(row[column], list):
            raise DataError(
                f"{name}, row {number} (counted from 0): {column} is {row[column]!r:.80}; it "
                "must be a list with one entry a completion."
            )
    sizes = {column: len(row[column]) for column in lists}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{column} {size}" for column, size in sizes.items())
        raise DataError(
            f"{name}, row {number} (counted from 0): its lists have different lengths: {told}."
        )
    return sizes["completions"]
