"""Rows cut into parts: against every way to cut them."""

import itertools
import random

import pytest

from trl_ext.packing import PackedTokens, PaddedTokens, RowSize, cut_at, cut_evenly

KINDS = (PackedTokens, PaddedTokens)


def rows_of(seed: int, number: int = 8) -> list[RowSize]:
    draw = random.Random(seed)
    prompts = [draw.randint(1, 9) for _ in range(3)]
    drawn = sorted(draw.randrange(3) for _ in range(number))
    return [RowSize(draw.randint(1, 20), prompts[prompt], prompt) for prompt in drawn]


def tokens_of(part: list[RowSize], kind) -> int:
    """By hand: completions and different prompts; or rows times the longest of both."""
    if kind is PackedTokens:
        return sum(r.completion for r in part) + sum(
            {r.prompt: r.prompt_tokens for r in part}.values()
        )
    longest = max(r.completion for r in part) + max(r.prompt_tokens for r in part)
    return len(part) * longest


def parts_of(rows: list[RowSize], counts: list[int]) -> list[list[RowSize]]:
    ends = list(itertools.accumulate(counts))
    return [rows[end - count : end] for end, count in zip(ends, counts, strict=True)]


def largest(rows, counts, kind) -> int:
    return max(tokens_of(part, kind) for part in parts_of(rows, counts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(10))
def test_the_largest_part_is_as_small_as_can_be(seed, kind):
    rows = rows_of(seed)
    for number in range(1, len(rows) + 1):
        counts = cut_evenly(number, rows, kind)
        assert len(counts) == number and sum(counts) == len(rows) and min(counts) >= 1
        best = min(
            largest(rows, [b - a for a, b in itertools.pairwise((0, *cuts, len(rows)))], kind)
            for cuts in itertools.combinations(range(1, len(rows)), number - 1)
        )
        assert largest(rows, counts, kind) == best


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_is_above_the_limit_but_for_a_row_alone(kind):
    rows = rows_of(0)
    for limit in (1, 15, 30, 60, 10_000):
        parts = parts_of(rows, cut_at(limit, rows, kind))
        assert [row for part in parts for row in part] == rows
        assert all(len(part) == 1 or tokens_of(part, kind) <= limit for part in parts)
        joined = [a + b[:1] for a, b in itertools.pairwise(parts)]
        assert all(tokens_of(part, kind) > limit for part in joined)


def test_nothing_is_no_part():
    assert cut_at(10, [], PackedTokens) == []
