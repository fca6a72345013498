"""How much completions repeat: within one, and over many. From token ids, without a model."""

from collections.abc import Sequence


def repeated_ngrams(tokens: Sequence[int], n: int = 3) -> float:
    """1 − |distinct n-grams| / |n-grams| of one completion, between 0 and 1.

    Source: Welleck et al. (2020), "Neural text generation with unlikelihood training", seq-rep-n.

    Args:
        tokens: token ids of the completion, its end token included or not.
        n: length of an n-gram, 1 or more.

    Returns:
        The share of n-grams that occurred earlier in the completion; 0 where it is shorter than n.

    Raises:
        ValueError: n is below 1.
    """
    ngrams = _ngrams(tokens, n)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct_ngrams(completions: Sequence[Sequence[int]], n: int) -> float:
    """|distinct n-grams| / |n-grams| over all completions together, between 0 and 1.

    Source: Li et al. (2016), "A diversity-promoting objective function for neural conversation
    models", distinct-n. It falls with the number of tokens: compare it between batches of one size.

    Args:
        completions: token ids of each.
        n: length of an n-gram, 1 or more; none spans two completions.

    Returns:
        NaN where every completion is shorter than n.

    Raises:
        ValueError: n is below 1.
    """
    ngrams = [ngram for tokens in completions for ngram in _ngrams(tokens, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else float("nan")


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    if n < 1:
        raise ValueError(f"An n-gram has 1 token or more, got n={n}.")
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
