"""The scorer against exact prefix values, by enumeration and by closed forms."""

import copy
import math

import pytest
import torch
from torch import Tensor

from trl_ext.functional import prefix_log_ratio
from trl_ext.gibbs_prm import GibbsScorer
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    TabularLMConfig,
    gibbs_logps,
    log_partition,
    projection_loss,
    ruin_positions,
    ruin_prefix_value,
    ruin_table,
    ruin_win_probability,
    tabular_tokenizer,
)

SHAPE = TabularLMConfig(num_prompts=2, vocab_size=4, max_completion_length=3, initializer_range=0.7)
SPACE = Enumeration(SHAPE)
TOKENIZER = tabular_tokenizer(SHAPE.vocab_size)
REWARDS = SPACE.rewards(lambda prompt, tokens: (3 * sum(tokens) + len(tokens) * prompt) % 7 / 2)
COMPLETIONS = [tokens[kept].tolist() for tokens, kept in zip(SPACE.tokens, SPACE.mask, strict=True)]


@pytest.fixture
def reference() -> TabularLM:
    torch.manual_seed(2)
    return TabularLM(SHAPE).double()


def target(reference: TabularLM, beta: float) -> TabularLM:
    """π*, set to it."""
    logps = gibbs_logps(SPACE.logps(reference), REWARDS, beta)
    return TabularLM(SHAPE).double().load_table(SPACE.table_of(logps))


def scores_of_all(scorer: GibbsScorer, prompt: str) -> list[list[float]]:
    """The prefix scores of all completions, a step a token."""
    texts = [TOKENIZER.decode(ids) for ids in COMPLETIONS]
    scored = scorer.score([prompt] * len(texts), texts, "token", completion_ids=COMPLETIONS)
    return [each.prefix_scores for each in scored]


def assert_scores_are(scorer: GibbsScorer, exact: Tensor, atol: float) -> None:
    """exact (P, N, T+1), of the prefixes of 0..T tokens."""
    for number, prompt in enumerate("ab"):
        for scores, values in zip(scores_of_all(scorer, prompt), exact[number], strict=True):
            wanted = (values[1:] - values[0])[: len(scores)]
            torch.testing.assert_close(
                torch.tensor(scores, dtype=torch.float64), wanted, rtol=0, atol=atol
            )


@pytest.mark.equation("E22", "E23", "E24")
@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_a_prefix_scores_what_the_reference_would_collect_behind_it(reference, beta):
    """β·log π*(y≤t)/h(y≤t) = β·(log E_h[exp(r/β) | y≤t] − log Z), for every prefix there is."""
    scorer = GibbsScorer(target(reference, beta), reference, TOKENIZER, beta)
    exact = beta * SPACE.prefix_values(reference, REWARDS, beta)
    assert_scores_are(scorer, exact, atol=1e-5)
    # Complete ones: r − β log Z, Equation E22.
    log_z = log_partition(SPACE.logps(reference), REWARDS, beta)
    last = [scores[-1] for scores in scores_of_all(scorer, "b")]
    torch.testing.assert_close(
        torch.tensor(last, dtype=torch.float64), REWARDS[1] - beta * log_z[1], rtol=0, atol=1e-5
    )


def test_a_policy_trained_to_the_target_scores_like_it(reference):
    """Gradient descent on KL(π*‖π), exact gradients, from the reference on."""
    beta = 1.0
    policy = TabularLM(SHAPE).double()
    policy.load_state_dict(reference.state_dict())
    ref_logps = SPACE.logps(reference).detach()
    optimizer = torch.optim.LBFGS(
        policy.parameters(),
        max_iter=400,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = projection_loss(SPACE.logps(policy), ref_logps, REWARDS, beta).sum()
        value.backward()
        return value

    optimizer.step(loss)
    scorer = GibbsScorer(policy, reference, TOKENIZER, beta)
    assert_scores_are(scorer, beta * SPACE.prefix_values(reference, REWARDS, beta), atol=1e-5)


def test_without_tilt_the_score_is_the_expected_reward(reference):
    """β → ∞: β·log E[exp(r/β)] = E[r] + V[r]/(2β) + …, and V/(2β) < 2e-4 for β = 10⁴."""
    beta = 1e4
    scorer = GibbsScorer(target(reference, beta), reference, TOKENIZER, beta)
    assert_scores_are(scorer, SPACE.expected_values(reference, REWARDS), atol=5e-4)


def test_the_reference_scores_itself_zero(reference):
    twin = copy.deepcopy(reference)  # one model in both places is refused
    scorer = GibbsScorer(twin, reference, TOKENIZER, 2.0)
    assert {score for scores in scores_of_all(scorer, "a") for score in scores} == {0.0}


@pytest.mark.equation("E52")
@pytest.mark.parametrize("p", [0.5, 0.35])
@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_the_gamblers_ruin_chain(p, beta):
    """π* of the walk is its Doob transform: up from k with p·u(k+1)/u(k), u = 1 + f(e^{1/β} − 1).

    Its score is β·log u(k)/u(start) wherever the walk stands, however it came there.
    """
    size, start, steps = 5, 2, 7
    shape = TabularLMConfig(vocab_size=3, max_completion_length=steps)
    space = Enumeration(shape)
    walk = TabularLM(shape).double().load_table(ruin_table(space, start, size, p))
    value = [
        math.log1p(ruin_win_probability(k, size, p) * math.expm1(1 / beta)) for k in range(size + 1)
    ]
    assert value[start] == pytest.approx(ruin_prefix_value(start, size, p, beta))
    table = ruin_table(space, start, size, p).log_softmax(-1).clone()
    for row, k in enumerate(ruin_positions(space.tokens[: shape.num_prefixes], start).tolist()):
        if 0 < k < size:
            table[:, row, 1] += value[k + 1] - value[k]
            table[:, row, 2] += value[k - 1] - value[k]
    policy = TabularLM(shape).double().load_table(table)
    scorer = GibbsScorer(policy, walk, tabular_tokenizer(3), beta)
    walks = [
        tokens[:length].tolist()
        for tokens in space.tokens
        for length in range(1, steps + 1)
        if _goes_on(tokens[:length], start, size)
    ]
    texts = [tabular_tokenizer(3).decode(ids) for ids in walks]
    scored = scorer.score(["a"] * len(walks), texts, "token", completion_ids=walks)
    seen = set()
    for ids, each in zip(walks, scored, strict=True):
        places = [start + ids[: t + 1].count(1) - ids[: t + 1].count(2) for t in range(len(ids))]
        seen |= set(places)
        wanted = [beta * (value[k] - value[start]) for k in places]
        assert each.prefix_scores == pytest.approx(wanted, abs=1e-5)
    assert seen == set(range(size + 1)), "every place was reached"


def _goes_on(tokens: Tensor, start: int, size: int) -> bool:
    """Whether these are steps of a walk that was not over before the last of them."""
    if (tokens == 0).any():
        return False
    places = start + (tokens == 1).cumsum(0) - (tokens == 2).cumsum(0)
    return bool(((places[:-1] > 0) & (places[:-1] < size)).all())


def test_the_formula_is_that_of_functional(reference):
    """The scorer against `prefix_log_ratio` of enumerated token probabilities."""
    policy = target(reference, 0.5)
    scorer = GibbsScorer(policy, reference, TOKENIZER, 0.5)
    logps, ref_logps = SPACE.token_logps(policy)[0], SPACE.token_logps(reference)[0]
    exact = 0.5 * prefix_log_ratio(logps, ref_logps, SPACE.mask)
    for scores, row in zip(scores_of_all(scorer, "a"), exact, strict=True):
        assert scores == pytest.approx(row[: len(scores)].tolist(), abs=1e-6)
