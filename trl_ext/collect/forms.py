"""What a file of collected completions may be: rows of completions, preferences or rankings."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

Row = dict[str, Any]

# Of one completion: what a row of a whole group does not have.
_OF_ONE = (
    "completion",
    "completion_ids",
    "is_truncated",
    "logp",
    "prompt_ids",
    "ref_logp",
    "reward",
    "rewards",
)
WRITTEN = (*_OF_ONE, "group")
# Columns that a form adds to those of the dataset.
ADDED = (
    "chosen",
    "completions",
    "rejected",
    "score_chosen",
    "score_rejected",
    "scores",
)


def groups_of(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The scored completions of each prompt, in their order; none of a prompt gives an empty list.

    What no reward function scored says nothing of the reward, and is left out.
    """
    for _, group in groupby(rows, key=lambda row: row["group"]):
        yield [row for row in group if row["reward"] is not None]


def is_uniform(group: list[Row]) -> bool:
    """Whether all rewards of a group are the same: no completion is better than another."""
    return len({row["reward"] for row in group}) <= 1


def completions(group: list[Row]) -> list[Row]:
    """A row a completion."""
    return group


def preferences(group: list[Row]) -> list[Row]:
    """The best completion and the worst, of equals the first; none where they are the same."""
    if is_uniform(group):
        return []
    best = max(group, key=lambda row: row["reward"])
    worst = min(group, key=lambda row: row["reward"])
    if best["completion"] == worst["completion"]:
        return []
    pair = {
        "chosen": best["completion"],
        "rejected": worst["completion"],
        "score_chosen": best["reward"],
        "score_rejected": worst["reward"],
    }
    return [{"prompt": best["prompt"], **pair, **_of_group(best)}]


def rankings(group: list[Row]) -> list[Row]:
    """All completions with their scores; none where these are the same."""
    if is_uniform(group):
        return []
    lists = {
        "completions": [row["completion"] for row in group],
        "scores": [row["reward"] for row in group],
    }
    return [{"prompt": group[0]["prompt"], **lists, **_of_group(group[0])}]


def _of_group(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in (*_OF_ONE, "prompt")}


FORMS: dict[str, Callable[[list[Row]], list[Row]]] = {
    "completions": completions,
    "preferences": preferences,
    "rankings": rankings,
}
