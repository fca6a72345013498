"""Reversing short strings of different letters: the task of the 1M-parameter character model.

A prompt is the letters and an arrow ("abcd>"), the answer their reverse ("dcba").
"""

import random
import string
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from trl_ext.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

MIN_LETTERS, MAX_LETTERS = 3, 6
# One string in so many is held out, chosen by its checksum and not by a seed: whatever is drawn
# for training, here or for the bundled model's supervised start, never meets a held-out string.
HELD_OUT_ONE_IN = 8
DEFAULTS = {"size": 2000, "seed": 0, "eval_size": 500}


def is_held_out(letters: str) -> bool:
    """Whether a string belongs to the test split, in every run alike."""
    return zlib.crc32(letters.encode()) % HELD_OUT_ONE_IN == 0


def draw(rng: random.Random, *, held_out: bool = False) -> Iterator[str]:
    """Endless random strings of one split, each length equally likely, no letter twice.

    A repeated letter leaves open which of the two comes next: with repetitions a small model
    learns more slowly.
    """
    while True:
        length = rng.randint(MIN_LETTERS, MAX_LETTERS)
        letters = "".join(rng.sample(string.ascii_lowercase, k=length))
        if is_held_out(letters) == held_out:
            yield letters


def prompt_of(letters: str) -> str:
    """The prompt that asks for the reverse of `letters`."""
    return f"{letters}>"


def answer_of(letters: str) -> str:
    """The only right completion."""
    return letters[::-1]


def splits(kwargs: dict[str, Any]) -> "dict[str, Dataset]":
    """The train split, and a test split unless `eval_size` is 0; columns `prompt` and `answer`.

    Args:
        kwargs: `size` and `eval_size` (numbers of strings; they may repeat within a split, and
            never occur in both) and `seed`.

    Raises:
        ConfigError: if a key is unknown or a value is not a whole number.
    """
    for key, value in kwargs.items():
        if key not in DEFAULTS:
            known = ", ".join(DEFAULTS)
            raise ConfigError(f"dataset_kwargs: char_reverse has no key {key!r}; it has {known}.")
        least = int(key == "size")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(
                f"dataset_kwargs: {key} is {value!r}; it must be a whole number from {least} on."
            )
    chosen = DEFAULTS | kwargs
    rng = random.Random(chosen["seed"])
    found = {"train": _dataset(list(islice(draw(rng), chosen["size"])))}
    if chosen["eval_size"]:
        held_out = draw(rng, held_out=True)
        found["test"] = _dataset(list(islice(held_out, chosen["eval_size"])))
    return found


def _dataset(strings: list[str]) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_dict(
        {"prompt": [prompt_of(s) for s in strings], "answer": [answer_of(s) for s in strings]}
    )
