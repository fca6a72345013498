"""The verifier's reward and the readers in front of it."""

import json
from typing import Any

import pytest

from trl_ext.errors import RewardError
from trl_ext.rewards import exact_match, reasoning_gym
from trl_ext.rewards.reading import completion_text, lenient_answer
from trl_ext.tasks import load_splits


def columns(task: str, count: int, **kwargs: Any) -> dict[str, Any]:
    script = {"dataset_name": f"reasoning_gym/{task}", "dataset_kwargs": {"size": count, **kwargs}}
    train: Any = load_splits(script)[0]
    rows = train[:]
    return {key: list(rows[key]) for key in ("task", "entry", "question", "answer")}


def test_every_task_accepts_its_own_answer():
    for task in ("letter_counting", "syllogism", "products", "gcd", "number_format"):
        rows = columns(task, 3)
        replies = [f" {answer}\n" for answer in rows["answer"]]
        assert reasoning_gym(completions=replies, **rows) == [1.0] * 3


def test_strict_takes_the_whole_completion():
    """A reply containing the answer gets answer length / reply length from letter_counting."""
    rows = {**columns("letter_counting", 1), "answer": ["1"]}
    assert reasoning_gym(completions=["1"], **rows) == [1.0]
    assert reasoning_gym(completions=["It is 1"], **rows) == [pytest.approx(1 / 7)]
    assert reasoning_gym(completions=["2"], **rows) == [0.0]
    assert reasoning_gym(completions=[""], **rows) == [0.0]


def test_lenient_reads_the_answer_out_of_the_text():
    rows = {**columns("letter_counting", 1), "answer": ["1"]}
    assert reasoning_gym(completions=["It is 1."], reader="lenient", **rows) == [1.0]


@pytest.mark.parametrize(
    ("text", "expected", "answer"),
    [
        ("so 3, then 12.", "12", "12"),
        ("I have 3. <answer> 4 </answer> or 5", "4", "4"),
        ("<answer>1</answer> no, <answer>2</answer>", "2", "2"),
        ("1,234", "1234", "1234"),
        ("1,234", "1,234", "1,234"),
        ("-2.5 degrees", "-2.5", "-2.5"),
        (" Yes\nQ: what about 3?", "Yes", "Yes"),
        (" Yes", None, "Yes"),
        ("none", "7", "none"),
        ("", "7", ""),
    ],
)
def test_lenient_answer(text, expected, answer):
    assert lenient_answer(text, expected) == answer


def test_messages_are_read():
    rows = columns("syllogism", 1)
    reply = [{"role": "assistant", "content": rows["answer"][0]}]
    assert reasoning_gym(completions=[reply], **rows) == [1.0]
    assert (
        completion_text([{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]) == "a"
    )
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    assert completion_text([]) == ""


def test_the_settings_reach_the_verifier():
    rows = columns("letter_counting", 1, min_words=1, max_words=2)
    stored = json.loads(rows["entry"][0])
    assert stored["settings"] == {"min_words": 1, "max_words": 2}
    stored["settings"]["min_words"] = 3
    rows["entry"] = [json.dumps(stored)]
    with pytest.raises(AssertionError, match="max_words must be >= min_words"):
        reasoning_gym(completions=["1"], **rows)


def test_a_reply_that_the_verifier_cannot_parse_scores_nothing():
    """The verifier of prime_factorization calls int() on it and raises ValueError."""
    assert reasoning_gym(completions=["seven"], **columns("prime_factorization", 1)) == [0.0]


def test_the_share_solved_is_logged():
    rows = {**columns("letter_counting", 4), "answer": ["1"] * 4}
    logged = []
    reasoning_gym(
        completions=["1", "It is 1", "2", "1"], log_metric=lambda *pair: logged.append(pair), **rows
    )
    assert logged == [("reasoning_gym/solved", 0.5)]


def test_an_unknown_reader_and_missing_columns():
    lax: Any = "lax"
    with pytest.raises(RewardError, match="reader is 'lax'; it must be strict or lenient"):
        reasoning_gym(completions=["1"], reader=lax, **columns("gcd", 1))
    with pytest.raises(RewardError, match="needs the columns task, entry, question and answer"):
        reasoning_gym(completions=["1"], answer=["1"])


def test_exact_match():
    replies = [" ab\n", "ab c", "AB", [{"role": "assistant", "content": "ab"}]]
    assert exact_match(completions=replies, answer=["ab"] * 4) == [1, 0, 0, 1]
    assert exact_match(completions=["AB", "4"], answer=["ab", 4], ignore_case=True) == [1, 1]
    with pytest.raises(RewardError, match="a column 'answer'"):
        exact_match(completions=["ab"], text=["ab"])
