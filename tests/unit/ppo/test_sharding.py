"""What PPO refuses where its policy is in shards, and the critic's optimizer there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from tests.tiny import QUIET
from trl_ext.errors import ConfigError, RunError
from trl_ext.ppo import PPOConfig
from trl_ext.ppo.sharding import OPTIMIZER, CriticOptimizer, check_sharding


def trainer_of(tmp_path, *, deepspeed=False, fsdp=0, **options) -> Any:
    """What of a trainer is asked, with DeepSpeed or with FSDP of a version."""
    args = PPOConfig(str(tmp_path), **(QUIET | options))
    policy, head = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    return SimpleNamespace(
        args=args,
        is_deepspeed_enabled=deepspeed,
        is_fsdp_enabled=fsdp > 0,
        accelerator=SimpleNamespace(is_fsdp2=fsdp == 2),
        critic=SimpleNamespace(trained=lambda: [head]),
        optimizer=torch.optim.SGD([policy], lr=args.learning_rate),
        optimizer_cls_and_kwargs=None,
        get_optimizer_cls_and_kwargs=Trainer.get_optimizer_cls_and_kwargs,
        model=None,
    )


@pytest.mark.parametrize("critic", ["head", "model"])
def test_fsdp2_is_taken(tmp_path, critic):
    check_sharding(trainer_of(tmp_path, fsdp=2, critic=critic))


def test_every_critic_and_fp16_without_shards(tmp_path):
    check_sharding(trainer_of(tmp_path, critic="adapter", learning_rate=0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"deepspeed": True},
            "DeepSpeed trains one model alone, and PPO a critic beside it. Use FSDP2 "
            "(accelerate_config=fsdp2), which shards the policy, or DDP.",
        ),
        (
            {"fsdp": 1},
            "PPO's critic goes with FSDP2, and this is FSDP1. Set fsdp_version: 2 in the "
            "Accelerate config, or use DDP.",
        ),
        (
            {"fsdp": 2, "critic": "adapter"},
            "critic='adapter' stands on the policy's frozen weights, and FSDP2 has them in shards. "
            "Use critic='head', or critic='model', which is whole on every card.",
        ),
        (
            {"fsdp": 2, "fp16": True},
            "fp16=True with FSDP2: the critic has an optimizer of its own there, and the gradient "
            "scaler serves one. Use bf16.",
        ),
        (
            {"fsdp": 2, "learning_rate": 0.0},
            "learning_rate=0.0 with FSDP2: the critic follows its schedule, and it must be greater "
            "than 0. Use a small one, or DDP.",
        ),
    ],
    ids=["deepspeed", "fsdp1", "adapter", "fp16", "learning rate"],
)
def test_refused(tmp_path, options, message):
    with pytest.raises(ConfigError) as error:
        check_sharding(trainer_of(tmp_path, **options))
    assert str(error.value) == message


def test_the_critics_learning_rate_has_the_course_of_the_policys(tmp_path):
    """SGD from 1 with gradient 1: 0.4 after a whole step of 0.6, then a quarter of it."""
    trainer = trainer_of(tmp_path, optim="sgd", learning_rate=8.0, critic_learning_rate=0.6)
    own, [head] = CriticOptimizer(trainer), trainer.critic.trained()
    head.grad = torch.ones(3)
    for share, expected in ((1.0, 0.4), (0.25, 0.25)):
        trainer.optimizer.param_groups[0]["lr"] = 8.0 * share
        own.step()
        torch.testing.assert_close(head.detach(), torch.full((3,), expected))


def test_a_given_optimizer_class_is_the_critics_too(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.optimizer_cls_and_kwargs = (torch.optim.Adagrad, {"lr": 1.0, "eps": 0.5})
    own = CriticOptimizer(trainer).optimizer
    assert isinstance(own, torch.optim.Adagrad)
    assert (own.defaults["eps"], own.defaults["lr"]) == (0.5, trainer.args.critic_learning_rate)


@pytest.mark.parametrize("given", [(torch.optim.SGD, {"params": []}), (object, {})])
def test_an_optimizer_of_a_models_layers(tmp_path, given):
    trainer = trainer_of(tmp_path)
    trainer.optimizer_cls_and_kwargs = given
    with pytest.raises(ConfigError, match=r"is made for the layers of one model.*adamw_torch"):
        CriticOptimizer(trainer)


def test_its_state_is_kept(tmp_path):
    trainer = trainer_of(tmp_path)
    own, [head] = CriticOptimizer(trainer), trainer.critic.trained()
    head.grad = torch.ones(3)
    own.step()
    own.save(tmp_path)
    other = CriticOptimizer(trainer)
    other.load(tmp_path)
    [state] = other.optimizer.state.values()
    assert state["step"] == 1 and torch.equal(state["exp_avg"], torch.full((3,), 1 - 0.9))


def test_a_lost_state(tmp_path):
    own = CriticOptimizer(trainer_of(tmp_path))
    with pytest.raises(
        RunError, match=f"has no {OPTIMIZER}: it was not written by PPO under FSDP2"
    ):
        own.load(tmp_path)
