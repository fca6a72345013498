"""Strings to reverse: shape, disjoint splits, refusals."""

import random
from itertools import islice
from typing import Any

import pytest

from trl_ext.errors import ConfigError
from trl_ext.tasks import load_splits
from trl_ext.tasks.char_reverse import HELD_OUT_ONE_IN, draw, is_held_out


def load(**kwargs: Any) -> tuple[Any, Any]:
    return load_splits({"dataset_name": "char_reverse", "dataset_kwargs": kwargs})


def test_prompt_and_answer():
    train, test = load(size=50, eval_size=20)
    assert (len(train), len(test)) == (50, 20)
    for row in train:
        letters = row["prompt"].removesuffix(">")
        assert 3 <= len(letters) <= 6
        assert len(set(letters)) == len(letters)
        assert row["answer"] == "".join(reversed(letters))


def test_held_out_strings_never_occur_in_training_whatever_the_seeds():
    trained = {prompt for seed in range(3) for prompt in load(size=3000, seed=seed)[0]["prompt"]}
    held_out = {prompt for seed in range(3) for prompt in load(seed=seed)[1]["prompt"]}
    assert not trained & held_out


def test_one_string_in_eight_is_held_out():
    """Of 4000 strings the share is 1/8 within 4 standard errors, 4 * (1/8 * 7/8 / 4000)^½."""
    rng = random.Random(0)
    strings = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(4000)]
    share = sum(map(is_held_out, strings)) / 4000
    assert abs(share - 1 / HELD_OUT_ONE_IN) < 4 * (1 / 8 * 7 / 8 / 4000) ** 0.5


def test_draws_repeat_with_the_seed():
    first = list(islice(draw(random.Random(5)), 10))
    assert first == list(islice(draw(random.Random(5)), 10))
    assert first != list(islice(draw(random.Random(6)), 10))


def test_an_eval_size_of_0_means_no_test_split():
    assert load(size=1, eval_size=0)[1] is None


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"sise": 3}, "no key 'sise'; it has size, seed, eval_size"),
        ({"size": 0}, "size is 0; it must be a whole number from 1 on"),
        ({"size": True}, "size is True; it must be a whole number from 1 on"),
        ({"eval_size": -1}, "eval_size is -1; it must be a whole number from 0 on"),
        ({"size": "many"}, "size is 'many'"),
    ],
)
def test_bad_settings(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        load(**kwargs)
