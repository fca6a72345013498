"""What counted experts have in common: look-up by batch, padding, devices, files.

Tables are sparse and held as torch tensors; sums are in float64, because a pseudo-count may be as
small as 1e-10, and results in float32.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from trl_ext.errors import ConfigError
from trl_ext.poe.counted_files import (
    COUNTS,
    DESCRIPTION,
    FORMAT_VERSION,
    check_no_model,
    damaged,
    read_description,
    replaced,
)
from trl_ext.poe.counting import Counts, CountTable
from trl_ext.poe.counts_file import load_counts, save_counts

# Scores computed together, rows × V: 8 MB in float64, and at most a few times that for the counts
# that are spread over them. On a CPU more is slower.
SCORES_AT_ONCE = 2**20
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class CountedExpert(ABC):
    """An autoregressive distribution P_N(x_t | x_<t) made of smoothed counts. Equation E13.

    Made by `fit` of `NaiveBayesExpert` or `NGramExpert`, or by `load`. A sequence begins at its
    first token that is not masked; a masked token ends the context of those behind it.

    Attributes:
        vocab_size: V.
        pseudo_count: a, added to every count.
        tokenizer: the one that made the token ids, or None.
        num_tokens: n, how many tokens were counted.
        prior_entropy: nats, the entropy of P(c) = (n_c + a)/(n + aV).
    """

    kind: ClassVar[str]
    _size_name: ClassVar[str]  # what `context_length` is derived from: "window", "order"

    def __init__(self, counts: Counts, *, pseudo_count: float, tokenizer: Any | None = None):
        self.vocab_size = len(counts.tokens)
        self.pseudo_count = pseudo_count
        self.tokenizer = tokenizer
        self.num_tokens = int(counts.tokens.sum())
        self._counts = counts
        log_prior = self._log_smoothed(counts.tokens)
        self._log_prior = log_prior - self._log_total(counts.tokens.sum())
        self.prior_entropy = -(self._log_prior.exp() * self._log_prior).sum().item()

    @property
    def context_length(self) -> int:
        """How many of the preceding tokens it reads."""
        return len(self._counts.tables)

    @property
    def num_distinct(self) -> int:
        """Different n-grams that were counted: of the order, or pairs at the longest distance."""
        tables = self._counts.tables
        return len(tables[-1].pairs) if tables else int((self._counts.tokens > 0).sum())

    @property
    def device(self) -> torch.device:
        """Where the tables are, and its input must be."""
        return self._log_prior.device

    def to(self, device: torch.device | str) -> Self:
        """Move the tables to `device`; returns the same expert."""
        self._counts = self._counts.to(device)
        self._log_prior = self._log_prior.to(device)
        return self

    @torch.no_grad()
    def log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """log P_N of every token that may follow each prefix; row t is P_N(.|x_≤t).

        Args:
            input_ids: (B, T) integers on the expert's device. Ids of masked tokens are not read.
            attention_mask: (B, T), 1 or True = keep; None keeps all. Padding may be on both sides.

        Returns:
            (B, T, V) nats, float32, normalised over V. A row of a masked token is the prior P(c),
            that of the beginning of a sequence.

        Raises:
            ConfigError: if shapes, types, devices or token ids do not fit.
        """
        ids, mask = self._checked(input_ids, attention_mask)
        ends = torch.arange(ids.size(1), device=ids.device).expand(ids.shape)
        return self._dense_in_chunks(self._contexts(ids, mask, ends))

    @torch.no_grad()
    def next_log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """log P_N of every token that may come next: the row of `log_probs` at the last token.

        Args:
            input_ids: (B, T), as in `log_probs`; T = 0 asks for the beginning of a sequence.
            attention_mask: (B, T), as there. Of a row padded on the right, the last token that is
                not masked counts.

        Returns:
            (B, V) nats, float32, normalised over V.

        Raises:
            ConfigError: as `log_probs`.
        """
        ids, mask = self._checked(input_ids, attention_mask)
        places = torch.arange(1, ids.size(1) + 1, device=ids.device)
        padded = functional.pad(torch.where(mask, places, 0), (1, 0))  # so that T = 0 has a maximum
        ends = padded.amax(1, keepdim=True) - 1
        return self._dense_in_chunks(self._contexts(ids, mask, ends))[:, 0]

    @torch.no_grad()
    def token_log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """log P_N(x_t | x_<t) of the tokens themselves, the first one's from the prior.

        Their sum over a row is log P_N of the sequence, Equation E13. No (B, T, V) is held.

        Args:
            input_ids: (B, T), as in `log_probs`.
            attention_mask: (B, T), as there.

        Returns:
            (B, T) nats, float32; 0 for a masked token.

        Raises:
            ConfigError: as `log_probs`.
        """
        ids, mask = self._checked(input_ids, attention_mask)
        ends = torch.arange(ids.size(1), device=ids.device).expand(ids.shape) - 1
        contexts = self._contexts(ids, mask, ends).flatten(0, 1)
        log_probs = self._of_tokens(contexts, ids.flatten()).view(ids.shape)
        return torch.where(mask, log_probs, 0.0).float()

    @abstractmethod
    def _dense(self, contexts: Tensor) -> Tensor:
        """(P, V) float64 normalised log-probabilities behind contexts (P, k) of `_contexts`."""

    @abstractmethod
    def _of_tokens(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """(P,) float64 log-probabilities of `tokens` (P,) behind contexts (P, k)."""

    def _log_smoothed(self, counts: Tensor) -> Tensor:
        """log(count + a), float64."""
        return (counts.double() + self.pseudo_count).log()

    def _log_total(self, counts: Tensor) -> Tensor:
        """log(count + aV), float64: of V smoothed counts that sum to this."""
        return (counts.double() + self.pseudo_count * self.vocab_size).log()

    def _add_seen(self, scores: Tensor, table: CountTable, rows: Tensor) -> None:
        """Add log((count + a)/a) of what `table` has seen to scores (P, V), in place.

        What was not seen has the score of count 0 already.
        """
        owner, tokens, counts = table.entries(rows)
        added = self._log_smoothed(counts) - math.log(self.pseudo_count)
        scores.view(-1).scatter_add_(0, owner * self.vocab_size + tokens, added)

    def _dense_in_chunks(self, contexts: Tensor) -> Tensor:
        """(…, V) float32 for contexts (…, k)."""
        flat = contexts.flatten(0, 1)
        out = torch.empty(len(flat), self.vocab_size, dtype=torch.float32, device=flat.device)
        for chunk in self._chunks(len(flat)):
            out[chunk] = self._dense(flat[chunk]).float()
        return out.view(*contexts.shape[:-1], self.vocab_size)

    def _chunks(self, positions: int) -> Iterator[slice]:
        size = max(1, SCORES_AT_ONCE // self.vocab_size)
        return (slice(begin, begin + size) for begin in range(0, positions, size))

    def _contexts(self, ids: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
        """(B, P, k): the tokens at `ends` (B, P), one before it, …; −1 where the sequence ended."""
        # A masked column in front is what is before the first token, index −1.
        ids, mask = functional.pad(ids, (1, 0)), functional.pad(mask, (1, 0))
        back = torch.arange(self.context_length, device=ids.device)
        at = (ends[..., None] + 1 - back).clamp(min=0)
        alive = mask.gather(1, at.flatten(1)).view(at.shape).long().cumprod(-1)
        return torch.where(alive.bool(), ids.gather(1, at.flatten(1)).view(at.shape), -1)

    def _checked(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids (B, T) int64, 0 where masked, and the mask (B, T) bool."""
        if (
            not isinstance(input_ids, Tensor)
            or input_ids.dim() != 2
            or input_ids.dtype not in _INTEGERS
        ):
            raise ConfigError(
                f"input_ids is {_described(input_ids)}; it must be a tensor (B, T) of integers. "
                "For a single sequence: torch.tensor([ids])."
            )
        self._check_device("input_ids", input_ids)
        if attention_mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        else:
            if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
                raise ConfigError(
                    f"attention_mask is {_described(attention_mask)}, and input_ids is "
                    f"{_described(input_ids)}; they must have the same shape, 1 = keep."
                )
            self._check_device("attention_mask", attention_mask)
            mask = attention_mask.bool()
        ids = torch.where(mask, input_ids.long(), 0)
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            row, place = outside.nonzero()[0].tolist()
            raise ConfigError(
                f"input_ids has the token id {ids[row, place].item()} in sequence {row}, at "
                f"{place}; the expert's vocabulary has {self.vocab_size} tokens, 0 to "
                f"{self.vocab_size - 1}. Mask padding in attention_mask; fit with vocab_size="
                "the number of the language model's tokens."
            )
        return ids, mask

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.device:
            raise ConfigError(
                f"{name} is on {tensor.device}, and the expert's counts are on {self.device}. Move "
                f"the expert with expert.to({str(tensor.device)!r}), or the tensor."
            )

    def __repr__(self) -> str:
        size = f"{self._size_name}={getattr(self, self._size_name)}"
        return (
            f"{type(self).__name__}({size}, pseudo_count={self.pseudo_count}, "
            f"vocab_size={self.vocab_size}, num_tokens={self.num_tokens})"
        )

    def save(self, path: str | Path) -> None:
        """Write a directory: what it is, its counts, and its tokenizer if it has one.

        Args:
            path: made if it does not exist; an expert that is there is replaced, other files stay.

        Raises:
            ConfigError: if a language model or an adapter is there.
            RunError: if the counts cannot be written.
        """
        check_no_model(path)
        description = {
            "kind": self.kind,
            self._size_name: getattr(self, self._size_name),
            "pseudo_count": self.pseudo_count,
            "vocab_size": self.vocab_size,
            "num_tokens": self.num_tokens,
            "tokenizer": self.tokenizer is not None,
            "format_version": FORMAT_VERSION,
        }
        with replaced(Path(path)) as folder:
            save_counts(self._counts, folder / COUNTS)
            text = json.dumps(description, indent=2) + "\n"
            (folder / DESCRIPTION).write_text(text, encoding="utf-8")
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote, on the CPU; `CountedExpert.load` returns the class that was saved.

        Args:
            path: a directory that `save` wrote.

        Raises:
            ConfigError: if it is none, of another class, damaged, or written in a newer format.
        """
        folder = Path(path)
        # They are made of this class.
        from trl_ext.poe.counted import NaiveBayesExpert, NGramExpert

        kinds = {each.kind: each for each in (NaiveBayesExpert, NGramExpert)}
        size_names = {kind: each._size_name for kind, each in kinds.items()}
        description = read_description(folder, size_names)
        found = kinds[description["kind"]]
        if not issubclass(found, cls):
            raise ConfigError(
                f"{folder} holds a counted expert of the kind {found.kind!r}, which is a "
                f"{found.__name__}, not a {cls.__name__}. Use {found.__name__}.load or "
                "CountedExpert.load."
            )
        is_ngram, size = found is NGramExpert, description[found._size_name]
        counts = load_counts(
            folder / COUNTS,
            tables=size - 1 if is_ngram else size,
            chained=is_ngram,
            num_tokens=description["num_tokens"],
        )
        if len(counts.tokens) != description["vocab_size"]:
            raise damaged(
                folder / DESCRIPTION,
                f"vocab_size is {description['vocab_size']}, and {COUNTS} counts "
                f"{len(counts.tokens)} tokens",
            )
        tokenizer = _tokenizer(folder) if description["tokenizer"] else None
        return found(counts, pseudo_count=description["pseudo_count"], tokenizer=tokenizer)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise damaged(folder, f"its tokenizer cannot be opened: {reason}") from error


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"
