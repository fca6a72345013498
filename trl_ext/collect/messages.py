"""Messages of other libraries that say nothing here, and of ours that each round repeats."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def _kept(logger: str, is_kept: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Only those messages of a logger."""
    of_name = logging.getLogger(logger)
    of_name.addFilter(is_kept)
    try:
        yield
    finally:
        of_name.removeFilter(is_kept)


def without_unscored() -> Any:
    """Without TRL's message on each batch in which a completion has no reward: they are counted."""
    said = "All reward functions returned None"
    return _kept("trl.trainer.grpo_trainer", lambda record: said not in record.getMessage())


def without_tied(model: Any) -> Any:
    """Without transformers' message on keys that a file of weights rightly lacks: tied ones."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())

    def is_kept(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        is_of_keys = said.startswith("There were missing keys in the checkpoint")
        return not (is_of_keys and set(re.findall("'(.+?)'", said)) <= tied)

    return _kept("transformers.trainer", is_kept)


def said_once(logger: str) -> Any:
    """Each message of a logger once, whatever the numbers in it."""
    said = set()

    def is_new(record: logging.LogRecord) -> bool:
        return record.msg not in said and not said.add(record.msg)

    return _kept(logger, is_new)
