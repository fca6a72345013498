"""How alike two lists of scores order the same entries, within prompts."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from trl_ext.errors import DataError
from trl_ext.functional.ranking import kendall_tau_b, spearman

# With another seed the ends of a 95% interval move by about a hundredth of its width.
_BOOTSTRAP_DRAWS = 2000
_BOOTSTRAP_SEED = 0
_ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)


@dataclass(frozen=True)
class Agreement:
    """How alike two scorers order the same entries, within prompts, averaged over prompts.

    Attributes:
        kendall_tau_b: mean of Kendall's τ_b over the prompts.
        kendall_interval: 95% bootstrap interval of that mean over prompts; None for one prompt.
        spearman: mean of Spearman's ρ over the prompts.
        spearman_interval: the same of it.
        num_prompts: prompts that count: both scorers tell two entries apart.
        num_pairs: pairs of entries within these prompts.
        num_undefined: the other prompts, which have no correlation and are left out.
    """

    kendall_tau_b: float
    kendall_interval: tuple[float, float] | None
    spearman: float
    spearman_interval: tuple[float, float] | None
    num_prompts: int
    num_pairs: int
    num_undefined: int


def score_agreement(
    one: Sequence[float], other: Sequence[float], groups: Sequence[Hashable]
) -> Agreement:
    """Rank correlations of two lists of scores within groups, averaged over the groups.

    Args:
        one: N scores.
        other: N scores of the same entries.
        groups: N names of prompts; the entries of one need not stand together.

    Returns:
        `Agreement`.

    Raises:
        DataError: if the lengths differ, a score is NaN, or no group has two entries that both
            tell apart.
    """
    if not len(one) == len(other) == len(groups):
        raise DataError(
            "Each entry needs a score from both scorers and a group, got "
            f"{len(one)} and {len(other)} scores and {len(groups)} groups."
        )
    first, second = check_numbers(one, "score"), check_numbers(other, "score")
    sizes, values = [], []
    for rows in rows_by_name(groups).values():
        sizes.append(len(rows))
        pair = first[rows], second[rows]
        values.append([kendall_tau_b(*pair).item(), spearman(*pair).item()])
    # Both are undefined for the same groups: where one of the scorers is constant.
    defined = [not math.isnan(tau) for tau, _ in values]
    if not any(defined):
        raise DataError(
            f"None of {len(sizes)} prompts has two entries that both scorers tell apart, so there "
            "is no order to compare. Give more completions of each prompt."
        )
    correlations = torch.tensor(values, dtype=torch.float64)[torch.tensor(defined)].T
    (tau, tau_interval), (rho, rho_interval) = means_and_intervals(correlations)
    return Agreement(
        kendall_tau_b=tau,
        kendall_interval=tau_interval,
        spearman=rho,
        spearman_interval=rho_interval,
        num_prompts=sum(defined),
        num_pairs=sum(math.comb(n, 2) for n, counts in zip(sizes, defined, strict=True) if counts),
        num_undefined=len(sizes) - sum(defined),
    )


def check_numbers(values: Sequence[float] | Tensor, what: str) -> Tensor:
    """(N,) float64 of N numbers, none of them NaN or a bool.

    Raises:
        DataError: if one is.
    """
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    for index, value in enumerate(listed):
        if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
            raise DataError(
                f"The {what} of entry {index} must be a number, got {value!r}; leave out entries "
                "without one."
            )
    return torch.tensor(listed, dtype=torch.float64)


def rows_by_name(names: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """name -> the rows that have it, both in the order of their first appearance."""
    rows: dict[Hashable, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return rows


def means_and_intervals(
    values: Tensor,
) -> list[tuple[float, tuple[float, float] | None]]:
    """(2, P) values of P prompts -> mean of each row, and its 95% bootstrap interval."""
    size = values.shape[-1]
    means = values.mean(-1).tolist()
    if size == 1:
        return [(mean, None) for mean in means]
    generator = torch.Generator().manual_seed(_BOOTSTRAP_SEED)
    draws = torch.randint(size, (_BOOTSTRAP_DRAWS, size), generator=generator)
    ends = values[:, draws].mean(-1).quantile(_ENDS, dim=-1).T.tolist()
    return [(mean, (low, high)) for mean, (low, high) in zip(means, ends, strict=True)]
