"""A run's record -> what its user sees at the end."""

import json
import math
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any, NamedTuple

from trl_ext.record import EVALUATIONS, RunRecord
from trl_ext.watch import HACKING
from trl_ext.watch.measures import WORDS

# Two-sided 95% of the normal distribution; with fewer prompts than this its interval is too narrow.
_Z = 1.96
_FEW = 30

_Rewards = list[list[float | None]]


class Gain(NamedTuple):
    """A held-out mean before and after training, paired by prompt.

    Attributes:
        before, after: mean over prompts of the mean over a prompt's completions.
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

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the gain."""
        return self.gain - self.half_width, self.gain + self.half_width


def held_out_gains(record: RunRecord) -> dict[str, Gain]:
    """What the first and the last evaluation of a run say; nothing if there are not two.

    Returns:
        "reward"; and "accuracy", the share of completions with reward 1, where rewards lie in
        [0, 1] and some reach 1. Where all are 0 or 1 the two are one: "accuracy". Where a gold
        reward was watched they are "proxy reward" and "proxy accuracy".
    """
    evaluations = record.rows(EVALUATIONS)
    if len(evaluations) < 2 or evaluations[0]["step"] != 0:
        return {}
    first, last = evaluations[0]["rewards"], evaluations[-1]["rewards"]
    given = {reward for group in [*first, *last] for reward in group if reward is not None}
    measures: dict[str, Callable[[float], float]] = {}
    if not given <= {0, 1}:
        measures["reward"] = float
    if 1 in given and all(0 <= reward <= 1 for reward in given):
        measures["accuracy"] = lambda reward: float(reward == 1)
    # Beside a gold reward, a full proxy reward may be anything but right.
    of = "proxy " if (record.output_dir / HACKING).is_file() else ""
    gains = {
        of + name: _gain(first, last, measure, evaluations[-1]["step"])
        for name, measure in (measures or {"reward": float}).items()
    }
    return {name: gain for name, gain in gains.items() if gain}


def before_after_table(gains: dict[str, Gain]) -> str:
    """The gains as a small table for the terminal."""
    width = max(8, *map(len, gains))
    lines = [
        "Held-out prompts, which training never saw",
        f"  {'':{width}}   before    after     gain   95% interval",
    ]
    for name, gain in gains.items():
        low, high = gain.interval
        lines.append(
            f"  {name:{width}}  {gain.before:7.3f}  {gain.after:7.3f}  {gain.gain:+7.3f}   "
            f"{low:+.3f} to {high:+.3f}"
        )
        if low <= 0 <= high:
            lines.append("  The interval contains 0: this run does not show a gain.")
    any_gain = next(iter(gains.values()))
    lines.append(
        f"  on {any_gain.prompts} prompts, {any_gain.completions} completions in all, each time; "
        f"after = step {any_gain.step}"
    )
    if any_gain.prompts < _FEW:
        lines.append(f"  Fewer than {_FEW} prompts: the interval is only a rough guide.")
    return "\n".join(lines)


def hacking_table(record: RunRecord) -> str:
    """What the reward-hacking watch saw, for the terminal; empty if there was none."""
    file = record.output_dir / HACKING
    if not file.is_file():
        return ""
    seen = json.loads(file.read_text())
    rows = seen["evaluations"]
    best = next(row for row in rows if row["step"] == seen["best_step"])
    shown = {"before": rows[0], "best gold": best, "last": rows[-1]}
    lines = [
        f"Reward-hacking watch, {seen['prompts']} held-out prompts, mean ± 95%",
        f"  {'':26}" + "".join(f"{name:>18}" for name in shown),
        f"  {'step':26}" + "".join(f"{row['step']:>18}" for row in shown.values()),
    ]
    lines += [
        f"  {words:26}" + "".join(f"{_with_interval(row.get(name)):>18}" for row in shown.values())
        for name, words in WORDS.items()
    ]
    lines += [f"  Alarm, {message}." for message in seen["alarms"].values()]
    lines += [] if seen["alarms"] else ["  No alarm."]
    return "\n".join([*lines, f"  The policy with the best gold reward is in {seen['best']}."])


def _with_interval(measured: dict[str, Any] | None) -> str:
    if measured is None or measured["mean"] is None:
        return "not measured"
    value, error = measured["mean"], measured["standard_error"]
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {_Z * error:.3f}"


def _gain(
    first: _Rewards, last: _Rewards, measure: Callable[[float], float], step: int
) -> Gain | None:
    pairs = [
        (_mean(before, measure), _mean(after, measure))
        for before, after in zip(first, last, strict=True)
    ]
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
        step=step,
    )


def _mean(rewards: list[float | None], measure: Callable[[float], float]) -> float:
    scored = [measure(reward) for reward in rewards if reward is not None]
    return fmean(scored) if scored else math.nan
