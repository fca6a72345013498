"""Choosing by scores and answers against sums by hand; the curve against all draws in a loop."""

import math
from itertools import combinations, permutations
from typing import Any

import pytest
import torch

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.choosing import answers_of, choose
from trl_ext.gibbs_prm.curves import accuracy_curve
from trl_ext.gibbs_prm.scored import MonteCarloScores, PrefixScores


def scored(*prefix_scores: float, prompt="x", beta=0.5) -> PrefixScores:
    steps = [f"{k}\n" for k in range(len(prefix_scores))]
    ends = list(range(1, len(steps) + 1))
    return PrefixScores(prompt, "".join(steps), steps, ends, list(prefix_scores), beta)


def completions(*scores: float, beta=0.5) -> list[PrefixScores]:
    return [scored(score, beta=beta) for score in scores]


def test_best_is_the_highest_score_of_equals_the_first():
    found = choose(completions(1.0, 3.0, 3.0, 2.0))
    assert (found.index, found.answer, found.votes) == (1, None, {})
    assert choose(completions(-1.0, 2.0), ["a", None]).answer is None
    assert choose(completions(5.0, 2.0), ["a", "b"]).answer == "a"


def test_aggregations():
    """last: 0, 1, −3; min: −2, −1, −3; mean: 1, −1/3, 3."""
    several = [scored(5.0, -2.0, 0.0), scored(-1.0, -1.0, 1.0), scored(9.0, -3.0)]
    assert choose(several).index == 1
    assert choose(several, aggregation="min").index == 1
    assert choose(several, aggregation="mean").index == 2
    swapped = [scored(5.0, -2.0, 2.0), *several[1:]]
    assert choose(swapped).index == 0
    assert choose(swapped, aggregation="min").index == 1


def test_an_empty_completion_has_the_score_of_the_prompt():
    assert choose([scored(), scored(-1.0)]).index == 0
    assert choose([scored(), scored(2.0, 1.0)], aggregation="min").index == 1


def test_majority_is_the_commonest_answer_whatever_the_scores():
    found = choose(completions(9.0, 1.0, 2.0, 8.0), ["7", "3", "3", None], by="majority")
    # Of the two completions that answer 3, the second scores higher. None has no vote.
    assert (found.index, found.answer) == (2, "3")
    assert found.votes == pytest.approx({"7": 1 / 3, "3": 2 / 3})
    assert list(found.votes) == ["7", "3"]


def test_tied_answers_are_told_apart_by_their_sums_of_scores():
    """a: 1 + 2 = 3, b: 5 − 3 = 2; with 6 − 2 = 4 for b it is b."""
    answers = ["b", "a", "a", "b"]
    assert choose(completions(5.0, 1.0, 2.0, -3.0), answers, by="majority").index == 2
    found = choose(completions(6.0, 1.0, 2.0, -2.0), answers, by="majority")
    assert (found.index, found.answer) == (0, "b")
    # Sums alike too: the answer given first.
    assert choose(completions(1.0, 1.0), ["z", "a"], by="majority").answer == "z"


@pytest.mark.equation("E22", "E24")
def test_weighted_votes_are_importance_weights():
    """β = 0.5, scores 0.5·log w: votes w = 1, 1, 1, 4 of 7: the lone 4 beats three of 1."""
    scores = [0.5 * math.log(w) for w in (1, 1, 1, 4)]
    found = choose(completions(*scores), ["a", "a", "a", "b"], by="weighted_majority")
    assert (found.index, found.answer) == (3, "b")
    assert found.votes == pytest.approx({"a": 3 / 7, "b": 4 / 7})
    assert choose(completions(*scores), ["a", "a", "a", "b"], by="majority").answer == "a"
    # β = 5 takes the tenth root of each weight: 3 against 4^0.1.
    wide = choose(completions(*scores, beta=5.0), ["a", "a", "a", "b"], by="weighted_majority")
    assert wide.votes == pytest.approx({"a": 3 / (3 + 4**0.1), "b": 4**0.1 / (3 + 4**0.1)})


def test_weighted_votes_beyond_exp():
    """exp(2000) is no number; the ratio e : 1 of the two is."""
    found = choose(completions(999.5, 1000.0), ["a", "b"], by="weighted_majority")
    assert found.votes == pytest.approx({"a": 1 / (1 + math.e), "b": math.e / (1 + math.e)})


def test_votes_that_differ_by_rounding_are_tied():
    """Both answers have the same votes in another order, so the first answer wins every time."""
    logs = [0.5 * math.log(w) for w in (0.1, 0.2, 0.3, 0.7, 0.9)]
    for order in permutations(logs):
        found = choose(completions(*logs, *order), list("bbbbbaaaaa"), by="weighted_majority")
        assert found.answer == "b"


def test_where_nobody_votes_the_best_is_chosen():
    for by in ("majority", "weighted_majority"):
        found = choose(completions(1.0, 4.0), [None, None], by=by)
        assert (found.index, found.answer, found.votes) == (1, None, {})


def test_each_call_of_a_monte_carlo_scorer_has_its_own_log_z():
    """β(log E − log Z): −1 + 0.5·4 relative to the first one's log Z = 0 is 1, above 0.5."""

    def estimated(score, log_z):
        return MonteCarloScores("x", "0\n", ["0\n"], [1], [score], 0.5, log_z=log_z)

    assert choose([estimated(0.5, 0.0), estimated(-1.0, 4.0)]).index == 1
    assert choose([estimated(0.5, 0.0), estimated(-1.0, 0.0)]).index == 0


def test_answers_are_read_as_by_the_lenient_rewards():
    texts = ["so 4 and 1,250", "<answer> 7 </answer> or 9", "none", ""]
    assert answers_of(texts, numbers=True) == ["1250", "7", None, None]
    assert answers_of(["Paris\nor not", "<answer>Rome</answer>", " \n"]) == ["Paris", "Rome", None]
    assert answers_of([[{"role": "assistant", "content": "it is 5"}]], numbers=True) == ["5"]


def test_answers_may_be_an_array():
    answers: Any = torch.tensor([4, 5, 4])
    chosen = choose(completions(1.0, 2.0, 0.5), answers, by="majority")
    assert (chosen.answer, chosen.index) == (4, 0)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "says"),
    [
        (([],), {}, DataError, "nothing to rank"),
        (([1.0, 2.0],), {}, DataError, r"Completion 0 is 1\.0; give what a scorer"),
        (([scored(1.0), scored(1.0, prompt="y")],), {}, DataError, "of the prompt 'y'"),
        (([scored(1.0), scored(1.0, beta=1.0)],), {}, DataError, r"has beta 1\.0"),
        (([scored(math.nan)],), {}, DataError, "must be a number, got nan"),
        (([scored(math.nan, 1.0)],), {"aggregation": "mean"}, DataError, "got nan"),
        (([scored(math.nan, 1.0)],), {"aggregation": "min"}, DataError, "got nan"),
        ((completions(1.0), ["a", "b"]), {}, DataError, "1 completions and 2 answers"),
        ((None,), {}, DataError, "scored is a NoneType; it must be a list"),
        ((scored(1.0),), {}, DataError, "scored is a PrefixScores; it must be a list"),
        ((completions(1.0), "a"), {}, DataError, "answers is 'a'; it must be a list"),
        ((completions(1.0), 3), {}, DataError, "answers is 3; it must be a list"),
        ((completions(1.0), [["a"]]), {"by": "majority"}, DataError, r"Answer 0 is \['a'\]"),
        ((completions(1.0), [math.nan]), {"by": "majority"}, DataError, "Answer 0 is nan"),
        ((completions(1.0),), {"aggregation": {}}, ConfigError, "aggregation is {}; it must"),
        ((completions(1.0),), {"by": "vote"}, ConfigError, "by is 'vote'; it must be one of best"),
        ((completions(1.0),), {"by": "majority"}, ConfigError, "there are none. Give answers="),
        ((completions(1.0),), {"aggregation": "max"}, ConfigError, "one of last, min, mean"),
        (
            (completions(1.0), ["a"]),
            {"by": "weighted_majority", "aggregation": "min"},
            ConfigError,
            "only the score of the whole completion",
        ),
    ],
)
def test_what_cannot_be_chosen_from(arguments, options, kind, says):
    with pytest.raises(kind, match=says):
        choose(*arguments, **options)


# Three prompts of four completions; the last of the third does not exist.
SCORES = [[0.1, 0.9, 0.4, 0.3], [1.0, 2.0, 2.0, 0.0], [0.5, -0.5, 0.2, math.nan]]
CORRECT = [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]]
ANSWERS = [["4", "5", "4", None], ["a", "b", "c", "b"], [None, None, "8", "8"]]
LENGTHS = [[10, 20, 30, 40], [1, 1, 1, 1], [2, 4, 6, 99]]
BETA = 0.25


def loop_of_draws(choice, prompt: int, n: int) -> float:
    """The mean of `choice(rows)`, correctness of what is chosen of them, over all draws of n."""
    rows = [i for i in range(4) if not math.isnan(SCORES[prompt][i])]
    found = [choice(prompt, draw) for draw in combinations(rows, n)]
    return sum(found) / len(found)


def by_score(prompt, draw):
    top = max(SCORES[prompt][i] for i in draw)
    tied = [CORRECT[prompt][i] for i in draw if SCORES[prompt][i] == top]
    return sum(tied) / len(tied)


def by_votes(vote):
    def choice(prompt, draw):
        votes: dict[Any, float] = {}
        for i in draw:
            if ANSWERS[prompt][i] is not None:
                votes[ANSWERS[prompt][i]] = votes.get(ANSWERS[prompt][i], 0) + vote(prompt, i)
        if not votes:
            return sum(CORRECT[prompt][i] for i in draw) / len(draw)
        winners = [a for a, total in votes.items() if total == max(votes.values())]
        right = [CORRECT[prompt][i] for a in winners for i in draw if ANSWERS[prompt][i] == a]
        # Each answer here is right in all of its completions or in none.
        return sum(right) / len(right)

    return choice


def curve(ns, **options: Any):
    return accuracy_curve(
        options.pop("scores", SCORES),
        options.pop("correct", CORRECT),
        options.pop("answers", ANSWERS),
        options.pop("lengths", LENGTHS),
        ns,
        beta=options.pop("beta", BETA),
        **options,
    )


def test_the_curve_is_the_mean_over_all_draws():
    rows = curve([1, 2, 3])
    assert [row.n for row in rows] == [1, 2, 3]
    ways = {
        "best": by_score,
        "majority": by_votes(lambda prompt, i: 1),
        "weighted_majority": by_votes(lambda prompt, i: math.exp(SCORES[prompt][i] / BETA)),
        "random": lambda prompt, draw: sum(CORRECT[prompt][i] for i in draw) / len(draw),
        "pass_at_n": lambda prompt, draw: max(CORRECT[prompt][i] for i in draw),
    }
    for row in rows:
        means = {}
        for name, choice in ways.items():
            means[name] = sum(loop_of_draws(choice, p, row.n) for p in range(3)) / 3
            assert getattr(row, name).mean == pytest.approx(means[name], abs=1e-12), (row.n, name)
        difference = means["best"] - means["majority"]
        assert row.best_minus_majority.mean == pytest.approx(difference, abs=1e-12)
        difference = means["best"] - means["weighted_majority"]
        assert row.best_minus_weighted_majority.mean == pytest.approx(difference, abs=1e-12)
        # Mean lengths 25, 1 and (2 + 4 + 6)/3 = 4: 10 tokens a completion.
        assert row.tokens == pytest.approx(10 * row.n)
    assert len({row.best.mean for row in rows}) == 3


def test_tensors_do_as_well():
    numbers = [[0, 1, 0, 9], [0, 1, 2, 1], [5, 5, 8, 8]]
    lists = curve([3], answers=numbers)
    tensors = curve(
        [3],
        scores=torch.tensor(SCORES),
        correct=torch.tensor(CORRECT).bool(),
        answers=torch.tensor(numbers),
        lengths=torch.tensor(LENGTHS),
    )
    assert lists[0].majority == tensors[0].majority
    assert lists[0].best.mean == pytest.approx(tensors[0].best.mean)


def test_intervals_are_of_prompts_and_of_pairs():
    """P = 400 prompts of two completions, the scores right in a random 70%.

    A percentile of 2000 bootstrap means has the standard error √(0.025·0.975/2000)/φ(1.96) = 0.06
    of their standard deviation σ/√P, so an end is within 4·0.06 of it at mean ± 1.96 σ/√P.
    """
    torch.manual_seed(0)
    is_right = (torch.rand(400) < 0.7).double()
    scores = torch.stack([is_right, 1 - is_right], 1)
    correct = torch.tensor([[1.0, 0.0]]).expand(400, 2)
    [row] = curve(
        [2],
        scores=scores,
        correct=correct,
        answers=[["a", "b"]] * 400,
        lengths=torch.ones(400, 2),
    )
    error = (is_right.std(correction=0) / 20).item()
    assert row.best.mean == pytest.approx(is_right.mean().item())
    assert row.best.interval is not None
    for end, sign in zip(row.best.interval, (-1, 1), strict=True):
        assert abs(end - (row.best.mean + sign * 1.96 * error)) <= 4 * 0.06 * error
    # The majority is undecided for every prompt, so the difference varies as the best does.
    assert row.majority.mean == 0.5 and row.majority.interval == (0.5, 0.5)
    moved = tuple(end - 0.5 for end in row.best.interval)
    assert row.best_minus_majority.interval == pytest.approx(moved, abs=1e-12)
    # What chooses alike for each prompt differs by exactly 0, however much prompts differ.
    assert row.best_minus_weighted_majority.interval == (0.0, 0.0)


def test_one_prompt_has_no_interval():
    [row] = curve(
        [2], scores=SCORES[:1], correct=CORRECT[:1], answers=ANSWERS[:1], lengths=LENGTHS[:1]
    )
    assert row.best.interval is None and row.best_minus_majority.interval is None


def test_at_all_completions_the_curve_is_what_is_chosen():
    """n = G: one draw, in which `choose` finds what the curve counts; no ties here."""
    scores = [0.2, 0.1, 0.3, 0.9]
    answers = ["a", "a", "b", "c"]
    correct = {"a": 1, "b": 0, "c": 0}
    [row] = curve(
        [4],
        scores=[scores],
        correct=[[correct[a] for a in answers]],
        answers=[answers],
        lengths=[[1] * 4],
    )
    for by in ("best", "majority", "weighted_majority"):
        chosen = choose(completions(*scores, beta=BETA), answers, by=by).index
        assert getattr(row, by).mean == correct[answers[chosen]]


@pytest.mark.parametrize(
    ("ns", "options", "kind", "says"),
    [
        ([4], {}, DataError, "ns holds 4; it must be a whole number from 1 to 3, .* prompt 2"),
        ([0], {}, DataError, "ns holds 0"),
        ([True], {}, DataError, "ns holds True"),
        (2, {}, DataError, "ns is 2; it must be a list of whole numbers from 1 to 3"),
        ([1], {"answers": None}, DataError, "answers_PG is no table"),
        ([1], {"answers": ["a", "b", "c"]}, DataError, "answers_PG is no table"),
        ([1], {"answers": [[["4"]] * 4] * 3}, DataError, r"answers_PG holds \['4'\]"),
        ([1], {"answers": [[math.nan] * 4] * 3}, DataError, "answers_PG holds nan"),
        ([1], {"max_subsets": 1}, ConfigError, "max_subsets is 1; it must be a whole number, 2 or"),
        ([1], {"max_subsets": "9"}, ConfigError, "max_subsets is '9'"),
        ([1], {"seed": None}, ConfigError, "seed is None; it must be a whole number, 0 or more"),
        ([1], {"beta": 0}, ConfigError, "beta is 0; it must be a number greater than 0"),
        ([1], {"beta": True}, ConfigError, "beta is True"),
        ([1], {"correct": [[0.5] * 4] * 3}, DataError, r"correct_PG holds 0\.5"),
        ([1], {"correct": CORRECT[:2]}, DataError, r"one shape .* \(3, 4\), \(2, 4\)"),
        ([1], {"lengths": [[math.nan] * 4] * 3}, DataError, "lengths_PG must hold a number"),
        ([1], {"answers": [["a"], ["a", "b"]]}, DataError, r"got the lengths \[1, 2\]"),
        ([1], {"scores": [[1.0], [1.0, 2.0]]}, DataError, "scores_PG is no table of numbers"),
        ([1], {"scores": [[None]]}, DataError, "fill its row of scores up with NaN"),
    ],
)
def test_tables_that_are_none(ns, options, kind, says):
    with pytest.raises(kind, match=says):
        curve(ns, **options)
