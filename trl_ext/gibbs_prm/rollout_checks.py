"""What every sampler of rollouts asks of its arguments, and where a rollout ends."""

from collections.abc import Iterable, Sequence
from typing import Any

from trl_ext.errors import ConfigError


def check_count(name: str, value: Any) -> int:
    """A whole number of 1 or more.

    Raises:
        ConfigError: it is something else; True is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, 1 or more.")
    return value


def check_temperature(value: Any, *, greedy: bool = False) -> float:
    """A finite positive number; with `greedy` also 0, the likeliest token each time.

    Raises:
        ConfigError: it is something else.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (0 < value < float("inf") or (greedy and value == 0)):
        return float(value)
    zero = "0 (the likeliest token each time) or " if greedy else ""
    raise ConfigError(
        f"temperature is {value!r}; it must be {zero}a positive number. 1 samples from the model."
    )


def as_ids(ids: int | Iterable[int] | None) -> list[int]:
    """One token id, several or none, as a list."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def budgets_of(
    prefixes: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int] | None,
    max_completion_length: int,
    longest: int | None,
) -> list[int]:
    """How many tokens each prefix may still get: what its completion has left of its length.

    Args:
        prefixes: tokens of the prompt and of the completion so far.
        prompt_lengths: how many of them are the prompt's; None: all.
        max_completion_length: tokens that a completion has at most.
        longest: tokens that the model reads at most; None: any number.

    Raises:
        ConfigError: a prefix has no token or no room left, or prompt_lengths do not fit.
    """
    lengths = [len(prefix) for prefix in prefixes] if prompt_lengths is None else prompt_lengths
    if len(lengths) != len(prefixes):
        raise ConfigError(
            f"There are {len(prefixes)} prefixes and {len(lengths)} prompt_lengths; give one each."
        )
    return [
        _budget(number, prefix, length, max_completion_length, longest)
        for number, (prefix, length) in enumerate(zip(prefixes, lengths, strict=True))
    ]


def _budget(
    number: int, prefix: Sequence[int], prompt_length: int, most: int, longest: int | None
) -> int:
    if not 1 <= prompt_length <= len(prefix):
        raise ConfigError(
            f"Prefix {number} has {len(prefix)} tokens, {prompt_length} of them its prompt's. A "
            "causal language model needs a prompt of one token or more, and the prefix begins "
            "with it. Give the prompt a token, such as the tokenizer's bos_token."
        )
    begun = len(prefix) - prompt_length
    if begun >= most:
        raise ConfigError(
            f"Prefix {number} has {begun} tokens of a completion, and max_completion_length is "
            f"{most}: nothing is left to sample. Raise it, or leave out completions that are over."
        )
    if longest is not None and prompt_length + most > longest:
        raise ConfigError(
            f"Prefix {number} has a prompt of {prompt_length} tokens, with max_completion_length "
            f"{most} that is {prompt_length + most}, and the model reads at most {longest}. "
            "Shorten the prompt, lower max_completion_length, or take a model with a longer "
            "context."
        )
    return most - begun


def until_end(tokens: Sequence[int], ends: frozenset[int], budget: int) -> list[int]:
    """The first `budget` tokens, up to and with the first end token among them."""
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: min(last + 1, budget)])
