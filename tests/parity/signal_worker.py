"""Runs of TRL's trainer and of ours, one after another, as one process or one of several.

Of the groups of a step, those with signal lie on the processes unevenly, and in one step on none.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trl import GRPOConfig as TRLGRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from tests.parity.worker import GLOBAL_BATCH, rollout
from tests.tiny import QUIET, prompts
from trl_ext import GRPOConfig, GRPOTrainer
from trl_ext.trl_adapter import end_training

G = 4
# Of each step the groups with signal; of two processes, the first has groups 0 and 1.
MIXED = ((0, 1), (0, 2, 3), (), (3,))
# By name, what both trainers are given.
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "grpo_kl": {"loss_type": "grpo", "beta": 0.1},
    "dapo_twice": {"loss_type": "dapo", "num_iterations": 2, "steps_per_generation": 4},
}
# By name, what ours is given beside.
OURS: dict[str, dict[str, Any]] = {
    "default": {},
    "in more passes": {"max_tokens_per_micro_batch": 6},
}


def mixed_groups(completion_ids, trainer_state, **_) -> list[float]:
    """Reward: the first token in groups with signal, 1 in the others."""
    first = int(os.environ.get("RANK", "0")) * len(completion_ids)
    mixed = MIXED[trainer_state.global_step % len(MIXED)]
    return [
        float(ids[0]) if (first + row) // G in mixed else 1.0
        for row, ids in enumerate(completion_ids)
    ]


def train(trainer_class: Any, config_class: Any, model: str, folder: str, **options: Any):
    """Parameters, and the backward passes of each step."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings: dict[str, Any] = QUIET | {
        "per_device_train_batch_size": GLOBAL_BATCH // processes // 4,
        "gradient_accumulation_steps": 4,
        "num_generations": G,
        "max_steps": len(MIXED),
        # A scale that is wrong shows: neither clipping nor Adam hides it.
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "ddp_backend": "gloo" if processes > 1 else None,
    }
    trainer = trainer_class(
        model=model,
        reward_funcs=mixed_groups,
        args=config_class(folder, **(settings | options)),
        train_dataset=prompts(),
        rollout_func=rollout,
    )
    passes, backward = [0] * len(MIXED), trainer.accelerator.backward

    def counted(loss, **given):
        passes[trainer.state.global_step] += 1
        backward(loss, **given)

    trainer.accelerator.backward = counted
    trainer.train()
    assert isinstance(trainer.model, nn.Module)
    return trainer, {
        "parameters": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "passes": passes,
    }


def main(model: str, output: str) -> None:
    rank = os.environ.get("RANK", "0")
    found: dict[tuple[str, str], dict[str, Any]] = {}
    trainer: Any = None
    for name, options in RUNS.items():
        _, found[name, "trl"] = train(TRLGRPOTrainer, TRLGRPOConfig, model, output, **options)
        for how, ours in OURS.items():
            trainer, found[name, how] = train(
                GRPOTrainer, GRPOConfig, model, output, **options, **ours
            )
    torch.save(found, Path(f"{output}-{rank}"))
    end_training(trainer)
