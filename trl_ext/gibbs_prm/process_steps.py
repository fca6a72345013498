"""Where steps end as a policy sees it: by what it has written, and not by what it writes next."""

from itertools import accumulate
from typing import Any

from trl_ext.errors import ConfigError
from trl_ext.gibbs_prm.encoding import Encoded, encode
from trl_ext.gibbs_prm.steps import check_steps, cut

# What follows a prefix for the purpose of cutting it: neither white space nor the end.
_MORE = "x"


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
    check_steps(steps)


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
    ends: list[int] = []
    for place in range(1, len(encoded.tokens) + 1):
        begin = ends[-1] if ends else 0
        if place - begin in cut(_window(encoded, begin, place), steps).token_ends:
            ends.append(place)
    return ends


def _window(encoded: Encoded, begin: int, end: int) -> Encoded:
    """Some tokens of a completion, and a word after them."""
    tokens = [*encoded.tokens[begin:end], _MORE]
    ids = [*encoded.completion_ids[begin:end], 0]
    ends = list(accumulate(map(len, tokens)))
    return Encoded(encoded.prompt_ids, ids, "".join(tokens), tokens, ends, [True] * len(tokens), [])
