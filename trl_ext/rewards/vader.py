"""How positive a text sounds: a lexicon's verdict, offline and in microseconds."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from trl_ext.errors import MissingDependencyError
from trl_ext.rewards.reading import completion_text


def vader(completions: Sequence[Any], **columns: Any) -> list[float]:
    """VADER's compound score of each completion, from −1 (negative) to 1 (positive).

    Source: Hutto and Gilbert (2014), "VADER: a parsimonious rule-based model for sentiment
    analysis of social media text". It counts words: a text that repeats "great" scores high. An
    empty text scores 0.

    Args:
        completions: texts or lists of messages.
        columns: not read.

    Raises:
        MissingDependencyError: without the package vaderSentiment.
    """
    return sentiment([completion_text(completion) for completion in completions])


def sentiment(texts: Sequence[str]) -> list[float]:
    """The same of plain texts: `trl_ext generate --metric sentiment`."""
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in texts]


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise MissingDependencyError(
            "The reward 'vader' needs the package vaderSentiment: pip install 'trl-ext[sentiment]'."
        ) from error
    return SentimentIntensityAnalyzer()
