"""Where the next step of a completion is over while it is being generated."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from trl_ext.errors import ConfigError
from trl_ext.gibbs_prm.encoding import Encoded
from trl_ext.gibbs_prm.steps import check_steps, cut

# Whatever follows, these steps end with the line break that ends them: a text that goes on shows
# where. "x" is no upper case, with which a sentence may begin, and no white space.
_GOES_ON = "x"
_KNOWN_AT_ONCE = ("newline", "paragraph", "sentence", "token")


class StepEnd(NamedTuple):
    """Numbers of tokens of a completion: its steps end with `end`, which shows at `shown`.

    Where a sentence ends shows only with the token behind it; that one begins the next step.
    """

    end: int
    shown: int


class NextStep:
    """Finds where the step that a completion is in is over.

    Whether it is over after t tokens depends on these t tokens alone: it is a stopping time. What
    was sampled behind may be dropped and sampled again, and the completion is still a sample of
    the model. Blank lines behind a line break thus belong to the next step, which `cut` gives to
    the one before.

    Args:
        steps: a rule of `trl_ext.gibbs_prm.steps`; "whole" is never over before the completion.
        tokenizer: of the completions.

    Attributes:
        pauses: ids of the tokens with which alone a step can be over, to stop sampling at; empty:
            it may be any.

    Raises:
        ConfigError: the rule is none, or cuts only what is there already.
    """

    def __init__(self, steps: Any, tokenizer: Any):
        check_steps(steps)
        if steps == "turn" or isinstance(steps, list | tuple):
            raise ConfigError(
                f"steps is {steps!r}: a search needs a rule that finds the end of a step while it "
                "is generated. Take 'newline', 'sentence', 'paragraph', 'token', "
                '{"regex": "…"}, or "whole", which is best of n.'
            )
        self.steps = steps
        self.is_whole = steps == "whole"
        breaks = steps in ("newline", "paragraph")
        self.pauses = _line_breaks(tokenizer) if breaks else frozenset()

    def over(self, encoded: Encoded, start: int, since: int, upto: int) -> StepEnd | None:
        """The first end of the step that begins with token `start`, from token `since` on.

        Args:
            encoded: the completion.
            start: tokens of the steps before it.
            since: the first number of tokens after which it may be over.
            upto: the last one.
        """
        if self.is_whole:
            return None
        lengths = range(since, upto + 1)
        ids = encoded.completion_ids
        if self.pauses:
            lengths = [count for count in lengths if ids[count - 1] in self.pauses]
        for count in lengths:
            part = _part(encoded, start, count, goes_on=self.steps in _KNOWN_AT_ONCE)
            ends = cut(part, self.steps).token_ends
            if len(ends) > 1:
                return StepEnd(start + ends[0], count)
        return None


def first_stop(encoded: Encoded, strings: Sequence[str]) -> int | None:
    """The number of tokens with which one of these strings is in the completion; None: none is."""
    places = [(encoded.text.find(string), string) for string in strings]
    ends = [place + len(string) for place, string in places if place >= 0]
    return bisect_left(encoded.token_ends, min(ends)) + 1 if ends else None


def _part(encoded: Encoded, start: int, stop: int, *, goes_on: bool) -> Encoded:
    """Tokens start..stop−1, and one that goes on behind them."""
    behind = _GOES_ON if goes_on else ""
    offset, *ends = [0, *encoded.token_ends][start : stop + 1]
    tokens = [*encoded.tokens[start:stop], *([behind] if behind else [])]
    text = encoded.text[offset : ends[-1]] + behind
    token_ends = [end - offset for end in ends] + ([len(text)] if behind else [])
    return replace(encoded, text=text, tokens=tokens, token_ends=token_ends, end_text="")


def _line_breaks(tokenizer: Any) -> frozenset[int]:
    texts = tokenizer.batch_decode(
        [[index] for index in range(len(tokenizer))],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    return frozenset(i for i, text in enumerate(texts) if "\n" in text or "\r" in text)
