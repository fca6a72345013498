"""Texts to count and prompts to answer, from files; for plain ones nothing heavy is imported."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_ext.errors import DataError, MissingDependencyError
from trl_ext.poe.dataset_column import column_of
from trl_ext.tasks.loading import BUILDERS, OWN, load_splits

PYDOC = "pydoc"
TEXT_COLUMN = "text"
Prompt = str | list[dict[str, Any]]

_LEAST_WORDS = 8  # a paragraph with fewer is a heading, a signature or a caption
# How a paragraph of the language reference is marked as a point of a list, or as a footnote.
_MARKER = re.compile(r"^(?:[*-]|\d+\.|\[\d+\])\s+")


def corpus_texts(name_or_path: str, column: str | None = None) -> list[str]:
    """The texts of a corpus.

    Args:
        name_or_path: a text file or pipe (one text a line; empty lines are left out), a .jsonl,
            .json, .parquet or .csv file, a dataset's folder (its `train` split), or `pydoc`: the
            prose of Python's own language reference, one text a paragraph.
        column: of a dataset, where it is not `text`.

    Raises:
        DataError: if there is no such corpus, it has no such column, or holds no text.
        MissingDependencyError: if this Python has no language reference.
    """
    path = Path(name_or_path).expanduser()
    is_plain = name_or_path == PYDOC or (
        _is_file_or_pipe(path) and path.suffix.lower() not in BUILDERS
    )
    if is_plain and column is not None:
        raise DataError(
            f"column is {column!r}, and {name_or_path} is plain text, which has no columns. Leave "
            "column out."
        )
    if name_or_path == PYDOC:
        return _pydoc()
    if is_plain:
        texts = [line for line in _lines(path) if line.strip()]
    elif path.exists():
        texts = column_of(name_or_path, column or TEXT_COLUMN)
    else:
        raise DataError(
            f"There is no corpus {name_or_path!r}. Give a text file (one text a line), a "
            f"{', '.join(BUILDERS)} file, the folder of a dataset, or {PYDOC!r}."
        )
    if not texts:
        raise DataError(f"The corpus {name_or_path} holds no text. Write one text a line.")
    return texts


def read_prompts(name: str) -> list[Prompt]:
    """Prompts of a file.

    Args:
        name: of a text file or pipe (one prompt a line; empty lines are left out), of a .jsonl,
            .json, .parquet or .csv file with the key or column `prompt`: a text, or chat messages;
            or of a generated task such as `openings`, whose held-out prompts are meant.

    Raises:
        DataError: if it cannot be read, holds no prompt, or one that is none; with its line.
    """
    path = Path(name).expanduser()
    prompts: list[Prompt]
    if name in OWN:
        _, held_out = load_splits({"dataset_name": name})
        assert held_out is not None
        return list(held_out["prompt"])
    if not _is_file_or_pipe(path):
        raise DataError(
            f"There is no prompt file {name!r}. Give a text file with one prompt a line, a .jsonl "
            f"file with the key 'prompt', or one of {', '.join(OWN)}, generated here."
        )
    if path.suffix.lower() == ".jsonl":
        prompts = list(_json_prompts(path))
    elif path.suffix.lower() in BUILDERS:
        rows = column_of(name, "prompt", str | list)
        prompts = [_checked(row, f"{name}, row {index}") for index, row in enumerate(rows)]
    else:
        prompts = [line for line in _lines(path) if line.strip()]
    if not prompts:
        raise DataError(f"The prompt file {name} is empty. Write one prompt a line.")
    return prompts


def _is_file_or_pipe(path: Path) -> bool:
    """Whether it can be read from beginning to end: `/dev/stdin` and `<(command)` too."""
    return path.exists() and not path.is_dir()


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}. Convert "
            "it, for example with iconv."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    return text.split("\n")


def _json_prompts(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: this is not JSON: {error.msg}. A .jsonl file has one object a line, "
                'such as {"prompt": "What is rain?"}.'
            ) from error
        if not isinstance(row, dict) or "prompt" not in row:
            found = f"the keys {', '.join(row)}" if isinstance(row, dict) else f"{row!r}"
            raise DataError(
                f"{where}: there is no key 'prompt', but {found}. Write "
                '{"prompt": "What is rain?"}, or messages in place of the text.'
            )
        yield _checked(row["prompt"], where)


def _checked(prompt: Any, where: str) -> Prompt:
    is_text = isinstance(prompt, str) and prompt.strip()
    is_chat = isinstance(prompt, list) and prompt and all(map(_is_message, prompt))
    if not is_text and not is_chat:
        shown = repr(prompt)
        raise DataError(
            f"{where}: the prompt is {shown if len(shown) <= 80 else shown[:77] + '...'}; it must "
            'be a text that is not empty, or a list of messages {"role": "user", "content": "…"}.'
        )
    check_prompt(prompt, f"{where}: the prompt")
    return prompt


def check_prompt(prompt: Prompt, what: str) -> None:
    """Whether a prompt has whole characters only; as `check_characters`."""
    for text in [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]:
        check_characters(text, what)


def check_characters(text: str, what: str) -> None:
    """Whether a text has whole characters only.

    Args:
        text: to be checked.
        what: it is, for the error.

    Raises:
        DataError: if it holds half a surrogate pair, which no tokenizer and no file takes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise DataError(
            f"{what} has half a character, {text[error.start]!r}, at {error.start}: {around!r}. It "
            "is no text in UTF-8. Repair it, for example with text.encode('utf-8', 'replace')"
            ".decode()."
        ) from error


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _pydoc() -> list[str]:
    """The prose of the language reference: whole paragraphs, each on one line."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MissingDependencyError(
            "The corpus 'pydoc' is Python's module pydoc_data.topics, which this Python lacks. Use "
            "a Python that was installed whole, or give a text file."
        ) from error
    paragraphs = (
        _MARKER.sub("", " ".join(paragraph.split()))
        for _, topic in sorted(topics.items())
        for paragraph in re.split(r"\n\s*\n", topic)
    )
    return [paragraph for paragraph in dict.fromkeys(paragraphs) if _is_prose(paragraph)]


def _is_prose(paragraph: str) -> bool:
    """Whether it is a sentence, and not an example, a rule of the grammar or a signature."""
    words = paragraph.split()
    return (
        len(words) >= _LEAST_WORDS
        and paragraph[-1] in ".:"
        and paragraph[0] in '"“*(ABCDEFGHIJKLMNOPQRSTUVWXYZ'
        and ">>>" not in paragraph
        and "::=" not in words
    )
