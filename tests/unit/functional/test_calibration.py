import math
from decimal import Decimal, getcontext

import pytest
import torch

from trl_ext.functional.calibration import (
    brier,
    expected_calibration_error,
    reliability,
    success_probability,
)

getcontext().prec = 60


def exact_tilt(p: float, beta: float) -> float:
    """log(1 + p(e^{1/β} − 1)) to 60 digits, nats."""
    return float((1 + Decimal(p) * ((1 / Decimal(beta)).exp() - 1)).ln())


@pytest.mark.equation("E52")
@pytest.mark.parametrize("beta", [0.001, 0.01, 0.3, 1.0, 50.0, 1e6])
@pytest.mark.parametrize("p", [1e-6, 0.2, 0.5, 1.0])
def test_success_probability_is_read_off_the_tilt(p, beta):
    tilt = exact_tilt(p, beta)
    for log_z in (0.0, 0.25):
        log_ratio = torch.tensor(tilt - log_z, dtype=torch.float64)
        got = success_probability(log_ratio, log_z, beta).item()
        # The sum is rounded to 2e-16 of its larger part, which dp/dtilt = e^tilt/(e^{1/β} − 1)
        # magnifies.
        slope = math.exp(tilt - 1 / beta) / -math.expm1(-1 / beta)
        assert got == pytest.approx(p, rel=4e-16, abs=4e-16 * max(tilt, log_z) * slope)


@pytest.mark.equation("E52")
def test_success_probability_by_hand():
    # 1/β = ln 3: E exp(r/β) = 1 + 2p; for the walk from 1 of 4 with p = ½, the ruin's win
    # probability is ¼ and the tilt ln 1.5.
    beta = 1 / math.log(3)
    tilt = torch.tensor([0.0, math.log(1.5), math.log(3)], dtype=torch.float64)
    assert success_probability(tilt, 0.0, beta).tolist() == pytest.approx([0, 0.25, 1], abs=1e-15)
    # It is the sum of both logarithms that counts.
    log_z = torch.tensor([0.5, 0.1, -2.0], dtype=torch.float64)
    shifted = success_probability(tilt - log_z, log_z, beta).tolist()
    assert shifted == pytest.approx([0, 0.25, 1], abs=1e-15)


def test_success_probability_outside_of_its_range_is_clipped_on_request_only():
    beta = 1 / math.log(3)
    # e^tilt = ½ and 5: (½ − 1)/2 and (5 − 1)/2.
    tilt = torch.tensor([math.log(0.5), math.log(5), torch.nan, -torch.inf], dtype=torch.float64)
    got = success_probability(tilt, 0.0, beta)
    assert got[[0, 1, 3]].tolist() == pytest.approx([-0.25, 2.0, -0.5], abs=1e-14)
    assert got[2].isnan()
    clipped = success_probability(tilt, 0.0, beta, clip=True)
    assert clipped[[0, 1, 3]].tolist() == [0.0, 1.0, 0.0]
    assert clipped[2].isnan()


def test_success_probability_in_half_precision_is_float32():
    got = success_probability(torch.tensor([0.5], dtype=torch.bfloat16), 0.0, 1.0)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(math.expm1(0.5) / math.expm1(1), rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_a_beta_without_a_probability_is_refused(beta):
    with pytest.raises(ValueError, match="positive and finite"):
        success_probability(torch.zeros(1), 0.0, beta)


PREDICTED = torch.tensor([0.1, 0.3, 0.6, 0.7, 0.8, 1.0])
OUTCOMES = torch.tensor([0, 1, 1, 0, 1, 1])


def test_reliability_by_hand():
    # Halves: (0.1, 0.3) with outcomes 0 1, and (0.6, 0.7, 0.8, 1) with 1 0 1 1.
    found = reliability(PREDICTED, OUTCOMES, bins=2)
    assert found.mean_predicted.tolist() == pytest.approx([0.2, 0.775], abs=1e-7)
    assert found.observed.tolist() == [0.5, 0.75]
    assert found.count.tolist() == [2, 4]
    # √(¼/1) and √((3/16)/3).
    assert found.standard_error.tolist() == [0.5, 0.25]
    # 2/6·|0.5 − 0.2| + 4/6·|0.75 − 0.775|; squares 0.01 0.49 0.16 0.49 0.04 0.
    error = expected_calibration_error(PREDICTED, OUTCOMES, bins=2).item()
    assert error == pytest.approx(0.7 / 6, abs=1e-7)
    assert brier(PREDICTED, OUTCOMES).item() == pytest.approx(1.19 / 6, abs=1e-7)


def test_empty_and_single_bins():
    found = reliability(torch.tensor([0.05, 0.95, 0.99]), torch.tensor([0, 1, 1]), bins=4)
    assert found.count.tolist() == [1, 0, 0, 2]
    assert found.observed.tolist() == pytest.approx([0, math.nan, math.nan, 1], nan_ok=True)
    assert found.mean_predicted[1:3].isnan().all()
    assert found.standard_error[:3].isnan().all()
    assert found.standard_error[3].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_edge_belongs_to_the_bin_above_and_one_to_the_last(dtype):
    # 0, 0.01, …, 1: in either dtype some k/100·100 is rounded to less than k.
    edges = torch.tensor([k / 100 for k in range(101)], dtype=dtype)
    found = reliability(edges, torch.zeros(101), bins=100)
    assert found.count.tolist() == [1] * 99 + [2]


def test_bins_of_equal_mass_keep_equals_together():
    by_mass = reliability(PREDICTED, OUTCOMES, bins=3, binning="mass")
    assert by_mass.count.tolist() == [2, 2, 2]
    assert by_mass.observed.tolist() == [0.5, 0.5, 1.0]
    # One value five times out of six is one bin, however they are ordered.
    tied = torch.tensor([0.4, 0.4, 0.9, 0.4, 0.4, 0.4])
    found = reliability(tied, OUTCOMES, bins=3, binning="mass")
    assert found.count.tolist() == [0, 5, 1]
    same = torch.full((4,), 0.4)
    assert reliability(same, torch.ones(4), bins=4, binning="mass").count.sum() == 4


def test_masking_equals_slicing_in_any_shape():
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    poisoned = torch.where(mask.bool(), PREDICTED, torch.nan)
    keep = mask.bool()
    for function in (brier, expected_calibration_error):
        masked = function(poisoned.view(2, 3), OUTCOMES.view(2, 3), mask=mask.view(2, 3))
        assert masked == function(PREDICTED[keep], OUTCOMES[keep])
    assert brier(PREDICTED, OUTCOMES, mask=torch.zeros(6)).isnan()
    assert expected_calibration_error(PREDICTED, OUTCOMES, mask=torch.zeros(6)).isnan()
    assert reliability(PREDICTED[:0], OUTCOMES[:0], binning="mass").count.sum() == 0


def test_calibrated_predictions_are_within_their_standard_errors():
    """N = 20000 outcomes drawn with the predicted probabilities, in 10 bins of 2000 or so."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(20_000, generator=generator, dtype=torch.float64)
    outcomes = torch.rand(20_000, generator=generator, dtype=torch.float64) < predicted
    found = reliability(predicted, outcomes)
    gaps = (found.observed - found.mean_predicted).abs()
    assert torch.all(gaps <= 4 * found.standard_error)
    # E(p − o)² = E p(1 − p) = 1/6; its variance is below E(p − o)⁴ < 1/6.
    assert abs(brier(predicted, outcomes).item() - 1 / 6) <= 4 * math.sqrt(1 / 6 / 20_000)


def test_what_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.25.*clip=True"):
        brier(torch.tensor([0.5, 1.25]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="between 0 and 1, got nan"):
        brier(torch.tensor([math.nan]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"0 or 1, got 0\.5"):
        reliability(torch.tensor([0.5]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(1,\)"):
        brier(torch.zeros(2), torch.zeros(1))
    for bins in (0, 2.5, True):
        with pytest.raises(ValueError, match="positive whole number"):
            reliability(PREDICTED, OUTCOMES, bins=bins)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'width' or 'mass', got 'size'"):
        reliability(PREDICTED, OUTCOMES, binning="size")  # pyright: ignore[reportArgumentType]
