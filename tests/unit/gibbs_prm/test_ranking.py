import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.ranking import Label, agreement, rank_prefixes
from trl_ext.gibbs_prm.scored import MonteCarloScores, PrefixScores
from trl_ext.metrics.agreement import score_agreement


def scored(
    prefix_scores: list[float],
    *,
    prompt: Any = "2 + 2?",
    completion: Any = None,
    errors: list[float] | None = None,
    beta: float = 0.5,
) -> PrefixScores:
    steps = [f"step {k}. " for k in range(len(prefix_scores))]
    return PrefixScores(
        prompt=prompt,
        completion="".join(steps) if completion is None else completion,
        steps=steps,
        step_ends=[3 * (k + 1) for k in range(len(steps))],
        prefix_scores=prefix_scores,
        beta=beta,
        standard_errors=errors,
    )


def sampled(
    prefix_scores: list[float], errors: list[float], log_z: float, log_z_error: float = 0.0
) -> MonteCarloScores:
    plain = scored(prefix_scores, errors=errors)
    return MonteCarloScores(**vars(plain), log_z=log_z, log_z_standard_error=log_z_error)


def test_plain_numbers_by_hand():
    ranking = rank_prefixes([1.0, 4.0, 1.0], [3.0, 4.0, 0.0])
    assert ranking.order == [1, 0, 2]
    assert ranking.ranks == [2.5, 1.0, 2.5]
    assert ranking.labels == [Label(0, None), Label(1, None), Label(2, None)]
    assert ranking.differences.tolist() == [[0, -3, 0], [3, 0, 3], [0, -3, 0]]
    assert ranking.standard_errors.tolist() == [[0, 5, 3], [5, 0, 4], [3, 4, 0]]
    # Φ(3/5) = (1 + erf(0.6/√2))/2, Φ(3/4) alike.
    wins = [(1 + math.erf(z / math.sqrt(2))) / 2 for z in (0.6, 0.75)]
    expected = [0.5, 1 - wins[0], 0.5, wins[0], 0.5, wins[1], 0.5, 1 - wins[1], 0.5]
    assert ranking.probabilities.flatten().tolist() == pytest.approx(expected, abs=1e-15)


def test_exact_numbers_are_sure():
    for numbers in ([1, 4.0, 1], torch.tensor([1.0, 4.0, 1.0])):
        ranking = rank_prefixes(numbers)
        assert ranking.probabilities.tolist() == [[0.5, 0, 0.5], [1, 0.5, 1], [0.5, 0, 0.5]]
        assert ranking.standard_errors.abs().sum() == 0


def test_all_prefixes_compete_and_are_labelled():
    completions = [
        scored([0.5, -1.0], errors=[0.3, 0.4]),
        scored([]),
        scored([2.0, 0.5, 3.0]),
    ]
    ranking = rank_prefixes(completions)
    assert ranking.labels == [Label(0, 0), Label(0, 1), Label(2, 0), Label(2, 1), Label(2, 2)]
    assert [ranking.labels[i] for i in ranking.order] == [(2, 2), (2, 0), (0, 0), (2, 1), (0, 1)]
    assert ranking.ranks == [3.5, 5, 2, 3.5, 1]
    # Of an estimate and an exact score: √(0.3² + 0); of the first two: √(0.09 + 0.16).
    assert ranking.standard_errors[0].tolist() == pytest.approx([0, 0.5, 0.3, 0.3, 0.3])


def test_whole_completions_compete():
    completions = [scored([0.5, -1.0], errors=[0.3, 0.4]), scored([]), scored([2.0, 0.5, 3.0])]
    ranking = rank_prefixes(completions, level="completion")
    assert ranking.labels == [Label(0, 1), Label(1, None), Label(2, 2)]
    assert ranking.order == [2, 1, 0]  # 3, 0 of the empty completion, −1
    assert ranking.differences[0].tolist() == [0, -1, -4]
    assert ranking.standard_errors[0].tolist() == [0, 0.4, 0.4]


@pytest.mark.equation("E24")
def test_another_z_changes_nothing():
    """β·(log E − log Z) with log E = 4, 1 and 2 and β = ½, once with log Z = 0 and once with 3."""
    without, with_z = (
        rank_prefixes([scored([2.0 - half_z, 0.5 - half_z]), scored([1.0 - half_z])])
        for half_z in (0.0, 1.5)
    )
    assert without.order == with_z.order == [0, 2, 1]
    assert without.differences.equal(with_z.differences)


@pytest.mark.equation("E24", "E25")
def test_estimates_of_z_that_differ_cancel():
    """Two calls estimated log E = 4 and 3, and log Z = 1 and 0: scores 1.5 and 1.5 at β = ½.

    The first is better by β·(4 − 3) = 0.5, with the errors of the two alone.
    """
    calls = [sampled([1.5], [0.3], log_z=1.0, log_z_error=9.0), sampled([1.5], [0.4], log_z=0.0)]
    ranking = rank_prefixes(calls)
    assert ranking.differences[0, 1].item() == 0.5
    assert ranking.standard_errors[0, 1].item() == pytest.approx(0.5)
    assert rank_prefixes(calls[::-1]).differences[0, 1].item() == -0.5


@pytest.mark.equation("E25")
def test_the_empty_completion_is_as_uncertain_as_z():
    # Its score is β·(log Z − log Z) = 0 relative to an estimate that is off by 0.8 nats: 0.4.
    calls = [sampled([1.0], [0.3], log_z=2.0, log_z_error=0.8), sampled([], [], 2.0, 0.8)]
    ranking = rank_prefixes(calls, level="completion")
    assert ranking.differences[0, 1].item() == 1.0
    assert ranking.standard_errors[0, 1].item() == pytest.approx(0.5)


def test_infinite_scores_have_a_place():
    ranking = rank_prefixes([-math.inf, 1.0, math.inf, -math.inf])
    assert ranking.order == [2, 1, 0, 3]
    assert ranking.ranks == [3.5, 2, 1, 3.5]
    assert ranking.probabilities[0].tolist() == [0.5, 0, 0, 0.5]


@pytest.mark.parametrize(
    ("scores", "errors", "says"),
    [
        ([], None, "nothing to rank"),
        ([scored([])], None, "nothing to rank"),
        (None, None, "scores is a NoneType; it must be a list"),
        (scored([1.0]), None, "scores is a PrefixScores; it must be a list"),
        ([1.0, math.nan], None, "score of entry 1 must be a number, got nan"),
        ([True, 1.0], None, "score of entry 0 must be a number, got True"),
        (["1.0"], None, "entry 0 must be a number, got '1.0'"),
        ([scored([1.0, math.nan])], None, "score of entry 1"),
        ([1.0], [-0.5], "cannot be negative, got -0.5"),
        ([1.0], [math.nan], "standard error of entry 0 must be a number"),
        ([1.0, 2.0], [0.5], "Each of 2 scores needs a standard error, got 1"),
        ([scored([1.0])], [0.5], "belong to plain numbers"),
        ([scored([1.0]), 2.0], None, "Entry 1 is 2.0 among PrefixScores"),
        (
            [scored([1.0]), scored([1.0], prompt="3 + 3?")],
            None,
            r"Entry 1 is of the prompt '3 \+ 3\?', entry 0 of '2 \+ 2\?': log Z does not cancel",
        ),
        ([scored([1.0]), scored([1.0], beta=2.0)], None, "Entry 1 has beta 2.0, entry 0 has 0.5"),
        (
            [scored([1.0]), sampled([1.0], [0.1], 0.0)],
            None,
            "Entry 1 is MonteCarloScores, entry 0 PrefixScores",
        ),
    ],
)
def test_what_cannot_be_ranked_is_refused(scores, errors, says):
    with pytest.raises(DataError, match=says):
        rank_prefixes(scores, errors)


def test_an_unknown_level_is_refused():
    with pytest.raises(ConfigError, match="'prefix' or 'completion', got 'step'"):
        rank_prefixes([scored([1.0])], level="step")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="got 'step'"):
        agreement([scored([1.0])], [scored([1.0])], level="step")  # pyright: ignore[reportArgumentType]


# Three prompts in no order; the first two have two completions each, one a list of messages.
MESSAGES = [{"role": "user", "content": "B"}]
ONE = [
    scored([1.0, 2.0], prompt="A"),
    scored([1.0], prompt=MESSAGES),
    scored([3.0], prompt="A"),
    scored([2.0, 5.0], prompt=MESSAGES),
    scored([7.0, 7.0], prompt="C"),
]
OTHER = [
    scored([10.0, 30.0], prompt="A", beta=3.0),
    scored([9.0], prompt=MESSAGES, beta=3.0),
    scored([20.0], prompt="A", beta=3.0),
    scored([8.0, 7.0], prompt=MESSAGES, beta=3.0),
    scored([1.0, 2.0], prompt="C", beta=3.0),
]


def test_agreement_by_hand():
    """A: 1 2 3 against 10 30 20, one of three pairs discordant: τ = ⅓, ρ = 1 − 6·2/24 = ½.

    B: 1 2 5 against 9 8 7: −1 and −1. C has no order for the first.
    """
    found = agreement(ONE, OTHER)
    assert found.kendall_tau_b == pytest.approx((1 / 3 - 1) / 2, abs=1e-15)
    assert found.spearman == pytest.approx((1 / 2 - 1) / 2, abs=1e-15)
    assert (found.num_prompts, found.num_pairs, found.num_undefined) == (2, 6, 1)
    # Of two prompts a quarter of the draws are twice the one, a quarter twice the other.
    assert found.kendall_interval == pytest.approx((-1, 1 / 3), abs=1e-12)
    assert found.spearman_interval == pytest.approx((-1, 1 / 2), abs=1e-12)


def test_agreement_of_whole_completions():
    # A: 2 3 against 30 20, −1; B: 1 5 against 9 7, −1; their steps may differ then.
    other = [replace(OTHER[0], step_ends=[1, 6]), *OTHER[1:]]
    found = agreement(ONE, other, level="completion")
    assert (found.kendall_tau_b, found.spearman) == (-1.0, -1.0)
    assert (found.num_prompts, found.num_pairs, found.num_undefined) == (2, 2, 1)
    assert found.kendall_interval == (-1.0, -1.0)


def test_one_prompt_has_no_interval():
    found = agreement([ONE[0], ONE[2]], [OTHER[0], OTHER[2]])
    assert found.kendall_tau_b == pytest.approx(1 / 3, abs=1e-15)
    assert found.kendall_interval is None
    assert found.spearman_interval is None


def test_agreement_sees_no_estimate_of_z():
    """log E = 4 and 3 of the first scorer, whose two calls estimated log Z = 1 and 0, as above."""
    calls = [sampled([1.5], [0.3], log_z=1.0), sampled([1.6], [0.4], log_z=0.0)]
    found = agreement(calls, [scored([2.0]), scored([1.0])])
    assert found.kendall_tau_b == 1.0


def test_the_interval_covers_the_mean_of_many_prompts():
    """N = 200 sets of 60 prompts with τ = 1 in 70% of them, else −1: the mean is 0.4.

    A 95% interval misses it in N·5% of the sets; the standard error of that part is √(.95·.05/N).
    The percentile bootstrap of 60 values is a little short, by less than a hundredth.
    """
    generator = torch.Generator().manual_seed(0)
    agree = torch.rand(200, 60, generator=generator) < 0.7
    covered = 0
    for row in agree.tolist():
        second = [value for same in row for value in ((0.0, 1.0) if same else (1.0, 0.0))]
        groups = [prompt for prompt in range(60) for _ in range(2)]
        found = score_agreement([0.0, 1.0] * 60, second, groups)
        assert found.kendall_interval is not None
        low, high = found.kendall_interval
        covered += low <= 0.4 <= high
    assert abs(covered / 200 - 0.95) <= 4 * math.sqrt(0.95 * 0.05 / 200)


def test_intervals_are_the_same_again():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 60, generator=generator).tolist()
    groups = [prompt for prompt in range(20) for _ in range(3)]
    found = score_agreement(first, second, groups)
    torch.manual_seed(1)
    assert score_agreement(first, second, groups) == found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": "Z"}, "Entry 3 differs in its prompt"),
        ({"completion": "other"}, "Entry 3 differs in its completion: 'step 0. step 1. ' and"),
        ({"step_ends": [1, 2]}, r"Entry 3 differs in its step_ends: \[3, 6\] and \[1, 2\]"),
    ],
)
def test_misaligned_scores_are_refused(change, says):
    other = [*OTHER[:3], replace(OTHER[3], **change), OTHER[4]]
    with pytest.raises(DataError, match=says):
        agreement(ONE, other)


def test_what_has_no_agreement_is_refused():
    with pytest.raises(DataError, match="got 5 and 4"):
        agreement(ONE, OTHER[:4])
    with pytest.raises(DataError, match="None of 1 prompts has two entries"):
        agreement(ONE[4:], OTHER[4:])
    with pytest.raises(DataError, match="None of 0 prompts"):
        agreement([], [])
    with pytest.raises(DataError, match=r"Entry 1 has beta 2\.0"):
        agreement([ONE[0], replace(ONE[2], beta=2.0)], [OTHER[0], OTHER[2]])
    with pytest.raises(DataError, match="got 2 and 2 scores and 1 groups"):
        score_agreement([1.0, 2.0], [1.0, 2.0], ["a"])
    with pytest.raises(DataError, match="score of entry 1 must be a number, got nan"):
        score_agreement([1.0, 2.0], [1.0, math.nan], ["a", "a"])
