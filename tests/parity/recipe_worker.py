"""One run of a recipe of logged rows or of distillation, as one process or one of several."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from tests.parity.worker import leave
from tests.tiny import prompts
from trl_ext.build import build_trainer
from trl_ext.recipe import read_recipe

GLOBAL_BATCH = 8
LETTERS = "abcde" * 3


def completed(rows: int) -> list[dict[str, Any]]:
    """Prompts with four completions each, of one to four letters."""
    return [
        {
            "prompt": LETTERS[i // 4 :][: 1 + i // 4 % 2] + "abcde"[i // 8],
            "completion": LETTERS[i % 5 :][: 1 + i % 4],
            "reward": float(i % 3),
        }
        for i in range(rows)
    ]


def compared(rows: int) -> list[dict[str, Any]]:
    """Prompts with two completions of different lengths."""
    return [
        {
            "prompt": LETTERS[i % 5 :][: 1 + i % 3],
            "chosen": LETTERS[i % 5 :][: 1 + i % 4],
            "rejected": LETTERS[i % 4 :][: 2 + i % 2] + "a",
        }
        for i in range(rows)
    ]


# Steps of 8 rows; where an epoch ends them, the fifth and last step of offline_rwr has 4.
ONE_EPOCH = {"max_steps": -1, "num_train_epochs": 1, "drop_uniform_groups": False}
# Trainer, keys of its recipe, rows of training and evaluation.
RECIPES: dict[str, tuple[str, dict[str, Any], Any, Any]] = {
    **{
        f"offline_rwr_{reduction}": (
            "offline_rwr",
            ONE_EPOCH | {"token_reduction": reduction},
            completed(36),
            completed(40),
        )
        for reduction in ("sum", "mean", "batch")
    },
    "sft": (
        "sft",
        {},
        [{"prompt": r["prompt"], "completion": r["completion"]} for r in completed(40)],
        [],
    ),
    "dpo": ("dpo", {"beta": 0.3}, compared(32), []),
    # The likeliest completion, so that sampling is the same however rows are spread.
    "poe_distillation": (
        "poe_distillation",
        {"expert_weights": {"a": 0.6, "b": 0.9}, "max_completion_length": 4, "top_k": 1},
        prompts(32).to_list(),
        [],
    ),
}


def write(name: str, models: list[str], folder: Path, accumulation: int) -> Path:
    """The recipe of a run in `folder`, and its dataset beside it."""
    trainer, keys, train, test = RECIPES[name]
    data = folder / "data"
    data.mkdir()
    for split, rows in (("train", train), ("test", test)):
        if rows:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (data / f"{split}.jsonl").write_text(lines)
    settings = {
        "trainer": trainer,
        "output_dir": str(folder / "run"),
        "model_name_or_path": models[0],
        "dataset_name": str(data),
        "bf16": False,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if trainer == "poe_distillation":
        settings["experts"] = {"a": models[1], "b": models[2]}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings | keys))
    return recipe


def main(recipe: str, output: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    read = read_recipe(recipe)
    accumulation = read.values["gradient_accumulation_steps"]
    rows = GLOBAL_BATCH // processes // accumulation
    keys = [f"per_device_train_batch_size={rows}"] + ["ddp_backend=gloo"] * (processes > 1)
    trainer = build_trainer(read_recipe(recipe, keys))
    trainer.train()
    evaluation = trainer.evaluate() if trainer.eval_dataset is not None else {}
    leave(trainer, output, evaluation=evaluation)
