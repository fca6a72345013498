"""What `trl_ext plan` predicts against what a card's allocator measures, phase by phase.

Random weights in the shape of real models, saved to a folder and trained from a recipe as a user
would: LoRA and QLoRA, by rwr, grpo and ppo. Prompts and completions all have the longest length, as
the plan assumes. Each case is a process of its own; of its steps the first is left out, since the
optimizer has no states yet. Needs a CUDA card; `--cpu` runs one small case to try the script out,
and its numbers mean nothing.

    python benchmarks/memory.py [--models Qwen/Qwen2.5-0.5B ...] [--steps 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _memory import forget_peak, peak
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from trl_ext.build import build_trainer
from trl_ext.environment import environment
from trl_ext.plan import PHASES, card_of_size, plan_recipe
from trl_ext.plan.opening import open_config
from trl_ext.recipe import read_recipe
from trl_ext.recipe.yaml_reader import write_yaml

RESULTS = Path(__file__).parent / "results" / "memory.json"
MODELS = (
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-1.5B",
    "Qwen/Qwen2.5-3B",
    "meta-llama/Llama-3.1-8B",
)
TRAINERS = ("rwr", "grpo", "ppo")
PROMPT, COMPLETION = 256, 256
RECIPE: dict[str, Any] = {
    "dtype": "bfloat16",
    "use_peft": True,
    "lora_r": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "dataset_name": "json",
    "reward_funcs": ["vader"],
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_completion_length": COMPLETION,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
OF_TRAINER: dict[str, dict[str, Any]] = {
    "rwr": {"reference": "fixed", "beta": 1.0},
    "grpo": {"beta": 0.04},
    "ppo": {"critic": "adapter", "beta": 0.04, "num_generations": 1},
}
QUANTISED = {"load_in_4bit": True, "use_bnb_nested_quant": True}


class Phases(TrainerCallback):
    """Peak bytes of each phase, from the second step on."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.is_warm = False

    def end(self, phase: str) -> None:
        if self.is_warm or phase in ("load", "save"):
            self.peaks[phase] = max(self.peaks.get(phase, 0), peak())
        forget_peak()

    def watch(self, model: Any) -> None:
        """Measure `generate` alone; what follows it until the rollout is done is scoring."""
        generate = model.generate

        def measured(*args: Any, **kwargs: Any) -> Any:
            forget_peak()
            result = generate(*args, **kwargs)
            self.end("generate")
            return result

        model.generate = measured

    def on_rollout(self, *args: Any, **kwargs: Any) -> None:
        self.end("score")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.end("train")
        self.is_warm = True


def save_model(name: str, folder: Path) -> None:
    """Random weights in a model's shape, and a tokenizer that makes a token of each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    ).save_pretrained(folder)
    config = open_config(name)
    config.eos_token_id = config.pad_token_id = 0
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def write_recipe(folder: Path, trainer: str, quantised: bool, steps: int, on_cpu: bool) -> Path:
    """The recipe of a case, in the folder of its model, with as many rows as it trains on."""
    prompt = "a" * _prompt_length(on_cpu)
    rows = "\n".join(json.dumps({"prompt": prompt}) for _ in range(64))
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "train.jsonl").write_text(rows + "\n")
    small = {"bf16": True, "per_device_train_batch_size": 4, "max_completion_length": 4}
    values = RECIPE | OF_TRAINER[trainer] | (QUANTISED if quantised else {})
    values |= {
        "trainer": trainer,
        "model_name_or_path": str(folder),
        "dataset_name": str(folder / "data"),
        "output_dir": str(folder / "out"),
        "max_steps": steps,
    }
    file = folder / "recipe.yaml"
    file.write_text(write_yaml(values | (small if on_cpu else {})))
    return file


def _prompt_length(on_cpu: bool) -> int:
    return 16 if on_cpu else PROMPT


def measure(file: Path) -> dict[str, int]:
    """Train a recipe in this process; the peak of each of its phases."""
    phases = Phases()
    forget_peak()
    trainer: Any = build_trainer(read_recipe(file))
    phases.end("load")
    phases.watch(trainer.model)
    trainer.add_callback(phases)
    trainer.train()
    forget_peak()
    trainer.save_model()
    phases.end("save")
    return phases.peaks


def compare(name: str, folder: Path, case: tuple[str, bool], args: Any) -> list[dict[str, Any]]:
    """Predicted and measured bytes of one case, a row a phase."""
    trainer, quantised = case
    file = write_recipe(folder, trainer, quantised, args.steps, args.cpu)
    plan = plan_recipe(read_recipe(file), card_of_size(80), prompt_length=_prompt_length(args.cpu))
    command = [sys.executable, __file__, "--child", str(file)]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if child.returncode:
        raise SystemExit(f"{name}, {trainer}: the run failed:\n{child.stderr[-3000:]}")
    measured = json.loads(child.stdout.splitlines()[-1])
    rows = []
    for phase in PHASES:
        if phase in plan.phases and phase in measured:
            predicted, real = plan.peak(phase), measured[phase]
            row = {"model": name, "trainer": trainer, "quantised": quantised, "phase": phase}
            rows.append(row | {"predicted": predicted, "measured": real})
            rows[-1]["error"] = predicted / real - 1
            print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    kind = "qlora" if row["quantised"] else "lora"
    sizes = f"{row['predicted'] / 2**30:8.2f} {row['measured'] / 2**30:8.2f} GiB"
    start = f"{row['model']:<26} {row['trainer']:<5} {kind:<6} {row['phase']:<9}"
    return f"{start} {sizes} {row['error']:+7.1%}"


def main() -> None:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child)))
        return
    if not torch.cuda.is_available() and not args.cpu:
        print("memory: needs a CUDA card; tests/unit/plan checks the same accounting on a CPU.")
        return
    names = ["HuggingFaceTB/SmolLM2-135M"] if args.cpu else args.models
    cases = list(product(TRAINERS[:1] if args.cpu else TRAINERS, (False, True)))
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            save_model(name, Path(folder))
            rows += [row for case in cases for row in compare(name, Path(folder), case, args)]
    errors = [abs(row["error"]) for row in rows]
    worst, least = max(errors), min(row["error"] for row in rows)
    print(f"median {statistics.median(errors):.1%}, worst {worst:.1%}, least {least:+.1%}")
    if not args.cpu:
        RESULTS.write_text(json.dumps({"machine": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
