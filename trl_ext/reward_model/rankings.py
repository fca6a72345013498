"""Which rows a reward model learns from: comparisons, checked, those that say something."""

import difflib
import logging
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names

from trl_ext.errors import DataError
from trl_ext.reward_model.rows import WrongRow, check_number, paired, ranked
from trl_ext.trl_reward_adapter import TOKENISED

logger = logging.getLogger(__name__)

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
        _check_tokenised(columns, name)
        return dataset
    _check_columns(columns, name, loss_type, order_effect)
    reading = ranked if "completions" in columns else paired

    def checked(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            if "margin" in row:
                check_number(row["margin"], "margin", "a finite number, in reward units")
            return reading(row)
        except WrongRow as error:
            raise DataError(f"The dataset {name}, row {index} (counted from 0): {error}") from None

    kept = dataset.map(checked, with_indices=True).filter(_compares)
    if isinstance(kept, Dataset):
        assert isinstance(dataset, Dataset)
        _report(name, len(dataset), len(kept))
        if order_effect:
            _check_both_orders(kept, name)
    return kept


def preference_pairs(dataset: Any, name: str) -> Any:
    """The rows of `chosen` and `rejected` that differ, checked: for a trainer of pairs alone.

    Args:
        dataset: rows as TRL takes them; one that is tokenised is given back as it is.
        name: what errors call it.

    Returns:
        A dataset of the same kind.

    Raises:
        DataError: as `comparisons`, and if it holds rankings.
    """
    columns = get_dataset_column_names(dataset)
    if "completions" in columns and not {"chosen", "rejected"} <= {*columns}:
        raise DataError(
            f"The dataset {name} has the columns {', '.join(columns)}, and a trainer of pairs "
            "takes prompt, chosen and rejected. Make a row of each pair; trainer: reward takes "
            "rankings as they are."
        )
    return comparisons(dataset, name, loss_type="bradley_terry", order_effect=False)


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


def _check_tokenised(columns: list[str], name: str) -> None:
    forms = (
        ("ranking_ids", "ranks"),
        ("chosen_ids", "rejected_ids"),
        ("chosen_input_ids", "rejected_input_ids"),
    )
    if not any({*form} <= {*columns} for form in forms):
        raise DataError(
            f"The dataset {name} is tokenised, and its columns are {', '.join(columns)}; it must "
            f"have {', or '.join(' and '.join(form) for form in forms)}. Add the one that is not "
            "there, or give texts."
        )


def _nearest(columns: list[str]) -> str:
    wanted = ("completions", "ranks", "scores", "chosen", "rejected", "prompt")
    for name in (name for name in wanted if name not in columns):
        close = difflib.get_close_matches(name, columns, n=1)
        if close:
            return f" Did you mean to rename {close[0]!r} to {name!r}?"
    return ""


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
