"""How often which token followed what, kept sparse."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trl_ext.poe.corpus import Corpus


class CountTable:
    """How often each (row, token) was seen; only what was seen takes memory, 16 bytes.

    Args:
        pairs: (N,) int64, row·V + token, ascending, each once.
        counts: (N,) int64, positive.
        vocab_size: V.
        row_keys: (R,) int64, ascending: row i is the one of key row_keys[i]. None: the key of a row
            is its number.
    """

    def __init__(
        self, pairs: Tensor, counts: Tensor, vocab_size: int, row_keys: Tensor | None = None
    ):
        self.pairs = pairs
        self.vocab_size = vocab_size
        self.row_keys = row_keys
        # The differences of neighbours are the counts; of a row's two ends, its total.
        self._cumulative = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @property
    def counts(self) -> Tensor:
        """(N,) int64: how often each of `pairs` was seen."""
        return self._cumulative.diff()

    def to(self, device: torch.device | str) -> "CountTable":
        """The same table on `device`."""
        keys = None if self.row_keys is None else self.row_keys.to(device)
        return CountTable(self.pairs.to(device), self.counts.to(device), self.vocab_size, keys)

    def rows(self, keys: Tensor) -> Tensor:
        """(P,) int64 row of each key, −1 for a key without a row; a negative key has none."""
        return keys if self.row_keys is None else _find(self.row_keys, keys)

    def count(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """(P,) int64: how often `tokens` (P,) were seen in `rows` (P,); 0 in row −1."""
        found = _find(self.pairs, rows * self.vocab_size + tokens)
        # Index −1 is the last of the cumulative sums: in range, and not taken.
        counts = self._cumulative[found + 1] - self._cumulative[found]
        return torch.where(found >= 0, counts, 0)

    def totals(self, rows: Tensor) -> Tensor:
        """(P,) int64: the sum of each row of `rows` (P,) over all tokens; 0 in row −1."""
        first, last = self._bounds(rows)
        return self._cumulative[last] - self._cumulative[first]

    def entries(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Everything seen in `rows` (P,): index into `rows`, token and count, each (E,) int64."""
        first, last = self._bounds(rows)
        lengths = last - first
        owner = torch.repeat_interleave(lengths)
        begins = lengths.cumsum(0) - lengths
        at = torch.arange(len(owner), device=rows.device) + (first - begins)[owner]
        counts = self._cumulative[at + 1] - self._cumulative[at]
        return owner, self.pairs[at] % self.vocab_size, counts

    def _bounds(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.searchsorted(self.pairs, rows * self.vocab_size)
        return first, torch.searchsorted(self.pairs, (rows + 1) * self.vocab_size)


def _find(ascending: Tensor, values: Tensor) -> Tensor:
    """Index of each value in `ascending`, −1 where it is absent."""
    if not len(ascending):
        return torch.full_like(values, -1)
    index = torch.searchsorted(ascending, values).clamp(max=len(ascending) - 1)
    return torch.where(ascending[index] == values, index, -1)


@dataclass(frozen=True)
class Counts:
    """All that an expert has counted.

    Attributes:
        tokens: (V,) int64, how often each token occurs.
        tables: one for each distance or context length, from 1 on.
    """

    tokens: Tensor
    tables: list[CountTable]

    def to(self, device: torch.device | str) -> "Counts":
        """The same counts on `device`."""
        return Counts(self.tokens.to(device), [table.to(device) for table in self.tables])


class KeyCounter:
    """Counts int64 keys that come in chunks; holds each different key once, and a chunk or two."""

    def __init__(self) -> None:
        self._merged = _sorted_counts(np.empty(0, np.int64))
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray) -> None:
        """Count `keys` (P,) int64, in any order."""
        self._waiting.append(_sorted_counts(keys))
        # Merged when as large as what there is, every key is moved a few times, not once a chunk.
        if sum(len(part) for part, _ in self._waiting) >= len(self._merged[0]):
            self._merge()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) ascending keys, (N,) counts, both int64."""
        self._merge()
        return self._merged

    def _merge(self) -> None:
        keys, counts = (
            np.concatenate(each) for each in zip(self._merged, *self._waiting, strict=True)
        )
        self._waiting.clear()
        order = np.argsort(keys, kind="stable")  # merges runs that are in order already
        keys, counts = keys[order], counts[order]
        first = _first_of_each(keys)
        self._merged = keys[first], np.add.reduceat(counts, first) if len(first) else counts


def _sorted_counts(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keys = np.sort(keys)
    first = _first_of_each(keys)
    return keys[first], np.diff(first, append=len(keys))


def _first_of_each(ascending: np.ndarray) -> np.ndarray:
    """(N,) where a new value begins."""
    changes = np.ones(len(ascending), bool)
    changes[1:] = ascending[1:] != ascending[:-1]
    return np.flatnonzero(changes)


def count_tokens(corpus: Corpus) -> Tensor:
    """(V,) int64: how often each token occurs."""
    counts = np.zeros(corpus.vocab_size, np.int64)
    for at in corpus.targets(0):
        counts += np.bincount(corpus.tokens[at], minlength=corpus.vocab_size)
    return torch.from_numpy(counts)


def count_at_distance(corpus: Corpus, distance: int) -> CountTable:
    """How often each token came `distance` ≥ 1 tokens behind another; that other is the row."""
    counter = KeyCounter()
    for at in corpus.targets(distance):
        rows = corpus.tokens[at - distance].astype(np.int64)
        counter.add(rows * corpus.vocab_size + corpus.tokens[at])
    return _table(counter, corpus.vocab_size)


def count_after_contexts(corpus: Corpus, longest: int) -> Iterator[CountTable]:
    """How often each token followed each context of 1, 2, …, `longest` tokens: a table a length.

    A context of one token is its row. A longer one is known by the key row·V + token: the row of
    the same context without its first token, and that token. So a key fits in int64 for contexts of
    any length.
    """
    if longest < 1:
        return
    yield count_at_distance(corpus, 1)
    # Row of the context of the present length before each position.
    rows = np.concatenate([np.zeros(1, np.int64), corpus.tokens[:-1].astype(np.int64)])
    for length in range(2, longest + 1):
        seen, counter = KeyCounter(), KeyCounter()
        for at in corpus.targets(length):
            rows[at] = rows[at] * corpus.vocab_size + corpus.tokens[at - length]
            seen.add(rows[at])
        row_keys, _ = seen.result()
        for at in corpus.targets(length):
            rows[at] = _ranks(row_keys, rows[at])
            counter.add(rows[at] * corpus.vocab_size + corpus.tokens[at])
        yield _table(counter, corpus.vocab_size, torch.from_numpy(row_keys))


def _ranks(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index in `ascending` of each value, which must be in it."""
    order = np.argsort(values)  # searched in order, large tables are read through, not jumped in
    ranks = np.empty_like(values)
    ranks[order] = np.searchsorted(ascending, values[order])
    return ranks


def _table(counter: KeyCounter, vocab_size: int, row_keys: Tensor | None = None) -> CountTable:
    pairs, counts = map(torch.from_numpy, counter.result())
    return CountTable(pairs, counts, vocab_size, row_keys)
