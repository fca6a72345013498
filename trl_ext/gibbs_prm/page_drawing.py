"""How the page of scores draws numbers: as colours, as a small picture and as text."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from markupsafe import Markup

from trl_ext.gibbs_prm.scored import PrefixScores

# One score in fifty may have the colour of an end: a few wild tokens do not bleach all others.
_QUANTILE = 0.98
_SPARK = (120, 24)  # pixels


class ColourScale:
    """21 colours between −limit and +limit, symmetric around 0.

    The limit is the smallest |value| that 98% of the finite ones do not exceed; where that is 0,
    the largest; where all are 0, 1.

    Args:
        values: all that the page shows on this scale.

    Attributes:
        limit: all values beyond ±limit have the colours of the ends; in the values' units.
        count, beyond, missing: how many values are numbers, lie beyond the limit, are no numbers.
    """

    NAMES: ClassVar = "abcdefghijklmnopqrstu"
    MISSING: ClassVar = "x"

    def __init__(self, values: Sequence[float]):
        finite = sorted(abs(value) for value in values if math.isfinite(value))
        at_quantile = finite[math.ceil(_QUANTILE * len(finite)) - 1] if finite else 0.0
        self.limit = at_quantile or (finite[-1] if finite else 0.0) or 1.0
        self.missing = sum(math.isnan(value) for value in values)
        self.count = len(values) - self.missing
        self.beyond = sum(abs(value) > self.limit for value in values)

    @property
    def names(self) -> str:
        """The classes of the colours, from the lowest."""
        return self.NAMES

    @property
    def ticks(self) -> list[float]:
        """What a legend writes below the colours."""
        return [part * self.limit for part in (-1.0, -0.5, 0.0, 0.5, 1.0)]

    def colour(self, value: float) -> str:
        """The class of the nearest colour; a value half-way between two has the stronger one."""
        if math.isnan(value):
            return self.MISSING
        middle = len(self.NAMES) // 2
        strength = min(math.floor(min(abs(value) / self.limit, 1.0) * middle + 0.5), middle)
        return self.NAMES[middle + (strength if value > 0 else -strength)]


def formatted(value: float) -> str:
    """Three digits, for people."""
    if math.isnan(value):
        return "NaN"
    text = "∞" if math.isinf(value) else f"{abs(value):.3g}"
    return f"−{text}" if value < 0 else text


def sparkline(one: PrefixScores, worst: int | None) -> Markup:
    """The prefix score over the steps, from 0 at the empty prefix, as a small picture."""
    values = [0.0, *one.prefix_scores]
    errors = [0.0, *(one.standard_errors or [0.0] * len(one.steps))]
    errors = [error if math.isfinite(error) else 0.0 for error in errors]
    points = [(k, v, e) for k, (v, e) in enumerate(zip(values, errors, strict=True))]
    points = [(k, v, e) for k, v, e in points if math.isfinite(v)]
    top, bottom = max(v + e for _, v, e in points), min(v - e for _, v, e in points)
    width, height = _SPARK

    def at(k: int, value: float) -> str:
        y = height * (top - value) / ((top - bottom) or 1.0)
        return f"{width * k / max(len(one.steps), 1):.4g},{y:.3g}"

    joined = {k for (before, *_), (k, *_) in pairwise(points) if k == before + 1}
    line = "".join(f"{'L' if k in joined else 'M'}{at(k, v)}" for k, v, _ in points)
    ranges = "".join(f"M{at(k, v - e)}L{at(k, v + e)}" for k, v, e in points if e)
    dots = [at(k, v).split(",") for k, v, _ in points if worst is not None and k == worst + 1]
    ends = [
        formatted(value) for value in (min(v for _, v, _ in points), max(v for _, v, _ in points))
    ]
    return Markup(
        f'<svg class="spark" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img"><title>Prefix scores between {ends[0]} and {ends[1]}</title>'
        f'<path class="zero" d="M{at(0, 0.0)}H{width}"/>'
        + (f'<path class="range" d="{ranges}"/>' if ranges else "")
        + f'<path d="{line}"/>'
        + "".join(f'<circle cx="{x}" cy="{y}" r="2.5"/>' for x, y in dots)
        + "</svg>"
    )
