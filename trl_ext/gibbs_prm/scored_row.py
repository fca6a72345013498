"""A scored completion with where it comes from and what is known of it, as it stands in files."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from trl_ext.gibbs_prm.row_values import check_scored
from trl_ext.gibbs_prm.scored import GibbsScores

_OF_SCORES = tuple(f.name for f in fields(GibbsScores))
_DERIVED = ("step_rewards", "worst_step", "score")
# `rank` is what `trl_ext rank` adds.
_RESERVED = {
    "row",
    "sample",
    "id",
    "label",
    "first_error",
    "answer",
    "rank",
    *_OF_SCORES,
    *_DERIVED,
}


@dataclass(frozen=True)
class ScoredRow:
    """A scored completion with where it comes from and what is known of it.

    Attributes:
        row, sample: which row of the input, and which of its completions, both from 0.
        scores: of its prefixes.
        id: of the row, if it has one.
        label: whether the completion is right, or its reward; None: not known.
        first_error: the first wrong step, of those that were given, from 0; −1: none; None: not
            known.
        answer: its final answer; None: not known.
        columns: what else the row had.
    """

    row: int
    sample: int
    scores: GibbsScores
    id: Any = None
    label: Any = None
    first_error: int | None = None
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON: the fields of the scores beside the row's own."""
        known = {
            name: value
            for name in ("id", "label", "first_error", "answer")
            if (value := getattr(self, name)) is not None
        }
        scores = {name: getattr(self.scores, name) for name in (*_OF_SCORES, *_DERIVED)}
        del scores["standard_errors"]  # of a sample, which this is not
        own = {"row": self.row, "sample": self.sample, **known, **scores}
        return {**own, **{k: v for k, v in self.columns.items() if k not in own}}

    @classmethod
    def of_record(cls, record: Any, where: str) -> "ScoredRow":
        """What `record` gave.

        Raises:
            DataError: if it is none.
        """
        check_scored(record, where)
        scores = GibbsScores(**{name: record[name] for name in _OF_SCORES if name in record})
        own = {f.name for f in fields(cls)} - {"scores", "columns"}
        rest = own | set(_OF_SCORES) | set(_DERIVED)
        return cls(
            scores=scores,
            columns={key: value for key, value in record.items() if key not in rest},
            **{name: record[name] for name in own if name in record},
        )


def apart(columns: Mapping[str, Any]) -> dict[str, Any]:
    """A row's other columns; one with the name of something scored is called input_… instead."""
    found: dict[str, Any] = {}
    for key, value in columns.items():
        name = key
        while name in _RESERVED or name in found or (name != key and name in columns):
            name = f"input_{name}"
        found[name] = value
    return found
