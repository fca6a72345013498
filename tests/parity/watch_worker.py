"""One watched training run, as one process or one of several; what its watch says goes to a file.

Completions are a function of the global row, as in `tests.parity.worker`.
"""

import json
import os
from typing import Any

from tests.parity.worker import GLOBAL_BATCH, rollout
from tests.tiny import QUIET, count_a, prompts
from trl_ext.grpo import GRPOTrainer
from trl_ext.trl_adapter import end_training
from trl_ext.watch import RewardHackingWatch, callback

SCHEDULE = [0.0, 1.0, 2.0, -1.0, -2.0, -2.0]


def gold(completions, trainer_state, **kwargs) -> list[float]:
    """Falls from step 3 on, by more than what the completions add."""
    return [SCHEDULE[trainer_state.global_step] + x / 8 for x in count_a(completions)]


def proxy(completions, trainer_state, **kwargs) -> list[float]:
    return [trainer_state.global_step + x for x in count_a(completions)]


def main(model: str, output: str) -> None:
    callback.draw_watch = lambda *_: None  # a picture takes longer than the run
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings: dict[str, Any] = QUIET | {
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "per_device_eval_batch_size": GLOBAL_BATCH // processes,
        "num_generations": 4,
        "num_generations_eval": 2,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "beta": 0.04,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "ddp_backend": "gloo" if processes > 1 else None,
    }
    watch = RewardHackingWatch(gold, action="stop", drift=None)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=proxy,
        args=GRPOTrainer.config_class(output + "-run", **settings),
        train_dataset=prompts(),
        eval_dataset=prompts(13),  # 26 completions: the last batch is filled up
        rollout_func=rollout,
        callbacks=[watch],
    )
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    said = {"step": trainer.state.global_step, "stopped": watch.stopped, **watch.extra_state()}
    with open(f"{output}-{trainer.accelerator.process_index}", "w") as file:
        json.dump(said, file)
    end_training(trainer)
