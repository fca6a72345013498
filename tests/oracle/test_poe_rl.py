"""RL towards a product of experts, judged by enumeration: which product each way leads to."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle.small import SHAPE, make_trainer, reward_of, save_reference
from trl_ext.functional import product_of_experts
from trl_ext.grpo import GRPOTrainer
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    TabularLMConfig,
    exact_gradient,
    expected_reward,
    gibbs_logps,
    kl_divergence,
    regularised_reward,
)
from trl_ext.poe.rewards import log_ratio, minus_reference
from trl_ext.ppo import PPOTrainer
from trl_ext.reinforce import ReinforceTrainer
from trl_ext.rwr import RWRTrainer

ALPHA = 0.4  # not ½, where the two models could be exchanged
SPACE = Enumeration(SHAPE)
# A second model of larger logits than the policy's: the two products then differ by KL 0.015.
SECOND = TabularLMConfig(vocab_size=3, max_completion_length=3, initializer_range=1.5)

PPO: dict[str, Any] = {
    "critic_learning_rate": 0.1,
    "whiten_advantages": False,
    "num_iterations": 2,
}
K1_IN_REWARD: dict[str, Any] = {
    "kl_estimator": "k1",
    "kl_placement": "reward",
    "kl_is_correction": False,
    "scale_rewards": "none",
}


@pytest.fixture
def start(tmp_path) -> str:
    return save_reference(tmp_path / "reference")


def second_model() -> TabularLM:
    """P_N."""
    torch.manual_seed(3)
    return TabularLM(SECOND)


def step_logps(start: str) -> Tensor:
    """(2, 1, R, V) log-probabilities of P_N and P_θ at each prefix."""
    models = (second_model(), TabularLM.from_pretrained(start))
    return torch.stack([SPACE.logits(model).detach().log_softmax(-1) for model in models])


def local_product(start: str) -> Tensor:
    """(1, N) of Π_t P_N^α P_θ^(1−α)/Z(y_<t), normalised at each token."""
    weights = torch.tensor([ALPHA, 1 - ALPHA], dtype=torch.float64)
    return SPACE.logps(product_of_experts(step_logps(start), weights))


def global_product(start: str) -> Tensor:
    """(1, N) of P_N^α P_θ^(1−α)/Z, normalised over completions."""
    of_expert, of_policy = map(SPACE.logps, step_logps(start))
    return (ALPHA * of_expert + (1 - ALPHA) * of_policy).log_softmax(-1)


def trained(kind: Any, start: str, rows: int = 128, reward: Any = None, **options: Any) -> Tensor:
    """(1, N) of the policy after 120 steps of `rows` completions, at rates that fall to 0."""
    settings = {
        "max_steps": 120,
        "learning_rate": 0.1,
        "lr_scheduler_type": "linear",
        "poe_alpha": ALPHA,
    }
    reward = log_ratio(second_model()) if reward is None else reward
    trainer = make_trainer(kind, start, rows, reward_funcs=reward, **(settings | options))
    trainer.train()
    return SPACE.logps(trainer.model).detach()


def distance(logps: Tensor, other: Tensor) -> float:
    return kl_divergence(logps, other).item()


@pytest.mark.equation("E14")
def test_the_local_product_by_a_loop(start):
    """Each completion's probability as a product over its tokens of p^α q^(1−α)/Z, Z by hand."""
    tables = step_logps(start)[:, 0].exp().tolist()
    product = local_product(start)[0]
    for n, (tokens, kept) in enumerate(zip(SPACE.tokens.tolist(), SPACE.mask.sum(1), strict=True)):
        expected = 1.0
        for t in range(int(kept)):
            row = SPACE.nodes[n, t]
            both = [
                p**ALPHA * q ** (1 - ALPHA) for p, q in zip(*(t[row] for t in tables), strict=True)
            ]
            expected *= both[tokens[t]] / sum(both)
        assert product[n].exp().item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.equation("E14", "E15", "E16", "E21")
@pytest.mark.parametrize("gamma", [0.0, 1.0], ids=["local", "global"])
@pytest.mark.parametrize(
    ("kind", "options"), [(ReinforceTrainer, {}), (PPOTrainer, PPO)], ids=["reinforce", "ppo"]
)
def test_dense_log_ratios_lead_to_the_local_product_or_to_the_global_one(
    start, kind, options, gamma
):
    """120 steps of 128: KL below 1e-3 to the one, and that of the two products to the other.

    At the product the reward minus β times the log-ratio is β log Z of its state, or of all: the
    noise of the gradient vanishes with the distance.
    """
    products = [local_product(start), global_product(start)]
    apart = distance(*products)
    before = distance(SPACE.logps(TabularLM.from_pretrained(start)).detach(), products[0])
    logps = trained(kind, start, gamma=gamma, **options)
    right, other = products if gamma == 0.0 else products[::-1]
    assert distance(logps, right) < 1e-3 < apart / 10 < before / 100
    assert distance(logps, other) > apart / 2


@pytest.mark.equation("E15", "E16", "E21")
def test_grpo_takes_the_sum_of_the_tokens_to_the_global_product(start):
    """120 steps of 128 with k1 in the reward, whose expected gradient is that of the whole KL."""
    logps = trained(GRPOTrainer, start, **K1_IN_REWARD)
    local, of_completions = local_product(start), global_product(start)
    assert distance(logps, of_completions) < 2e-3 < distance(logps, local) / 4


@pytest.mark.equation("E15", "E16", "E21")
def test_rwr_with_a_fixed_reference_comes_to_the_global_product(start):
    """150 rollouts of 256: a forward projection, so that KL(product‖π) is what falls."""
    logps = trained(
        RWRTrainer,
        start,
        rows=256,
        reference="fixed",
        drop_uniform_groups=False,
        loss_type="dapo",
        max_steps=150,
        learning_rate=0.05,
    )
    local, of_completions = local_product(start), global_product(start)
    assert distance(of_completions, logps) < 2e-3 < distance(local, logps) / 4


@pytest.mark.equation("E17", "E18")
def test_a_reward_minus_log_reference_leads_to_the_weighted_product(start):
    """120 steps of 128 of PPO: π ∝ exp(α r + (1−α) log π_ref), and not exp(α r) π_ref."""

    def reward(completion_ids, **columns):
        return [reward_of(1, ids) for ids in completion_ids]

    logps = trained(PPOTrainer, start, reward=minus_reference(reward), **PPO)
    rewards = SPACE.rewards(reward_of)
    ref_logps = SPACE.logps(TabularLM.from_pretrained(start)).detach()
    target = (ALPHA * rewards + (1 - ALPHA) * ref_logps).log_softmax(-1)
    tilted = gibbs_logps(ref_logps, rewards, 1 / ALPHA)
    assert distance(logps, target) < 1e-3 < distance(logps, tilted) / 10


def objectives(name: str, start: str) -> tuple[Any, Any, Tensor]:
    """Two objectives of (1, N) log-probabilities, and the policy that maximises both."""
    of_expert, of_policy = map(SPACE.logps, step_logps(start))
    if name == "E15":
        combined, reward = ALPHA * of_expert + (1 - ALPHA) * of_policy, of_expert - of_policy
    else:
        rewards = SPACE.rewards(reward_of)
        combined, reward = ALPHA * rewards + (1 - ALPHA) * of_policy, rewards - of_policy

    def with_entropy(logps: Tensor) -> Tensor:
        return expected_reward(logps, combined - logps)  # H(π) = E_π[−log π]

    def with_kl(logps: Tensor) -> Tensor:
        return regularised_reward(logps, of_policy, reward, 1 / ALPHA)

    return with_entropy, with_kl, combined.log_softmax(-1)


@pytest.mark.equation("E15", "E17", "E18")
@pytest.mark.parametrize("name", ["E15", "E18"])
def test_the_two_objectives_are_one_times_alpha(start, name):
    """E_π[α log P_N + (1−α) log P_θ] + H = α(E_π[log P_N − log P_θ] − (1/α) KL), for every π.

    For H = −E_π[log π] and KL = E_π[log π − log P_θ]; the same with r for log P_N. No constant is
    left, and both have their maximum at the product: gradient 0 there, less everywhere else.
    """
    with_entropy, with_kl, best = objectives(name, start)
    torch.manual_seed(11)
    for scale in [0.1, 1.0, 4.0] * 20:
        logps = (best + scale * torch.randn_like(best)).log_softmax(-1)
        assert with_entropy(logps).item() == pytest.approx(ALPHA * with_kl(logps).item(), rel=1e-9)
        assert with_entropy(logps) < with_entropy(best)
        # By how much is the KL to the product.
        below = (with_entropy(best) - with_entropy(logps)).item()
        assert below == pytest.approx(distance(logps, best), rel=1e-6)
    model = TabularLM(SHAPE).double().load_table(SPACE.table_of(best))
    for objective in (with_entropy, with_kl):
        gradient = exact_gradient(objective, model, SPACE)["model.table.weight"]
        assert gradient.abs().max() < 1e-9


@pytest.mark.equation("E19")
@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_the_gibbs_policy_is_the_product_of_reward_and_reference(start, beta):
    """π_ref·exp(r/β)/Z = π_RM ⊗ π_ref, π_RM ∝ exp(r/β): by log-probabilities, logits and loops."""
    rewards = SPACE.rewards(reward_of)
    ref_logps = SPACE.logps(TabularLM.from_pretrained(start)).detach()
    of_reward = (rewards / beta).log_softmax(-1)
    product = product_of_experts(torch.stack([of_reward, ref_logps]), torch.ones(2))
    torch.testing.assert_close(product, gibbs_logps(ref_logps, rewards, beta))
    unnormalised = torch.stack([rewards, ref_logps])
    weighted = product_of_experts(unnormalised, torch.tensor([1 / beta, 1.0], dtype=torch.float64))
    torch.testing.assert_close(weighted, product)
    tilted = [
        math.exp(r / beta) * math.exp(logp)
        for r, logp in zip(rewards[0].tolist(), ref_logps[0].tolist(), strict=True)
    ]
    by_hand = torch.tensor(tilted, dtype=torch.float64) / sum(tilted)
    torch.testing.assert_close(product[0].exp(), by_hand)
