"""Completions of a rollout as columns, whose groups can be exchanged."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from trl_ext.errors import ConfigError


@dataclass(frozen=True)
class Draw:
    """Completions in whole groups, and what they are worth.

    Attributes:
        columns: (what, name) -> a list with a value for each completion of this process.
        rewards: (processes, groups of each, G, reward functions), of all.
        mixed: (processes, groups of each) bool: whether the rewards of a group differ.
    """

    columns: dict[tuple[str, Any], list]
    rewards: Tensor
    mixed: Tensor

    @property
    def share(self) -> float:
        """Of the groups that are mixed."""
        return self.mixed.double().mean().item()

    def with_mixed_of(self, other: "Draw", process: int) -> "Draw":
        """Mixed groups of `other` in the places of uniform ones, within each process."""
        rewards, mixed, group = self.rewards.clone(), self.mixed.clone(), self.rewards.size(2)
        columns = {name: list(values) for name, values in self.columns.items()}
        for of in range(len(mixed)):
            places, found = (~self.mixed[of]).nonzero(), other.mixed[of].nonzero()
            for (to,), (source,) in zip(places.tolist(), found.tolist(), strict=False):
                rewards[of, to], mixed[of, to] = other.rewards[of, source], True
                if of == process:
                    for name, values in columns.items():
                        taken = other.columns[name][source * group : (source + 1) * group]
                        values[to * group : (to + 1) * group] = taken
        return Draw(columns, rewards, mixed)


def with_same_columns(kept: Draw, again: Draw) -> list[Draw]:
    """Both with all columns that rewards logged for one of them, None where they logged nothing."""
    differing = kept.columns.keys() ^ again.columns.keys()
    if wrong := sorted(str(name) for of, name in differing if of != "logged"):
        raise ConfigError(
            f"rollout_func returned {', '.join(wrong)} in one call and not in another; with "
            "min_mixed_groups their completions go into one batch. Return the same keys each time."
        )
    return [
        replace(draw, columns=dict.fromkeys(differing, [None] * _rows(draw)) | draw.columns)
        for draw in (kept, again)
    ]


def _rows(draw: Draw) -> int:
    return len(draw.columns["of", "rows"])


def one_each(name: str, values: list, rows: int) -> list:
    if len(values) != rows:
        raise ConfigError(
            f"The column {name!r} of a rollout_func or of log_extra has {len(values)} values for "
            f"{rows} completions. With min_mixed_groups, which exchanges completions, it must have "
            "one for each."
        )
    return values
