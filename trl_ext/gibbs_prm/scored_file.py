"""Scored completions in a file: written as they come, gone on with after a kill, read back.

Until everything is scored the rows are in `<output>.partial`, JSON lines behind a first line that
says what is being scored with what. It becomes the output, .jsonl or .parquet, at the end.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigError, DataError, RunError
from trl_ext.gibbs_prm.scored import GibbsScores

ENDINGS = (".jsonl", ".parquet")
_OF_SCORES = tuple(f.name for f in fields(GibbsScores))
_DERIVED = ("step_rewards", "worst_step", "score")


@dataclass(frozen=True)
class ScoredRow:
    """A scored completion with where it comes from and what is known of it.

    Attributes:
        row, sample: which row of the input, and which of its completions, both from 0.
        scores: of its prefixes.
        id: of the row, if it has one.
        label: whether the completion is right, or its reward; None: not known.
        first_error: the first wrong step, of those that were given, from 0; −1: none; None: not
            known.
        answer: its final answer; None: not known.
        columns: what else the row had.
    """

    row: int
    sample: int
    scores: GibbsScores
    id: Any = None
    label: Any = None
    first_error: int | None = None
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON: the fields of the scores beside the row's own."""
        known = {
            name: value
            for name in ("id", "label", "first_error", "answer")
            if (value := getattr(self, name)) is not None
        }
        scores = {name: getattr(self.scores, name) for name in (*_OF_SCORES, *_DERIVED)}
        del scores["standard_errors"]  # of a sample, which this is not
        extra = {k: v for k, v in self.columns.items() if k not in scores}
        return {"row": self.row, "sample": self.sample, **known, **scores, **extra}

    @classmethod
    def of_record(cls, record: Any, where: str) -> "ScoredRow":
        """What `record` gave.

        Raises:
            DataError: if it is none.
        """
        needed = {"row", "sample", *_OF_SCORES} - {"standard_errors"}
        missing = sorted(needed - set(record)) if isinstance(record, dict) else sorted(needed)
        if missing:
            raise DataError(
                f"{where}: this is no scored completion: there is no {missing[0]!r}. `trl_ext "
                "score` writes them."
            )
        scores = GibbsScores(**{name: record[name] for name in _OF_SCORES if name in record})
        own = {f.name for f in fields(cls)} - {"scores", "columns"}
        rest = own | set(_OF_SCORES) | set(_DERIVED)
        return cls(
            scores=scores,
            columns={key: value for key, value in record.items() if key not in rest},
            **{name: record[name] for name in own if name in record},
        )


def read_scored(path: str | Path) -> Iterator[ScoredRow]:
    """The rows of a scored file, .jsonl or .parquet, one after the other.

    Raises:
        DataError: if there is no such file, or a row is no scored completion.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        partial = partial_of(path)
        hint = f" {partial} is not finished; score on." if partial.is_file() else ""
        raise DataError(f"There is no scored file {str(path)!r}.{hint}")
    if path.suffix.lower() == ".parquet":
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile

        try:
            batches = ParquetFile(path).iter_batches(batch_size=64)
        except (ArrowInvalid, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}.") from error
        records = (record for batch in batches for record in batch.to_pylist())
    else:
        records = _json_lines(path)
    number = 0
    for number, record in enumerate(records, start=1):
        yield ScoredRow.of_record(record, f"{path}:{number}")
    if not number:
        raise DataError(f"{path} holds no scored completion.")


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: this is not JSON: {error.msg}.") from error


def partial_of(output: Path) -> Path:
    """Where the rows are until all are there."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path, force: bool) -> None:
    """Whether an output can be written, before there is something to write.

    Raises:
        ConfigError: if not.
    """
    if output.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{output}: the ending must be one of {', '.join(ENDINGS)}.")
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"{output} cannot be written. Name a file in a folder that exists.")
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"{output}: you may not write there. Name a file in a folder of yours.")
    if output.exists() and not force:
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
        try:
            if self.partial.exists() and not force:
                self._go_on()
            else:
                self.partial.write_text(json.dumps({"scoring": self.about}) + "\n", "utf-8")
            self._file = self.partial.open("a", encoding="utf-8")
        except OSError as error:
            raise self._not_written(error) from error

    def _go_on(self) -> None:
        """Count what is there; drop a last line that a kill left half written."""
        with self.partial.open("rb+") as file:
            begin = file.readline()
            before = _about_of(begin)
            if before is None:
                raise ConfigError(
                    f"{self.partial} is in the way, and is no scoring that could be gone on with. "
                    "Move it away, or give --force to begin anew."
                )
            changed = [k for k in self.about if before.get(k) != self.about[k]]
            changed += [k for k in before if k not in self.about]
            if changed:
                key = changed[0]
                raise ConfigError(
                    f"{self.partial} was begun with {key}: {before.get(key)!r}, and now it is "
                    f"{self.about.get(key)!r}. Go on as it was begun, give another --output, or "
                    "--force to begin anew."
                )
            whole = file.tell()
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.done += 1
                whole += len(line)
            file.truncate(whole)

    def write(self, rows: list[ScoredRow]) -> None:
        """Add rows and have them on disk.

        Raises:
            RunError: if they cannot be written.
        """
        try:
            self._file.writelines(
                json.dumps(row.record(), ensure_ascii=False) + "\n" for row in rows
            )
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
        self._file.close()
        new = self.output.with_name(self.output.name + ".new")
        try:
            if self.output.suffix.lower() == ".parquet":
                self._to_parquet(new)
            else:
                with self.partial.open("rb") as rows, new.open("wb") as file:
                    rows.readline()
                    while part := rows.read(2**20):
                        file.write(part)
            new.replace(self.output)
            self.partial.unlink()
        except OSError as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        """Leave it as it is, to be gone on with."""
        self._file.close()

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
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            new.unlink(missing_ok=True)
            raise RunError(
                f"{self.output}: the rows do not fit the columns of a parquet file: {error}. They "
                f"are in {self.partial}, all of them; give an --output that ends with .jsonl, or "
                "leave columns of several kinds out of the input."
            ) from error

    def _windows(self) -> Iterator[list[Any]]:
        window: list[Any] = []
        with self.partial.open(encoding="utf-8") as file:
            next(file)
            for line in file:
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
