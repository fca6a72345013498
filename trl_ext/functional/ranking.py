"""Order statistics of scores: ranks, rank correlations, and who is better than whom.

All results are float64: they are read by people, and are ratios of counts.
"""

import torch
from torch import Tensor


def counts_below(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many kept values of the row are below each one, and how many are not above it.

    An entry counts itself among those not above it; ties are the difference of the two numbers.

    Args:
        values: (…, N), any dtype. NaN marks a missing value, left out as if it was masked.
        mask: (…, N), 1 or True = keep.

    Returns:
        Two int64 tensors (…, N). Of an entry that is left out they mean nothing.
    """
    keep = kept(values, mask)
    # What is left out goes behind everything; +inf goes there too, hence the limit on the second.
    ahead = torch.where(keep, values.double(), torch.inf)
    ordered = ahead.sort(-1).values
    below = torch.searchsorted(ordered, ahead, right=False)
    not_above = torch.searchsorted(ordered, ahead, right=True)
    return below, torch.minimum(not_above, keep.sum(-1, keepdim=True))


def mean_ranks(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Rank of each value, 1 for the lowest; ties share the mean of their ranks.

    Source: Kendall (1945), "The treatment of ties in ranking problems".

    Args:
        values: (…, N), any dtype. NaN marks a missing value, left out as if it was masked.
        mask: (…, N), 1 or True = keep.

    Returns:
        (…, N) float64, between 1 and the number of kept values; NaN for an entry left out.
    """
    below, not_above = counts_below(values, mask)
    ranks = (below + not_above + 1).double() / 2
    return torch.where(kept(values, mask), ranks, torch.nan)


def spearman(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pearson's correlation of the mean ranks, on the last axis.

    ρ = Σ (R_i − R̄)(S_i − S̄) / √(Σ (R_i − R̄)² Σ (S_i − S̄)²). Source: Spearman (1904), with
    Kendall's (1945) mean ranks for ties.

    Args:
        a: (…, N) scores, any dtype.
        b: (…, N) scores; an entry that is NaN in either is left out.
        mask: (…, N), 1 or True = keep.

    Returns:
        (…) in [−1, 1], float64; NaN where either is constant or fewer than two are kept.
    """
    keep = kept(a, mask) & kept(b, mask)
    # Twice the distance of a rank from the mean rank is an integer, so the sums are exact.
    centre = keep.sum(-1, keepdim=True) + 1
    x, y = (
        torch.where(keep, 2 * mean_ranks(values, keep) - centre, 0.0)
        for values in (a.double(), b.double())
    )
    return _cosine((x * y).sum(-1), x.square().sum(-1), y.square().sum(-1))


def kendall_tau_b(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pairs in the same order minus pairs in opposite order, corrected for ties; last axis.

    τ_b = (C − D) / √((P − T_a)(P − T_b)) with P = N(N−1)/2 pairs, of which C are concordant, D
    discordant, T_a tied in a and T_b tied in b. Source: Kendall (1945). Time and memory grow as N².

    Args:
        a: (…, N) scores, any dtype.
        b: (…, N) scores; an entry that is NaN in either is left out.
        mask: (…, N), 1 or True = keep.

    Returns:
        (…) in [−1, 1], float64; NaN where either is constant or fewer than two are kept.
    """
    keep = kept(a, mask) & kept(b, mask)
    pairs = keep[..., :, None] & keep[..., None, :]
    x, y = (torch.where(pairs, _signs(values.double()), 0.0) for values in (a, b))
    # Each pair counts twice in all three sums, which their ratio does not see.
    return _cosine((x * y).sum((-2, -1)), x.square().sum((-2, -1)), y.square().sum((-2, -1)))


def pairwise_differences(
    scores: Tensor, standard_errors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """s_i − s_j for all pairs, and its standard error when the estimates are independent.

    Equation E24: between prefixes of one prompt the difference of two log-ratios is free of
    log Z(x). Its standard error is √(σ_i² + σ_j²).

    Args:
        scores: (…, N), in any unit.
        standard_errors: (…, N), σ ≥ 0 in the same unit; None: the scores are exact.

    Returns:
        (…, N, N) differences, of row minus column, and (…, N, N) their standard errors, 0 on the
        diagonal. float64. Two scores that are the same infinity differ by 0.
    """
    rows, columns = scores.double()[..., :, None], scores.double()[..., None, :]
    differences = torch.where(rows == columns, 0.0, rows - columns)
    if standard_errors is None:
        return differences, torch.zeros_like(differences)
    errors = standard_errors.double()
    both = torch.hypot(*torch.broadcast_tensors(errors[..., :, None], errors[..., None, :]))
    itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    return differences, torch.where(itself, 0.0, both)


def probability_greater(differences: Tensor, standard_errors: Tensor) -> Tensor:
    """Φ(d/σ): how probable it is that the true difference is positive, by a normal estimate.

    Source: the normal approximation, with nothing known beforehand about the difference.

    Args:
        differences: (…, N, N) or any shape.
        standard_errors: the same shape and unit, σ ≥ 0.

    Returns:
        Probabilities, the same shape, float64. For σ = 0 it is 1, 0.5 or 0 by the sign of the
        difference; for σ = inf it is 0.5.
    """
    differences, errors = differences.double(), standard_errors.double()
    certain = (1 + differences.sign()) / 2
    uncertain = torch.special.ndtr(differences / torch.where(errors > 0, errors, 1.0))
    unknown = errors.isinf() & ~differences.isnan()
    return torch.where(unknown, 0.5, torch.where(errors == 0, certain, uncertain))


def kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """Which entries count: not NaN, and not masked.

    Args:
        values: (…, N), any dtype.
        mask: (…, N), 1 or True = keep; None: all.

    Returns:
        (…, N) bool.
    """
    keep = ~values.isnan()
    return keep if mask is None else keep & mask.bool()


def _signs(values: Tensor) -> Tensor:
    """Sign of x_i − x_j by comparison, which infinities and tiny differences survive."""
    rows, columns = values[..., :, None], values[..., None, :]
    return (rows > columns).double() - (rows < columns).double()


def _cosine(product: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """⟨x, y⟩/√(|x|²|y|²); NaN where x or y is 0: a constant has no order to agree with."""
    defined = (first > 0) & (second > 0)
    size = torch.where(defined, first * second, 1.0).sqrt()
    return torch.where(defined, product / size, torch.nan)
