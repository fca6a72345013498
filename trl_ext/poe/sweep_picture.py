"""A sweep as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_ext.poe.sweep import Mean, Point, perplexity_of

# From this ratio of the largest perplexity to the smallest on, its axis is logarithmic.
_WIDE = 10


def plot(points: Sequence[Point], name: str, reference: str, file: Path, metric: str = "") -> None:
    """Draw a sweep: likelihood under one expert against that under the other, a point an α.

    With a metric, a second panel has it against the perplexity. Bars are standard errors over
    prompts.

    Args:
        points: of the sweep.
        name: of the expert that was swept.
        reference: the expert that gave the perplexity.
        file: a .png.
        metric: its name, if there is one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    (other,) = [expert for expert in points[0].log_likelihood if expert != name]
    panels = 2 if metric else 1
    figure = Figure(figsize=(6.0 * panels, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    xs, ys = ([p.log_likelihood[expert] for p in points] for expert in (other, name))
    _draw(axes[0], points, xs, ys)
    axes[0].set_xlabel(f"log-likelihood under {other}, nats per token")
    axes[0].set_ylabel(f"log-likelihood under {name}, nats per token")
    if metric:
        perplexities = [_perplexity(point.log_likelihood[reference]) for point in points]
        _draw(axes[1], points, perplexities, [point.metric or Mean(0, 0) for point in points])
        values = [perplexity.mean for perplexity in perplexities]
        if max(values) > _WIDE * min(values):
            axes[1].set_xscale("log")
        axes[1].set_xlabel(f"perplexity under {reference}")
        axes[1].set_ylabel(metric)
    prompts = len(points[0].texts)
    figure.suptitle(
        f"Samples of {other}^(1−α) · {name}^α: {prompts} prompts, bars ± one standard error"
    )
    figure.savefig(file, dpi=150)


def _perplexity(logp: Mean) -> Mean:
    """The standard error of exp(−x), to first order."""
    value = perplexity_of(logp.mean)
    return Mean(value, value * logp.standard_error)


def _draw(axes: Any, points: Sequence[Point], xs: Sequence[Mean], ys: Sequence[Mean]) -> None:
    def bars(means: Sequence[Mean]) -> list[float]:
        return [0.0 if math.isnan(m.standard_error) else m.standard_error for m in means]

    x, y = [m.mean for m in xs], [m.mean for m in ys]
    axes.errorbar(x, y, xerr=bars(xs), yerr=bars(ys), fmt="o-", capsize=2, elinewidth=0.8, lw=1)
    for point, *at in zip(points, x, y, strict=True):
        axes.annotate(
            f"α={point.alpha:g}",
            at,
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        )
    axes.grid(alpha=0.3)
