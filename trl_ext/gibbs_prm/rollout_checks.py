"""What every sampler of rollouts asks of its arguments, and where a rollout ends."""

from collections.abc import Iterable, Sequence
from typing import Any

from trl_ext.errors import ConfigError, RunError

_NONE = object()


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


def check_ids(name: str, ids: Any) -> list[int]:
    """Token ids, as a list.

    Raises:
        ConfigError: they are something else; True is no number.
    """
    listed: list[Any] = (
        list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str | bytes) else [ids]
    )
    wrong = [i for i in listed if isinstance(i, bool) or not isinstance(i, int) or i < 0]
    if wrong or not isinstance(ids, Iterable):
        raise ConfigError(
            f"{name} is {ids!r}; it must be a list of token ids, whole numbers from 0. "
            "tokenizer.convert_tokens_to_ids(token) gives one."
        )
    return listed


def check_sampled(
    sampler: Any, found: Any, count: int, budgets: Sequence[int]
) -> list[list[list[int]]]:
    """What a sampler returned for prefixes, each with so many tokens left.

    Raises:
        RunError: it is not `count` lists of token ids for each, or a list is empty or longer.
    """

    problem = _problem_of(found, count, budgets, sampler.end_ids)
    if problem:
        raise RunError(
            f"The sampler {type(sampler).__name__} returned {problem}. Its `sample` must return, "
            f"of each of the {len(budgets)} prefixes, {count} lists of token ids: one token or "
            "more, none behind an end token, and no more than its max_completion_length leaves."
        )
    return found


def _problem_of(found: Any, count: int, budgets: Sequence[int], ends: Any) -> str | None:
    if not _is_list(found, len(budgets)):
        return f"{_kind(found)} for {len(budgets)} prefixes"
    odd = next((ways for ways in found if not _is_list(ways, count)), _NONE)
    if odd is not _NONE:
        return f"{_kind(odd)} for a prefix"
    pairs = zip(found, budgets, strict=True)
    problems = (_problem_of_one(ids, budget, ends) for ways, budget in pairs for ids in ways)
    return next(filter(None, problems), None)


def _problem_of_one(ids: Any, budget: int, ends: Any) -> str | None:
    if not isinstance(ids, list | tuple) or any(type(i) is not int or i < 0 for i in ids):
        return f"{_kind(ids)} that is no list of token ids"
    if not ids:
        return "no token behind a prefix that is not over"
    if len(ids) > budget:
        return f"{len(ids)} tokens where {budget} were left"
    if any(token in ends for token in ids[:-1]):
        return f"{_kind(ids)} that goes on behind an end token"
    return None


def _is_list(value: Any, size: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == size


def _kind(value: Any) -> str:
    said = " ".join(repr(value).split())
    return f"a {type(value).__name__}, {said if len(said) <= 80 else said[:79] + '…'},"


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
