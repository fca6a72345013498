"""From the dataset keys of a recipe to a training and an evaluation split."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.errors import ConfigError, DataError
from trl_ext.tasks import char_reverse, openings, reasoning_gym

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

GENERATED = "reasoning_gym/"
OWN = {"char_reverse": char_reverse.splits, "openings": openings.splits}
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
DEFAULT_TEST_SPLIT = "test"  # TRL's default: absent, it is nobody's mistake


def load_splits(
    script: Mapping[str, Any],
) -> "tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]":
    """The training split, and the evaluation split or None where there is none.

    Args:
        script: of a recipe's values these are read: `dataset_name` (`reasoning_gym/<task>`,
            `char_reverse`, `openings`, a file, a directory or a hub id), `dataset_config`,
            `dataset_train_split`, `dataset_test_split`, `dataset_streaming` as in TRL, and
            `dataset_kwargs`: a generated task's settings, or arguments of `datasets.load_dataset`.

    Raises:
        DataError: if the dataset cannot be read or lacks the split; the message lists those found.
        ConfigError: if a key does not apply to this dataset.
        UnknownNameError: if reasoning-gym has no such task.
    """
    name = script.get("dataset_name")
    if not name:
        raise DataError(f"The recipe names no dataset. Set dataset_name to {_ways()}.")
    kwargs = script.get("dataset_kwargs") or {}
    if name in OWN or name.startswith(GENERATED):
        _refuse_loading_options(script, name)
        splits = _generate(name, kwargs)
    else:
        splits = _load(name, script, kwargs)
    train = _select(
        splits, script.get("dataset_train_split") or "train", name, "dataset_train_split"
    )
    test_split = script.get("dataset_test_split") or DEFAULT_TEST_SPLIT
    if test_split == DEFAULT_TEST_SPLIT and test_split not in splits:
        return train, None
    return train, _select(splits, test_split, name, "dataset_test_split")


def _refuse_loading_options(
    script: Mapping[str, Any],
    name: str,
    keys: Sequence[str] = ("dataset_config", "dataset_streaming"),
    why: str = "that is generated, or was saved whole",
) -> None:
    for key in keys:
        if script.get(key):
            raise ConfigError(
                f"{key} is {script[key]!r}, which does nothing for {name}: {why}. Remove {key}."
            )


def _generate(name: str, kwargs: dict[str, Any]) -> "dict[str, Dataset]":
    if name.startswith(GENERATED):
        return reasoning_gym.splits(name.removeprefix(GENERATED), kwargs)
    return OWN[name](kwargs)


def _select(splits: Mapping[Any, Any], split: str, name: str, key: str) -> Any:
    if split not in splits:
        close = difflib.get_close_matches(split, list(splits), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DataError(
            f"{key} is {split!r}, but the dataset {name} has the splits {', '.join(splits)}.{hint}"
        )
    return splits[split]


def _load(name: str, script: Mapping[str, Any], kwargs: dict[str, Any]) -> Mapping[Any, Any]:
    """Splits of a file, a directory, or a dataset on the hub."""
    path = Path(name).expanduser()
    if path.is_dir() and _was_saved_to_disk(path):
        return _from_disk(path, script, kwargs)
    arguments = {"path": name, "name": script.get("dataset_config"), **kwargs}
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise DataError(
                f"dataset_name {name!r} is a file that is none of {', '.join(BUILDERS)}."
            )
        _refuse_loading_options(script, name, ("dataset_config",), "a file has no configurations")
        arguments |= {"path": BUILDERS[path.suffix.lower()], "data_files": str(path)}
    elif path.is_dir():
        arguments["path"] = str(path)
    elif _looks_like_a_path(name):
        raise DataError(f"There is no file or directory {name!r}.{_neighbour(path)}")
    return _load_dataset(name, arguments, streaming=bool(script.get("dataset_streaming")))


def _load_dataset(name: str, arguments: dict[str, Any], *, streaming: bool) -> Mapping[Any, Any]:
    from datasets import load_dataset

    try:
        splits = load_dataset(**arguments, streaming=streaming)
    except Exception as error:  # each file format, and the hub, raises kinds of its own
        reason = error.__cause__ or error
        if says_no_rows(reason):
            raise DataError(
                f"The dataset {name} has no rows. Write at least one, with the column 'prompt'."
            ) from error
        raise DataError(
            f"The dataset {name} cannot be read: {type(reason).__name__}: {reason}."
            f"{_generated_neighbour(name)} dataset_name is {_ways()} (which needs the network, or "
            "an earlier download)."
        ) from error
    if not isinstance(splits, Mapping):
        raise ConfigError(
            "dataset_kwargs must not choose a split; use dataset_train_split and "
            "dataset_test_split."
        )
    return splits


def says_no_rows(reason: BaseException) -> bool:
    """Whether this is how `datasets` fails on an empty file, or on one without a row."""
    no_file_content = isinstance(reason, StopIteration) or type(reason).__name__ == "EmptyDataError"
    return no_file_content or "corresponds to no data" in str(reason)


def _generated_neighbour(name: str) -> str:
    """A generated task of nearly that name, for the error message."""
    head, _, task = name.partition("/")
    close = difflib.get_close_matches(head, [*OWN, GENERATED.rstrip("/")], n=1)
    if not close:
        return ""
    meant = close[0] if close[0] in OWN else f"{GENERATED}{task or '<task>'}"
    return f" Did you mean {meant!r}?"


def _ways() -> str:
    """What dataset_name may be, for error messages."""
    own, files = ", ".join(OWN), ", ".join(BUILDERS)
    return f"{GENERATED}<task>, {own}, a {files} file, a directory, or a dataset on the hub"


def _was_saved_to_disk(path: Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _from_disk(path: Path, script: Mapping[str, Any], kwargs: dict[str, Any]) -> Mapping[Any, Any]:
    from datasets import load_from_disk

    _refuse_loading_options(script, str(path))
    try:
        saved = load_from_disk(str(path), **kwargs)
    except Exception as error:  # arrow's and the file system's kinds
        raise DataError(f"The saved dataset {path} cannot be read: {error}") from error
    return saved if isinstance(saved, Mapping) else {"train": saved}


def _looks_like_a_path(name: str) -> bool:
    """A hub id is `name` or `owner/name`, without a data file's ending."""
    is_data_file = Path(name).suffix.lower() in BUILDERS
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or is_data_file


def _neighbour(path: Path) -> str:
    """The nearest name that does exist, for the error message."""
    if not path.parent.is_dir():
        return f" Nor is there a directory {str(path.parent)!r}."
    found = [child.name for child in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, found, n=1)
    return f" Did you mean {str(path.parent / close[0])!r}?" if close else ""
