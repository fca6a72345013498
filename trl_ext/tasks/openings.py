"""Openings of everyday texts, to be continued: prompts for style and sentiment, without answers."""

import random
from typing import TYPE_CHECKING, Any

from trl_ext.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

BEGINNINGS = (
    "Yesterday I tried {} for the first time, and",
    "My honest opinion of {}:",
    "We spent the whole afternoon at {}. It was",
    'Here is what I wrote to a friend about {}: "',
    "When people ask me about {}, I tell them that",
    "A short review of {}.",
    "I have been thinking about {} all week, because",
    "Last night I dreamt of {}. In my dream,",
)
SUBJECTS = (
    "the new bakery on our street",
    "the film about the lighthouse keeper",
    "my neighbour's garden",
    "the train to the coast",
    "the city museum",
    "that long novel about the sea",
    "my first cooking class",
    "the hotel by the lake",
    "the school concert",
    "the old swimming pool",
    "the mountain trail",
    "the weekly market",
    "our team's last match",
    "the phone I bought in spring",
    "the play at the small theatre",
    "the dentist in the next town",
    "the ferry across the bay",
    "a rainy day at the zoo",
    "the language course online",
    "the restaurant at the station",
)
# Subjects that only the test split has.
HELD_OUT = 5
DEFAULTS = {"seed": 0}


def splits(kwargs: dict[str, Any]) -> "dict[str, Dataset]":
    """120 openings to train on, and 40 about other subjects to evaluate; column `prompt`.

    Args:
        kwargs: `seed`, of their order.

    Raises:
        ConfigError: if a key is unknown or the seed is not a whole number.
    """
    for key, value in kwargs.items():
        if key not in DEFAULTS:
            raise ConfigError(f"dataset_kwargs: openings has no key {key!r}; it has seed.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(
                f"dataset_kwargs: {key} is {value!r}; it must be a whole number from 0 on."
            )
    rng = random.Random((DEFAULTS | kwargs)["seed"])
    return {
        "train": _dataset(SUBJECTS[:-HELD_OUT], rng),
        "test": _dataset(SUBJECTS[-HELD_OUT:], rng),
    }


def _dataset(subjects: tuple[str, ...], rng: random.Random) -> "Dataset":
    from datasets import Dataset

    prompts = [beginning.format(subject) for beginning in BEGINNINGS for subject in subjects]
    rng.shuffle(prompts)
    return Dataset.from_dict({"prompt": prompts})
