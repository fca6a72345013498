"""Samples on their way to a file: kept as they come, gone on with after a kill, written at last."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from trl_ext.collect.forms import Row
from trl_ext.errors import DataError
from trl_ext.gibbs_prm.scored_file import ScoredFile

_WINDOW = 512  # rows in memory at a time


class _Record:
    """A row as `ScoredFile` takes it."""

    def __init__(self, row: Row):
        self._row = row

    def record(self) -> Row:
        return self._row


class Samples:
    """Every sample so far, in `<output>.samples.partial`, behind a line that says of what.

    Args:
        output: the file that there will be.
        about: what is sampled with what; other samples are not gone on with.
        force: begin anew whatever is there.

    Attributes:
        done: samples that are there.

    Raises:
        ConfigError: if the samples there are others.
        RunError: if they cannot be read or written.
    """

    def __init__(self, output: Path, about: Mapping[str, Any], *, force: bool):
        self._file = ScoredFile(output.with_name(output.name + ".samples"), about, force=force)
        self.path = self._file.partial

    @property
    def done(self) -> int:
        return self._file.done

    def write(self, rows: list[Row]) -> None:
        """Add samples and have them on disk.

        Raises:
            RunError: if they cannot be written.
        """
        records: list[Any] = [_Record(row) for row in rows]
        self._file.write(records)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Close the file if the body fails, and say where the samples are."""
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, KeyboardInterrupt) and self.done:
                print(
                    f"\n{self.done} completions are kept in {self.path}; the same command goes on "
                    "there.",
                    file=sys.stderr,
                )
            raise

    def rows(self) -> Iterator[Row]:
        """The samples, one after the other."""
        with self.path.open(encoding="utf-8") as lines:
            next(lines)
            yield from map(json.loads, lines)

    def remove(self) -> None:
        """Remove the file: what was wanted of it is written."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the samples, to be gone on with."""
        self._file.close()


def write_rows(output: Path, rows: Iterable[Row], form: str) -> int:
    """Write a .jsonl or .parquet file, which is there only once it is whole; the number of rows.

    Raises:
        DataError: if there is no row.
        RunError: if it cannot be written.
    """
    file = ScoredFile(output, {}, force=True)
    try:
        left = iter(rows)
        while window := [_Record(row) for row in islice(left, _WINDOW)]:
            records: list[Any] = window
            file.write(records)
        if not file.done:
            raise DataError(_nothing(output, form))
        file.finish()
    finally:
        file.close()
    return file.done


def _nothing(output: Path, form: str) -> str:
    if form == "completions":
        return (
            f"{output} is not written: no reward function gave a number for any completion. Look "
            "at what the reward_funcs return, or take others."
        )
    return (
        f"{output} is not written: in no group is one completion better than another, so there "
        f"are no {form}. Raise num_generations or temperature, or take --as completions."
    )
