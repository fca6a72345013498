"""A corpus of texts or token ids, read once and checked."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from operator import length_hint
from typing import Any

import numpy as np
import torch

from trl_ext.errors import ConfigError, DataError
from trl_ext.poe.corpora import check_characters

SEQUENCES_AT_ONCE = 1000  # a fast tokenizer spreads a batch of texts over the cores
TOKENS_AT_ONCE = 2**20  # counted and merged together; bounds the memory beside corpus and tables
COLUMNS = ("text", "input_ids")


@dataclass(frozen=True)
class Corpus:
    """Sequences of token ids, one behind the other: 4 bytes a token.

    Attributes:
        tokens: (n,) int32.
        starts: (S,) int64, where each sequence begins; an empty one where the next does.
        vocab_size: V.
    """

    tokens: np.ndarray
    starts: np.ndarray
    vocab_size: int

    def targets(self, distance: int) -> Iterator[np.ndarray]:
        """Positions with at least `distance` tokens of their sequence before them, by chunks."""
        for begin in range(0, len(self.tokens), TOKENS_AT_ONCE):
            at = np.arange(begin, min(begin + TOKENS_AT_ONCE, len(self.tokens)))
            start = self.starts[np.searchsorted(self.starts, at, side="right") - 1]
            yield at[at - start >= distance]


def read_corpus(
    sequences: Iterable[Any],
    *,
    vocab_size: int | None = None,
    tokenizer: Any | None = None,
    column: str | None = None,
    add_eos: bool = False,
    progress: bool = True,
) -> Corpus:
    """Read sequences, texts by the batch; the arguments are those of `NaiveBayesExpert.fit`.

    Raises:
        ConfigError: if an argument is wrong or missing.
        DataError: if a sequence cannot be read, or there is no token at all.
    """
    from tqdm.auto import tqdm

    vocab_size = _vocab_size(vocab_size, tokenizer)
    reader = _Reader(vocab_size, tokenizer, column, _end(tokenizer) if add_eos else [])
    rows = reader.rows(sequences)
    total = length_hint(sequences) or None
    parts, lengths = [np.empty(0, np.int32)], []
    with tqdm(desc="Reading", total=total, unit="seq", disable=not progress) as bar:
        while batch := list(islice(rows, SEQUENCES_AT_ONCE)):
            arrays = reader.arrays(batch, first=len(lengths))
            parts.append(np.concatenate(arrays))
            lengths += map(len, arrays)
            bar.update(len(batch))
    if not sum(lengths):
        raise DataError(
            f"The corpus is empty: {len(lengths)} sequences, 0 tokens. An expert counts at least "
            "one token. Look at what `sequences` yields; a generator can be read only once."
        )
    ends = np.cumsum(lengths, dtype=np.int64)
    return Corpus(np.concatenate(parts), ends - lengths, vocab_size)


def _vocab_size(vocab_size: int | None, tokenizer: Any | None) -> int:
    if vocab_size is None:
        if tokenizer is None:
            raise ConfigError(
                "vocab_size is missing, and there is no tokenizer to have it from. Give "
                "vocab_size, the number of the language model's tokens, or its tokenizer."
            )
        return len(tokenizer)
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        raise ConfigError(f"vocab_size is {vocab_size!r}; it must be a whole number from 1 on.")
    return vocab_size


def _end(tokenizer: Any | None) -> list[int]:
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        raise ConfigError(
            "add_eos is True, but there is no tokenizer with an eos_token_id. Give such a "
            "tokenizer, or leave add_eos out and end the sequences yourself."
        )
    return [end]


@dataclass(frozen=True)
class _Reader:
    """From what users have to arrays of checked token ids; `end` is put behind each text."""

    vocab_size: int
    tokenizer: Any | None
    column: str | None
    end: list[int]

    def rows(self, sequences: Any) -> Iterator[Any]:
        """Texts or sequences of token ids, out of their column if they are in one."""
        if isinstance(sequences, str | Mapping):
            kind, step = (
                ("a single text", "Put it into a list.")
                if isinstance(sequences, str)
                else ("a mapping", "Take one of its splits, or one of its columns.")
            )
            raise DataError(f"sequences is {kind}; it must be an iterable of sequences. {step}")
        if hasattr(sequences, "column_names") and hasattr(sequences, "select_columns"):
            names = sequences.column_names
            if names:  # a streamed dataset may not know them yet
                sequences = sequences.select_columns([self._column(names)])
        for index, row in enumerate(_iterated(sequences)):
            if isinstance(row, Mapping):
                row = row[self._column(list(row))]
            elif self.column is not None:
                raise ConfigError(
                    f"column is {self.column!r}, but sequence {index} is a {type(row).__name__} "
                    "that has no columns. Leave column out."
                )
            yield row

    def _column(self, names: list[str]) -> str:
        usual = [name for name in COLUMNS if name in names]
        if self.column in names or (self.column is None and len(usual) == 1):
            return self.column or usual[0]
        if self.column is not None:
            found = f"column is {self.column!r}, and the dataset has no such column"
        elif usual:
            found = "The dataset has both 'text' and 'input_ids'"
        else:
            found = "The dataset has neither 'text' nor 'input_ids'"
        raise ConfigError(
            f"{found}; its columns are {', '.join(names)}. Set column to the one that holds texts "
            "or token ids."
        )

    def arrays(self, batch: list[Any], first: int) -> list[np.ndarray]:
        """(length,) int32 of each sequence; `first` is the index of the first one."""
        places = [place for place, row in enumerate(batch) if isinstance(row, str)]
        if places:
            texts = {first + place: batch[place] for place in places}
            for place, ids in zip(places, self._tokenise(texts), strict=True):
                batch[place] = ids
        if self.end and len(places) < len(batch):
            place = min(set(range(len(batch))) - set(places))
            raise ConfigError(
                f"add_eos is True, and sequence {first + place} is token ids; the end token is "
                "added to texts only. Leave add_eos out and end the sequences yourself."
            )
        return [self._checked(row, first + place) for place, row in enumerate(batch)]

    def _tokenise(self, texts: dict[int, str]) -> list[list[int]]:
        """Token ids of texts by their index."""
        if self.tokenizer is None:
            first, text = next(iter(texts.items()))
            raise ConfigError(
                f"Sequence {first} is the text {text[:40]!r}, and there is no tokenizer. Give "
                "the language model's tokenizer, or token ids."
            )
        try:
            encoded = self.tokenizer(
                list(texts.values()),
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,  # no warning about texts longer than a model's context
            )
        except (TypeError, UnicodeError):  # how tokenizers refuse half a character
            for index, text in texts.items():
                check_characters(text, f"Sequence {index}")
            raise
        return [ids + self.end for ids in encoded["input_ids"]]

    def _checked(self, row: Any, index: int) -> np.ndarray:
        try:
            ids = row.detach().cpu().numpy() if isinstance(row, torch.Tensor) else np.asarray(row)
        # Lists of unequal lengths within; tensors that are sparse, or of a type numpy lacks.
        except (ValueError, TypeError, RuntimeError):
            ids = np.empty((0, 0))
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
            raise DataError(
                f"Sequence {index} is {_shown(row)}; a sequence is a list, array or tensor of "
                "token ids with one dimension, or a text if a tokenizer is given."
            )
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise DataError(
                f"Sequence {index} has the token id {outside[0]}, which is outside the vocabulary "
                f"of {self.vocab_size} tokens, 0 to {self.vocab_size - 1}. Was it tokenised by "
                "another tokenizer? Or set vocab_size to the number of the language model's tokens."
            )
        return ids.astype(np.int32)


def _iterated(sequences: Any) -> Iterator[Any]:
    try:
        return iter(sequences)
    except (TypeError, RuntimeError) as error:  # a sparse tensor's is a RuntimeError
        raise DataError(
            f"sequences is {_shown(sequences)}; it must be an iterable of sequences: lists, arrays "
            "or tensors of token ids, or texts. Put a single one into a list."
        ) from error


def _shown(row: Any) -> str:
    text = repr(row)
    return f"{type(row).__name__} {text if len(text) <= 80 else f'{text[:77]}...'}"
