"""Seconds a step and peak memory of a process reward: REINFORCE with one against without.

All train the same LoRA policy on the same prompts from the same seed, in one process, in turn,
there and back again; ratios are taken repetition by repetition (`step_time.py`).

    python benchmarks/process_step_time.py [--repeats 5] [--steps 4]
        [--model bundled:smollm2-135m-instruct] [--output process_step_time.json]
"""

import argparse
import json
import statistics
import tempfile
from typing import Any

import step_time
import torch
from peft import LoraConfig, get_peft_model
from step_time import RESULTS, Clock
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

from trl_ext import ReinforceConfig, ReinforceTrainer
from trl_ext.bundled import resolve_model
from trl_ext.tasks import load_splits

PLAIN, TRL = "reinforce", "trl rloo"
# The rewards of the benchmark go to 6, and labels to 1.
SHARED: dict[str, Any] = {"beta": 0.04, "reward_weights": [1 / 6]}


def cases(scorer: str) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Name -> trainer, config and options; `scorer` is the path of a LoRA adapter."""
    frozen = {"process_reward": scorer, "process_beta": 0.05}
    steps = {"process_level": "step", "process_steps": "sentence"}
    online = {"process_learning_rate": 1e-4}
    return {
        PLAIN: (ReinforceTrainer, ReinforceConfig, SHARED),
        "reinforce, frozen": (ReinforceTrainer, ReinforceConfig, SHARED | frozen),
        "reinforce, frozen, steps": (ReinforceTrainer, ReinforceConfig, SHARED | frozen | steps),
        "reinforce, online": (ReinforceTrainer, ReinforceConfig, SHARED | online),
        TRL: (RLOOTrainer, RLOOConfig, SHARED),
    }


def save_adapter(model: str, folder: str) -> None:
    """An adapter as the policy's, at random: what it says costs as much as what a trained one does.

    Beside it the tokenizer.
    """
    torch.manual_seed(0)
    lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    get_peft_model(base, lora).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def ratios(measured: dict[str, list[Clock]]) -> dict[str, list[float]]:
    """Seconds a step of each case over those of REINFORCE alone, repetition by repetition."""
    seconds = {
        case: [statistics.median(c.seconds) for c in each] for case, each in measured.items()
    }
    return {
        case: [a / b for a, b in zip(each, seconds[PLAIN], strict=True)]
        for case, each in seconds.items()
        if case != PLAIN
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--output", default="process_step_time.json", help="in benchmarks/results")
    options = parser.parse_args()
    prompts, _ = load_splits(
        {
            "dataset_name": "reasoning_gym/basic_arithmetic",
            "dataset_kwargs": {"size": 64, "num_examples": 2, "max_terms": 2, "max_digits": 1},
        }
    )
    model = resolve_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        step_time.CASES = cases(folder)
        step_time.BASELINE = dict.fromkeys(step_time.CASES.keys() - {TRL}, TRL)
        measured: dict[str, list[Clock]] = {case: [] for case in step_time.CASES}
        for repeat in range(options.repeats):
            for case in list(measured)[:: -1 if repeat % 2 else 1]:
                clock = step_time.run(case, model, prompts, options.steps, seed=repeat)
                measured[case].append(clock)
    step_time.report(measured, vars(options))
    to_plain = ratios(measured)
    for case, each in to_plain.items():
        middle = statistics.median(each)
        print(f"{case}: {middle:.3f} of {PLAIN} ({min(each):.3f}-{max(each):.3f})")
    path = RESULTS / options.output
    record = json.loads(path.read_text()) | {f"ratios to {PLAIN}": to_plain}
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
