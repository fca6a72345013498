"""Completions to score, with their steps and labels, read row by row from files."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.encoding import short
from trl_ext.gibbs_prm.file_formats import MAKERS, Row
from trl_ext.gibbs_prm.raw_rows import READERS, raw_rows

__all__ = ["FORMATS", "Row", "read_rows"]

FORMATS = tuple(MAKERS)

_KEYS = (
    'plain has "prompt" and "completion" or "completions"; processbench "problem", "steps", '
    '"final_answer_correct" and "label"; prm800k "question" and "label"'
)


def read_rows(path: str | Path, *, format: str = "auto") -> Iterator[Row]:
    """The rows of a file, one after the other; only a few are in memory at a time.

    "plain" has the keys prompt and completion, and may have steps, one of label, correct and
    reward, answer and id. With completions, a list, in place of completion, each of these but id
    is a list with one entry for each. "processbench" has problem, steps, final_answer_correct and
    label (the first wrong step from 0; −1: none). "prm800k" has question.problem and label.steps:
    of each step what was chosen is taken, or what a human wrote; where there is neither, the
    solution ends, with what is rated −1 there. In these two the completion is made of its steps,
    with an empty line between them.

    Args:
        path: of a .jsonl, .json (an array, or one object a line), .parquet or .csv file. In a
            .csv file texts are as they are; lists, labels and rewards are JSON.
        format: "auto" tells the three by their keys.

    Raises:
        ConfigError: for an unknown format.
        DataError: at once if there is no such file or its ending is unknown; while reading if it
            is empty, cannot be read, or a row is not what its format says.
    """
    path = Path(path).expanduser()
    if format not in ("auto", *FORMATS):
        close = difflib.get_close_matches(str(format), ["auto", *FORMATS], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"format is {format!r}; it must be auto, {', '.join(FORMATS)}.{hint}")
    if not path.exists() or path.is_dir():
        raise DataError(f"There is no file {str(path)!r}.{_neighbour(path)}")
    if not path.is_file():
        raise DataError(
            f"{path} is a pipe or a device, which can be read only once. Write the rows into a "
            "file."
        )
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{path}: the ending {path.suffix!r} is none of {', '.join(READERS)}. Convert the "
            "file to one of these."
        )
    return _rows(path, format)


def _rows(path: Path, format: str) -> Iterator[Row]:
    first = ""
    maker = MAKERS.get(format)
    for where, row in raw_rows(path):
        if not isinstance(row, dict):
            raise DataError(f"{where}: the row is {short(row)}; it must be an object with keys.")
        if format == "auto":
            found = _recognised(row, where)
            maker = maker or MAKERS[found]
            if maker is not MAKERS[found]:
                raise DataError(
                    f"{where}: the row is in the format {found}, and that of {first} is not. Write "
                    "all rows of a file in one format."
                )
        first = first or where
        assert maker is not None
        yield maker(row, where)
    if not first:
        raise DataError(f"{path} is empty. Write at least one row: {_KEYS}.")


def _recognised(row: dict[str, Any], where: str) -> str:
    if "prompt" in row or "completion" in row or "completions" in row:
        return "plain"
    if "question" in row:
        return "prm800k"
    if "problem" in row:
        return "processbench"
    raise DataError(
        f"{where}: the keys {short(list(row))} are those of no format: {_KEYS}. Rename them."
    )


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" Nor is there a directory {str(path.parent)!r}."
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f" Did you mean {str(path.parent / close[0])!r}?" if close else ""
