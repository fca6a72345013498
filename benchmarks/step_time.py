"""Seconds a step and peak memory: each trainer here against `trl.GRPOTrainer`, in turn.

All train the same model on the same prompts from the same seed, in one process. Each
repetition runs them in turn, there and back again, so that a machine whose speed drifts slows all;
the ratio is taken repetition by repetition.

    python benchmarks/step_time.py [--repeats 5] [--steps 4] [--model bundled:smollm2-135m-instruct]
        [--cases "ppo" "trl grpo, beta 0.04"] [--output step_time.json]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _memory import forget_peak, peak
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from trl import GRPOConfig as TRLGRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from trl_ext import (
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    ReinforceConfig,
    ReinforceTrainer,
    RWRConfig,
    RWRTrainer,
)
from trl_ext.bundled import resolve_model
from trl_ext.environment import environment
from trl_ext.tasks import load_splits

RESULTS = Path(__file__).parent / "results"
IN_REWARD = {
    "beta": 0.04,
    "kl_estimator": "k1",
    "kl_placement": "reward",
    "kl_is_correction": False,
}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rwr": (RWRTrainer, RWRConfig, {}),
    "rwr, fixed reference": (RWRTrainer, RWRConfig, {"reference": "fixed"}),
    "grpo, k1 in the reward": (GRPOTrainer, GRPOConfig, IN_REWARD),
    "grpo, exact in both": (
        GRPOTrainer,
        GRPOConfig,
        IN_REWARD | {"kl_estimator": "exact", "kl_placement": "both"},
    ),
    "reinforce": (ReinforceTrainer, ReinforceConfig, {"beta": 0.04}),
    "ppo": (PPOTrainer, PPOConfig, {"beta": 0.04}),
    "ppo, critic an adapter": (PPOTrainer, PPOConfig, {"beta": 0.04, "critic": "adapter"}),
    "trl grpo, beta 0": (TRLGRPOTrainer, TRLGRPOConfig, {"beta": 0.0}),
    "trl grpo, beta 0.04": (TRLGRPOTrainer, TRLGRPOConfig, {"beta": 0.04}),
}
# What each is compared with: TRL's with a reference where it has one.
BASELINE = {
    case: "trl grpo, beta 0" if case == "rwr" else "trl grpo, beta 0.04"
    for case in CASES
    if not case.startswith("trl")
}


class Clock(TrainerCallback):
    """Seconds of each optimizer step, the first (warm-up) left out."""

    def __init__(self):
        self.seconds: list[float] = []
        self.peak_bytes = 0
        self._start = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self._start)


def _cheap_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Differs within a group and costs nothing."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def run(case: str, model: str, prompts: Any, steps: int, seed: int) -> Clock:
    """Train `steps` steps and return the clock."""
    trainer_class, config_class, options = CASES[case]
    clock, held = Clock(), forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            folder,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=8,
            # Every completion is 8 tokens long: both sides do the same work.
            generation_kwargs={"min_new_tokens": 8},
            max_steps=steps,
            seed=seed,
            use_cpu=not torch.accelerator.is_available(),
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
            **options,
        )
        trainer = trainer_class(
            model=model,
            reward_funcs=_cheap_reward,
            args=args,
            train_dataset=prompts,
            peft_config=LoraConfig(r=16, target_modules=["q_proj", "v_proj"]),
            callbacks=[clock],
        )
        trainer.train()
    clock.peak_bytes = peak() - held
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", default="step_time.json", help="file in benchmarks/results")
    options = parser.parse_args()
    prompts, _ = load_splits(
        {
            "dataset_name": "reasoning_gym/basic_arithmetic",
            "dataset_kwargs": {"size": 64, "num_examples": 2, "max_terms": 2, "max_digits": 1},
        }
    )
    model = resolve_model(options.model)
    measured: dict[str, list[Clock]] = {case: [] for case in options.cases}
    for repeat in range(options.repeats):
        # There and back again, so that coming first or last favours nobody.
        for case in options.cases[:: -1 if repeat % 2 else 1]:
            measured[case].append(run(case, model, prompts, options.steps, seed=repeat))
    report(measured, vars(options))


def report(measured: dict[str, list[Clock]], options: dict[str, Any]) -> None:
    """Print the table and write the JSON."""
    table = Table(title="Seconds a step, median over repeats")
    for column in ("", "s/step", "min-max", "peak MB", "ratio to TRL", "min-max"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {}
    for case, clocks in measured.items():
        seconds = [statistics.median(clock.seconds) for clock in clocks]
        row: dict[str, Any] = {
            "seconds": seconds,
            "peak_mb": statistics.median(clock.peak_bytes for clock in clocks) / 2**20,
        }
        shown = ["", ""]
        if BASELINE.get(case) in measured:
            theirs = [statistics.median(c.seconds) for c in measured[BASELINE[case]]]
            row["ratios"] = [a / b for a, b in zip(seconds, theirs, strict=True)]
            shown = [f"{statistics.median(row['ratios']):.3f}", _span(row["ratios"], 3)]
        rows[case] = row
        memory = f"{row['peak_mb']:.0f}"
        table.add_row(case, f"{statistics.median(seconds):.2f}", _span(seconds, 2), memory, *shown)
    Console().print(table)
    record = {"options": options, "environment": environment(), "rows": rows}
    path = RESULTS / options["output"]
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"Written to {path}")


def _span(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"


if __name__ == "__main__":
    main()
