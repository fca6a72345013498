import json
import math

import evaluate
import evaluate.config
import evaluate.loading
import pytest

from trl_ext.errors import DataError, UnknownNameError
from trl_ext.metrics import METRICS, load_metric, metric_path

# For each: columns, options, and what comes out, derived below.
BEST = {
    "predictions": [1.0, 2.0, 3.0, 5.0, 5.0],
    "references": [0.0, 1.0, 0.0, 1.0, 0.0],
    "groups": ["a", "a", "a", "b", "b"],
}


def test_best_of_n_by_hand():
    # a: of three pairs one has the second as its best, 1/3; b: tied, ½.
    # Standard error of their mean: |1/3 − 1/2|/√2/√2 = 1/12.
    found = load_metric("best_of_n").compute(**BEST, n=2)
    assert found == {
        "accuracy": pytest.approx(5 / 12),
        "standard_error": pytest.approx(1 / 12),
        "num_groups": 2,
    }
    # n = 1 unless told; groups may be numbers, need not stand together, and one has no error.
    numbered = BEST | {"groups": [7, 7, 7, 7, 7]}
    alone = load_metric("best_of_n").compute(**numbered)
    assert alone == {"accuracy": pytest.approx(0.4), "standard_error": None, "num_groups": 1}
    mixed = BEST | {"groups": ["a", "b", "a", "b", "a"]}
    # a: (1, 3, 5) of which all are wrong; b: (2, 5), both right.
    assert load_metric("best_of_n").compute(**mixed, n=2)["accuracy"] == pytest.approx(0.5)


def test_a_completion_without_score_is_left_out():
    columns = BEST | {"predictions": [1.0, 2.0, math.nan, 5.0, 5.0]}
    # a is left with 1 < 2, the better one right.
    assert load_metric("best_of_n").compute(**columns, n=2)["accuracy"] == pytest.approx(0.75)
    with pytest.raises(DataError, match="between 1 and the 2 scored completions of group 'a'"):
        load_metric("best_of_n").compute(**columns, n=3)
    for n in (0, 1.0, True):
        with pytest.raises(DataError, match="whole number between 1 and"):
            load_metric("best_of_n").compute(**columns, n=n)


def test_first_error_by_hand():
    # As in the test of f1: ¾ of the errors, ½ of the correct ones, F1 0.6.
    metric = load_metric("first_error")
    found = metric.compute(predictions=[0, 1, 2, 0, -1, 3], references=[0, 1, 2, 2, -1, -1])
    assert found == {
        "accuracy_error": 0.75,
        "accuracy_correct": 0.5,
        "f1": pytest.approx(0.6),
        "num_error": 4,
        "num_correct": 2,
    }
    with pytest.raises(DataError, match=r"prediction of solution 0 must be a step.*got 0\.7"):
        load_metric("first_error").compute(predictions=[0.7, -1], references=[0, -1])


def test_calibration_by_hand():
    # 0.1 0.3 | 0.8, in halves: means 0.2 and 0.8, rates ½ and 1, 2/3·0.3 + 1/3·0.2 = 0.8/3;
    # squares 0.01 + 0.49 + 0.04. Of four bins the third is empty.
    columns = {"predictions": [0.1, 0.3, 0.8], "references": [0, 1, 1]}
    found = load_metric("calibration").compute(**columns, bins=2)
    assert found["ece"] == pytest.approx(0.8 / 3)
    assert found["brier"] == pytest.approx(0.54 / 3)
    one, two = found["bins"]
    assert one == {
        "mean_predicted": pytest.approx(0.2),
        "observed": 0.5,
        "count": 2,
        "standard_error": 0.5,
    }
    assert (two["count"], two["standard_error"]) == (1, None)
    assert [
        row["count"] for row in load_metric("calibration").compute(**columns, bins=4)["bins"]
    ] == [
        1,
        1,
        1,
    ]
    massed = load_metric("calibration").compute(**columns, bins=3, binning="mass")
    assert [row["mean_predicted"] for row in massed["bins"]] == pytest.approx([0.1, 0.3, 0.8])
    assert massed["ece"] == pytest.approx((0.1 + 0.7 + 0.2) / 3)


AGREE = {
    "predictions": [1.0, 2.0, 3.0, 1.0, 2.0, 7.0],
    "references": [10.0, 30.0, 20.0, 9.0, 8.0, 1.0],
    "groups": ["A", "A", "A", "B", "B", "C"],
}


def test_rank_agreement_by_hand():
    # A: one of three pairs discordant, τ = ⅓, ρ = ½; B: −1 and −1; C: undefined.
    found = load_metric("rank_agreement").compute(**AGREE)
    assert found["kendall_tau_b"] == pytest.approx(-1 / 3)
    assert found["spearman"] == pytest.approx(-1 / 4)
    assert (found["num_prompts"], found["num_pairs"], found["num_undefined"]) == (2, 4, 1)
    one = {name: column[:3] for name, column in AGREE.items()}
    assert load_metric("rank_agreement").compute(**one)["kendall_interval"] is None


INPUTS = {
    "best_of_n": (BEST, {"n": 2}),
    "first_error": ({"predictions": [0, -1, 1], "references": [0, -1, 0]}, {}),
    "calibration": ({"predictions": [0.1, 0.3, 0.8], "references": [0, 1, 1]}, {"bins": 4}),
    "rank_agreement": (AGREE, {}),
}


@pytest.mark.parametrize("name", INPUTS)
def test_batches_add_up_and_results_can_be_saved(name, tmp_path):
    columns, options = INPUTS[name]
    whole = load_metric(name).compute(**columns, **options)
    metric = load_metric(name, keep_in_memory=True)
    assert metric.keep_in_memory
    for start in (0, 2):
        stop = 2 if start == 0 else None
        metric.add_batch(**{key: column[start:stop] for key, column in columns.items()})
    assert metric.compute(**options) == whole
    # No NaN and no inf, which are no JSON.
    json.dumps(whole, allow_nan=False)
    evaluate.save(tmp_path / "result.json", **whole)
    assert json.loads((tmp_path / "result.json").read_text())


@pytest.mark.parametrize("name", INPUTS)
def test_each_metric_says_what_it_takes(name):
    metric = load_metric(name)
    assert metric.description
    for column in metric._feature_names():
        assert f"{column}:" in metric.inputs_description


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda column, name: column[: None if name == "references" else 1],
            "one length, got 1 pr",
        ),
        (lambda column, name: [None, *column[1:]], "Entry 0 of predictions is None; it must be a"),
        (lambda column, name: ["x"] * len(column), "Entry 0 of predictions is 'x'"),
        (lambda column, name: None if name == "references" else column, "references is missing"),
        (lambda column, name: [], "There is no entry to compute from"),
    ],
)
def test_columns_that_do_not_fit_are_refused(name, change, says):
    columns, options = INPUTS[name]
    wrong = {key: change(list(column), key) for key, column in columns.items()}
    with pytest.raises(DataError, match=says):
        load_metric(name).compute(**wrong, **options)
    if "no entry" in says:
        metric = load_metric(name)
        metric.add_batch(**wrong)  # nothing
        with pytest.raises(DataError, match=says):
            metric.compute(**options)
    else:
        with pytest.raises(DataError, match=says):
            load_metric(name).add_batch(**wrong)


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_what_is_neither_right_nor_wrong_is_refused(value):
    columns = BEST | {"references": [value, *BEST["references"][1:]]}
    with pytest.raises(DataError, match=f"references holds {value}; a completion is right, 1"):
        load_metric("best_of_n").compute(**columns)


@pytest.mark.parametrize(
    ("column", "options", "says"),
    [
        ([float("nan"), 0.5], {}, "probabilities must be between 0 and 1, got nan"),
        ([0.1, 0.5], {"bins": 0}, "bins must be a positive whole number, got 0"),
        ([0.1, 0.5], {"binning": "z"}, "binning must be 'width' or 'mass', got 'z'"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(column, options, says):
    with pytest.raises(DataError, match=says):
        load_metric("calibration").compute(predictions=column, references=[0, 1], **options)


def test_metrics_are_the_folders():
    folder = metric_path("best_of_n").parents[1]
    found = sorted(path.parent.name for path in folder.glob("*/*.py"))
    assert found == sorted(METRICS)


def test_an_unknown_metric_is_refused():
    with pytest.raises(UnknownNameError, match=r"no metric 'bestofn'\. Did you mean 'best_of_n'"):
        load_metric("bestofn")
    with pytest.raises(UnknownNameError, match=r"no metric 'xyz'\. There are best_of_n, calib"):
        metric_path("xyz")
    with pytest.raises(UnknownNameError, match="no metric None"):
        metric_path(None)  # pyright: ignore[reportArgumentType]
