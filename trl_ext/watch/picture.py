"""What the reward-hacking watch saw, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.watch.measures import WORDS, Z

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_watch(
    evaluations: Sequence[dict[str, Any]],
    best_step: int,
    alarm_steps: Mapping[str, int],
    file: Path,
) -> None:
    """Write the picture of `watch_figure`, which has the same arguments, to a .png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = watch_figure(evaluations, best_step, alarm_steps)
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=120)


def watch_figure(
    evaluations: Sequence[dict[str, Any]], best_step: int, alarm_steps: Mapping[str, int]
) -> "Figure":
    """Proxy and gold reward against the KL, or the step; length; repetition and distinct n-grams.

    Bars are 95% intervals over prompts.

    Args:
        evaluations: of the watch: `step`, and a mean and its standard error a measure.
        best_step: of the evaluation with the highest gold reward.
        alarm_steps: kind of an alarm -> the step at which it was raised. Where the axis is the KL,
            it is marked at that step's evaluation, if there was one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15.0, 4.4), layout="constrained")
    rewards, lengths, texts = figure.subplots(1, 3)
    steps = [float(row["step"]) for row in evaluations]
    by_kl = all("kl" in row for row in evaluations)
    at = [row["kl"][0] for row in evaluations] if by_kl else steps
    best = at[steps.index(best_step)]
    rewards.axvline(best, color="grey", ls=":", label=f"best gold, step {best_step}")
    for name in ("proxy_reward", "gold_reward"):
        _line(rewards, at, evaluations, name)
    _line(lengths, steps, evaluations, "length")
    for name in ("truncated", "repetition", "distinct_1", "distinct_2"):
        _line(texts, steps, evaluations, name)
    where = dict(zip(steps, at, strict=True)) if by_kl else None
    for axes, label in ((rewards, "reward"), (lengths, "tokens"), (texts, "share")):
        _finish(axes, label, alarm_steps, where if axes is rewards else None)
    figure.suptitle("Held-out prompts; bars are 95% intervals over prompts")
    return figure


def _finish(
    axes: "Axes", label: str, alarm_steps: Mapping[str, int], where: Mapping[float, float] | None
) -> None:
    """Mark the alarms and say what the axes are; `where` is step -> KL, or None for steps."""
    from matplotlib.ticker import MaxNLocator

    for step in sorted(set(alarm_steps.values())):
        kinds = ", ".join(kind for kind, at in alarm_steps.items() if at == step)
        at = step if where is None else where.get(step)
        if at is not None:
            axes.axvline(
                at, color="red", ls="--", lw=1, zorder=0, label=f"alarm ({kinds}), step {step}"
            )
    if where is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step" if where is None else f"{WORDS['kl']} per completion")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _line(axes: "Axes", at: Sequence[float], evaluations: Sequence[dict], name: str) -> None:
    values = [row[name][0] for row in evaluations]
    errors = [Z * row[name][1] if row[name][1] == row[name][1] else 0.0 for row in evaluations]
    axes.errorbar(at, values, yerr=errors, fmt="o-", ms=3, lw=1, capsize=2, label=WORDS[name])
