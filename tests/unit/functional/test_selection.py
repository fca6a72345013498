import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.functional.selection import best_of_n_accuracy, majority_accuracy

groups = st.integers(1, 7).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(-2, 2), min_size=size, max_size=size),
        st.lists(st.integers(0, 1), min_size=size, max_size=size),
        st.integers(1, size),
    )
)


def slow_best(scores, correct, n) -> float:
    """Mean over all subsets of the mean correctness of those that score highest in it."""
    found = []
    for subset in combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        best = [correct[i] for i in subset if scores[i] == top]
        found.append(sum(best) / len(best))
    return sum(found) / len(found)


def slow_majority(answers, correct, n, votes) -> float:
    """Mean over all subsets of the mean correctness of the answers with most votes in it."""
    of_answer = {}
    for answer in set(answers):
        members = [c for a, c in zip(answers, correct, strict=True) if a == answer]
        of_answer[answer] = sum(members) / len(members)
    found = []
    for subset in combinations(range(len(answers)), n):
        totals: dict = {}
        for i in subset:
            totals[answers[i]] = totals.get(answers[i], 0) + votes[i]
        best = [of_answer[a] for a, total in totals.items() if total == max(totals.values())]
        found.append(sum(best) / len(best))
    return sum(found) / len(found)


@given(groups)
def test_best_of_n_equals_enumeration(group):
    scores, correct, n = group
    got = best_of_n_accuracy(torch.tensor(scores), torch.tensor(correct), n)
    assert got.item() == pytest.approx(slow_best(scores, correct, n), abs=1e-12)


def test_best_of_n_by_hand():
    # Pairs of (a, b, c) with scores 1 < 2 < 3 and b correct: b is the best of {a, b} only: 1/3.
    scores, correct = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0])
    assert [best_of_n_accuracy(scores, correct, n).item() for n in (1, 2, 3)] == pytest.approx(
        [1 / 3, 1 / 3, 0], abs=1e-15
    )
    # All tied: the mean at any n.
    tied = best_of_n_accuracy(torch.zeros(3), correct, 2).item()
    assert tied == pytest.approx(1 / 3, abs=1e-15)


@given(st.integers(1, 12), st.data())
def test_scores_that_are_the_correctness_give_pass_at_n(size, data):
    right, n = data.draw(st.integers(0, size)), data.draw(st.integers(1, size))
    correct = torch.tensor([1.0] * right + [0.0] * (size - right))
    expected = 1 - math.comb(size - right, n) / math.comb(size, n)
    got = best_of_n_accuracy(correct, correct, n).item()
    assert got == pytest.approx(expected, abs=1e-12)


def test_best_of_n_survives_large_groups():
    # Of 1000 in order, with the k-th highest correct, the best of n is that one with probability
    # C(1000 − k, n − 1)/C(1000, n), taken from whole numbers.
    correct = torch.zeros(1000)
    correct[1000 - 3] = 1
    got = best_of_n_accuracy(torch.arange(1000), correct, 400).item()
    assert got == pytest.approx(math.comb(997, 399) / math.comb(1000, 400), rel=1e-11)


def test_best_of_n_masks_and_batches():
    scores = torch.tensor([[3.0, 1.0, torch.nan, 2.0], [torch.inf, 5.0, 1.0, torch.inf]])
    correct = torch.tensor([[torch.nan, 0.0, 9.0, 1.0], [torch.nan, 0.0, 0.0, 1.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]])
    got = best_of_n_accuracy(scores, correct, 2, mask)
    # Left: scores (1, 2) with the better correct; (5, 1, inf) of which 2 of 3 pairs have inf.
    assert got.tolist() == pytest.approx([1.0, 2 / 3], abs=1e-15)
    # The first row keeps two, of which no three can be drawn.
    three = best_of_n_accuracy(scores, correct, 3, mask)
    assert three[0].isnan()
    assert three[1].item() == 1.0


@pytest.mark.parametrize("n", [0, 4, 2.0, True])
def test_a_draw_that_is_none_is_refused(n):
    with pytest.raises(ValueError, match="between 1 and the 3 completions"):
        best_of_n_accuracy(torch.zeros(3), torch.zeros(3), n)
    with pytest.raises(ValueError, match="between 1 and the 3 completions"):
        majority_accuracy(torch.zeros(3, dtype=torch.long), torch.zeros(3), n)


@given(groups, st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_majority_equals_enumeration(group, exponents):
    answers, correct, n = group
    exponents = exponents[: len(answers)]
    a, c = torch.tensor(answers), torch.tensor(correct)
    plain, error = majority_accuracy(a, c, n)
    assert plain.item() == pytest.approx(
        slow_majority(answers, correct, n, [1] * len(answers)), abs=1e-12
    )
    assert error.item() == 0.0
    # Votes 1, 2, 4, 8 add up exactly; their logarithms do not, and ties must still be seen.
    votes = [2**k for k in exponents]
    weights = torch.tensor(exponents, dtype=torch.float64) * math.log(2)
    weighted, _ = majority_accuracy(a, c, n, weights=weights)
    assert weighted.item() == pytest.approx(slow_majority(answers, correct, n, votes), abs=1e-12)


@given(groups)
def test_one_completion_is_the_mean_whatever_selects(group):
    scores, correct, _ = group
    s, c = torch.tensor(scores), torch.tensor(correct)
    mean = sum(correct) / len(correct)
    assert best_of_n_accuracy(s, c, 1).item() == pytest.approx(mean, abs=1e-12)
    assert majority_accuracy(s, c, 1)[0].item() == pytest.approx(mean, abs=1e-12)
    assert majority_accuracy(s, c, 1, weights=s)[0].item() == pytest.approx(mean, abs=1e-12)


def test_majority_by_hand():
    # Answers a a b, a wrong and b right. Pairs aa, ab, ab: 0, ½, ½. All three: a has most.
    answers, correct = torch.tensor([7, 7, 3]), torch.tensor([0, 0, 1])
    assert majority_accuracy(answers, correct, 2)[0].item() == pytest.approx(1 / 3, abs=1e-15)
    assert majority_accuracy(answers, correct, 3)[0].item() == 0.0
    # b weighs e^1 against 2, more; and e^0.6 = 1.82 against 2, less.
    for weight, expected in ((1.0, 1.0), (0.6, 0.0)):
        weights = torch.tensor([0.0, 0.0, weight])
        assert majority_accuracy(answers, correct, 3, weights=weights)[0].item() == expected


def test_weights_may_be_far_from_zero():
    answers, correct = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1])
    weights = torch.tensor([0.0, 0.0, 1.0])
    for far in (-5000.0, 5000.0):
        assert majority_accuracy(answers, correct, 3, weights=weights + far)[0].item() == 1.0
    # One certain vote beats all; without any vote that counts, all are alike.
    certain = torch.tensor([9.0, 9.0, torch.inf])
    assert majority_accuracy(answers, correct, 3, weights=certain)[0].item() == 1.0
    nothing = torch.full((3,), -torch.inf)
    assert majority_accuracy(answers, correct, 3, weights=nothing)[0].item() == 0.0


def test_an_answer_no_one_gave_in_a_draw_wins_nothing():
    # -inf, -inf of answer 0 in the draw {0, 1}; answer 1 is not in it.
    answers, correct = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1])
    weights = torch.tensor([-torch.inf, -torch.inf, 0.0])
    # Draws {0,0}: 0; {0,1} twice: the weighted one, 1.
    got = majority_accuracy(answers, correct, 2, weights=weights)[0].item()
    assert got == pytest.approx(2 / 3, abs=1e-15)


def test_majority_masks_and_batches():
    answers = torch.tensor([[[1, 1, 2, 2]], [[5, 6, 6, 6]]])
    correct = torch.tensor([[[0.0, 0.0, 1.0, torch.nan]], [[1.0, 0.0, 0.0, 0.0]]])
    weights = torch.tensor([[[0.0, torch.nan, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    mask = torch.tensor([[[1, 1, 1, 0]], [[1, 1, 0, 0]]])
    mean, error = majority_accuracy(answers, correct, 2, weights=weights, mask=mask)
    # Each row is left with one completion of either answer: ½.
    assert mean.tolist() == [[0.5], [0.5]]
    assert error.tolist() == [[0.0], [0.0]]
    three, no_error = majority_accuracy(answers, correct, 3, weights=weights, mask=mask)
    assert three.isnan().all()
    assert no_error.isnan().all()


def test_random_subsets_come_within_their_standard_error():
    """Of 16 completions 9 give a wrong answer, 7 the right one; 13 are drawn, N = 500 times.

    The right one has most votes if all its 7 are drawn and 6 of the 9: 84 of C(16, 13) = 560
    subsets, 0.15. Drawn with replacement it would be 0.32.
    """
    answers, correct = torch.tensor([4] * 9 + [2] * 7), torch.tensor([0] * 9 + [1] * 7)
    mean, error = majority_accuracy(answers, correct, 13, max_subsets=500)
    exact_error = math.sqrt(0.15 * 0.85 / 500)
    assert 0 < abs(mean.item() - 0.15) <= 4 * exact_error
    # The variance of 0 and 1 in the sample is that of the mean: m(1 − m)·N/(N − 1).
    expected = math.sqrt(mean.item() * (1 - mean.item()) / 499)
    assert error.item() == pytest.approx(expected, rel=1e-9)
    assert majority_accuracy(answers, correct, 13, max_subsets=500)[0] == mean
    assert majority_accuracy(answers, correct, 13, max_subsets=500, seed=1)[0] != mean
    enumerated, no_error = majority_accuracy(answers, correct, 13, max_subsets=560)
    assert enumerated.item() == pytest.approx(0.15, abs=1e-12)
    assert no_error.item() == 0.0


def test_equal_rows_get_random_subsets_of_their_own():
    answers, correct = torch.tensor([[0] * 8 + [1] * 8] * 2), torch.tensor([[0] * 8 + [1] * 8] * 2)
    mean, _ = majority_accuracy(answers, correct, 5, max_subsets=50)
    assert mean[0] != mean[1]


def test_too_few_subsets_are_refused():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        majority_accuracy(torch.zeros(3).long(), torch.zeros(3), 2, max_subsets=1)
