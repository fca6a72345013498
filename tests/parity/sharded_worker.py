"""Training runs, as one process or as two that FSDP2 shards over; what comes out goes to files.

Accelerate has FSDP for accelerators alone; `shard_on_cpus` tells it that CPUs are some. What else a
launch sets comes from the shipped Accelerate config. Completions are greedy, or where a group needs
several those of `tests.parity.worker`, and rewards a function of the global row: both are the same
however the rows are spread over processes.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig

from tests.parity.test_offline_parity import logged
from tests.parity.worker import rollout
from tests.tiny import QUIET, prompts
from trl_ext import (
    GRPOTrainer,
    OfflineRWRConfig,
    OfflineRWRTrainer,
    PoEDistillationConfig,
    PoEDistillationTrainer,
    PPOTrainer,
    ReinforceTrainer,
    RewardConfig,
    RewardTrainer,
    RWRTrainer,
)
from trl_ext.recipe.shipped import read_accelerate_config
from trl_ext.trl_adapter import end_training
from trl_ext.trl_adapter.probe import LongestBatchFirst

GLOBAL_BATCH = 16
STEPS = 2
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
LOGGED = {name: value for name, value in QUIET.items() if name != "max_completion_length"}


def compared() -> Dataset:
    letters = "abcde"
    return Dataset.from_list(
        [
            {
                "prompt": letters[i % 5],
                "chosen": letters[(i + 1) % 5] * (1 + i % 3),
                "rejected": letters[(i + 2) % 5] * (1 + i % 2),
            }
            for i in range(64)
        ]
    )


@dataclass
class Run:
    """A trainer, its options and what it is given beside them."""

    trainer: Any
    options: dict[str, Any] = field(default_factory=dict)
    config: Any = None
    data: Callable[[], Dataset] = prompts
    is_lora: bool = False
    probes: bool = False

    def make(self, model: str, output: str, **more: Any) -> Any:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        is_policy = self.config is None
        settings: dict[str, Any] = {
            **(LOGGED if self.data is not prompts else QUIET),
            "per_device_train_batch_size": GLOBAL_BATCH // processes // 2,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "save_strategy": "steps",
            "save_steps": STEPS // 2,
            "learning_rate": 1e-2,
            "ddp_backend": "gloo" if processes > 1 else None,
        }
        given: dict[str, Any] = {"peft_config": LoraConfig(**LORA)} if self.is_lora else {}
        if is_policy:
            given["reward_funcs"] = by_global_row
        if is_policy and self.trainer is not PPOTrainer:
            settings["num_generations"], given["rollout_func"] = 4, rollout
        elif self.data is prompts:
            settings["generation_kwargs"] = {"do_sample": False}
        config = self.config or self.trainer.config_class
        args = config(output, **(settings | self.options | more))
        trainer = self.trainer(model, args=args, train_dataset=self.data(), **given)
        if self.probes:
            trainer.add_callback(LongestBatchFirst(trainer))
        return trainer


EXACT = {"beta": 0.1, "kl_estimator": "exact", "kl_is_correction": False}
TWO = {"expert_weights": {"a": 1.5, "b": -0.5}, "plausibility": 0.01, "divergence": "forward_kl"}
FAST = {"critic_learning_rate": 1e-2}  # as the policy: its parameters are compared alike
# With what each adds: a reference model or the policy without its adapter, several uses of a
# rollout, generation (PPO and PoE), a critic of each kind, a step that is not taken.
RUNS = {
    "grpo": Run(GRPOTrainer, EXACT, is_lora=True),
    "grpo_full": Run(GRPOTrainer, EXACT | {"kl_placement": "both"}),
    "rwr": Run(RWRTrainer, {"reference": "fixed", "beta": 0.5}),
    "reinforce": Run(ReinforceTrainer, {"num_iterations": 2, "baseline": "optimal"}),
    "offline_rwr": Run(OfflineRWRTrainer, {}, OfflineRWRConfig, logged),
    "reward": Run(RewardTrainer, {}, RewardConfig, compared),
    "ppo": Run(PPOTrainer, FAST | {"lr_scheduler_type": "cosine"}, probes=True),
    "ppo_model": Run(PPOTrainer, FAST | {"critic": "model", "beta": 0.1}),
    "ppo_lora": Run(
        PPOTrainer,
        FAST | {"critic": "model", "early_stop_kl": 1e-3, "num_iterations": 2},
        is_lora=True,
    ),
    "poe": Run(PoEDistillationTrainer, {"expert_weights": {"a": 1.0}}, PoEDistillationConfig),
    "poe_lora": Run(PoEDistillationTrainer, TWO, PoEDistillationConfig, is_lora=True),
}


def by_global_row(completion_ids, **kwargs) -> list[float]:
    """Reward: arbitrary, and another for each row."""
    first = int(os.environ.get("RANK", "0")) * len(completion_ids)
    return [(3 * sum(ids) + 2 * (first + i)) % 7 / 7 for i, ids in enumerate(completion_ids)]


def launched() -> dict[str, str]:
    """The variables that `accelerate launch` sets for the shipped fsdp2.yaml."""
    options = read_accelerate_config("fsdp2")["fsdp_config"]
    return {"ACCELERATE_USE_FSDP": "true"} | {n.upper(): str(v) for n, v in options.items()}


def shard_on_cpus() -> None:
    """Let Accelerate turn FSDP on where the processes are CPUs."""
    init: Any = AcceleratorState.__init__

    def on_cpus(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = on_cpus


def whole(trainer: Any) -> dict[str, torch.Tensor]:
    """The parameters, of all processes together."""
    parameters = dict(trainer.accelerator.get_state_dict(trainer.model))
    if isinstance(trainer, PPOTrainer):
        parameters |= {f"critic.{n}": p for n, p in trainer.critic.state_dict().items()}
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def main(names: list[str], model: str, experts: dict[str, str], folder: str) -> None:
    """Train each for two steps; two processes once more, from the checkpoint of the first."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        shard_on_cpus()
    trainer: Any = None
    for name in names:
        output, run = f"{folder}/{name}", RUNS[name]
        more: dict[str, Any] = {}
        if run.trainer is PoEDistillationTrainer:
            more["experts"] = {n: experts[n] for n in run.options["expert_weights"]}
        trainer = run.make(model, output, **more)
        assert trainer.is_fsdp_enabled == (processes > 1)
        trainer.train()
        trainer.save_model(output + "/saved")
        result = {"parameters": whole(trainer), "history": trainer.state.log_history}
        if processes > 1:
            again = run.make(model, output + "-again", **more)
            again.train(resume_from_checkpoint=f"{output}/checkpoint-{STEPS // 2}")
            result["resumed"] = whole(again)
        if trainer.accelerator.is_main_process:
            torch.save(result, Path(folder) / f"{name}.pt")
    end_training(trainer)
