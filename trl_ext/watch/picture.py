"""What the reward-hacking watch saw, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Two-sided 95% of the normal distribution.
_Z = 1.96


def draw_watch(evaluations: Sequence[dict[str, Any]], best_step: int, file: Path) -> None:
    """Proxy and gold reward against the KL, or the step; length; repetition and distinct n-grams.

    Bars are 95% intervals over prompts.

    Args:
        evaluations: of the watch: `step`, and a mean and its standard error a measure.
        best_step: of the evaluation with the highest gold reward.
        file: a .png.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15.0, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    rewards, lengths, texts = figure.subplots(1, 3)
    by_kl = all("kl" in row for row in evaluations)
    at = [row["kl"][0] if by_kl else row["step"] for row in evaluations]
    for name in ("proxy_reward", "gold_reward"):
        _line(rewards, at, evaluations, name)
    best = next(i for i, row in enumerate(evaluations) if row["step"] == best_step)
    rewards.axvline(at[best], color="grey", ls=":", label=f"best gold, step {best_step}")
    rewards.set_xlabel("KL to the policy before training, nats per completion" if by_kl else "step")
    rewards.set_ylabel("reward")
    steps = [row["step"] for row in evaluations]
    _line(lengths, steps, evaluations, "length")
    lengths.set_ylabel("tokens")
    for name in ("repetition", "truncated", "distinct_1", "distinct_2"):
        _line(texts, steps, evaluations, name)
    texts.set_ylabel("share")
    for axes in (lengths, texts):
        axes.set_xlabel("step")
    for axes in (rewards, lengths, texts):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("Held-out prompts; bars are 95% intervals over prompts")
    figure.savefig(file, dpi=120)


def _line(axes: Any, at: Sequence[float], evaluations: Sequence[dict], name: str) -> None:
    values = [row[name][0] for row in evaluations]
    errors = [_Z * row[name][1] if row[name][1] == row[name][1] else 0.0 for row in evaluations]
    axes.errorbar(
        at, values, yerr=errors, fmt="o-", ms=3, lw=1, capsize=2, label=name.replace("_", " ")
    )
