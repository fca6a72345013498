"""Scored completions in a file: written as they come, gone on with after a kill, read back.

Until everything is scored the rows are in `<output>.partial`, JSON lines behind a first line that
says what is being scored with what. It becomes the output, .jsonl or .parquet, at the end.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from trl_ext.errors import ConfigError, DataError, RunError
from trl_ext.gibbs_prm.raw_rows import raw_rows
from trl_ext.gibbs_prm.row_values import line_of
from trl_ext.gibbs_prm.scored_row import ScoredRow

ENDINGS = (".jsonl", ".parquet")


def read_scored(path: str | Path) -> Iterator[ScoredRow]:
    """The rows of a scored file, .jsonl or .parquet, one after the other.

    Raises:
        DataError: if there is no such file, or a row is no scored completion.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        partial = path.name and partial_of(path)
        hint = f" {partial} is not finished; score on." if partial and partial.is_file() else ""
        raise DataError(f"There is no scored file {str(path)!r}.{hint}")
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path}: the ending must be one of {', '.join(ENDINGS)}.")
    where = None
    for where, record in raw_rows(path):
        yield ScoredRow.of_record(record, where)
    if where is None:
        raise DataError(f"{path} holds no scored completion.")


def partial_of(output: Path) -> Path:
    """Where the rows are until all are there."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path, force: bool) -> None:
    """Whether an output can be written, before there is something to write; makes its folder.

    Raises:
        ConfigError: if not.
    """
    if output.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{output}: the ending must be one of {', '.join(ENDINGS)}.")
    for path in (output, partial_of(output)):
        if path.exists() and not path.is_file():
            raise ConfigError(f"{output} cannot be written: {path} is no file. Name a file.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: there is no folder {output.parent}, nor can it be made "
            f"({error.strerror}). Name a file in a folder of yours."
        ) from error
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"{output}: you may not write there. Name a file in a folder of yours.")
    if os.path.lexists(output) and not force:
        raise ConfigError(
            f"{output} exists and is left alone. Give another name, or --force to replace it."
        )


class ScoredFile:
    """An output on its way.

    Args:
        output: the file that there will be.
        about: what is scored with what; another scoring does not go on with the file.
        force: begin anew whatever is there.

    Attributes:
        done: completions that are in the file already.

    Raises:
        ConfigError: if a file of another scoring is under way there.
        RunError: if it cannot be read or written.
    """

    def __init__(self, output: Path, about: Mapping[str, Any], *, force: bool = False):
        self.output = output
        self.partial = partial_of(output)
        self.about = json.loads(json.dumps(about))
        self.done = 0
        self._new = output.with_name(output.name + ".partial.new")
        try:
            is_there = self.partial.exists()
            # All reading and writing is by this handle: on Windows others may not read what it
            # holds locked.
            self._file = self.partial.open("ab+")
            self._lock()
            if force or not is_there:
                self._begin()
            else:
                self._go_on()
        except OSError as error:
            raise self._not_written(error) from error

    def _lock(self) -> None:
        """Keep a second process out, until this one ends or closes the file."""
        if not lock_descriptor(self._file.fileno(), blocking=False):
            self._file.close()
            raise RunError(
                f"{self.partial} is being written by another process, which scores into "
                f"{self.output}. Wait for its end, or give another --output."
            )

    def _begin(self) -> None:
        self._file.truncate(0)
        self._file.write(json.dumps({"scoring": self.about}).encode() + b"\n")
        self._file.flush()

    def _go_on(self) -> None:
        """Count what is there; drop a last line that a kill left half written."""
        self._file.seek(0)
        before = _about_of(self._file.readline())
        if before is None:
            self._file.close()
            raise ConfigError(
                f"{self.partial} is in the way, and is no scoring that could be gone on with. "
                "Move it away, or give --force to begin anew."
            )
        whole = self._file.tell()
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self.done += 1
            whole += len(line)
        if before == self.about:
            self._file.truncate(whole)
        elif self.done:
            self._file.close()
            self._refuse(before)
        else:
            self._begin()  # what nothing was scored with yet

    def _refuse(self, before: Mapping[str, Any]) -> None:
        changed = [k for k in self.about if before.get(k) != self.about[k]]
        key = [*changed, *(k for k in before if k not in self.about)][0]
        raise ConfigError(
            f"{self.partial}, with {self.done} completions, was begun with {key}: "
            f"{before.get(key)!r}, and now it is {self.about.get(key)!r}. Go on as it was begun, "
            "give another --output, or --force to begin anew."
        )

    def write(self, rows: list[ScoredRow]) -> None:
        """Add rows and have them on disk.

        Raises:
            RunError: if they cannot be written.
        """
        try:
            self._file.writelines([line_of(row.record()).encode() for row in rows])
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._not_written(error) from error
        self.done += len(rows)

    def finish(self) -> None:
        """Turn the rows into the output, which replaces what was there as a whole.

        Raises:
            RunError: if it cannot be written.
        """
        try:
            if self.output.suffix.lower() == ".parquet":
                self._to_parquet(self._new)
            else:
                self._file.seek(0)
                self._file.readline()
                with self._new.open("wb") as file:
                    shutil.copyfileobj(self._file, file)
            self._new.replace(self.output)
            self._remove()
        except OSError as error:
            raise self._not_written(error) from error
        finally:
            self._file.close()

    def close(self) -> None:
        """Leave what is scored, to be gone on with; nothing where nothing is."""
        if not self._file.closed and not self.done:
            self._remove()
        self._file.close()

    def _remove(self) -> None:
        if os.name == "nt":  # which removes no file that is open
            self._file.close()
        # Still locked: nobody goes on with what is removed.
        self.partial.unlink(missing_ok=True)

    def _to_parquet(self, new: Path) -> None:
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        try:
            # Of all rows: a column that is empty in the first ones has its kind from later ones.
            schemas = [pyarrow.Table.from_pylist(_filled(w)).schema for w in self._windows()]
            schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
            with ParquetWriter(new, schema) as writer:
                for records in self._windows():
                    writer.write_table(pyarrow.Table.from_pylist(records, schema=schema))
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
            new.unlink(missing_ok=True)
            lines = self.output.with_suffix(".jsonl")
            raise RunError(
                f"{self.output}: the rows do not fit the columns of a parquet file: "
                f"{str(error).rstrip('.')}. They are in {self.partial}, all of them: `tail -n +2 "
                f"{self.partial} > {lines}` makes a .jsonl of them. Or leave columns of "
                "several kinds out of the input."
            ) from error

    def _windows(self) -> Iterator[list[Any]]:
        window: list[Any] = []
        self._file.seek(0)
        self._file.readline()
        for line in self._file:
            window.append(json.loads(line))
            if len(window) == 512:
                yield window
                window = []
        if window:
            yield window

    def _not_written(self, error: OSError) -> RunError:
        return RunError(
            f"{error.filename or self.partial} cannot be written: {error.strerror}. What is scored "
            f"so far is in {self.partial}; the same command goes on from there."
        )


def _filled(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every record with the keys of all: arrow looks at those of the first alone."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    return [{key: record.get(key) for key in keys} for record in records]


def _about_of(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    about = found.get("scoring") if isinstance(found, dict) else None
    return about if isinstance(about, dict) and line.endswith(b"\n") else None
