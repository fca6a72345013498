"""The enumeration against plain recursion (brute.py) and against values by hand."""

import math

import pytest
import torch

from tests.oracle import brute
from trl_ext.oracle import Enumeration, TabularLM, TabularLMConfig, gibbs_logps, log_partition

BETA = 0.7
SHAPES = [(2, 1, 1), (2, 4, 1), (3, 3, 2), (4, 3, 3), (5, 2, 4)]


def reward(prompt, completion):
    """Any function that tells prompts and completions apart."""
    return math.sin(prompt + sum(token * (t + 2) ** 2 for t, token in enumerate(completion)))


@pytest.fixture(params=SHAPES, ids=lambda s: "V{}-T{}-P{}".format(*s))
def case(request):
    """Enumeration, model, and for each prompt the model's table as brute.py reads it."""
    vocab_size, length, prompts = request.param
    config = TabularLMConfig(
        vocab_size=vocab_size, max_completion_length=length, num_prompts=prompts
    )
    model = TabularLM(config).double()
    rows = model.model.table.weight.view(prompts, -1, vocab_size).tolist()
    return Enumeration(config), model, [brute.read_table(r, vocab_size, length) for r in rows]


def listed(space):
    """Completions as tuples, in the order of their numbers."""
    pairs = zip(space.tokens, space.mask, strict=True)
    return [tuple(tokens[kept].tolist()) for tokens, kept in pairs]


@pytest.mark.equation("E31")
def test_completions_and_their_probabilities(case):
    """Every completion once, its probability the product over its tokens, the sum 1."""
    space, model, tables = case
    shape = space.config
    expected = set(brute.completions(shape.vocab_size, shape.max_completion_length))
    assert len(space) == len(expected) and set(listed(space)) == expected
    logps = space.logps(model)
    for row, table in zip(logps.exp(), tables, strict=True):
        by_hand = [brute.probability(table, y) for y in listed(space)]
        assert row.tolist() == pytest.approx(by_hand, rel=1e-12)
    ones = torch.ones(shape.num_prompts, dtype=torch.float64)
    torch.testing.assert_close(logps.exp().sum(-1), ones, atol=1e-12, rtol=0)


def test_token_logps(case):
    space, model, tables = case
    logps = space.token_logps(model).tolist()
    for x, table in enumerate(tables):
        for n, y in enumerate(listed(space)):
            by_hand = [math.log(table[y[:t]][token]) for t, token in enumerate(y)]
            assert logps[x][n] == pytest.approx(by_hand + [0.0] * (space.mask.shape[1] - len(y)))


def test_index_inverts_the_enumeration(case):
    space = case[0]
    numbers = torch.arange(len(space))
    assert torch.equal(space.index(space.tokens), numbers)
    # Letters behind the end token, as padding with another token would leave them.
    junk = torch.where(space.mask, space.tokens, 1)
    assert torch.equal(space.index(junk), numbers)


def test_rewards(case):
    space = case[0]
    table = space.rewards(reward).tolist()
    for x, row in enumerate(table):
        assert row == [reward(x + 1, y) for y in listed(space)]


@pytest.mark.equation("E23")
def test_prefix_values(case):
    """log E_h[exp(r/β) | y_≤t], from the recursion over completions of each prefix."""
    space, model, tables = case
    values = space.prefix_values(model, space.rewards(reward), BETA).tolist()
    for x, table in enumerate(tables, start=1):
        for n, y in enumerate(listed(space)):
            by_hand = [
                math.log(brute.expectation(table, lambda z: math.exp(reward(x, z) / BETA), y[:t]))  # noqa: B023
                for t in range(len(y) + 1)
            ]
            by_hand += by_hand[-1:] * (space.mask.shape[1] - len(y))
            assert values[x - 1][n] == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.equation("E23")
def test_prefix_values_are_the_log_ratios_of_the_gibbs_policy(case):
    """Value minus log Z is the cumulated log π*(y_t|y_<t) − log h(y_t|y_<t)."""
    space, model, _ = case
    rewards = space.rewards(reward)
    values = space.prefix_values(model, rewards, BETA)
    target = space.table_of(gibbs_logps(space.logps(model), rewards, BETA))
    ratios = (space.token_logps(target) - space.token_logps(model)).cumsum(-1)
    torch.testing.assert_close(values[..., 1:] - values[..., :1], ratios, atol=1e-10, rtol=0)
    log_z = log_partition(space.logps(model), rewards, BETA)
    torch.testing.assert_close(values[..., 0], log_z[:, None].expand(-1, len(space)))


@pytest.mark.equation("E39")
def test_expected_values(case):
    """V after each prefix; at the start it is the expected reward."""
    space, model, tables = case
    values = space.expected_values(model, space.rewards(reward)).tolist()
    for x, table in enumerate(tables, start=1):
        for n, y in enumerate(listed(space)):
            by_hand = [
                brute.expectation(table, lambda z: reward(x, z), y[:t])  # noqa: B023
                for t in range(len(y) + 1)
            ]
            by_hand += by_hand[-1:] * (space.mask.shape[1] - len(y))
            assert values[x - 1][n] == pytest.approx(by_hand, abs=1e-12)


def test_table_of_realises_any_distribution(case):
    """Random probabilities over completions come back, and the table is normalised."""
    space, model, _ = case
    shape = space.config
    logps = torch.randn(shape.num_prompts, len(space)).double().log_softmax(-1)
    table = space.table_of(logps)
    torch.testing.assert_close(space.logps(table), logps, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(space.logps(model.load_table(table)), logps, atol=1e-12, rtol=1e-12)
    assert table.logsumexp(-1).abs().max() < 1e-12
    torch.testing.assert_close(space.table_of(space.logps(model)), table, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_table_of_a_distribution_with_zeros(space, model, dtype):
    """All mass on one completion: its probability is 1 to the last bit, all others have 0."""
    model = model.to(dtype)
    logps = torch.full((len(space),), -torch.inf)
    logps[7] = 0.0
    realised = space.logps(model.load_table(space.table_of(logps))).exp()
    expected = torch.zeros(2, len(space), dtype=torch.float64)
    expected[:, 7] = 1.0
    assert torch.equal(realised, expected)


def test_by_hand():
    """V=2, T=2: π(end) = 1/4, then π(end|a) = 1/3; completions are "", "a", "aa"."""
    space = Enumeration(TabularLMConfig(vocab_size=2, max_completion_length=2))
    policy = torch.tensor([[[1 / 4, 3 / 4], [1 / 3, 2 / 3]]]).log()
    assert space.tokens.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert space.mask.tolist() == [[True, False], [True, True], [True, True]]
    assert space.nodes.tolist() == [[0, 3, 3], [0, 1, 4], [0, 1, 2]]
    assert space.logps(policy).exp().tolist()[0] == pytest.approx([1 / 4, 1 / 4, 1 / 2])
    # exp(r) = 1, 2, 3 at β = 1. Given a: (1/4·2 + 1/2·3)/(3/4) = 8/3; Z = 1/4 + 3/4·8/3 = 9/4.
    rewards = torch.tensor([1.0, 2.0, 3.0]).double().log()
    values = space.prefix_values(policy, rewards, 1.0).exp()[0].tolist()
    assert values[0] == pytest.approx([9 / 4, 1, 1])
    assert values[1] == pytest.approx([9 / 4, 8 / 3, 2])
    assert values[2] == pytest.approx([9 / 4, 8 / 3, 3])
    # π* = (1/4, 2/4, 3/2)/(9/4) = (1, 2, 6)/9: at the start (1, 8)/9, after a (2, 6)/8.
    target = space.table_of(gibbs_logps(space.logps(policy), rewards, 1.0)).exp()[0].tolist()
    assert target[0] == pytest.approx([1 / 9, 8 / 9])
    assert target[1] == pytest.approx([2 / 8, 6 / 8])
    # E[r] with r = 0, 1, 5: given a 1/3 + 10/3 = 11/3, at the start 3/4 of that.
    means = space.expected_values(policy, torch.tensor([0.0, 1.0, 5.0]))[0].tolist()
    assert means[2] == pytest.approx([11 / 4, 11 / 3, 5])


def test_values_of_a_large_reward_stay_finite(space, model):
    rewards = torch.linspace(-1e4, 1e4, len(space))
    assert space.prefix_values(model, rewards, 0.1).isfinite().all()
    with pytest.raises(ValueError, match="beta must be a positive number or infinity, got 0"):
        space.prefix_values(model, rewards, 0)


def test_a_float32_model_is_enumerated_in_float64(space, model):
    """The table is what it is; the arithmetic on it is not in float32."""
    narrow = space.logps(model.float())
    assert torch.equal(narrow, space.logps(model.double()))
    torch.testing.assert_close(narrow.exp().sum(-1), torch.ones(2).double(), atol=1e-12, rtol=0)


def test_any_causal_lm_can_be_enumerated(config, space):
    """A small Llama over the same tokens: the same log-probabilities as its own forward gives."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, pad_token_id=0, eos_token_id=0, bos_token_id=None,
        )
    )  # fmt: skip
    logps = space.token_logps(llama)
    for n in (0, 5, 39):
        y = listed(space)[n]
        scores = llama(torch.tensor([[2, *y]])).logits[0].double().log_softmax(-1)
        by_hand = [scores[t, token].item() for t, token in enumerate(y)]
        assert logps[1, n, : len(y)].tolist() == pytest.approx(by_hand, abs=1e-6)
