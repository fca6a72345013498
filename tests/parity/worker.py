"""One training run of a trainer that samples, as one process or one of several.

The global batch is 16 rows either way, in one micro-batch or several. Completions are a function of
the global row, so that sampling is the same however the rows are spread over processes.
"""

import os
from typing import Any

import torch
from peft import LoraConfig
from transformers import Trainer

from tests.tiny import QUIET, VOCABULARY, count_a, prompts
from trl_ext.ppo import PPOTrainer
from trl_ext.registry import TRAINERS
from trl_ext.rewards.deadline import default_timeout
from trl_ext.trl_adapter import end_training

GLOBAL_BATCH = 16
# Registered trainer, what differs from its defaults, adapter.
SAMPLING: dict[str, tuple[str, dict[str, Any], LoraConfig | None]] = {
    "policy": ("trl_ext.trl_adapter:PolicyTrainer", {"beta": 0.04}, None),
    "kl_in_reward": (
        "grpo",
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
        "grpo",
        {"beta": 0.1, "kl_estimator": "k1", "kl_controller": "adaptive", "kl_target": 1e-9},
        None,
    ),
    "reinforce": ("reinforce", {"num_iterations": 2, "baseline": "optimal"}, None),
    "ppo": (
        "ppo",
        {"num_iterations": 2, "early_stop_kl": 1e-3, "bootstrap_truncated": True},
        None,
    ),
    "ppo_adapter": (
        "ppo",
        {"critic": "adapter", "surrogate": "penalty", "num_iterations": 2},
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    ),
    "rwr": ("rwr", {"log_kl": True}, None),
    "rwr_fixed": ("rwr", {"reference": "fixed", "beta": 0.5}, None),
    "rwr_lora": (
        "rwr",
        {"num_iterations": 2},
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    ),
}


def of_first_half(completions: list[str], log_metric=None, **kwargs) -> list[float | None]:
    """A reward that applies to the first half of the global batch alone, so to one process of two.

    Of several processes the others log no metric of it either.
    """
    first = int(os.environ.get("RANK", "0")) * len(completions)
    applies = [first + row < GLOBAL_BATCH // 2 for row in range(len(completions))]
    if log_metric and any(applies):
        log_metric("first_half/rows", float(sum(applies)))
    lengths = [float(len(completion)) for completion in completions]
    return [length if use else None for length, use in zip(lengths, applies, strict=True)]


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


def main(name: str, model: str, output: str, accumulation: int, group: int) -> None:
    registered, options, lora = SAMPLING[name]
    trainer_class = TRAINERS.load(registered)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings: dict[str, Any] = QUIET | {
        "per_device_train_batch_size": GLOBAL_BATCH // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
        "num_generations": group,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "ddp_backend": "gloo" if processes > 1 else None,
    }
    trainer = trainer_class(
        model=model,
        reward_funcs=[count_a, of_first_half],
        args=trainer_class.config_class(output + "-run", **(settings | options)),
        train_dataset=prompts(),
        rollout_func=rollout,
        peft_config=lora,
    )
    assert trainer.args.reward_timeout == default_timeout(processes)
    trainer.train()
    critic = trainer.critic.named_parameters() if isinstance(trainer, PPOTrainer) else ()
    leave(trainer, output, {f"critic.{name}": p.detach() for name, p in critic})


def leave(
    trainer: Trainer,
    output: str,
    parameters: dict[str, torch.Tensor] | None = None,
    evaluation: dict[str, float] | None = None,
) -> None:
    """What a process has at the end goes to its file, `output` with its rank; then it ends."""
    assert isinstance(trainer.model, torch.nn.Module)
    model = {name: p.detach() for name, p in trainer.model.named_parameters()}
    result = {
        "parameters": model | (parameters or {}),
        "history": trainer.state.log_history,
        "evaluation": evaluation or {},
        "processes": trainer.accelerator.num_processes,
    }
    torch.save(result, f"{output}-{trainer.accelerator.process_index}")
    end_training(trainer)
