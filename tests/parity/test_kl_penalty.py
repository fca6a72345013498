"""TRL's own KL penalty, computed by our path, is TRL's: loss, gradient and parameters."""

import itertools
from typing import Any

import pytest
import torch
from trl import GRPOConfig as TRLGRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from tests.tiny import QUIET, count_a, prompts, save_tiny_llama
from trl_ext import GRPOConfig, GRPOTrainer

STEPS = 4
# k3 under another name: what is registered as "k3" is left to TRL.
OURS = {"kl_estimator": "trl_ext.functional:k3", "allow_biased_kl": True}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def trained(trainer_class, config_class, model_path, tmp_path, **options):
    settings: dict[str, Any] = QUIET | {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "beta": 0.5,
    }
    args = config_class(str(tmp_path), **(settings | options))
    trainer = trainer_class(
        model=model_path, reward_funcs=count_a, args=args, train_dataset=prompts()
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert len(logs) == STEPS
    return [(log["loss"], log["grad_norm"]) for log in logs], dict(trainer.model.named_parameters())


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo"]
CELLS = [
    *itertools.product(LOSS_TYPES, [2], [True], [1], [1]),
    *itertools.product(["grpo", "dapo", "dr_grpo"], [1, 2], [False], [2], [2]),
    # A rollout of two optimizer steps: the tokens that dapo divides by are those of one of them.
    *itertools.product(["grpo", "dapo"], [1], [True], [2], [4]),
]


def both(model_path, tmp_path, corrected, ours, **same):
    """What TRL's trainer gives, and ours with its own options beside."""
    theirs = same | {"use_bias_correction_kl": corrected}
    ours = same | ours | {"kl_is_correction": corrected}
    return (
        trained(TRLGRPOTrainer, TRLGRPOConfig, model_path, tmp_path / "trl", **theirs),
        trained(GRPOTrainer, GRPOConfig, model_path, tmp_path / "ours", **ours),
    )


@pytest.mark.parametrize(("loss_type", "iterations", "corrected", "accumulation", "rollout"), CELLS)
def test_our_path_is_trls(
    model_path, tmp_path, loss_type, iterations, corrected, accumulation, rollout
):
    theirs, ours = both(
        model_path,
        tmp_path,
        corrected,
        OURS,
        loss_type=loss_type,
        num_iterations=iterations,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=rollout,
    )
    for mine, trls in zip(ours[0], theirs[0], strict=True):
        assert mine == pytest.approx(trls, rel=1e-3, abs=2e-6)
    for name, parameter in theirs[1].items():
        torch.testing.assert_close(ours[1][name], parameter, rtol=0, atol=2e-5)


@pytest.mark.parametrize("corrected", [True, False])
def test_at_trls_setting_it_is_trl_exactly(model_path, tmp_path, corrected):
    options = {"allow_biased_kl": not corrected, "trim_padding": False, "skip_zero_credit": False}
    theirs, ours = both(model_path, tmp_path, corrected, options)
    assert ours[0] == theirs[0]
    assert all(torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])


def test_the_penalty_matters(model_path, tmp_path):
    """So that the tests above compare something."""
    with_kl, without = (
        trained(
            GRPOTrainer,
            GRPOConfig,
            model_path,
            tmp_path / placement,
            kl_placement=placement,
            num_iterations=2,
        )
        for placement in ("loss", "none")
    )
    gaps = [(with_kl[1][n] - without[1][n]).abs().max().item() for n in without[1]]
    assert max(gaps) > 1e-3
