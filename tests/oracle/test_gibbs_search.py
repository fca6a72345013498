"""The search by steps on a language of 40 completions, guided by the exact π*: its distribution."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from trl_ext.gibbs_prm import GibbsScorer
from trl_ext.gibbs_prm.search import StepSearch
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    TabularLMConfig,
    gibbs_logps,
    log_partition,
    tabular_tokenizer,
)

BETA = 0.5
SHAPE = TabularLMConfig(vocab_size=4, max_completion_length=3, initializer_range=0.4)
SPACE = Enumeration(SHAPE)
# Distinct in [0, 4), in no order.
REWARDS = SPACE.rewards(
    lambda prompt, tokens: 4 * (sum((y + 1) * 0.37 ** (t + 1) for t, y in enumerate(tokens)) % 1)
)[0]


@pytest.fixture(scope="module")
def reference() -> TabularLM:
    torch.manual_seed(2)
    return TabularLM(SHAPE).double()


@pytest.fixture(scope="module")
def scorer(reference) -> GibbsScorer:
    return scorer_of(reference, BETA)


def scorer_of(reference: TabularLM, beta: float) -> GibbsScorer:
    target = gibbs_logps(SPACE.logps(reference), REWARDS, beta)
    policy = TabularLM(SHAPE).double().load_table(SPACE.table_of(target))
    return GibbsScorer(policy, reference, tabular_tokenizer(SHAPE.vocab_size), beta)


def searched(scorer: GibbsScorer, number: int, **options):
    length = SHAPE.max_completion_length
    search = StepSearch(
        "reference", scorer, max_completion_length=length, batch_size=20_000, **options
    )
    return search.search(["a"] * number)


def numbers(results) -> Tensor:
    """The number of each chosen completion."""
    rows = [each.ids + [0] * (SHAPE.max_completion_length - len(each.ids)) for each in results]
    return SPACE.index(torch.tensor(rows))


def statistic(chosen: Tensor, probabilities: Tensor) -> float:
    """Pearson's, in standard deviations √(2d) from its mean d = cells − 1.

    Completions that expect less than 5 are one cell.
    """
    seen = torch.bincount(chosen, minlength=len(SPACE)).double()
    expected = probabilities * len(chosen)
    rare = expected < 5
    assert expected[rare].sum() >= 5 or not rare.any()
    cells = [(seen[~rare], expected[~rare])]
    if rare.any():
        cells.append((seen[rare].sum()[None], expected[rare].sum()[None]))
    seen, expected = (torch.cat(parts) for parts in zip(*cells, strict=True))
    freedom = len(seen) - 1
    return (((seen - expected) ** 2 / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


def best_of_each_step(reference: TabularLM, draws: int) -> Tensor:
    """P(y) if each token is the best of `draws` by log E_h[exp(r/β) | y≤t], from all draws."""
    values = SPACE.prefix_values(reference, REWARDS, BETA)[0]
    ref = SPACE.logits(reference).softmax(-1)[0]
    # The value behind each table row and token, read off any completion that begins so.
    behind = {}
    for row in range(len(SPACE)):
        for t in range(int(SPACE.mask[row].sum())):
            node = int(SPACE.nodes[row, t])
            behind[node, int(SPACE.tokens[row, t])] = values[row, t + 1].item()
    best = torch.zeros_like(ref)
    for node in range(len(ref)):
        for drawn in product(range(SHAPE.vocab_size), repeat=draws):
            chosen = max(drawn, key=lambda token: behind[node, token])
            best[node, chosen] += math.prod(ref[node, token].item() for token in drawn)
    return SPACE.logps(best.log()[None]).exp()[0]


def best_of_whole(reference: TabularLM, draws: int) -> Tensor:
    """P(y) of the best of `draws` completions by reward: F(y)^m − F(below y)^m."""
    order = REWARDS.argsort()
    up_to = SPACE.logps(reference)[0].exp()[order].cumsum(0)
    below = torch.cat([torch.zeros(1, dtype=torch.float64), up_to[:-1]])
    return torch.empty_like(up_to).scatter(0, order, up_to**draws - below**draws)


SAMPLES = 1500


def assert_tells_apart(wanted: Tensor, other: Tensor) -> None:
    """N·Σ(p − q)²/q, the noncentrality of the test against q, is beyond what chance explains.

    Its mean is (λ)/√(2d) standard deviations, its spread √((d + 2λ)/d): above 4 by 4 of them.
    """
    freedom = len(SPACE) - 1
    noncentrality = SAMPLES * ((wanted - other) ** 2 / other).sum().item()
    spread = math.sqrt((freedom + 2 * noncentrality) / freedom)
    assert noncentrality / math.sqrt(2 * freedom) - 4 * spread > 4


@pytest.mark.equation("E23", "E24")
def test_one_prefix_is_the_best_of_m_at_each_step(reference, scorer):
    """1500 searches with width 1 and expand 3, seed 0, a step a token; not the best of 3 whole."""
    wanted, whole = best_of_each_step(reference, 3), best_of_whole(reference, 3)
    chosen = numbers(searched(scorer, SAMPLES, width=1, expand=3, steps="token"))
    assert abs(statistic(chosen, wanted)) <= 4
    for other in (whole, best_of_each_step(reference, 2), SPACE.logps(reference)[0].exp()):
        assert_tells_apart(wanted, other)
        assert statistic(chosen, other) > 4


def test_whole_completions_are_the_best_of_m(reference, scorer):
    """1500 searches with expand 3 and one step, seed 0."""
    wanted = best_of_whole(reference, 3)
    chosen = numbers(searched(scorer, SAMPLES, width=1, expand=3, steps="whole"))
    assert abs(statistic(chosen, wanted)) <= 4
    assert_tells_apart(wanted, best_of_each_step(reference, 3))


@pytest.mark.parametrize("steps", ["token", {"regex": "a(?=b)"}, {"regex": "[bc]"}])
def test_one_prefix_with_one_way_on_is_the_reference(reference, scorer, steps):
    """1500 searches with width and expand 1, seed 0: wherever steps end, a sample of π_ref.

    Whether an a ends a step is known from what follows. To drop that b and sample again would
    make ab as rare as π_ref's square of it.
    """
    wanted = SPACE.logps(reference)[0].exp()
    found = searched(scorer, SAMPLES, width=1, expand=1, steps=steps)
    assert abs(statistic(numbers(found), wanted)) <= 4


def test_with_a_place_for_every_prefix_the_best_is_found(reference):
    """It is lost only where one of its prefixes is never sampled.

    With expand m that has the probability 1 − Π_t (1 − (1 − h(y_t))^m). 400 searches with m = 2:
    the share of found ones is within 4 standard errors; 30 with m = 60: never lost, seed 0. At
    β = 5 not all of its tokens have the highest value of all: with one place it is lost.
    """
    scorer = scorer_of(reference, beta=5.0)
    best = int(REWARDS.argmax())
    steps = SPACE.token_logps(reference)[0, best][SPACE.mask[best]].exp()
    assert len(steps) > 1

    def share(draws: int) -> float:
        return (1 - (1 - steps) ** draws).prod().item()

    found = (numbers(searched(scorer, 400, width=40, expand=2, steps="token")) == best).double()
    wanted = share(2)
    assert 0.1 < wanted < 0.9
    assert abs(found.mean().item() - wanted) <= 4 * math.sqrt(wanted * (1 - wanted) / 400)
    assert 30 * (1 - share(60)) < 1e-3
    assert numbers(searched(scorer, 30, width=40, expand=60, steps="token")).unique() == best
    assert best not in numbers(searched(scorer, 30, width=1, expand=60, steps="token"))


@pytest.mark.equation("E22")
def test_what_is_kept_is_ranked_by_reward(reference, scorer):
    """Of what was sampled, the scores of complete ones are r − β log Z."""
    log_z = log_partition(SPACE.logps(reference), REWARDS[None], BETA)[0]
    results = searched(scorer, 20, width=40, expand=3, steps="token")
    assert sum(len(each.ranked) for each in results) > 100
    for result in results:
        of_each = [
            REWARDS[SPACE.index(torch.tensor([ids + [0] * (3 - len(ids))]))].item()
            for ids in result.completion_ids
        ]
        assert of_each == sorted(of_each, reverse=True)
        assert len(set(of_each)) == len(of_each)
        scores = [each.score for each in result.ranked]
        wanted = [reward - BETA * log_z.item() for reward in of_each]
        assert scores == pytest.approx(wanted, abs=1e-5)
