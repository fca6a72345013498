"""A run's record -> what its user sees at the end."""

import math
from statistics import fmean, stdev
from typing import NamedTuple

from trl_ext.record import EVALUATIONS, RunRecord

# Two-sided 95% of the normal distribution; with fewer prompts than this its interval is too narrow.
_Z = 1.96
_FEW = 30


class Gain(NamedTuple):
    """Held-out mean reward before and after training, paired by prompt.

    Attributes:
        before, after: mean reward over all held-out completions.
        gain: after − before.
        half_width: of the 95% confidence interval of the gain, from the spread over prompts.
        prompts, completions: how many were evaluated, each time.
        step: of the evaluation after training.
    """

    before: float
    after: float
    gain: float
    half_width: float
    prompts: int
    completions: int
    step: int


def held_out_gain(record: RunRecord) -> Gain | None:
    """What the first and the last evaluation of a run say; None if there are not two."""
    evaluations = record.rows(EVALUATIONS)
    if len(evaluations) < 2 or evaluations[0]["step"] != 0:
        return None
    first, last = evaluations[0]["rewards"], evaluations[-1]["rewards"]
    pairs = [(_mean(before), _mean(after)) for before, after in zip(first, last, strict=True)]
    pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
    if len(pairs) < 2:
        return None
    gains = [after - before for before, after in pairs]
    return Gain(
        before=fmean(before for before, _ in pairs),
        after=fmean(after for _, after in pairs),
        gain=fmean(gains),
        half_width=_Z * stdev(gains) / len(gains) ** 0.5,
        prompts=len(pairs),
        completions=sum(map(len, last)),
        step=evaluations[-1]["step"],
    )


def before_after_table(gain: Gain) -> str:
    """The gain as a small table for the terminal."""
    low, high = gain.gain - gain.half_width, gain.gain + gain.half_width
    lines = [
        "Held-out reward (prompts that training never saw)",
        f"  before      {gain.before:7.3f}",
        f"  after       {gain.after:7.3f}   ({gain.step} steps)",
        f"  gain        {gain.gain:+7.3f}   95% interval {low:+.3f} to {high:+.3f}",
        f"  measured on {gain.prompts} prompts, {gain.completions} sampled completions each time",
    ]
    if low <= 0 <= high:
        lines.append("  The interval contains 0: this run does not show a gain.")
    if gain.prompts < _FEW:
        lines.append(f"  Fewer than {_FEW} prompts: the interval is only a rough guide.")
    return "\n".join(lines)


def _mean(rewards: list[float | None]) -> float:
    scored = [reward for reward in rewards if reward is not None]
    return fmean(scored) if scored else math.nan
