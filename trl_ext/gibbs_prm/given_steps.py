"""Steps that are given: as texts that follow one another in a completion, or as their ends."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.encoding import Encoded, short


def check_given(steps: Sequence[Any]) -> None:
    if is_of_one(steps):
        return
    for one in steps:
        if not isinstance(one, list | tuple) or not is_of_one(one):
            raise ConfigError(
                f"steps is a list that holds {short(one)}. The given steps of a completion are a "
                "list of texts, or a list of the characters (whole numbers) at which they end."
            )


def is_of_one(steps: Sequence[Any]) -> bool:
    """Whether these are the steps of one completion."""
    return all(isinstance(s, str) for s in steps) or all(
        isinstance(s, int) and not isinstance(s, bool) for s in steps
    )


def given_ends(encoded: Encoded, steps: Sequence[Any]) -> list[int]:
    """Character ends of the steps that somebody wrote down for this completion."""
    if not is_of_one(steps):
        raise ConfigError(
            "steps holds the steps of several completions; cut one completion with its own list."
        )
    said, total = said_of(encoded), len(encoded.text)
    if (steps and not encoded.tokens) or (said.strip() and not steps):
        raise DataError(
            f"{len(steps)} steps are given for the completion {short(said)}. An empty completion "
            "has no steps, and every other has at least one."
        )
    if not steps:
        return []
    locate = _located if isinstance(steps[0], str) else _checked
    ends, covered = locate(said, steps, total)
    if said[covered:].strip():
        raise DataError(
            f"The given steps end at character {covered} of the completion, which goes on with "
            f"{short(said[covered:])}. Give steps for all of it."
        )
    return ends


def check_in_text(text: str, steps: Sequence[Any]) -> None:
    """Whether the steps of one completion follow one another in its text, which may go on.

    Raises:
        DataError: if not.
    """
    if steps:
        locate = _located if isinstance(steps[0], str) else _checked
        locate(text, steps, len(text))


def _located(said: str, steps: Sequence[str], total: int) -> tuple[list[int], int]:
    """Where each step ends, the last one with the text, and up to where they cover it."""
    starts: list[int] = []
    place, last = 0, 0
    for index, step in enumerate(steps):
        start = place + len(said[place:]) - len(said[place:].lstrip())
        words, indent = step.strip(), step[: len(step) - len(step.lstrip())]
        if not said.startswith(words, start):
            raise DataError(
                f"Step {index} (from 0), {short(step)}, is not what the completion has at "
                f"character {start}: {short(said[start : start + 60])}. The given steps must "
                "follow one another in it, with nothing but white space between them."
            )
        # A step that is given with its indentation keeps it.
        own = len(indent) if words and said[place:start].endswith(indent) else 0
        starts.append(start - own)
        if words:
            place, last = start + len(words), index
    # The end-of-turn token goes to the last step that says something.
    return [*starts[1 : last + 1], *[total] * (len(steps) - last)], place


def _checked(said: str, ends: Sequence[int], total: int) -> tuple[list[int], int]:
    """The ends, the last one at that of the text, and up to where they cover it."""
    for before, end in pairwise([0, *ends]):
        if not before < end <= total:
            raise DataError(
                f"The given steps end at the characters {short(list(ends))}: {end} follows "
                f"{before}, and the completion has {total} characters. The ends must increase, "
                f"from at least 1 to at most {total}."
            )
    return [*ends[:-1], total], ends[-1]


def said_of(encoded: Encoded) -> str:
    """The completion's text without the special tokens that end it."""
    return encoded.text.removesuffix(encoded.end_text)
