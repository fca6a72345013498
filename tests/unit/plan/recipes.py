"""Recipes to plan, written where a test is."""

from pathlib import Path
from typing import Any

from tests.unit.plan.allocations import config_of
from trl_ext.recipe import Recipe, read_recipe
from trl_ext.recipe.yaml_reader import write_yaml

BASE: dict[str, Any] = {
    "trainer": "rwr",
    "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
    "dtype": "bfloat16",
    "dataset_name": "some/data",
    "reward_funcs": ["exact_match"],
    "output_dir": "out",
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "max_completion_length": 200,
}
LORA = {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0}
OFFLINE = {"reward_funcs": None, "num_generations": None, "max_completion_length": None}


def recipe(folder: Path, **changed: Any) -> Recipe:
    """The recipe above with some keys changed; None leaves one out."""
    values = {key: value for key, value in (BASE | changed).items() if value is not None}
    file = folder / "recipe.yaml"
    file.write_text(write_yaml(values))
    return read_recipe(file)


def small(folder: Path) -> str:
    """A folder with the config.json of a small model, and nothing else."""
    place = folder / "small"
    config_of().save_pretrained(place)
    return str(place)
