import math

import pytest

from trl_ext.functional.text_drift import distinct_ngrams, repeated_ngrams


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [
        ([1, 2, 3, 1, 2, 3], 3, 1 / 4),  # 123 231 312 123: one of four again
        ([5, 5, 5, 5, 5], 3, 2 / 3),  # 555 three times
        ([1, 2, 3, 4], 3, 0),
        ([1, 1], 3, 0),  # too short to repeat anything
        ([], 3, 0),
        ([1, 1, 2], 1, 1 / 3),
    ],
)
def test_repeated_ngrams(tokens, n, share):
    assert repeated_ngrams(tokens, n) == pytest.approx(share)


def test_distinct_ngrams_are_counted_over_all_completions_and_span_no_two():
    completions = [[1, 2], [1, 2, 3], [4]]
    assert distinct_ngrams(completions, 1) == 4 / 6
    # 12 | 12 23: neither 21 nor 34.
    assert distinct_ngrams(completions, 2) == 2 / 3
    assert math.isnan(distinct_ngrams([[1], []], 2))


def test_a_length_below_1_is_refused():
    with pytest.raises(ValueError, match="got n=0"):
        repeated_ngrams([1], 0)
    with pytest.raises(ValueError, match="got n=-1"):
        distinct_ngrams([[1]], -1)
