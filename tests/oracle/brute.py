"""The oracle's quantities once more, by recursion over tuples: no torch, no numbered prefixes.

A table is a dictionary from a prefix (a tuple of letters) to the probabilities of the next token.
"""

import itertools
import math
from collections.abc import Callable, Iterator

Completion = tuple[int, ...]
Table = dict[Completion, list[float]]


def read_table(logits: list[list[float]], vocab_size: int, length: int) -> Table:
    """Rows in the documented order: shorter prefixes first, then as itertools.product yields."""
    prefixes = [
        prefix
        for t in range(length)
        for prefix in itertools.product(range(1, vocab_size), repeat=t)
    ]
    return {prefix: softmax(row) for prefix, row in zip(prefixes, logits, strict=True)}


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def completions(vocab_size: int, length: int, prefix: Completion = ()) -> Iterator[Completion]:
    if len(prefix) == length:
        yield prefix
        return
    yield (*prefix, 0)
    for letter in range(1, vocab_size):
        yield from completions(vocab_size, length, (*prefix, letter))


def probability(table: Table, y: Completion) -> float:
    return math.prod(table[y[:t]][token] for t, token in enumerate(y))


def expectation(table: Table, f: Callable[[Completion], float], prefix: Completion = ()) -> float:
    """E[f(y) | y starts with prefix]; a prefix that is not in the table is a whole completion."""
    if prefix not in table:
        return f(prefix)
    return sum(p * expectation(table, f, (*prefix, a)) for a, p in enumerate(table[prefix]))
