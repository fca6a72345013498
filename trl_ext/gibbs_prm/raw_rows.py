"""Rows as they stand in .jsonl, .json, .parquet and .csv files, a few in memory at a time."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, TextIO

from trl_ext.errors import DataError
from trl_ext.gibbs_prm.encoding import short
from trl_ext.gibbs_prm.row_values import FLAGS, STEPS

_BATCH_ROWS = 64  # of a parquet file, in memory at a time
_CHUNK = 2**16  # characters of a .json file, read at a time


_CSV_FIELD = 2**31 - 1  # characters; Python's own limit, 131072, is less than a long completion
# What a cell of a .csv file holds as JSON; every other cell is a text.
_JSON_CELLS = {"completions", "answers", *STEPS, *FLAGS}
_WORD = re.compile(r"(?!NaN|Infinity|null)[^\W\d][\w -]*")  # what JSON has not unquoted


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(text, where, error) from error
    except (ValueError, RecursionError) as error:
        raise _not_readable(where, error) from error


def _not_readable(where: str, error: Exception) -> DataError:
    """For JSON that Python does not read: a number of thousands of digits, a thousand brackets."""
    reason = str(error).split(";")[0]
    return DataError(f"{where}: this JSON cannot be read: {reason}. Leave that value out.")


def _not_json(text: str, where: str, error: json.JSONDecodeError) -> DataError:
    around = text[max(0, error.pos - 30) : error.pos + 30]
    return DataError(
        f"{where}: this is not JSON: {error.msg} at {short(around)}. A .jsonl file has one object "
        "a line, and a .json file one array of objects."
    )


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of an array, one at a time in memory; or, as in .jsonl, one object a line."""
    with path.open(encoding="utf-8-sig") as file:
        text = _filled("", file)
        if text.startswith("["):
            yield from _elements(path, file, text)
            return
    yield from _json_lines(path)


def _elements(path: Path, file: TextIO, text: str) -> Iterator[tuple[str, Any]]:
    for index in count():
        where, mark = f"{path}, row {index}", "," if index else "["
        text = _filled(text, file)
        if text.startswith("]"):
            _check_end(path, file, text)
            return
        if not text.startswith(mark):
            raise DataError(
                f"{where}: the array goes on with {short(text[:30])}; it must be ',' or ']'. Is "
                "the file cut?"
            )
        text = _filled(text[1:], file)
        if not index and text.startswith("]"):
            _check_end(path, file, text)
            return
        element, text = _element(file, text, where)
        yield where, element


def _check_end(path: Path, file: TextIO, text: str) -> None:
    behind = _filled(text[1:], file)
    if behind:
        raise DataError(
            f"{path}: behind the end of the array the file goes on with {short(behind[:30])}. "
            "Write one array, or one object a line."
        )


def _filled(text: str, file: TextIO) -> str:
    """`text` from its first character that is no white space, read on for where there is none."""
    while not text.strip():
        text = file.read(_CHUNK)
        if not text:
            return ""
    return text.lstrip()


def _element(file: TextIO, text: str, where: str) -> tuple[Any, str]:
    """The first JSON value of `text` and of what follows in the file, and the text behind it."""
    while True:
        try:
            element, end = json.JSONDecoder().raw_decode(text)
            return element, text[end:]
        except json.JSONDecodeError as error:
            more = file.read(max(_CHUNK, len(text)))
            if not more:
                raise _not_json(text, where, error) from error
            text += more
        except (ValueError, RecursionError) as error:
            raise _not_readable(where, error) from error


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _check_header(path, reader.fieldnames or [])
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if None in cells or None in cells.values():
                    raise DataError(
                        f"{where}: the row has another number of cells than the header, which has "
                        f'{len(reader.fieldnames or [])}. Put texts with commas into "quotes".'
                    )
                yield where, {key: _cell(key, text, where) for key, text in cells.items()}
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.reader.line_num}: this is not CSV: {error}."
            ) from error


def _check_header(path: Path, names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}:1: two columns have the name {twice!r}. Rename one of them.")


def _cell(key: str, text: str, where: str) -> Any:
    if key not in _JSON_CELLS:
        return text
    # Python and its data frames write True and False.
    plain = {"": None, "true": True, "false": False}
    if text.lower() in plain:
        return plain[text.lower()]
    if key in FLAGS and _WORD.fullmatch(text):
        return text  # refused as a label that is a text, with what may be there
    return _parsed(text, f"{where}: {key}")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=_BATCH_ROWS)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"{path}, row {index}", row) for index, row in enumerate(rows))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a parquet file, or is cut: {error}.") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}


def raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row as it stands in the file, with its place there."""
    try:
        yield from READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text in UTF-8: {error.reason} at byte {error.start}. Convert it, for "
            "example with iconv."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
