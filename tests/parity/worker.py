"""One training run, as one process or one of several; its parameters go to a file.

    torchrun --nproc_per_node 2 -m tests.parity.worker TRAINER MODEL OUTPUT GROUP

The global batch is 16 rows either way. Completions are a function of the global row, so that
sampling is the same however the rows are spread over processes.
"""

import os
import sys
from typing import Any

import torch
from peft import LoraConfig

from tests.tiny import QUIET, VOCABULARY, count_a, prompts
from trl_ext.grpo import GRPOTrainer
from trl_ext.ppo import PPOTrainer
from trl_ext.reinforce import ReinforceTrainer
from trl_ext.rwr import RWRTrainer
from trl_ext.trl_adapter import PolicyTrainer, end_training

GLOBAL_BATCH = 16
TRAINERS = {
    "policy": (PolicyTrainer, {"beta": 0.04}, None),
    "kl_in_reward": (
        GRPOTrainer,
        {
            "beta": 0.1,
            "kl_estimator": "k1",
            "kl_placement": "reward",
            "kl_is_correction": False,
            "num_iterations": 2,
        },
        None,
    ),
    "kl_in_loss": (
        GRPOTrainer,
        {"beta": 0.1, "kl_estimator": "k1", "kl_controller": "adaptive", "kl_target": 1e-9},
        None,
    ),
    "reinforce": (ReinforceTrainer, {"num_iterations": 2, "baseline": "optimal"}, None),
    "ppo": (
        PPOTrainer,
        {"num_iterations": 2, "early_stop_kl": 1e-3, "bootstrap_truncated": True},
        None,
    ),
    "ppo_adapter": (
        PPOTrainer,
        {"critic": "adapter", "surrogate": "penalty", "num_iterations": 2},
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    ),
    "rwr": (RWRTrainer, {"log_kl": True}, None),
    "rwr_fixed": (RWRTrainer, {"reference": "fixed", "beta": 0.5}, None),
    "rwr_lora": (
        RWRTrainer,
        {"num_iterations": 2},
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    ),
}


def rollout(prompts, trainer):
    """Completions of one to four tokens, drawn from a generator seeded by step and global row."""
    first = trainer.accelerator.process_index * len(prompts)
    completions = []
    for row in range(first, first + len(prompts)):
        generator = torch.Generator().manual_seed(1000 * trainer.state.global_step + row)
        length = int(torch.randint(1, 5, (), generator=generator))
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator)
        completions.append(tokens.tolist())
    return {
        "prompt_ids": trainer.processing_class(prompts)["input_ids"],
        "completion_ids": completions,
        "logprobs": None,
    }


def main(name: str, model: str, output: str, group: int) -> None:
    trainer_class, options, lora = TRAINERS[name]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings: dict[str, Any] = QUIET | {
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "num_generations": group,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "ddp_backend": "gloo" if processes > 1 else None,
    }
    trainer = trainer_class(
        model=model,
        reward_funcs=count_a,
        args=trainer_class.config_class(output + "-run", **(settings | options)),
        train_dataset=prompts(),
        rollout_func=rollout,
        peft_config=lora,
    )
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    if trainer.accelerator.is_main_process:
        history = [log for log in trainer.state.log_history if "grad_norm" in log]
        parameters = {n: p.detach() for n, p in trainer.model.named_parameters()}
        if isinstance(trainer, PPOTrainer):
            critic = trainer.critic.named_parameters()
            parameters |= {f"critic.{n}": p.detach() for n, p in critic}
        torch.save({"parameters": parameters, "history": history}, output)
    end_training(trainer)


if __name__ == "__main__":
    _, name, model, output, group = sys.argv
    main(name, model, output, int(group))
