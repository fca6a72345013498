import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.functional.ranking import (
    counts_below,
    kendall_tau_b,
    mean_ranks,
    pairwise_differences,
    probability_greater,
    spearman,
)

# Few values, so that ties are common.
scores = st.lists(st.integers(-3, 3), min_size=2, max_size=9)
two_scorers = scores.flatmap(
    lambda a: st.tuples(st.just(a), st.lists(st.integers(-3, 3), min_size=len(a), max_size=len(a)))
)


def slow_tau_b(a, b) -> float:
    """(C − D)/√((P − T_a)(P − T_b)) pair by pair; None of a constant."""
    concordant = discordant = tied_a = tied_b = 0
    pairs = list(combinations(range(len(a)), 2))
    for i, j in pairs:
        product = (a[i] - a[j]) * (b[i] - b[j])
        concordant += product > 0
        discordant += product < 0
        tied_a += a[i] == a[j]
        tied_b += b[i] == b[j]
    size = math.sqrt((len(pairs) - tied_a) * (len(pairs) - tied_b))
    return (concordant - discordant) / size if size else math.nan


def slow_ranks(values) -> list[float]:
    """Sort, and give each value the mean of the places (from 1) at which it stands."""
    ordered = sorted(values)
    places = {v: [k + 1 for k, other in enumerate(ordered) if other == v] for v in values}
    return [sum(places[v]) / len(places[v]) for v in values]


def slow_spearman(a, b) -> float:
    x, y = slow_ranks(a), slow_ranks(b)
    mean = (len(a) + 1) / 2
    product = sum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    size = math.sqrt(sum((p - mean) ** 2 for p in x) * sum((q - mean) ** 2 for q in y))
    return product / size if size else math.nan


def test_correlations_by_hand():
    # a = 1 2 3 4, b = 1 3 2 4: of 6 pairs one is discordant, (5 − 1)/6; ranks differ by 0 1 1 0,
    # so ρ = 1 − 6·2/(4·15) = 0.8.
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert kendall_tau_b(a, b).item() == pytest.approx(2 / 3, abs=1e-15)
    assert spearman(a, b).item() == pytest.approx(0.8, abs=1e-15)
    # a = 1 1 2, b = 1 2 3: pairs (tied in a), C, C: 2/√((3−1)·3). Ranks 1.5 1.5 3 and 1 2 3:
    # Σ = 0.5·1 + 0.5·0 + 1·1 = 1.5 of √(1.5·2).
    a, b = torch.tensor([1, 1, 2]), torch.tensor([1, 2, 3])
    assert kendall_tau_b(a, b).item() == pytest.approx(2 / math.sqrt(6), abs=1e-15)
    assert spearman(a, b).item() == pytest.approx(1.5 / math.sqrt(3), abs=1e-15)


@given(two_scorers)
def test_correlations_equal_the_definition(pair):
    a, b = pair
    x, y = torch.tensor(a), torch.tensor(b)
    assert kendall_tau_b(x, y).item() == pytest.approx(slow_tau_b(a, b), abs=1e-12, nan_ok=True)
    assert spearman(x, y).item() == pytest.approx(slow_spearman(a, b), abs=1e-12, nan_ok=True)
    assert mean_ranks(x).tolist() == slow_ranks(a)


@pytest.mark.parametrize("correlation", [kendall_tau_b, spearman])
def test_order_alone_counts_and_sign_turns(correlation):
    a = torch.tensor([0.3, -2.0, 5.0, 0.3, 100.0])
    # Exactly 1, and unchanged by an increasing function; infinities have a place in the order.
    assert correlation(a, a.exp()).item() == 1.0
    assert correlation(a, -a).item() == -1.0
    b = torch.tensor([1.0, -torch.inf, 2.0, 1.5, torch.inf])
    assert correlation(a, b) == correlation(a, torch.tensor([1.0, -9.0, 2.0, 1.5, 9.0]))


@pytest.mark.parametrize("correlation", [kendall_tau_b, spearman])
def test_nothing_to_correlate_is_nan(correlation):
    constant, varied = torch.ones(3), torch.arange(3.0)
    assert correlation(constant, varied).isnan()
    assert correlation(varied, constant).isnan()
    assert correlation(varied[:1], varied[:1]).isnan()
    assert correlation(varied, varied, torch.zeros(3)).isnan()


@pytest.mark.parametrize("correlation", [kendall_tau_b, spearman])
def test_masking_equals_slicing_row_by_row(correlation):
    a = torch.tensor([[1.0, 1.5, 2.0, 3.0, torch.inf], [1.0, 2.0, torch.nan, 4.0, 0.0]])
    b = torch.tensor([[1.0, torch.nan, 3.0, 2.0, 7.0], [3.0, 2.0, 2.5, 1.0, 5.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    got = correlation(a, b, mask)
    first, second = [0, 2, 3], [0, 1, 3, 4]
    assert got[0] == correlation(a[0, first], b[0, first])
    assert got[1] == correlation(a[1, second], b[1, second])


def test_counts_and_ranks_leave_out_what_is_masked():
    values = torch.tensor([2.0, torch.inf, torch.nan, 2.0, torch.inf, -1.0])
    mask = torch.tensor([1, 1, 1, 1, 0, 1])
    below, not_above = counts_below(values, mask)
    kept = [0, 1, 3, 5]  # 2, inf, 2, -1
    assert below[kept].tolist() == [1, 3, 1, 0]
    assert not_above[kept].tolist() == [3, 4, 3, 1]
    ranks = mean_ranks(values, mask)
    assert ranks[kept].tolist() == [2.5, 4.0, 2.5, 1.0]
    assert ranks[[2, 4]].isnan().all()


@pytest.mark.equation("E24")
def test_differences_and_their_standard_errors_by_hand():
    differences, errors = pairwise_differences(
        torch.tensor([1.0, 3.0, 2.5]), torch.tensor([3.0, 4.0, 0.0])
    )
    assert differences.tolist() == [[0, -2, -1.5], [2, 0, 0.5], [1.5, -0.5, 0]]
    assert errors.tolist() == [[0, 5, 3], [5, 0, 4], [3, 4, 0]]
    # A constant, such as log Z, changes no difference.
    assert pairwise_differences(torch.tensor([8.0, 10.0, 9.5]))[0].equal(differences)
    assert pairwise_differences(torch.zeros(2, 3))[1].equal(torch.zeros(2, 3, 3).double())


def test_equal_infinities_do_not_differ():
    differences, _ = pairwise_differences(torch.tensor([torch.inf, 0.0, torch.inf]))
    assert differences.tolist() == [
        [0, math.inf, 0],
        [-math.inf, 0, -math.inf],
        [0, math.inf, 0],
    ]


def test_probability_greater_is_the_normal_distribution():
    differences = torch.tensor([1.959964, -1.959964, 0.0, 2.0])
    errors = torch.tensor([1.0, 1.0, 3.0, 1.0])
    # Φ(1.959964) = 0.975; Φ(2) = (1 + erf(√2))/2.
    expected = [0.975, 0.025, 0.5, (1 + math.erf(math.sqrt(2))) / 2]
    assert probability_greater(differences, errors).tolist() == pytest.approx(expected, abs=1e-7)
    # The unit cancels.
    halves = probability_greater(differences / 2, errors / 2)
    assert halves.tolist() == pytest.approx(expected, abs=1e-7)


def test_probability_greater_without_error_and_without_knowledge():
    exact = probability_greater(torch.tensor([1e-9, 0.0, -3.0, torch.inf]), torch.zeros(4))
    assert exact.tolist() == [1.0, 0.5, 0.0, 1.0]
    unknown = probability_greater(torch.tensor([5.0, torch.inf]), torch.full((2,), torch.inf))
    assert unknown.tolist() == [0.5, 0.5]
    assert probability_greater(torch.tensor([torch.nan]), torch.tensor([torch.inf])).isnan()


def test_probability_greater_is_how_often_the_better_estimate_is_right():
    """N = 100000 pairs of estimates of true values 0.3 and 0, with errors 0.6 and 0.8.

    The difference of the estimates is normal with mean 0.3 and standard deviation 1, so it is
    positive with probability Φ(0.3): that of the true difference with its standard error.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100_000, 2, generator=generator, dtype=torch.float64)
    estimates = torch.tensor([0.3, 0.0]) + noise * torch.tensor([0.6, 0.8])
    rate = (estimates[:, 0] > estimates[:, 1]).double().mean().item()
    pair = pairwise_differences(torch.tensor([0.3, 0.0]), torch.tensor([0.6, 0.8]))
    expected = probability_greater(*pair)[0, 1].item()
    standard_error = math.sqrt(expected * (1 - expected) / 100_000)
    assert abs(rate - expected) <= 4 * standard_error
