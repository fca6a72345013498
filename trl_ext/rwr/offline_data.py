"""From a dataset of logged completions to rows with a `weight`, for TRL's SFTTrainer."""

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from trl_ext.errors import ConfigError, DataError
from trl_ext.rwr.logged import LoggedRows, as_utf8, read_rows
from trl_ext.rwr.logged_lists import flattened
from trl_ext.rwr.logged_row import PLACE, Needed, RowReader
from trl_ext.rwr.offline_config import OfflineRWRConfig
from trl_ext.rwr.offline_scoring import scored
from trl_ext.rwr.offline_weights import Weighed, weigh

logger = logging.getLogger(__name__)

Rows = Dataset | IterableDataset

WEIGHT = "weight"
# Columns that are not taken: name -> why.
TAKEN = {
    WEIGHT: "weights are computed from rewards",
    "input_ids": "rows of tokens are taken as prompt_ids and completion_ids",
    "image": "rows with images are not supported",
    "images": "rows with images are not supported",
}
# What others call it: a hint where the column itself is not there.
_ALSO_CALLED = {
    "prompt": ("question", "instruction", "input", "query"),
    "completion": ("response", "answer", "output"),
    "reward": ("score", "scores", "rating"),
}
# What TRL reads of a row of text beside prompt and completion.
_FOR_THE_TEMPLATE = ("tools", "chat_template_kwargs")
# Rows read at once.
_BATCH = 1000


def with_weights(
    dataset: Any,
    name: str,
    config: OfflineRWRConfig,
    reward_funcs: list[Any] | None,
    vocabulary: int | None = None,
) -> tuple[Any, Weighed]:
    """The rows of a dataset that have a weight, each with it; and all weights.

    A map-style dataset and a stream go the same way: one pass reads what weights are made of, and
    the weights are put in by row, or, in a stream, whose order may change, by what the row is.

    Args:
        dataset: in row form or list form.
        name: what to call it in errors.
        config: says how rows are weighed.
        reward_funcs: guarded; used where the dataset has no rewards.
        vocabulary: tokens of the model, where that is known: ids are below it.

    Raises:
        DataError: if a column is missing or has no place here, or a row has a value that is none.
        ConfigError: if an option asks for what the dataset does not have.
    """
    with as_utf8(name):
        dataset = _as_rows(_of_known_type(dataset, name), name)
        columns = _columns(dataset, name)
        if "reward" not in columns:
            dataset = _rewarded(dataset, name, config, reward_funcs, columns)
        elif reward_funcs:
            logger.warning(
                "%s has rewards of its own, in the column 'reward': reward_funcs are not asked.",
                name,
            )
        needed = replace(_needed(columns, config, name), vocabulary=vocabulary)
        rows = read_rows(_batches(dataset, needed, name, config), needed, name)
    _warn_of_mixtures(rows, name)
    weighed = weigh(rows, config, name)
    kept = ["prompt", "completion", *(c for c in _FOR_THE_TEMPLATE if c in columns)]
    kept += ["prompt_ids", "completion_ids"] if needed.ids else []
    if isinstance(dataset, Dataset):
        dataset = dataset.select_columns(kept).add_column(WEIGHT, weighed.weights)  # pyright: ignore
        return dataset.select(np.flatnonzero(weighed.weights)), weighed
    attach = AttachWeights(rows, weighed.weights, needed, name)
    return dataset.map(attach).select_columns([*kept, WEIGHT]).filter(_has_weight), weighed


class AttachWeights:
    """Puts `weight` into the rows of a stream, found by what a row is.

    A stream may be shuffled anew each epoch, and is dealt out to workers: row numbers say nothing.
    """

    def __init__(self, rows: LoggedRows, weights: np.ndarray, needed: Needed, name: str):
        self.keys, first = np.unique(rows.keys, return_index=True)
        self.weights = weights[first]
        self.reader = RowReader(needed, name)

    def __call__(self, row: dict[str, Any]) -> dict[str, float]:
        key = np.uint64(self.reader.read(row).key)
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key:
            raise DataError(
                f"{self.reader.name} gives a row that it did not give when its weights were "
                f"computed: prompt {row['prompt']!r:.80}. A stream must give the same rows each "
                "time it is read, in any order."
            )
        return {WEIGHT: float(self.weights[place])}


def _has_weight(row: Mapping[str, Any]) -> bool:
    return row[WEIGHT] > 0


def _of_known_type(dataset: Any, name: str) -> Rows:
    if isinstance(dataset, Dataset | IterableDataset):
        return dataset.with_format(None)
    step = "Dataset.from_list(rows) makes one of a list of rows."
    if isinstance(dataset, Mapping):
        step = "Take one of its splits."
    raise DataError(
        f"{name} is a {type(dataset).__name__}; it must be a datasets.Dataset or a "
        f"datasets.IterableDataset of logged completions. {step}"
    )


def _columns(dataset: Rows, name: str) -> list[str]:
    known = dataset.column_names
    if known:
        return list(known)
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"{name} is empty: it has no row to train on.")
    return list(first)


def _as_rows(dataset: Rows, name: str) -> Rows:
    """Row form: as it is, or made of lists; with the columns that it needs and none that clash."""
    columns = _columns(dataset, name)
    if "completion" not in columns and "completions" in columns:
        dataset = flattened(dataset, name, columns)
        columns = _columns(dataset, name)
    for column in ("prompt", "completion"):
        if column not in columns:
            raise DataError(
                f"{name} has no column {column!r}; its columns are {', '.join(columns)}."
                f"{_hint(column, columns)} "
                "Logged completions are rows of prompt, completion and reward, or of prompt, "
                "completions and rewards; `trl_ext collect` writes them."
            )
    for column, reason in TAKEN.items():
        if column in columns:
            raise DataError(f"{name} has a column {column!r}: {reason}. Rename or remove it.")
    return dataset


def _hint(column: str, columns: list[str]) -> str:
    """What may have been meant by a column that is not there."""
    close = difflib.get_close_matches(column, [name.lower() for name in columns], n=1)
    meant = [
        name for name in columns if name.lower() in close or name.lower() in _ALSO_CALLED[column]
    ]
    return f" Did you mean to rename {meant[0]!r}?" if meant else ""


def _rewarded(
    dataset: Rows,
    name: str,
    config: OfflineRWRConfig,
    reward_funcs: list[Any] | None,
    columns: list[str],
) -> Dataset:
    if not reward_funcs:
        shown = [column for column in columns if column != PLACE]
        lists = " (rewards, a list, beside completions)" if PLACE in columns else ""
        raise DataError(
            f"{name} has no column 'reward'{lists}; its columns are {', '.join(shown)}."
            f"{_hint('reward', shown)} Give the column, a finite number in every row, or "
            "reward_funcs, which score the rows."
        )
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"{name} is a stream without the column 'reward'; reward_funcs score map-style "
            "datasets only. Score it beforehand, as with dataset.map."
        )
    return dataset.add_column("reward", scored(dataset, reward_funcs, config, name))  # pyright: ignore


def _needed(columns: list[str], config: OfflineRWRConfig, name: str) -> Needed:
    wanted = {"value": "baseline: value"} if config.baseline == "value" else {}
    if config.importance_weights:
        wanted |= dict.fromkeys(("logp", "ref_logp"), "importance_weights")
    for column, option in wanted.items():
        if column not in columns:
            raise ConfigError(
                f"{option} reads the column {column!r}, and {name} has {', '.join(columns)}. Add "
                "it, or change the option."
            )
    with_ids = [column for column in ("prompt_ids", "completion_ids") if column in columns]
    return Needed(
        group="group" in columns,
        value="value" in wanted,
        log_ratio="logp" in wanted,
        ids=len(with_ids) == 2,
        place=PLACE in columns,
    )


def _batches(
    dataset: Rows, needed: Needed, name: str, config: OfflineRWRConfig
) -> Iterable[dict[str, list]]:
    total = len(dataset) if isinstance(dataset, Dataset) else None
    hidden = config.disable_tqdm or config.process_index > 0
    with tqdm(total=total, desc=f"Weighing {name}", unit=" rows", disable=hidden) as bar:
        for batch in dataset.select_columns(needed.columns).iter(_BATCH):
            assert isinstance(batch, dict)
            yield batch
            bar.update(len(batch["prompt"]))


def _warn_of_mixtures(rows: LoggedRows, name: str) -> None:
    repeated = len(rows) - len(np.unique(rows.keys))
    if repeated:
        logger.warning(
            "%s: %d of %d rows repeat a completion of their prompt. Each counts as a sample; "
            "remove them if they were not sampled so.",
            name,
            repeated,
            len(rows),
        )
    if rows.prompts is None:
        return
    pairs = np.unique(np.stack([rows.groups, rows.prompts]), axis=1)
    mixed = pairs.shape[1] - len(np.unique(rows.groups))
    if mixed:
        logger.warning(
            "%s: some groups hold several prompts (%d more than groups). Completions of different "
            "prompts are compared there. Are group numbers of several files mixed?",
            name,
            mixed,
        )
