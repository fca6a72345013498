"""One run of the reward trainer, as one process or one of two; what comes out goes to a file."""

import os
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from tests import tiny
from trl_ext import RewardConfig, RewardTrainer
from trl_ext.trl_adapter import end_training

QUIET: dict[str, Any] = {k: v for k, v in tiny.QUIET.items() if k != "max_completion_length"}
GLOBAL_BATCH = 8


def main(name: str, model: str, output: str, rankings: list[dict[str, Any]]) -> None:
    """Train for four steps on a global batch of eight rows, and evaluate on seven."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    args = RewardConfig(
        output + "-run",
        **QUIET,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        per_device_eval_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        order_effect=True,
        ddp_backend="gloo" if processes > 1 else None,
    )
    trainer = RewardTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(rankings * 8),
        eval_dataset=Dataset.from_list((rankings * 2)[:7]),
        peft_config=lora if name == "lora" else None,
    )
    trainer.train()
    evaluation = trainer.evaluate()
    assert trainer.accelerator.num_processes == processes
    if trainer.accelerator.is_main_process:
        history = [log for log in trainer.state.log_history if "grad_norm" in log]
        parameters = {n: p.detach() for n, p in trainer.model.named_parameters()}
        result = {"parameters": parameters, "history": history, "evaluation": evaluation}
        torch.save(result, output)
    end_training(trainer)
