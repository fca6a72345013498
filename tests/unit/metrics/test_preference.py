"""The metric of comparisons, by hand."""

import math

import pytest
import torch

from trl_ext.errors import DataError, UnknownNameError
from trl_ext.metrics import load_metric
from trl_ext.metrics.comparisons import comparison_scores

# σ(log 3) = 3/4, σ(log 4) = 4/5.
GIVEN = {
    "predictions": [math.log(3), -math.log(3), math.log(4), math.log(4), 0.0],
    "references": [1, 0, 0, 1, 1],
}


def test_by_hand():
    found = load_metric("preference").compute(**GIVEN, bins=5)
    # Margins: log 3, log 3, −log 4, log 4, 0; probabilities of what happened ¾ ¾ ⅕ ⅘ ½.
    assert found["accuracy"] == 0.6
    assert found["margin"] == pytest.approx(2 * math.log(3) / 5)
    chances = [3 / 4, 3 / 4, 1 / 5, 4 / 5, 1 / 2]
    assert found["log_loss"] == pytest.approx(-sum(map(math.log, chances)) / 5)
    assert found["brier"] == pytest.approx(sum((1 - p) ** 2 for p in chances) / 5)
    # Forecasts ¾ ¾, both right, and ⅘ ⅘, one right: gaps ¼ and 0.3, two of each.
    assert found["ece"] == pytest.approx((2 * 0.25 + 2 * 0.3) / 4)
    assert [(row["count"], row["observed"]) for row in found["bins"]] == [(2, 1.0), (2, 0.5)]
    assert [row["mean_predicted"] for row in found["bins"]] == pytest.approx([0.75, 0.8])
    assert found["bins"][1]["standard_error"] == pytest.approx(0.5)  # √(½·½/1)
    assert found["by_margin"] == [
        {"from": 0.0, "to": 0.5, "accuracy": 0.0, "count": 1},
        {"from": 1.0, "to": 2.0, "accuracy": 0.75, "count": 4},
    ]
    assert (found["num_comparisons"], found["num_ties"]) == (5, 1)


def test_which_is_named_first_does_not_matter():
    turned = {
        "predictions": [-x for x in GIVEN["predictions"]],
        "references": [1 - y for y in GIVEN["references"]],
    }
    assert load_metric("preference").compute(**turned) == load_metric("preference").compute(**GIVEN)


def test_a_model_that_is_right_about_its_doubts_is_calibrated():
    # 75 of 100 with a forecast of ¾.
    log_3 = torch.tensor(3.0, dtype=torch.float64).log()
    margins = torch.cat([log_3.repeat(75), -log_3.repeat(25)])
    assert comparison_scores(margins).ece == pytest.approx(0, abs=1e-12)
    assert comparison_scores(margins.abs()).ece == pytest.approx(0.25)
    # Five bins between ½ and 1: 0.62, right, and 0.72, wrong, are not in one.
    apart = torch.tensor([0.62, 0.72], dtype=torch.float64).logit() * torch.tensor([1, -1])
    assert comparison_scores(apart, bins=5).ece == pytest.approx((0.38 + 0.72) / 2)


def test_without_a_forecast_there_is_no_calibration():
    found = load_metric("preference").compute(predictions=[0.0, 0.0], references=[1, 0])
    assert (found["ece"], found["bins"], found["accuracy"]) == (None, [], 0.0)
    alone = load_metric("preference").compute(predictions=[1.0], references=[1])
    assert alone["bins"][0]["standard_error"] is None
    # A model that diverged fails no log line.
    assert math.isnan(comparison_scores(torch.tensor([math.nan, 1.0])).margin)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"predictions": [1.0], "references": [0.5]}, "references holds 0.5; the first complet"),
        ({"predictions": [math.nan], "references": [1]}, "predictions holds nan; it must be a fin"),
        ({"predictions": [1.0]}, "The column references is missing"),
        ({"predictions": [1.0], "references": [1, 0]}, "must have one length, got 1 pred"),
        ({"predictions": ["a"], "references": [1]}, "Entry 0 of predictions is 'a'; it must be a"),
        ({"predictions": [1.0], "references": [1], "bins": 0}, "bins must be a positive whole"),
        ({"predictions": [1.0], "references": [1], "bins": True}, "bins must be a positive whole"),
        ({}, "There is no entry to compute from"),
    ],
)
def test_what_is_wrong(columns, says):
    with pytest.raises(DataError, match=says):
        load_metric("preference").compute(**columns)


def test_names():
    with pytest.raises(UnknownNameError, match=r"'preferences'. Did you mean 'preference'\?"):
        load_metric("preferences")
