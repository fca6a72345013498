"""Experts that are counted, not trained: naive Bayes and n-grams over the tokens of a corpus.

Both give log P_N of every next token, so that a product (`trl_ext.poe.ProductOfExperts`) multiplies
it with a language model's.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from trl_ext.errors import ConfigError
from trl_ext.poe.corpus import read_corpus
from trl_ext.poe.counted_base import CountedExpert
from trl_ext.poe.counted_files import check_pseudo_count
from trl_ext.poe.counting import (
    Counts,
    CountTable,
    count_after_contexts,
    count_at_distance,
    count_tokens,
)

__all__ = ["CountedExpert", "NGramExpert", "NaiveBayesExpert"]


class NaiveBayesExpert(CountedExpert):
    """P_N(c|f_1, …, f_k) ∝ P(c) Π_j P_j(f_j|c): the features are the k last tokens. Equation E13.

    f_j is the token j places before c, and every distance j has a table of its own:

        P(c) = (n_c + a)/(n + aV)        P_j(f|c) = (n^j_{f,c} + a)/(n_c + aV)

    so that P_j(.|c) is normalised over f. n_c counts all c, also those with fewer than j tokens
    before them: the sum over f is one together with the event that the sequence began within those
    j places. It is the same n_c in both, and so, as a goes to 0, window 1 is the bigram model
    n_{f,c}/n_f wherever f was seen before a token. A feature before the beginning of a sequence is
    left out of the product (marginalised).

    Attributes:
        window: k.
    """

    kind = "naive_bayes"
    _size_name = "window"

    def __init__(self, counts: Counts, *, pseudo_count: float, tokenizer: Any | None = None):
        super().__init__(counts, pseudo_count=pseudo_count, tokenizer=tokenizer)
        # (k + 1, V): row j is log P(c) + j·log(a/(n_c + aV)), of j unseen features.
        unseen = math.log(pseudo_count) - self._log_total(counts.tokens)
        features = torch.arange(self.context_length + 1, device=self.device)
        self._log_of_unseen = self._log_prior + features[:, None] * unseen

    def to(self, device: torch.device | str) -> Self:
        """Move the tables to `device`; returns the same expert."""
        self._log_of_unseen = self._log_of_unseen.to(device)
        return super().to(device)

    @property
    def window(self) -> int:
        """k, how many preceding tokens are features."""
        return self.context_length

    @classmethod
    def fit(
        cls,
        sequences: Iterable[Any],
        *,
        window: int = 1,
        pseudo_count: float = 1.0,
        vocab_size: int | None = None,
        tokenizer: Any | None = None,
        column: str | None = None,
        add_eos: bool = False,
        progress: bool = True,
    ) -> Self:
        """Count a corpus; its token ids are held while counting, 4 bytes each.

        Args:
            sequences: lists, arrays or 1-D tensors of token ids; or texts, if there is a tokenizer.
                Any iterable, a generator too, which is read once, or a `datasets.Dataset`. An
                empty sequence counts nothing.
            window: k ≥ 1, how many preceding tokens are features.
            pseudo_count: a of Laplace smoothing, 0 < a ≤ 1e15.
            vocab_size: V; default len(tokenizer). A language model's logits may be wider than its
                tokenizer: then give their width.
            tokenizer: of the language model. Texts are tokenised without special tokens.
            column: of a dataset, or of rows that are mappings; default `text` or `input_ids`.
            add_eos: end each text with the tokenizer's eos token. Without, the expert never saw
                a text end, and a product with it hardly ever ends one.
            progress: show a progress bar.

        Raises:
            ConfigError: if an argument is wrong or missing.
            DataError: if the corpus is empty, or a sequence is none or outside the vocabulary.
        """
        _check_settings(pseudo_count, window=window)
        corpus = read_corpus(
            sequences,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            column=column,
            add_eos=add_eos,
            progress=progress,
        )
        distances = range(1, window + 1)
        tables = [count_at_distance(corpus, distance) for distance in distances]
        counts = Counts(count_tokens(corpus), tables)
        return cls(counts, pseudo_count=pseudo_count, tokenizer=tokenizer)

    def _dense(self, contexts: Tensor) -> Tensor:
        joint = self._joint(contexts)
        return joint.sub_(joint.logsumexp(-1, keepdim=True))

    def _of_tokens(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        # Tokens of one context share its normaliser, which costs V; window 1 has few contexts.
        contexts, which = contexts.unique(dim=0, return_inverse=True)
        normaliser = self._log_prior.new_empty(len(contexts))
        for chunk in self._chunks(len(contexts)):
            normaliser[chunk] = self._joint(contexts[chunk]).logsumexp(-1)
        joint = self._log_prior[tokens]
        of_token = self._log_total(self._counts.tokens[tokens])
        for table, features in zip(self._counts.tables, contexts[which].T, strict=True):
            likelihood = self._log_smoothed(table.count(features, tokens)) - of_token
            joint = joint + torch.where(features >= 0, likelihood, 0.0)
        return joint - normaliser[which]

    def _joint(self, contexts: Tensor) -> Tensor:
        """(P, V) float64: log P(c) + Σ_j log P_j(f_j|c)."""
        joint = self._log_of_unseen[(contexts >= 0).sum(-1)]
        for table, features in zip(self._counts.tables, contexts.T, strict=True):
            self._add_seen(joint, table, features)
        return joint


class NGramExpert(CountedExpert):
    """P_N(c|f) = (n_{f,c} + a)/(n_f + aV), f being the last n − 1 tokens. Equation E13.

    n_f counts how often f was followed by a token. With fewer tokens before it, f is all of them,
    and its counts are those of that shorter context anywhere in the corpus; at the beginning of a
    sequence it is empty, and P_N is the prior P(c) = (n_c + a)/(n + aV). A context that was never
    seen gives the uniform distribution: there is no back-off.

    Attributes:
        order: n; 1 is the prior alone, 2 the bigram model.
    """

    kind = "ngram"
    _size_name = "order"

    @property
    def order(self) -> int:
        """n, one more than the tokens of a context."""
        return self.context_length + 1

    @classmethod
    def fit(
        cls,
        sequences: Iterable[Any],
        *,
        order: int = 2,
        pseudo_count: float = 1.0,
        vocab_size: int | None = None,
        tokenizer: Any | None = None,
        column: str | None = None,
        add_eos: bool = False,
        progress: bool = True,
    ) -> Self:
        """Count a corpus; its token ids are held while counting, 4 bytes each, and 8 from order 3.

        Args:
            sequences: as in `NaiveBayesExpert.fit`, and so are the others.
            order: n ≥ 1.
            pseudo_count: a of Laplace smoothing, 0 < a ≤ 1e15.
            vocab_size: V; default len(tokenizer).
            tokenizer: of the language model.
            column: of a dataset, or of rows that are mappings; default `text` or `input_ids`.
            add_eos: end each text with the tokenizer's eos token.
            progress: show a progress bar.

        Raises:
            ConfigError: if an argument is wrong or missing.
            DataError: if the corpus is empty, or a sequence is none or outside the vocabulary.
        """
        _check_settings(pseudo_count, order=order)
        corpus = read_corpus(
            sequences,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            column=column,
            add_eos=add_eos,
            progress=progress,
        )
        counts = Counts(count_tokens(corpus), list(count_after_contexts(corpus, order - 1)))
        return cls(counts, pseudo_count=pseudo_count, tokenizer=tokenizer)

    def _dense(self, contexts: Tensor) -> Tensor:
        found = list(self._rows(contexts))
        total = sum((table.totals(rows) for table, rows in found), contexts.new_zeros(()))
        unseen = math.log(self.pseudo_count) - self._log_total(total)
        empty = (contexts < 0).all(-1, keepdim=True)
        scores = torch.where(empty, self._log_prior, unseen.expand(len(contexts))[:, None])
        for table, rows in found:
            self._add_seen(scores, table, rows)
        return scores

    def _of_tokens(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        count = total = torch.zeros_like(tokens)
        for table, rows in self._rows(contexts):
            count = count + table.count(rows, tokens)
            total = total + table.totals(rows)
        empty = (contexts < 0).all(-1)
        seen = self._log_smoothed(count) - self._log_total(total)
        return torch.where(empty, self._log_prior[tokens], seen)

    def _rows(self, contexts: Tensor) -> Iterator[tuple[CountTable, Tensor]]:
        """Each table and the rows (P,) of the contexts of its length; −1 for all others."""
        lengths = (contexts >= 0).sum(-1)
        rows = contexts.new_zeros(len(contexts))
        for length, table in enumerate(self._counts.tables, start=1):
            # What is found for a shorter context is not yielded; behind row −1 there is nothing.
            rows = table.rows(rows * self.vocab_size + contexts[:, length - 1])
            yield table, torch.where(lengths == length, rows, -1)


def _check_settings(pseudo_count: float, **size: int) -> None:
    """Refuse what is no smoothing; `size` is window=k or order=n."""
    check_pseudo_count(pseudo_count)
    for name, value in size.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1 on.")
