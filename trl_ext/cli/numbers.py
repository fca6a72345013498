"""Numbers on the command line, as types of argparse."""

import argparse
import math

# Logits are divided by it in float32. Below, text is the likeliest; above, any token.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.001, 1000.0


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A number greater than 0."""
    if not 0 < (number := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, got {text!r}")
    return number


def temperature(text: str) -> float:
    """Of sampling: a number that leaves logits finite, and differences between them."""
    if not LEAST_TEMPERATURE <= (number := _number(text)) <= MOST_TEMPERATURE:
        raise argparse.ArgumentTypeError(
            f"must be a number from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}, got {text!r}; "
            "for the likeliest token: --greedy"
        )
    return number


def share(text: str) -> float:
    """A number greater than 0 and at most 1."""
    if not 0 < (number := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(
            f"must be a number greater than 0 and at most 1, got {text!r}"
        )
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
