"""Models that are compared token by token must number the same tokens alike."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from trl_ext.errors import ConfigError

NO_TOKEN = "no token"


def check_vocabularies(tokenizers: Mapping[str, Any]) -> None:
    """Whether tokenizers give every token the same id.

    Args:
        tokenizers: a model's name, for the error -> its tokenizer.

    Raises:
        ConfigError: if two do not; with the names and the first token that differs.
    """
    first, *others = tokenizers
    known = _tokens(tokenizers[first])
    for name in others:
        for index, (one, other) in enumerate(zip_longest(known, _tokens(tokenizers[name]))):
            if one != other:
                raise ConfigError(
                    f"{first!r} and {name!r} have different vocabularies: token {index} is "
                    f"{_shown(one)} for {first!r} and {_shown(other)} for {name!r}. Their "
                    "probabilities of one token are put together; take models of one tokenizer."
                )


def _tokens(tokenizer: Any) -> list[str | None]:
    """Each id's token; None for an id in between that has none."""
    ids = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
    for token, index in ids.items():
        tokens[index] = token
    return tokens


def _shown(token: str | None) -> str:
    return NO_TOKEN if token is None else repr(token)
