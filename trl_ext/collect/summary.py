"""What collected completions amount to, a few numbers of all of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev

from trl_ext.collect.forms import Row, is_uniform

# Two-sided 95% of the normal distribution; with fewer prompts than this its interval is too narrow.
_Z = 1.96
_FEW = 30


@dataclass(frozen=True)
class Summary:
    """Numbers of collected completions.

    Attributes:
        prompts, completions: how many were sampled.
        unscored: completions to which no reward function gave a number; they are left out.
        reward: mean over prompts of the mean over a prompt's scored completions; None without any.
        half_width: of its 95% confidence interval, from the spread over prompts; None for less
            than two.
        truncated: share of completions that reached `max_completion_length`.
        uniform: share of prompts whose scored completions all have the same reward.
        tokens: of the completions.
    """

    prompts: int
    completions: int
    unscored: int
    reward: float | None
    half_width: float | None
    truncated: float
    uniform: float
    tokens: int

    def table(self, written: str) -> str:
        """A small table for the terminal.

        Args:
            written: what the file has, such as "320 completions".
        """
        lines = [
            f"  {'prompts':18}{self.prompts:>10,}",
            f"  {'completions':18}{self.completions:>10,}",
            f"  {'mean reward':18}{self._reward_in_words()}",
            f"  {'truncated':18}{self.truncated:>10.1%}",
            f"  {'uniform groups':18}{self.uniform:>10.1%}",
            f"  {'completion tokens':18}{self.tokens:>10,}",
            f"  {'written':18}{written}",
        ]
        if self.unscored:
            lines.append(f"  {self.unscored:,} completions that no reward scored are left out.")
        if self.half_width is not None and self.prompts < _FEW:
            lines.append(f"  Fewer than {_FEW} prompts: the interval is only a rough guide.")
        return "\n".join(lines)

    def _reward_in_words(self) -> str:
        if self.reward is None:
            return f"{'none':>10}"
        if self.half_width is None:
            return f"{self.reward:>10.3f}"
        low, high = self.reward - self.half_width, self.reward + self.half_width
        return f"{self.reward:>10.3f}   95% interval {low:.3f} to {high:.3f}"


def summarise(rows: Iterable[Row]) -> Summary:
    """Numbers of rows as they were sampled, those of a prompt one after the other."""
    counts = {"prompts": 0, "completions": 0, "unscored": 0, "tokens": 0}
    truncated = uniform = 0
    means: list[float] = []
    for _, rows_of_prompt in groupby(rows, key=lambda row: row["group"]):
        group = list(rows_of_prompt)
        scored = [row for row in group if row["reward"] is not None]
        counts["prompts"] += 1
        counts["completions"] += len(group)
        counts["unscored"] += len(group) - len(scored)
        counts["tokens"] += sum(len(row["completion_ids"]) for row in group)
        truncated += sum(row["is_truncated"] for row in group)
        uniform += is_uniform(scored)
        means += [fmean(row["reward"] for row in scored)] if scored else []
    return Summary(
        **counts,
        reward=fmean(means) if means else None,
        half_width=_Z * stdev(means) / len(means) ** 0.5 if len(means) > 1 else None,
        truncated=truncated / counts["completions"],
        uniform=uniform / counts["prompts"],
    )
