"""Which rows a reward model learns from: comparisons, checked, those that say something."""

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names

from trl_ext.errors import DataError

logger = logging.getLogger(__name__)

TOKENISED = ("ranking_ids", "chosen_ids", "chosen_input_ids")
_FORMS = (
    "A row has prompt, completions and ranks (1 is the best) or scores (higher is better), or "
    "prompt, chosen and rejected, or chosen and rejected with the prompt in both"
)


def comparisons(dataset: Any, name: str, *, loss_type: str, order_effect: bool) -> Any:
    """The rows of a dataset that compare something, with the ranks of their completions.

    Every row is checked: those of a streamed dataset when they are read. Rows whose completions are
    all tied or all the same, or only one, are left out; how many, is logged.

    Args:
        dataset: rows `prompt`, `completions` and `ranks` or `scores`; or TRL's `chosen` and
            `rejected`; either with a `margin`. One that is tokenised is given back as it is.
        name: what errors call it.
        loss_type: of the config.
        order_effect: of the config.

    Returns:
        A dataset of the same kind; rankings have `ranks`, each 1 + the number of better ones.

    Raises:
        DataError: if it is no dataset, lacks a column, has a row that is no comparison (with its
            number), or none is left.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise DataError(
            f"{name} is a {type(dataset).__name__}; it must be a datasets.Dataset or a "
            "datasets.IterableDataset. Dataset.from_list(rows) makes one of a list of rows."
        )
    if next(iter(dataset), None) is None:
        raise DataError(f"The dataset {name} is empty: it has no row to learn from.")
    columns = get_dataset_column_names(dataset)
    if any(column in columns for column in TOKENISED):
        return dataset
    _check_columns(columns, name, loss_type, order_effect)
    reading = _ranked if "completions" in columns else _paired

    def checked(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            if "margin" in row:
                _check_number(row["margin"], "margin", "a finite number, in reward units")
            return reading(row)
        except _WrongRow as error:
            raise DataError(f"The dataset {name}, row {index}: {error}") from None

    kept = dataset.map(checked, with_indices=True).filter(_compares)
    if isinstance(kept, Dataset):
        assert isinstance(dataset, Dataset)
        _report(name, len(dataset), len(kept))
        if order_effect:
            _check_both_orders(kept, name)
    return kept


class _WrongRow(Exception):
    """What is wrong with a row; it becomes a `DataError` with the number of the row."""


def _check_columns(columns: list[str], name: str, loss_type: str, order_effect: bool) -> None:
    is_ranking, is_pair = "completions" in columns, {"chosen", "rejected"} & {*columns}
    if is_ranking and is_pair:
        raise DataError(
            f"The dataset {name} has both completions and {' and '.join(sorted(is_pair))}, and "
            "only one can be learned from. Remove one of them: dataset.remove_columns(...)."
        )
    needed = ("prompt", "completions") if is_ranking else ("chosen", "rejected")
    missing = [column for column in needed if column not in columns]
    if is_ranking and not {"ranks", "scores"} & {*columns}:
        missing.append("ranks")
    if missing:
        raise DataError(
            f"The dataset {name} has no column {missing[0]!r}; its columns are "
            f"{', '.join(columns)}.{_nearest(columns)} {_FORMS}."
        )
    if loss_type == "plackett_luce" and "margin" in columns:
        raise DataError(
            f"The dataset {name} has a margin, which belongs to pairs, and loss_type is "
            "'plackett_luce'. Use loss_type: bradley_terry, or remove the column."
        )
    if order_effect and not is_ranking:
        raise DataError(
            f"order_effect: the dataset {name} has chosen and rejected, which do not say which of "
            "the two was shown first. Give prompt, completions in the order in which they were "
            "shown, and ranks; or set order_effect to false."
        )


def _nearest(columns: list[str]) -> str:
    wanted = ("completions", "ranks", "scores", "chosen", "rejected", "prompt")
    for name in (name for name in wanted if name not in columns):
        close = difflib.get_close_matches(name, columns, n=1)
        if close:
            return f" Did you mean to rename {close[0]!r} to {name!r}?"
    return ""


def _ranked(row: dict[str, Any]) -> dict[str, Any]:
    """A checked ranking: its `ranks`."""
    kind, completions = _kind(row["prompt"], "prompt"), row["completions"]
    if not isinstance(completions, list):
        raise _WrongRow(f"completions is {_short(completions)}; it must be a list of completions.")
    for k, completion in enumerate(completions):
        if _kind(completion, f"completion {k}") != kind:
            raise _WrongRow(
                f"completion {k} is {_short(completion)}, and the prompt is {kind}. Write both in "
                "one way."
            )
    standings = []
    if row.get("ranks") is not None:
        ranks = _numbers(row["ranks"], "ranks", "rank", len(completions))
        standings.append(_standings(ranks))
    if row.get("scores") is not None:
        scores = _numbers(row["scores"], "scores", "score", len(completions))
        standings.append(_standings([-score for score in scores]))
    if not standings:
        raise _WrongRow("it has neither ranks nor scores. Leave out rows that nobody ranked.")
    if standings[0] != standings[-1]:
        raise _WrongRow(
            f"ranks {row['ranks']} and scores {row['scores']} order the completions differently: 1 "
            "is the best rank, and a higher score is better. Remove the column that is wrong."
        )
    return {"ranks": standings[0]}


def _paired(row: dict[str, Any]) -> dict[str, Any]:
    """A checked pair; nothing is added to it."""
    names = [name for name in ("prompt", "chosen", "rejected") if name in row]
    kinds = {name: _kind(row[name], name) for name in names}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise _WrongRow(f"its parts are of different kinds: {told}. Write them in one way.")
    return {}


def _kind(value: Any, what: str) -> str:
    """What a prompt or completion is written as."""
    if isinstance(value, str):
        return "a text"
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return "messages"
    raise _WrongRow(
        f"the {what} is {_short(value)}; it must be a text, or a list of messages with role and "
        "content."
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _numbers(values: Any, column: str, what: str, completions: int) -> list[float]:
    if not isinstance(values, list) or len(values) != completions:
        size = f"{len(values)} {column}" if isinstance(values, list) else f"{column} {values!r}"
        raise _WrongRow(
            f"it has {completions} completions and {size}; each completion needs one {what}."
        )
    for k, value in enumerate(values):
        _check_number(value, f"{what} of completion {k}", "a finite number")
        if what == "rank" and value < 1:
            raise _WrongRow(
                f"the rank of completion {k} is {value!r}; ranks count from 1, the best. Numbers "
                "of which higher is better belong into the column 'scores'."
            )
    return values


def _check_number(value: Any, what: str, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise _WrongRow(f"the {what} is {_short(value)}; it must be {allowed}.")


def _standings(values: Sequence[float]) -> list[float]:
    """1 + how many are lower, of each."""
    return [1.0 + sum(other < value for other in values) for value in values]


def _compares(row: dict[str, Any]) -> bool:
    """Whether a row tells two different completions apart."""
    if "completions" in row:
        first = row["completions"][:1]
        return len(set(row["ranks"])) > 1 and any([x] != first for x in row["completions"])
    return row["chosen"] != row["rejected"]


def _report(name: str, rows: int, kept: int) -> None:
    left_out = (
        f"{rows - kept} of {rows} rows compare nothing: their completions are all tied, all the "
        "same, or only one"
    )
    if not kept:
        raise DataError(f"The dataset {name}: {left_out}. Nothing is left to learn from.")
    if kept < rows:
        logger.warning("The dataset %s: %s. They are left out.", name, left_out)


def _check_both_orders(rankings: Dataset, name: str) -> None:
    """An order effect shows only where the better one is sometimes shown first, sometimes last."""
    first = last = False
    for ranks in rankings["ranks"]:
        first = first or any(a < b for i, a in enumerate(ranks) for b in ranks[i + 1 :])
        last = last or any(a > b for i, a in enumerate(ranks) for b in ranks[i + 1 :])
        if first and last:
            return
    where = "first" if first else "last"
    raise DataError(
        f"order_effect: in all rows of {name} the better completion is shown {where}, so that the "
        "order cannot be told from the quality. Give the completions in the order in which they "
        "were shown, or set order_effect to false."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
