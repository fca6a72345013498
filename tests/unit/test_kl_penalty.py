"""The penalty per token and the controller of β by hand; their place in a trainer."""

import math
from typing import Any

import pytest
import torch

from tests.tiny import QUIET, count_a, prompts, save_tiny_llama
from trl_ext.functional import aggregate_tokens
from trl_ext.grpo import GRPOConfig, GRPOTrainer
from trl_ext.kl_penalty import KLController, group_centred, penalty_of

LN2 = math.log(2)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def make(model_path, tmp_path, **options) -> GRPOTrainer:
    settings: dict[str, Any] = QUIET | {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "beta": 0.1,
    }
    args = GRPOConfig(str(tmp_path / "out"), **(settings | options))
    return GRPOTrainer(model_path, count_a, args, prompts())


@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        # ρ = 2 (π_old half as likely), log π/π_ref = ln 2: d/dlogπ of ρ·k is ρ(k + k').
        ("k1", 2 * (LN2 + 1)),
        ("k3", 2 * ((0.5 - 1 + LN2) + (1 - 0.5))),
        ("k2", 2 * LN2),  # ρ only weighs
    ],
)
def test_the_corrected_penalty_by_hand(name, gradient):
    logps = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    below = torch.full((1, 1), -LN2, dtype=torch.float64)
    value = penalty_of(name, True, None).in_loss(logps, below, below)
    plain = penalty_of(name, False, None).value(logps, below)
    assert value.item() == pytest.approx(2 * plain.item())
    assert torch.autograd.grad(value.sum(), logps)[0].item() == pytest.approx(gradient)


def test_a_clamp_holds_value_and_gradient():
    logps = torch.tensor([[5.0, 1.0]], requires_grad=True)
    value = penalty_of("k1", False, 2.0).in_loss(logps, torch.zeros(1, 2), None)
    assert value.tolist() == [[2.0, 1.0]]
    assert torch.autograd.grad(value.sum(), logps)[0].tolist() == [[0.0, 1.0]]


@pytest.mark.equation("E46")
def test_the_adaptive_controller_halves_and_doubles():
    controller = KLController("adaptive", beta=1.0, target=3.0)
    for kl, beta in ((2.1, 1.0), (1.9, 0.5), (4.4, 0.5), (4.6, 1.0), (math.nan, 1.0)):
        controller.update(kl, 8)
        assert controller.beta == beta


def test_the_proportional_controller():
    """e = clip(kl/target − 1, ±0.2): 0.1, and 0.2 of a KL ten times too large."""
    controller = KLController("proportional", beta=1.0, target=2.0, horizon=100)
    controller.update(2.2, 50)
    assert controller.beta == pytest.approx(1 + 0.1 * 50 / 100)
    controller.update(20.0, 50)
    assert controller.beta == pytest.approx(1.05 * (1 + 0.2 * 50 / 100))
    constant = KLController("constant", beta=1.0)
    constant.update(9.0, 50)
    assert constant.beta == 1.0


def test_a_group_is_centred_at_each_position():
    values = torch.tensor([[[3.0, 1.0], [1.0, 0.0]]])
    assert group_centred(values).tolist() == [[[1.0, 0.5], [-1.0, -0.5]]]


def test_aggregation_by_hand():
    per_token = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert aggregate_tokens(per_token, mask, "completion means").item() == (1.5 + 4) / 2
    assert aggregate_tokens(per_token, mask, "completion sums").item() == (3 + 4) / 2
    assert aggregate_tokens(per_token, mask, "tokens").item() == pytest.approx(7 / 3)
    assert aggregate_tokens(per_token, mask, "tokens", count=14.0).item() == 0.5
    assert aggregate_tokens(per_token, mask, "fixed length", count=7).item() == 0.5
    assert aggregate_tokens(per_token, mask * 0, "tokens").item() == 0.0


@pytest.mark.parametrize("placement", ["loss", "reward", "none"])
def test_the_kl_of_sequences_is_logged_wherever_the_penalty_goes(model_path, tmp_path, placement):
    trainer = make(
        model_path,
        tmp_path,
        kl_estimator="k1" if placement == "reward" else "k3",
        kl_is_correction=placement != "reward",
        kl_placement=placement,
        max_steps=4,
    )
    trainer.train()
    logged = [log["kl/sequence"] for log in trainer.state.log_history if "reward" in log]
    assert logged[0] == pytest.approx(0.0, abs=1e-6), "the policy is the reference"
    assert abs(logged[-1]) > 1e-4


def test_the_controllers_beta_is_used_logged_and_resumed(model_path, tmp_path):
    options = {
        "kl_controller": "adaptive",
        "kl_target": 1e-9,  # any KL is too large: β doubles
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = make(model_path, tmp_path / "whole", **options)
    whole.train()
    betas = [log["kl/beta"] for log in whole.state.log_history if "kl/beta" in log]
    # At step 1 the KL is 0, below the target; rounding decides nothing about the others.
    assert betas[0] == 0.05
    assert betas[1:] == [0.1, 0.2, 0.4]
    assert whole.beta == 0.4
    for step in (2, 4):
        resumed = make(model_path, tmp_path / "resumed", **options)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert resumed.beta == whole.beta
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs), f"resumed at step {step}"
