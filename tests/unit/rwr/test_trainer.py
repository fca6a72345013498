"""What `RWRTrainer` makes of rewards: weights, dropped groups, metrics, on hand-made rollouts."""

import math
from typing import Any

import pytest
import torch

from tests.tiny import QUIET, count_a, prompts, save_tiny_llama
from trl_ext.errors import ConfigError
from trl_ext.functional import optimism
from trl_ext.rollout import MicroBatch, Rollout
from trl_ext.rwr import RWRConfig, RWRTrainer
from trl_ext.rwr.config import LEAST_BETA

NAN = float("nan")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make(model_path, tmp_path):
    def trainer(reward=count_a, **options) -> RWRTrainer:
        settings: dict[str, Any] = QUIET | {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_steps": 1,
        }
        args = RWRConfig(str(tmp_path / "out"), **(settings | options))
        made = RWRTrainer(model_path, reward, args, prompts())
        made.model.train()
        return made

    return trainer


def credit(trainer, rewards, mask=None) -> torch.Tensor:
    rewards_PG = torch.tensor(rewards)
    rows = rewards_PG.numel()
    mask = torch.ones(rows, 3, dtype=torch.long) if mask is None else torch.tensor(mask)
    rollout = Rollout(rewards_PG, {"completion_mask": mask}, slice(0, rows))
    return trainer.assign_credit(rollout).view_as(rewards_PG)


def metric(trainer, name) -> float:
    (value,) = trainer._metrics["train"][name]
    return value


def test_weights_and_their_metrics_by_hand(make):
    """β = 1/ln 2: weights ∝ 2^r. Rows (1, 2, 4, 1)/8 and, uniform, (1, 1, 1, 1)/4, dropped."""
    trainer = make(beta=1 / math.log(2))
    weights = credit(trainer, [[0.0, 1.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    torch.testing.assert_close(weights[0], torch.tensor([1, 2, 4, 1]) / 8)
    assert weights[1].tolist() == [0.0] * 4
    assert metric(trainer, "rwr/uniform_groups") == 0.5
    # Of the group that is kept: 64/(1 + 4 + 16 + 1), entropy in nats. Of both: log Z = log(8/4)
    # and 3 ln 2.
    assert metric(trainer, "rwr/effective_sample_size") == pytest.approx(64 / 22)
    entropy = -sum(w / 8 * math.log(w / 8) for w in (1, 2, 4, 1))
    assert metric(trainer, "rwr/weight_entropy") == pytest.approx(entropy)
    assert metric(trainer, "rwr/log_z") == pytest.approx((math.log(2) + 3 * math.log(2)) / 2)


def test_uniform_groups_count_like_any_other_if_they_are_kept(make):
    weights = credit(make(drop_uniform_groups=False), [[2.0] * 4, [0.0, 1.0, 0.0, 0.0]])
    assert weights[0].tolist() == [0.25] * 4


def test_where_all_groups_are_dropped_there_is_no_effective_sample_size(make):
    trainer = make()
    credit(trainer, [[2.0] * 4])
    assert "rwr/effective_sample_size" not in trainer._metrics["train"]
    assert metric(trainer, "rwr/uniform_groups") == 1.0


def test_unscored_and_emptied_completions_have_no_weight(make):
    """One completion without a reward; another whose mask mask_truncated_completions emptied."""
    mask = [[1, 1, 0]] * 7 + [[0, 0, 0]]
    rewards = [[NAN, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 9.0]]
    weights = credit(make(beta=0.0), rewards, mask)
    assert weights.tolist() == [[0.0, 0.5, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]]
    assert credit(make(), [[NAN] * 4]).tolist() == [[0.0] * 4]


@pytest.mark.parametrize(("reduction", "per_row"), [("sum", [3.0, 2.0]), ("mean", [1.0, 1.0])])
def test_the_loss_is_the_mean_over_prompts(make, reduction, per_row):
    """Two rows of log-probability −1 a token, 3 and 2 tokens, weights ¾ and ¼; G = 4.

    The weights of a prompt sum to 1 over G rows, so the mean over rows is taken G times.
    """
    trainer = make(token_reduction=reduction)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    micro_batch = MicroBatch(-torch.ones(2, 3), mask, torch.tensor([0.75, 0.25]), {})
    expected = 4 * (0.75 * per_row[0] + 0.25 * per_row[1]) / 2
    assert trainer.policy_loss(micro_batch).item() == pytest.approx(expected)


@pytest.mark.equation("E11")
def test_reward_samples_are_averaged_and_their_optimism_is_logged(make):
    """Each call scores 0 or 2 in turn: mean 1, sample variance 2, optimism 2/(2β²)."""
    calls = []

    def alternating(completions, **kwargs):
        calls.append(len(completions))
        return [2.0 * (len(calls) % 2) for _ in completions]

    trainer = make(alternating, reward_samples=2, beta=2.0)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "reward" in log]
    assert calls == [8, 8]
    assert log["reward"] == 1.0
    assert log["rwr/optimism"] == pytest.approx(2 / (2 * 2.0**2))


def test_completions_that_no_reward_scores_do_not_dilute_the_optimism(make):
    calls = []

    def sometimes(completions, **kwargs):
        calls.append(1)
        return [None if i % 2 else 2.0 * (len(calls) % 2) for i in range(len(completions))]

    trainer = make(sometimes, reward_samples=2, beta=2.0)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "reward" in log]
    assert log["rwr/optimism"] == pytest.approx(2 / (2 * 2.0**2))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reference": "fixed", "top_p": 0.9}, "top_p=0.9 with reference='fixed'"),
        ({"reference": "fixed", "beta": 0.0}, "no Gibbs policy to converge to"),
        ({"reference": "first"}, "reference='first' must be one of"),
        ({"reward_samples": 0}, "reward_samples=0 must be at least 1"),
        ({"reward_samples": 1.5}, "reward_samples=1.5 is a float; it must be a whole number"),
        ({"log_kl": "no"}, "log_kl='no' is a str; it must be True or False"),
        ({"drop_uniform_groups": "no"}, "drop_uniform_groups='no' is a str; it must be True or"),
        ({"beta": "0.5"}, "beta='0.5' is a str; it must be a number"),
        ({"beta": math.nan}, "beta=nan must be between 0"),
        ({"beta": 1e-40}, "beta=1e-40 is so small .* at least 1e-15; beta=0 is its limit"),
        ({"scale_rewards": "none"}, "the scale is what beta sets"),
        (
            {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"},
            "a weight belongs to a whole completion. Use sequence_mask or",
        ),
    ],
)
def test_bad_options(tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        RWRConfig(str(tmp_path), **(QUIET | options))


def test_the_smallest_beta_gives_finite_numbers(make):
    """β = 1e-15: the weights are those of best of n, and the metrics stay within float32."""
    trainer = make(beta=LEAST_BETA)
    assert credit(trainer, [[0.0, 1000.0, 2.0, 0.0]]).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert math.isfinite(metric(trainer, "rwr/log_z"))
    scores = torch.tensor([[0.0, 1000.0]])
    assert optimism(scores, LEAST_BETA).isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 1e-15, 1, math.inf])
def test_the_betas_at_the_limits_pass(tmp_path, beta):
    assert RWRConfig(str(tmp_path), **(QUIET | {"beta": beta})).beta == beta
