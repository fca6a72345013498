"""Where steps end as a policy sees it: by what it has written, and not by what it writes next."""

import re
from bisect import bisect_left
from itertools import accumulate, pairwise
from typing import Any

from trl_ext.errors import ConfigError
from trl_ext.gibbs_prm.encoding import Encoded, encode
from trl_ext.gibbs_prm.steps import check_steps, cut

# What follows a prefix for the purpose of cutting it: neither white space nor the end.
_MORE = "x"
# Other tokens end no step of a rule that has a name: behind these marks the white space does.
_MAY_END = re.compile(r"[^\w.!?…．]")
_WORD = re.compile(r"(?<=\s)\S")
# Nothing of a rule that has a name reaches over a whole word but the number that opens a line.
_WORDS_BEFORE = 2


def check_training_steps(steps: Any) -> None:
    """Whether completions can be cut so in training.

    Raises:
        ConfigError: if not.
    """
    if steps == "turn":
        raise ConfigError(
            "process_steps='turn': a completion in training is one turn. Use 'newline', "
            "'sentence', 'paragraph' or 'whole'."
        )
    try:
        check_steps(steps)
    except ConfigError as error:
        raise ConfigError(f"process_{error}") from error


def step_ends(prompt_ids: list[int], completion_ids: list[int], steps: Any, tokenizer: Any) -> Any:
    """The numbers of tokens with which the steps of a completion end.

    A step ends with token t if `cut` ends one there whatever word comes next. So tokens up to t
    decide it, and a return from t + 1 on holds the earlier rewards of its step for every choice of
    that token or for none: they are a baseline. If the end of the completion decided it, as in
    `cut`, to stop behind a good step would be rewarded once more for that step.

    Args:
        prompt_ids, completion_ids: without padding.
        steps: as `cut` takes it, for all completions.
        tokenizer: of both.

    Returns:
        Increasing; what follows the last is a step too.
    """
    encoded = encode(tokenizer.decode(prompt_ids), "", tokenizer, completion_ids=completion_ids)
    if steps in ("token", "whole"):
        return list(range(1, len(encoded.tokens) + 1)) if steps == "token" else []
    pattern = None if isinstance(steps, str) else re.compile(steps["regex"])
    words = [found.start() for found in _WORD.finditer(encoded.text)] if pattern is None else []
    ends: list[int] = []
    begin = 0  # where the step begins, in characters
    for count, (start, end) in enumerate(pairwise([0, *encoded.token_ends]), 1):
        if not _may_end(encoded.text, begin, start, end, pattern):
            continue
        seen_from = max(begin, _words_before(words, start)) if pattern is None else begin
        if _ends_step(encoded.text, seen_from, start, end, pattern or steps):
            ends.append(count)
            begin = end
    return ends


def _may_end(text: str, begin: int, start: int, end: int, pattern: re.Pattern[str] | None) -> bool:
    """Whether this token may end a step; a rule with a name ends none of white space alone."""
    if start == end:
        return False
    if pattern is None:
        return bool(_MAY_END.search(text, start, end)) and not text[begin:end].isspace()
    found = pattern.finditer(text[begin:end] + _MORE)
    return any(start - begin < each.end() <= end - begin for each in found)


def _words_before(words: list[int], start: int) -> int:
    place = bisect_left(words, start) - _WORDS_BEFORE
    return words[place] if place >= 0 else 0


def _ends_step(text: str, begin: int, start: int, end: int, how: Any) -> bool:
    """Whether the token from `start` to `end` ends a step; what is before it counts as one."""
    tokens = [text[begin:start], text[start:end], _MORE]
    ends = list(accumulate(map(len, tokens)))
    window = Encoded([0], [0] * 3, "".join(tokens), tokens, ends, [True] * 3, [])
    return 2 in cut(window, how).token_ends
