"""Rows cut into consecutive parts of about as many tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class RowSize(NamedTuple):
    """Tokens of a completion and of its prompt; rows with the same `prompt` share that one."""

    completion: int
    prompt_tokens: int
    prompt: int


@dataclass
class PackedTokens:
    """Tokens of rows without padding, each prompt once."""

    total: int = 0
    _prompts: set[int] = field(default_factory=set)

    def add(self, row: RowSize) -> None:
        """Take one more row."""
        self.total += row.completion
        if row.prompt not in self._prompts:
            self._prompts.add(row.prompt)
            self.total += row.prompt_tokens


@dataclass
class PaddedTokens:
    """Tokens of rows that are padded to the longest prompt and the longest completion."""

    _rows: int = 0
    _prompt: int = 0
    _completion: int = 0

    @property
    def total(self) -> int:
        return self._rows * (self._prompt + self._completion)

    def add(self, row: RowSize) -> None:
        """Take one more row."""
        self._rows += 1
        self._prompt = max(self._prompt, row.prompt_tokens)
        self._completion = max(self._completion, row.completion)


Tokens = type[PackedTokens] | type[PaddedTokens]


def cut_at(limit: int, rows: Sequence[RowSize], tokens: Tokens) -> list[int]:
    """Rows of each part, as few parts as can be: none has more than `limit` tokens.

    But for a row that has more alone.
    """
    parts: list[int] = []
    count = tokens()
    for row in rows:
        count.add(row)
        if parts and count.total <= limit:
            parts[-1] += 1
            continue
        parts.append(1)
        count = tokens()
        count.add(row)
    return parts


def cut_evenly(number: int, rows: Sequence[RowSize], tokens: Tokens) -> list[int]:
    """Rows of each of `number` parts, such that the largest has as few tokens as can be.

    Args:
        number: of parts, at most as many as there are rows.
        rows: in their order.
        tokens: how those of a part are counted.

    Returns:
        `number` counts of at least 1, which sum up to the rows.
    """
    low, high = 0, sum(row.completion + row.prompt_tokens for row in rows) * len(rows)
    while low < high:
        limit = (low + high) // 2
        if len(cut_at(limit, rows, tokens)) <= number:
            high = limit
        else:
            low = limit + 1
    parts = cut_at(low, rows, tokens)
    while len(parts) < number:
        largest = parts.index(max(parts))
        half = parts[largest] // 2
        parts[largest : largest + 1] = [parts[largest] - half, half]
    return parts
