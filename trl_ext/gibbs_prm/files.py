"""Completions to score, with their steps and labels, read row by row from files."""

import csv
import difflib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any, TextIO

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.encoding import short

FORMATS = ("plain", "processbench", "prm800k")

_JOINT = "\n\n"  # between the steps of ProcessBench and PRM800K, in the completion made of them
_BATCH_ROWS = 64  # of a parquet file, in memory at a time
_CHUNK = 2**16  # characters of a .json file, read at a time
_CSV_FIELD = 2**31 - 1  # characters; Python's own limit, 131072, is less than a long completion
# What a plain row may say of each completion: the first of these keys that it has.
_STEPS, _ANSWERS = ("steps",), ("answer", "answers")
_LABELS = ("label", "labels", "correct", "reward", "rewards")
# What a cell of a .csv file holds as JSON; every other cell is a text.
_JSON_CELLS = {"completions", "final_answer_correct", "answers", *_STEPS, *_LABELS}
_KEYS = (
    'plain has "prompt" and "completion" or "completions"; processbench "problem", "steps", '
    '"final_answer_correct" and "label"; prm800k "question" and "label"'
)


@dataclass(frozen=True)
class Row:
    """A prompt with its completions, as a file has them.

    Attributes:
        prompt: a text or messages.
        completions: at least one, of the same kind.
        steps: of each completion, its texts or character ends; None: the file has none.
        labels: of each completion, whether it is right, or its reward; None: the file has none.
        first_errors: of each completion, the first wrong step, from 0, or −1: none is wrong; None:
            the file does not say.
        id: of the row; None: it has none.
        answers: of each completion, its final answer; None: the file has none.
        columns: everything else that the row has, to be written through.
    """

    prompt: Any
    completions: list[Any]
    steps: list[list[Any]] | None = None
    labels: list[Any] | None = None
    first_errors: list[int] | None = None
    id: Any = None
    answers: list[Any] | None = None
    columns: dict[str, Any] = field(default_factory=dict)


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
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"{path}: the ending {path.suffix!r} is none of {', '.join(_READERS)}. Convert the "
            "file to one of these."
        )
    return _rows(path, format)


def _rows(path: Path, format: str) -> Iterator[Row]:
    first = ""
    maker = _MAKERS.get(format)
    for where, row in _raw_rows(path):
        if not isinstance(row, dict):
            raise DataError(f"{where}: the row is {short(row)}; it must be an object with keys.")
        if format == "auto":
            found = _recognised(row, where)
            maker = maker or _MAKERS[found]
            if maker is not _MAKERS[found]:
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


def _plain(row: dict[str, Any], where: str) -> Row:
    prompt = _take(row, "prompt", where, _is_said, _SAID)
    several = row.get("completions") is not None
    if several and row.get("completion") is not None:
        raise DataError(f'{where}: the row has "completion" and "completions"; leave one out.')
    if several:
        completions = _take(row, "completions", where, _is_list_of(_is_said), f"a list, {_SAID}")
    else:
        completions = [_take(row, "completion", where, _is_said, _SAID)]
    if any(isinstance(c, str) != isinstance(prompt, str) for c in completions):
        raise DataError(
            f"{where}: of prompt and completion one is a text and the other is a list of messages. "
            "Write both in one way."
        )
    number = len(completions) if several else None
    used = {"prompt", "completion", "completions", "id"}
    steps, labels, answers = (
        _of_each(row, keys, where, number, used) for keys in (_STEPS, _LABELS, _ANSWERS)
    )
    columns = {key: value for key, value in row.items() if key not in used}
    return Row(prompt, completions, steps, labels, None, row.get("id"), answers, columns)


def _of_each(
    row: dict[str, Any], keys: tuple[str, ...], where: str, number: int | None, used: set[str]
) -> list[Any] | None:
    """What the first of the keys that the row has says of each completion; number: of these."""
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        return None
    used.add(key)
    is_right, allowed = _KINDS[key]
    if number is None:
        return [_take(row, key, where, is_right, allowed)]
    values = _take(row, key, where, _is_list_of(is_right), f"a list: for each completion {allowed}")
    if len(values) != number:
        raise DataError(
            f"{where}: {key} has {len(values)} entries, and there are {number} completions. Write "
            "one for each."
        )
    return values


def _processbench(row: dict[str, Any], where: str) -> Row:
    problem = _take(row, "problem", where, _is_text, "a text")
    steps = _take(row, "steps", where, _is_list_of(_is_text), "a list of at least one text")
    is_right = _take(row, "final_answer_correct", where, _is_bool, "true or false")
    label = _take(
        row,
        "label",
        where,
        lambda value: _is_count(value) and -1 <= value < len(steps),
        f"the first wrong step, from 0 to {len(steps) - 1}, or -1: none is wrong",
    )
    used = ("problem", "steps", "final_answer_correct", "label", "id")
    columns = {key: value for key, value in row.items() if key not in used}
    return Row(
        problem, [_JOINT.join(steps)], [steps], [is_right], [label], row.get("id"), None, columns
    )


def _prm800k(row: dict[str, Any], where: str) -> Row:
    question = _take(row, "question", where, _is_object, "an object")
    problem = _take(question, "problem", where, _is_text, "a text", "question.")
    label = _take(row, "label", where, _is_object, "an object")
    steps, first_error = [], -1
    marked = _take(label, "steps", where, lambda v: isinstance(v, list), "a list", "label.")
    for index, step in enumerate(marked):
        text, rating, goes_on = _chosen(step, where, f"label.steps[{index}]")
        if text is not None:
            steps.append(text)
        if rating == -1 and first_error == -1:
            first_error = index
        if not goes_on:
            break
    finish = label.get("finish_reason")
    columns = {key: value for key, value in row.items() if key not in ("question", "label", "id")}
    columns |= {"question": {k: v for k, v in question.items() if k != "problem"}}
    columns |= {"finish_reason": finish}
    labels = None if finish is None else [finish == "solution"]
    return Row(
        problem, [_JOINT.join(steps)], [steps], labels, [first_error], row.get("id"), None, columns
    )


def _chosen(step: Any, where: str, name: str) -> tuple[str | None, int | None, bool]:
    """Text and rating of a step, and whether the solution goes on behind it."""
    if not _is_object(step):
        raise DataError(f"{where}: {name} is {short(step)}; it must be an object.")
    found = _take(step, "completions", where, _are_rated, _RATED, f"{name}.")
    chosen, human = step.get("chosen_completion"), step.get("human_completion")
    if chosen is not None:
        _take(
            step,
            "chosen_completion",
            where,
            lambda value: _is_count(value) and 0 <= value < len(found),
            f"the number of one of the {len(found)} completions, from 0, or null",
            f"{name}.",
        )
        return found[chosen]["text"], found[chosen].get("rating"), True
    text = human.get("text") if isinstance(human, dict) else human
    if isinstance(text, str):
        return text, None, True
    wrong = next((c["text"] for c in found if c.get("rating") == -1), None)
    return wrong, None if wrong is None else -1, False


def _take(
    row: dict[str, Any],
    key: str,
    where: str,
    is_right: Callable[[Any], bool],
    allowed: str,
    parent: str = "",
) -> Any:
    """The value of a key that must be there and of its kind."""
    if key not in row:
        close = difflib.get_close_matches(key, list(row), n=1)
        hint = f" Did you mean to rename {close[0]!r}?" if close else ""
        raise DataError(
            f"{where}: there is no key {parent + key!r}, but {short(list(row))}.{hint} It is "
            f"{allowed}."
        )
    if not is_right(row[key]):
        raise DataError(f"{where}: {parent}{key} is {short(row[key])}; it must be {allowed}.")
    return row[key]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(is_right, value))


def _is_said(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)
    )


def _is_label(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_steps(value: Any) -> bool:
    return isinstance(value, list) and (all(map(_is_text, value)) or all(map(_is_count, value)))


def _are_rated(value: Any) -> bool:
    return isinstance(value, list) and all(
        _is_object(c) and _is_text(c.get("text")) and c.get("rating") in (-1, 0, 1, None)
        for c in value
    )


_SAID = 'a text or a list of messages {"role": "user", "content": "…"}'
_RATED = 'a list of objects with "text" and "rating" (-1, 0, 1 or null)'
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (_are_steps, "a list of texts, or of the characters at which they end"),
    **dict.fromkeys(_LABELS, (_is_label, "true, false or a finite number")),
    "correct": (_is_bool, "true or false"),
    **dict.fromkeys(_ANSWERS, (_is_text, "a text")),
}
_MAKERS = {"plain": _plain, "processbench": _processbench, "prm800k": _prm800k}


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
            return
        if not text.startswith(mark):
            raise DataError(
                f"{where}: the array goes on with {short(text[:30])}; it must be ',' or ']'. Is "
                "the file cut?"
            )
        text = _filled(text[1:], file)
        if not index and text.startswith("]"):
            return
        element, text = _element(file, text, where)
        yield where, element


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


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
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


def _cell(key: str, text: str, where: str) -> Any:
    if key not in _JSON_CELLS:
        return text
    # Python and its data frames write True and False.
    plain = {"": None, "true": True, "false": False}
    return plain[text.lower()] if text.lower() in plain else _parsed(text, f"{where}: {key}")


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


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}


def _raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row as it stands in the file, with its place there."""
    try:
        yield from _READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text in UTF-8: {error.reason} at byte {error.start}. Convert it, for "
            "example with iconv."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" Nor is there a directory {str(path.parent)!r}."
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f" Did you mean {str(path.parent / close[0])!r}?" if close else ""
