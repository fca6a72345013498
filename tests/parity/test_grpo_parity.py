"""With default hooks `PolicyTrainer` is `trl.GRPOTrainer`, number for number."""

import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from tests.tiny import QUIET, count_a, prompts, save_tiny_llama
from trl_ext.policy_config import PolicyConfig
from trl_ext.trl_adapter import PolicyTrainer

STEPS = 4
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def trained(trainer_class, config_class, model_path, tmp_path, lora=False, **options):
    """Losses and gradient norms of each step, and the parameters after the last."""
    settings: dict[str, Any] = (
        QUIET | {"max_steps": STEPS, "learning_rate": 1e-2, "num_generations": 4} | options
    )
    trainer = trainer_class(
        model=model_path,
        reward_funcs=count_a,
        args=config_class(str(tmp_path), **settings),
        train_dataset=prompts(),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert len(logs) == STEPS
    return [(log["loss"], log["grad_norm"]) for log in logs], parameters


CELLS = list(itertools.product(["grpo", "dapo", "dr_grpo"], [1, 2], [0.0, 0.04], [False, True]))


@pytest.mark.parametrize(("loss_type", "num_iterations", "beta", "lora"), CELLS)
def test_default_hooks_are_trl(model_path, tmp_path, loss_type, num_iterations, beta, lora):
    options = {
        "loss_type": loss_type,
        "num_iterations": num_iterations,
        "beta": beta,
        "per_device_train_batch_size": 8,
        "lora": lora,
    }
    theirs = trained(GRPOTrainer, GRPOConfig, model_path, tmp_path / "trl", **options)
    # Without padding, sums are rounded in another order (tests/parity/test_signal_parity.py).
    options |= {"trim_padding": False, "skip_zero_credit": False}
    ours = trained(PolicyTrainer, PolicyConfig, model_path, tmp_path / "ours", **options)
    assert ours[0] == theirs[0]
    assert any(grad_norm > 1e-4 for _, grad_norm in ours[0]), "nothing was trained"
    assert all(torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_accumulation_changes_nothing(model_path, tmp_path, loss_type):
    """One micro-batch of 16 and four of 4: the same rollouts, the same steps to rounding."""
    options = {"loss_type": loss_type, "beta": 0.04}
    runs = [
        trained(
            PolicyTrainer,
            PolicyConfig,
            model_path,
            tmp_path / str(accumulation),
            per_device_train_batch_size=16 // accumulation,
            gradient_accumulation_steps=accumulation,
            **options,
        )
        for accumulation in (1, 4)
    ]
    norms = [[norm for _, norm in logs] for logs, _ in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for name in runs[0][1]:
        torch.testing.assert_close(runs[0][1][name], runs[1][1][name], rtol=0, atol=1e-5)
