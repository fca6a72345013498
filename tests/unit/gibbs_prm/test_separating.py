import pytest

from trl_ext.errors import DataError
from trl_ext.gibbs_prm.separating import separation


def test_pairs_of_a_right_and_a_wrong_one_of_a_prompt():
    """a: right 2, 1; wrong 1, 0: 2>1, 2>0, 1=1, 1>0: (3 + ½)/4. b: 5 < 7: 0. c has none wrong.

    Between prompts nothing is compared: b's 7 is above all of a's.
    """
    found = separation(
        [2, 1, 1, 0, 5, 7, 3], [True, True, False, False, True, False, True], [*"aaaabbc"]
    )
    assert found.probability == pytest.approx((3.5 / 4 + 0) / 2)
    assert (found.num_prompts, found.num_pairs) == (2, 5)
    assert found.interval is not None
    # A mean of two draws of {0, 0.875}: both ends occur in a quarter of them.
    assert found.interval == pytest.approx((0, 0.875))


def test_one_prompt_has_no_interval():
    found = separation([1.0, float("inf"), float("inf")], [False, True, False], [0, 0, 0])
    assert (found.probability, found.interval) == (0.75, None)


def test_nothing_to_separate():
    for scores, correct, prompts, says in (
        ([1.0, 2.0], [True, True], [0, 0], "No prompt has both a right and a wrong completion"),
        ([1.0, 2.0], [True, False], [0, 1], "No prompt has both"),
        ([1.0], [True, False], [0, 0], "got 1, 2 and 2"),
        ([float("nan"), 1.0], [True, False], [0, 0], "The score of entry 0 must be a number"),
    ):
        with pytest.raises(DataError, match=says):
            separation(scores, correct, prompts)


def test_texts_are_no_labels():
    """bool("wrong") is True."""
    with pytest.raises(DataError, match=r"correct holds 'right'; .*'right' and 'wrong' are texts"):
        separation([1.0, 2.0], ["right", "wrong"], ["p", "p"])  # pyright: ignore[reportArgumentType]
