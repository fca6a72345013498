"""One run of the reward trainer, as one process or one of two."""

import os
from typing import Any

from datasets import Dataset
from peft import LoraConfig

from tests import tiny
from tests.parity.worker import leave
from trl_ext import RewardConfig, RewardTrainer

QUIET: dict[str, Any] = {k: v for k, v in tiny.QUIET.items() if k != "max_completion_length"}
GLOBAL_BATCH = 8

RANKINGS = [
    {"prompt": "ab", "completions": ["a", "bc", "cde", "e"], "scores": [1.0, 3.0, 2.0, 2.0]},
    {"prompt": "c", "completions": ["d", "ee"], "scores": [0.0, 1.0]},
    {"prompt": "dd", "completions": ["a", "b", "c"], "scores": [1.0, 0.5, 0.0]},
    {"prompt": "e", "completions": ["abc", "b", "cc"], "scores": [0.0, 2.0, 2.0]},
]


def main(name: str, model: str, output: str, accumulation: int) -> None:
    """Train for four steps on a global batch of eight rows, and evaluate on seven.

    With an order effect, and rows of 2, 3 and 4 completions. The eighth row that fills up the last
    batch of two processes belongs in no metric.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    args = RewardConfig(
        output + "-run",
        **QUIET,
        per_device_train_batch_size=GLOBAL_BATCH // processes // accumulation,
        gradient_accumulation_steps=accumulation,
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
        train_dataset=Dataset.from_list(RANKINGS * 8),
        eval_dataset=Dataset.from_list((RANKINGS * 2)[:7]),
        peft_config=lora if name == "lora" else None,
    )
    trainer.train()
    evaluation = trainer.evaluate()
    assert abs(trainer.model.get_parameter("order_effect")) > 1e-3
    leave(trainer, output, evaluation=evaluation)
