"""The folder of a counted expert: what it says of itself, and how it is replaced."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trl_ext.errors import ConfigError

DESCRIPTION, COUNTS = "counted_expert.json", "counts.safetensors"
FORMAT_VERSION = 1
# Up to here count + a still tells a count from its neighbour in float64, and a·V is far from inf.
MOST_PSEUDO_COUNT = 1e15
# One of them makes a folder a language model's or an adapter's.
MODEL_FILES = ("config.json", "adapter_config.json")
# What `save_pretrained` of a tokenizer may have written.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def check_pseudo_count(value: Any) -> None:
    """Refuse what is no smoothing.

    Raises:
        ConfigError: with the value.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MOST_PSEUDO_COUNT:
        raise ConfigError(
            f"pseudo_count is {value!r}; it must be at most {MOST_PSEUDO_COUNT:g} and a positive "
            "finite number. Without smoothing, 1e-10 say, what was never counted would be "
            "impossible in a product."
        )


def check_no_model(folder: str | Path) -> None:
    """Whether an expert may be written there.

    Raises:
        ConfigError: if a model's files are there: it could not be opened as a model any more.
    """
    found = next((name for name in MODEL_FILES if (Path(folder) / name).is_file()), None)
    if found is not None:
        raise ConfigError(
            f"{folder} is a language model's folder: it has a {found}. A counted expert would hide "
            "the model. Give another folder."
        )


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new empty folder, whose files become those of `folder` at the end.

    The description is taken away first and comes last, so that a save which is stopped leaves no
    folder that can be mistaken for an expert. One that fails leaves the old expert as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        yield Path(name)
        _remove_tokenizer(folder)
        (folder / DESCRIPTION).unlink(missing_ok=True)
        for file in sorted(Path(name).iterdir(), key=lambda file: file.name == DESCRIPTION):
            os.replace(file, folder / file.name)


def _remove_tokenizer(folder: Path) -> None:
    """Remove an older expert's own: its chat template would become that of the next one."""
    try:
        old = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no expert that could be opened
        return
    if isinstance(old, dict) and old.get("tokenizer") is True:
        for name in TOKENIZER_FILES:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)


def read_description(folder: Path, size_names: Mapping[str, str]) -> dict[str, Any]:
    """What an expert's save wrote of it, checked.

    Args:
        folder: of the expert.
        size_names: kind -> "window" or "order".

    Raises:
        ConfigError: if it is no such folder, or not as `save` writes it.
    """
    missing = [name for name in (DESCRIPTION, COUNTS) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} is no counted expert: it has no {' and no '.join(missing)}. Give a "
            "directory that an expert's save wrote."
        )
    file = folder / DESCRIPTION
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(file, f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise damaged(file, f"it is a {type(found).__name__}, not a mapping")
    version = found.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ConfigError(
            f"{folder} was written in format {version}, and this trl_ext reads formats up to "
            f"{FORMAT_VERSION}. Install the trl_ext that wrote it, or a newer one."
        )
    _check_description(file, found, size_names)
    return found


def _check_description(file: Path, found: dict[str, Any], size_names: Mapping[str, str]) -> None:
    kind = found.get("kind")
    if not isinstance(kind, str) or kind not in size_names:
        raise damaged(file, f"kind is {kind!r}, none of {', '.join(size_names)}")
    for name in (size_names[kind], "vocab_size", "num_tokens", "format_version"):
        if not _is_whole(found.get(name)):
            raise damaged(file, f"{name} is {found.get(name)!r}, not a whole number from 1 on")
    if not isinstance(found.get("tokenizer"), bool):
        raise damaged(file, f"tokenizer is {found.get('tokenizer')!r}, neither true nor false")
    try:
        check_pseudo_count(found.get("pseudo_count"))
    except ConfigError as error:
        raise damaged(file, str(error).split(". ")[0]) from error


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def damaged(file: Path, why: str) -> ConfigError:
    """The error for a file that no save wrote, or that was changed or cut since."""
    return ConfigError(
        f"{file} is damaged: {why}. Count the expert anew (`trl_ext count`), or take the folder "
        "from where it is whole."
    )
