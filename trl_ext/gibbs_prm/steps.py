"""Where the steps of a completion end, in characters and in tokens."""

import difflib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.encoding import Encoded, short
from trl_ext.gibbs_prm.given_steps import check_given, given_ends, said_of

_BREAK = r"(?:\r\n?|\n)"
_BLANK = rf"(?:[^\S\r\n]*{_BREAK})"  # a line, or the rest of one, that holds nothing
_LINES = rf"{_BREAK}{_BLANK}*"
_CLOSING = r"[\"'”’»)\]}」』）]*"
# Dots that end no sentence: those of abbreviations, and of the number that opens a list's line.
_NO_END = (
    r"(?<![\w.])(?:[Ee]\.g|[Ii]\.e|[Cc]f|[Vv]s|[Vv]iz|[Aa]pprox|[Rr]esp|[Ff]igs?|[Ee]qs?|"
    r"w\.r\.t|s\.t|a\.k\.a|Dr|Mr|Mrs|Ms|Prof|St|Jr|Sr|Sec|Thm|Vol|Ch)\.(?=\s)"
    r"|(?<![\w.])(?:etc|al|a\.m|p\.m)\.(?=\s+[a-z])"
    r"|(?m:^)[^\S\r\n]*\d+\.(?=\s)"
)
# 。！？｡ need no space behind them: scripts that use them have none there.
_STOP = rf"(?:[.!?…．]+{_CLOSING}(?=\s)|[。！？｡]+{_CLOSING})(?:{_BLANK}+|[^\S\r\n]+)?"

# A step ends behind each group `end`.
_RULES = {
    "newline": re.compile(rf"(?P<end>{_LINES})"),
    "sentence": re.compile(rf"{_NO_END}|(?P<end>{_STOP}|{_LINES})"),
    "paragraph": re.compile(rf"(?P<end>{_BREAK}{_BLANK}+)"),
    "whole": re.compile(r"(?!)"),
}
NAMES = (*_RULES, "token", "turn")
_WAYS = (
    f'{", ".join(map(repr, NAMES))}, {{"regex": "…"}}, or for each completion a list of the texts '
    "of its steps, or of the characters at which they end"
)
# A pattern that matches at each place of this matches the empty text everywhere.
_PROBE = "Step 1: 2+2=4.\n\nSo 4!"


@dataclass(frozen=True)
class Cut:
    """The K steps of a completion of T tokens.

    Attributes:
        texts: K of them; joined they are the completion's text.
        token_ends: K numbers of tokens, increasing; the last is T.
        notes: which steps were rounded to whole tokens and which became one, by their number
            (from 0) as they were asked for.
        merged_into: for each step as it was asked for, the step (from 0) that holds it now.
    """

    texts: list[str]
    token_ends: list[int]
    notes: list[str]
    merged_into: list[int]


def check_steps(steps: Any) -> None:
    """Whether this says how to cut completions: before any of them is looked at.

    Args:
        steps: a name of `NAMES`; {"regex": pattern} or a compiled pattern: a step ends behind each
            match; or given steps: a list of texts or of character ends, or a list of such lists,
            one a completion.

    Raises:
        ConfigError: if not.
    """
    if isinstance(steps, dict | re.Pattern):
        _pattern(steps)
    elif isinstance(steps, list | tuple):
        check_given(steps)
    elif not isinstance(steps, str):
        raise ConfigError(f"steps is {short(steps)}, a {type(steps).__name__}. Take {_WAYS}.")
    elif steps not in NAMES:
        close = difflib.get_close_matches(steps, NAMES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"steps is {steps!r}, which is no way to cut.{hint} Take {_WAYS}.")


def cut(encoded: Encoded, steps: Any) -> Cut:
    """Cut one completion into steps of whole tokens.

    A boundary inside a token moves to the end of that token: the step that the token begins in
    owns it. Where only white space lies between the boundary and the end of the token before, it
    moves there instead: the space of " Next" is part of the word. Steps that share a token become
    one. White space and end-of-turn tokens at the end belong to the last step.

    Args:
        encoded: the completion.
        steps: as `check_steps`; given steps are those of this completion alone: texts that follow
            one another in it with nothing but white space between them, which goes to the step
            before; or their ends in characters.

    Returns:
        Its steps; none where the completion has no token.

    Raises:
        ConfigError: as `check_steps`.
        DataError: if the given steps are not those of this completion, or it has no turns.
    """
    check_steps(steps)
    count = len(encoded.tokens)
    if isinstance(steps, list | tuple):
        ends = given_ends(encoded, steps)
    elif count == 0:
        ends = []
    elif steps == "token":
        return Cut(list(encoded.tokens), list(range(1, count + 1)), [], list(range(count)))
    elif steps == "turn":
        ends = _turn_ends(encoded)
    else:
        ends = _found_ends(encoded, steps)
    return _whole_tokens(encoded, ends) if ends else Cut([], [], [], [])


def _pattern(steps: dict[str, str] | re.Pattern[str]) -> re.Pattern[str]:
    if isinstance(steps, dict):
        if list(steps) != ["regex"] or not isinstance(steps["regex"], str):
            raise ConfigError(f'steps is {short(steps)}; a mapping must be {{"regex": "…"}}.')
        try:
            steps = re.compile(steps["regex"])
        except re.error as error:
            raise ConfigError(
                f"steps: the regex {steps['regex']!r} is wrong: {error}. Put a backslash before a "
                "character that is meant as it stands."
            ) from error
    if not isinstance(steps.pattern, str):
        raise ConfigError(f"steps is a pattern of bytes, {steps.pattern!r}; compile one of text.")
    if all(steps.match(_PROBE, place) for place in range(len(_PROBE) + 1)):
        raise ConfigError(
            f"steps: the regex {steps.pattern!r} matches the empty text everywhere, so that every "
            "character would be a step. Let it match at least one, as with + in place of *."
        )
    return steps


def _turn_ends(encoded: Encoded) -> list[int]:
    if not encoded.turn_ends:
        raise DataError(
            "steps is 'turn', and the completion is a text, which has no turns. Give prompt and "
            "completion as messages, or take 'whole'."
        )
    return encoded.turn_ends


def _found_ends(encoded: Encoded, steps: str | dict[str, str] | re.Pattern[str]) -> list[int]:
    """Character ends of the steps that a rule finds; its own rules make no step of white space."""
    said = said_of(encoded)
    if isinstance(steps, str):
        ends = [m.end() for m in _RULES[steps].finditer(said) if m["end"] is not None]
        ends = ends if not ends or said[: ends[0]].strip() else ends[1:]
    else:
        ends = [m.end() for m in _pattern(steps).finditer(said) if m.end() > 0]
    last = len(said.rstrip())
    # Two matches, of which the second is empty, may end at one place.
    return [*dict.fromkeys(end for end in ends if end < last), len(encoded.text)]


def _whole_tokens(encoded: Encoded, ends: Sequence[int]) -> Cut:
    """Steps that end at `ends` (characters; equal ones: an empty step), as whole tokens."""
    ends = _at_words(encoded, ends)
    counts = [bisect_left(encoded.token_ends, end) + 1 if end else 0 for end in ends]
    total = len(encoded.tokens)
    # Tokens without text behind the last character are the last step's.
    counts = [total if n and encoded.token_ends[n - 1] == len(encoded.text) else n for n in counts]
    counts[-1] = total
    # Empty steps at the beginning are part of the first that is not.
    first = next(filter(None, counts))
    groups = groupby(range(len(ends)), key=lambda step: counts[step] or first)
    token_ends, notes, merged_into = [], [], []
    for step, (count, group) in enumerate(groups):
        members = list(group)
        token_ends.append(count)
        merged_into += [step] * len(members)
        notes += _notes(encoded, ends, members, count)
    places = [0, *(encoded.token_ends[count - 1] for count in token_ends)]
    texts = [encoded.text[start:end] for start, end in pairwise(places)]
    return Cut(texts, token_ends, notes, merged_into)


def _at_words(encoded: Encoded, ends: Sequence[int]) -> list[int]:
    """`ends`, moved back over white space to the end of a token where they are inside of one."""
    moved: list[int] = []
    for before, end in pairwise([0, *ends]):
        start = moved[-1] if moved else 0
        if before == end:
            moved.append(start)
            continue
        token = bisect_right(encoded.token_ends, end) - 1
        place = encoded.token_ends[token] if token >= 0 else 0
        only_space = not encoded.text[place:end].strip()
        moved.append(place if only_space and place > start else end)
    return moved


def _notes(encoded: Encoded, ends: list[int], members: list[int], count: int) -> list[str]:
    """What the steps that are now one step of `count` tokens up to its end have gone through."""
    full = [step for step in members if ends[step] > (ends[step - 1] if step else 0)]
    token = repr(encoded.tokens[count - 1])
    notes = [
        f"step {step} is empty and counts as part of its neighbour"
        for step in members
        if step not in full
    ]
    if len(full) > 1:
        steps = f"{', '.join(map(str, full[:-1]))} and {full[-1]}"
        notes.append(f"steps {steps} share the token {token} and count as one")
    last = (full or members)[-1]
    over = encoded.token_ends[count - 1] - ends[last]
    if over:
        characters = "1 character" if over == 1 else f"{over} characters"
        notes.append(f"step {last} was rounded by {characters}, to the end of {token}")
    return notes
