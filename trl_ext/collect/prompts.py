"""The prompts of a split: whether they can be collected for, and batches of them."""

import hashlib
from collections.abc import Iterator
from itertools import count, islice

import numpy as np
from datasets import Dataset, IterableDataset

from trl_ext.collect.forms import ADDED, FORMS, WRITTEN, Row
from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.row_values import line_of
from trl_ext.rwr.logged import as_utf8

Prompts = Dataset | IterableDataset
SPLITS = ("train", "test")
_IMAGES = ("image", "images")


def check_asked(split: str, limit: int | None, form: str) -> None:
    """Whether these are values that `collect` takes.

    Raises:
        ConfigError: if not.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
    is_count = isinstance(limit, int) and not isinstance(limit, bool) and limit > 0
    if limit is not None and not is_count:
        raise ConfigError(f"limit={limit!r} must be a whole number of at least 1, or None.")
    if form not in FORMS:
        raise ConfigError(f"form={form!r} must be one of {', '.join(FORMS)}.")


def check_rows(dataset: Prompts, split: str) -> None:
    """Whether completions can be written beside the columns of a dataset.

    Raises:
        DataError: if a column has the name of one that is written, or holds what JSON has not.
    """
    with as_utf8(f"The {split} split"):
        first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"The {split} split has no rows: there is nothing to sample for.")
    clash = [name for name in first if name in (*WRITTEN, *ADDED)]
    if clash:
        raise DataError(
            f"The {split} split has the column {', '.join(map(repr, clash))}, which is written "
            "beside the completions. Rename it, or leave it out. Written are: "
            f"{', '.join(sorted((*WRITTEN, *ADDED)))}."
        )
    images = [name for name in _IMAGES if name in first]
    if images:
        raise DataError(
            f"The {split} split has the column {images[0]!r}: rows of JSON and parquet files here "
            "hold texts and numbers, no images. Collect with prompts of text."
        )
    line_of(first)


def length_of(dataset: Prompts, limit: int | None) -> int | None:
    """How many prompts there are up to the limit; None if nobody knows."""
    if isinstance(dataset, IterableDataset):
        return limit  # an upper bound; a stream does not know its length
    return len(dataset) if limit is None else min(limit, len(dataset))


def _rows(dataset: Prompts, first: int, limit: int | None) -> Iterator[Row]:
    """The rows from `first` on, up to the limit."""
    rows = iter(dataset.skip(first) if first else dataset)
    return rows if limit is None else islice(rows, max(0, limit - first))


def batches_of(
    dataset: Prompts, first: int, limit: int | None, size: int
) -> Iterator[tuple[int, list[Row]]]:
    """(number of the first row, rows), `size` of them at a time; the last batch may be smaller."""
    rows = _rows(dataset, first, limit)
    for number in count(first, size):
        batch = list(islice(rows, size))
        if not batch:
            return
        yield number, batch


def seed_of(*numbers: int) -> int:
    """One seed from several numbers: others give another, neighbours too."""
    return int(np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(1)[0])


def digest_of(dataset: Prompts, limit: int | None) -> str | None:
    """What tells one dataset from another, or from itself when changed; not of a stream."""
    if isinstance(dataset, IterableDataset):
        return None
    digest = hashlib.sha256()
    with as_utf8("The dataset"):
        for row in _rows(dataset, 0, limit):
            digest.update(line_of(row).encode())
    return f"{length_of(dataset, limit)}, sha256 {digest.hexdigest()[:16]}"
