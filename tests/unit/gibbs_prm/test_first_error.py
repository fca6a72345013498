import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.first_error import f1, predict, step_values, tune
from trl_ext.gibbs_prm.scored import MonteCarloScores, PrefixScores


def slow_f1(values, labels, threshold) -> float:
    """ProcessBench's code in words: the mean match of each class, and their harmonic mean."""
    matches: dict = {True: [], False: []}
    for steps, label in zip(values, labels, strict=True):
        guess = -1
        for k in reversed(range(len(steps))):
            if steps[k] < threshold:
                guess = k
        matches[label == -1].append(guess == label)
    a, b = (sum(found) / len(found) for found in matches.values())
    return 2 * a * b / (a + b) if a + b else 0.0


def every_threshold(values) -> list[float]:
    """A threshold within each interval between neighbouring values, and both ends."""
    finite = sorted({v for steps in values for v in steps if math.isfinite(v)})
    middles = [(low + high) / 2 for low, high in pairwise(finite)]
    outside = [finite[0] - 1, finite[-1] + 1] if finite else [0.0]
    return [-math.inf, *finite, *middles, *outside, math.inf]


# Few values, so that ties are common.
WHOLE = st.integers(-4, 4).map(float)


@st.composite
def splits(draw, value=WHOLE):
    """Solutions with labels, of either class at least one."""
    values = draw(st.lists(st.lists(value, min_size=1, max_size=5), min_size=2, max_size=8))
    labels = [draw(st.integers(-1, len(steps) - 1)) for steps in values]
    labels[0], labels[1] = -1, max(labels[1], 0)
    return values, labels


def test_predictions_by_hand():
    values = [[0.5, -0.2, -0.7], [0.1, 0.0], [-1.0], []]
    assert predict(values, 0.0) == [1, -1, 0, -1]
    assert predict(values, -0.2) == [2, -1, 0, -1]  # a value at the threshold is not below it
    assert predict(values, -math.inf) == [-1, -1, -1, -1]
    assert predict(values, math.inf) == [0, 0, 0, -1]


def test_f1_by_hand():
    # Erroneous: labels 0 1 2 2, three of them found exactly; correct: one of two. ¾ and ½:
    # 2·⅜/(5/4) = 0.6.
    found = f1([0, 1, 2, 0, -1, 3], [0, 1, 2, 2, -1, -1])
    assert (found.accuracy_error, found.accuracy_correct) == (0.75, 0.5)
    assert found.f1 == pytest.approx(0.6, abs=1e-15)
    assert (found.num_error, found.num_correct) == (4, 2)
    # A wrong step is no better than none, and an error in a correct solution no match.
    nothing = f1([1, 0], [0, -1])
    assert (nothing.accuracy_error, nothing.accuracy_correct, nothing.f1) == (0.0, 0.0, 0.0)


def test_tuned_threshold_by_hand():
    """Errors at step 1 (value −2) and 0 (−1); the correct one never goes below 0.5.

    Above −1 and not above 0.5 all three are right, so the middle is −0.25.
    """
    found = tune([[0.8, -2.0, 3.0], [-1.0, -3.0], [0.5, 0.9]], [1, 0, -1])
    assert found.threshold == -0.25
    assert (found.lower, found.upper) == (-1.0, 0.5)
    assert (found.f1, found.accuracy_error, found.accuracy_correct) == (1.0, 1.0, 1.0)
    assert (found.num_error, found.num_correct) == (2, 1)


def test_the_widest_of_equally_good_intervals():
    """One correct solution at 10, four errors, each right in one interval alone.

    Their second steps are the first below a threshold in (1, 2], (3, 5], (6, 7] and (8, 8.5].
    """
    values = [[10.0], [2.0, 1.0], [5.0, 3.0], [7.0, 6.0], [8.5, 8.0]]
    found = tune(values, [-1, 1, 1, 1, 1])
    assert (found.lower, found.upper, found.threshold) == (3.0, 5.0, 4.0)
    assert found.f1 == pytest.approx(2 * 0.25 / 1.25, abs=1e-15)
    # Of equally wide ones it is the first.
    assert tune(values[:2] + values[3:4], [-1, 1, 1]).threshold == 1.5


@given(splits())
def test_tuned_f1_is_the_best_of_all_thresholds(split):
    values, labels = split
    found = tune(values, labels)
    best = max(slow_f1(values, labels, threshold) for threshold in every_threshold(values))
    assert found.f1 == pytest.approx(best, abs=1e-12)
    assert slow_f1(values, labels, found.threshold) == pytest.approx(best, abs=1e-12)
    assert f1(predict(values, found.threshold), labels).__dict__ == {
        name: getattr(found, name)
        for name in ("accuracy_error", "accuracy_correct", "f1", "num_error", "num_correct")
    }


@given(splits())
def test_the_interval_is_as_good_everywhere_and_as_wide_as_it_can_be(split):
    values, labels = split
    found = tune(values, labels)
    inside = [t for t in every_threshold(values) if found.lower < t <= found.upper]
    assert all(f1(predict(values, t), labels).f1 == found.f1 for t in inside)
    scores = {name: value for name, value in found.__dict__.items() if "accuracy" in name}
    # A little below the lower end and above the upper, at least one accuracy is another.
    for outside in (found.lower, found.upper + 0.25):
        if math.isfinite(outside):
            there = f1(predict(values, outside), labels)
            assert {name: getattr(there, name) for name in scores} != scores


@given(splits(st.sampled_from([-math.inf, -1.0, 0.0, 2.0, math.inf])))
def test_infinite_values_have_a_place(split):
    values, labels = split
    found = tune(values, labels)
    best = max(slow_f1(values, labels, threshold) for threshold in every_threshold(values))
    assert found.f1 == pytest.approx(best, abs=1e-12)
    assert slow_f1(values, labels, found.threshold) == pytest.approx(best, abs=1e-12)


def test_intervals_without_an_end():
    # Nothing finds the error at step 1, above step 0: no error is reported.
    hopeless = tune([[1.0, 2.0], [0.0]], [1, -1])
    assert (hopeless.threshold, hopeless.f1, hopeless.accuracy_correct) == (-math.inf, 0.0, 1.0)
    # So it is where a value is −inf, of which −inf is the only threshold that is not above.
    hopeless = tune([[-math.inf, 1.0], [0.0]], [1, -1])
    assert (hopeless.threshold, hopeless.f1, hopeless.accuracy_correct) == (-math.inf, 0.0, 1.0)
    # A step of −inf is below all else: any number up to the other's value will do.
    certain = tune([[-math.inf], [0.0]], [0, -1])
    assert (certain.threshold, certain.f1) == (0.0, 1.0)
    # A correct solution without steps is right at any threshold: as high as one likes is best.
    assert tune([[1.0], []], [0, -1]).threshold == math.inf


def test_no_room_between_neighbouring_numbers():
    """The middle of two neighbouring floats is one of them; the upper is within (low, high]."""
    for low in (1.0, math.nextafter(1.0, 2.0), 5e-324):
        high = math.nextafter(low, 2.0)
        found = tune([[low], [high]], [0, -1])
        assert found.threshold == high
        assert f1(predict([[low], [high]], found.threshold), [0, -1]).f1 == 1.0
    # The sum of the ends overflows, their middle does not.
    assert tune([[1.2e308], [1.6e308]], [0, -1]).threshold == pytest.approx(1.4e308)


def test_a_large_split_takes_no_time():
    """N = 200000 steps: quadratic time would be hours."""
    numbers = random.Random(0)
    values = [[numbers.random() for _ in range(10)] for _ in range(20_000)]
    labels = [numbers.randrange(-1, 10) for _ in values]
    found = tune(values, labels)
    assert found.f1 == f1(predict(values, found.threshold), labels).f1


def scored(prefix_scores, beta=0.5) -> PrefixScores:
    size = len(prefix_scores)
    return PrefixScores("p", "c", ["s"] * size, list(range(1, size + 1)), prefix_scores, beta)


def test_step_values_by_hand():
    # 1/β = ln 3: p = (e^tilt − 1)/2, with tilt = score/β + log Z of 0 + ln 1.5, then ln 2 more,
    # then −ln 3 from the start: 0.25, 1, and (0.5 − 1)/2, which is limited to 0.
    beta = 1 / math.log(3)
    scores = [beta * x for x in (0.0, math.log(2), -math.log(3))]
    one = scored(scores, beta)
    steps = [scores[0], scores[1] - scores[0], scores[2] - scores[1]]
    assert step_values([one]) == [pytest.approx(steps)]
    assert step_values([one, scored([])], "prefix_score") == [scores, []]
    expected = pytest.approx([0.25, 1.0, 0.0], abs=1e-12)
    assert step_values([one], "probability", log_z=[math.log(1.5)]) == [expected]
    sampled = MonteCarloScores(**vars(one), log_z=math.log(1.5))
    assert step_values([sampled], "probability") == [expected]
    # What is given comes before what is estimated: log Z = 0 gives (1 − 1)/2 at the score 0.
    given = step_values([sampled], "probability", log_z=[0.0])
    assert given == [pytest.approx([0.0, 0.5, 0.0], abs=1e-12)]


def test_step_values_lead_to_the_first_error():
    # Rewards of the steps: 0.5, −1.5, 2. The second is the one below −1; the prefix scores 0.5, −1,
    # 1 have none below −1.
    one = scored([0.5, -1.0, 1.0])
    assert predict(step_values([one]), -1.0) == [1]
    assert predict(step_values([one], "prefix_score"), -1.0) == [-1]


def test_step_values_refuse_what_they_cannot_read():
    with pytest.raises(ConfigError, match="one of step_reward, prefix_score, probability, got"):
        step_values([], "reward")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="entry 0 is PrefixScores, which does not know it"):
        step_values([scored([1.0])], "probability")
    with pytest.raises(DataError, match="Each of 1 completions needs a log_z, got 2"):
        step_values([scored([1.0])], "probability", log_z=[0.0, 0.0])


@pytest.mark.parametrize(
    ("values", "labels", "says"),
    [
        ([[1.0], [2.0]], [0, 0], "got 2 and 0"),
        ([[1.0], [2.0]], [-1, -1], "got 0 and 2"),
        ([[1.0], [2.0]], [0], "values and a label, got 2 and 1"),
        ([[1.0], [2.0]], [1, -1], "label of solution 0 is step 1, but it has 1 steps"),
        ([[1.0], [2.0]], [-2, -1], "label of solution 0 must be a step.*got -2"),
        ([[1.0], [2.0]], [0, True], "label of solution 1 must be a step.*got True"),
        ([[1.0], [2.0]], [0.0, -1], r"label of solution 0 must be a step.*got 0\.0"),
        ([[1.0], [2.0, math.nan]], [0, -1], "Step 1 of solution 1 must have a number, got nan"),
        ([[True], [2.0]], [0, -1], "Step 0 of solution 0 must have a number, got True"),
    ],
)
def test_a_split_that_cannot_be_tuned_on_is_refused(values, labels, says):
    with pytest.raises(DataError, match=says):
        tune(values, labels)


def test_predictions_that_are_none_are_refused():
    with pytest.raises(DataError, match="threshold must be a number, got NaN"):
        predict([[1.0]], math.nan)
    with pytest.raises(DataError, match="must have a number, got nan"):
        predict([[math.nan]], 0.0)
    with pytest.raises(DataError, match="prediction and a label, got 1 and 2"):
        f1([0], [0, -1])
    with pytest.raises(DataError, match=r"prediction of solution 1 must be a step.*got False"):
        f1([0, False], [0, -1])
    with pytest.raises(DataError, match=r"label of solution 1 must be a step.*got -2"):
        f1([0, 0], [0, -2])
    with pytest.raises(DataError, match="got 0 and 1"):
        f1([0], [-1])
