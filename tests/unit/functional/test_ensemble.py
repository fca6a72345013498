"""Ensembles of scores: by hand, against a slow loop, in their limits."""

import math
from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.functional import ensemble_score, ensemble_spread

NAN = math.nan
numbers = st.floats(-100, 100, width=32)
# (members, samples), some without a score.
tables = st.integers(1, 5).flatmap(
    lambda members: st.lists(
        st.lists(st.one_of(numbers, st.just(NAN)), min_size=members, max_size=members),
        min_size=1,
        max_size=4,
    )
)


def slow(members: list[float], how: str, penalty: float) -> float:
    scored = [score for score in members if not math.isnan(score)]
    if not scored:
        return NAN
    if how == "min":
        return min(scored)
    return fmean(scored) - (penalty * pstdev(scored) if how == "uncertainty" else 0.0)


@given(tables, st.sampled_from(["mean", "min", "uncertainty"]), st.floats(0, 3))
def test_equals_a_loop_over_samples(rows, how, penalty):
    scores = torch.tensor(rows, dtype=torch.float64)
    expected = torch.tensor([slow(row, how, penalty) for row in rows], dtype=torch.float64)
    got = ensemble_score(scores, how, penalty=penalty, dim=1)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(
        ensemble_score(scores.T, how, penalty=penalty), got, equal_nan=True, rtol=0, atol=0
    )


def test_by_hand():
    # (1, 3): mean 2, deviations ±1, population variance 1. (2, 2): they agree. The third has one
    # score, the fourth none.
    scores = torch.tensor([[1.0, 2.0, NAN, NAN], [3.0, 2.0, 5.0, NAN]])
    expected = {
        "mean": [2.0, 2.0, 5.0, NAN],
        "min": [1.0, 2.0, 5.0, NAN],
        "uncertainty": [2 - 0.5 * 1, 2.0, 5.0, NAN],
    }
    for how, values in expected.items():
        got = ensemble_score(scores, how, penalty=0.5)  # type: ignore[arg-type]
        torch.testing.assert_close(got, torch.tensor(values), equal_nan=True)
    spread = torch.tensor([1.0, 0.0, 0.0, NAN])
    torch.testing.assert_close(ensemble_spread(scores), spread, equal_nan=True)


def test_limits():
    torch.manual_seed(0)
    scores = torch.randn(4, 7, dtype=torch.float64)
    mean = ensemble_score(scores)
    torch.testing.assert_close(ensemble_score(scores, "uncertainty", penalty=0.0), mean)
    # Two members are each one std from their mean: with c = 1 the penalised mean is the worst.
    pair = scores[:2]
    torch.testing.assert_close(ensemble_score(pair, "uncertainty"), ensemble_score(pair, "min"))
    # Adding a constant moves every rule by it, and no spread.
    torch.testing.assert_close(ensemble_score(scores + 3, "uncertainty"), 3 + mean - spread(scores))
    torch.testing.assert_close(ensemble_spread(scores + 3), spread(scores))


def spread(scores: torch.Tensor) -> torch.Tensor:
    return scores.std(dim=0, correction=0)


def test_half_precision_is_summed_in_single():
    # In bfloat16 100 + 0.25 is 100.
    scores = torch.tensor([[100.0], [0.25]], dtype=torch.bfloat16)
    got = ensemble_score(scores)
    assert got.dtype == torch.float32
    assert got.item() == 50.125


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"how": "max"}, "how is 'max'; it must be one of mean, min, uncertainty"),
        ({"penalty": -1.0}, "penalty is -1.0; it must be 0 or more"),
        ({"penalty": NAN}, "penalty is nan"),
        ({"penalty": math.inf}, "penalty is inf"),
    ],
)
def test_what_is_no_rule(kwargs, says):
    with pytest.raises(ValueError, match=says):
        ensemble_score(torch.zeros(2, 3), **kwargs)


def test_nobody_is_no_ensemble():
    with pytest.raises(ValueError, match="at least one member"):
        ensemble_score(torch.zeros(0, 3))
