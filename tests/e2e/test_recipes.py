"""Every shipped recipe, loaded with its own classes and run for two steps on a tiny model."""

import json

import pytest

from trl_ext.build import build_trainer
from trl_ext.launch import train
from trl_ext.recipe import read_recipe
from trl_ext.recipe.shipped import recipe_names

pytestmark = pytest.mark.slow

# Of the three sizes of a trainer that of QLoRA stands for all: recipes of smaller models train with
# LoRA and all weights, and tests/parity on several processes. tests/unit/plan/test_sizes.py reads
# every size.
TRAINED = [name for name in recipe_names() if not name.endswith(("qwen_24gb", "qwen_8gpu"))]

# What a recipe of logged data trains on: its file is made by another command.
LOGGED = {
    "dpo": {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
    "offline_rwr": {"prompt": "1+1=", "completions": ["2", "3"], "rewards": [1.0, 0.0]},
    "reward": {"prompt": "1+1=", "completions": ["2", "3", "11"], "scores": [1.0, 0.0, 0.0]},
}


def tiny(name, byte_llama, tmp_path) -> list[str]:
    """What makes a recipe one of a tiny model and two steps."""
    recipe = read_recipe(name)
    values, trainer = recipe.values, recipe.trainer
    settings = [
        f"output_dir={tmp_path / 'out'}",
        f"model_name_or_path={byte_llama}",
        "max_steps=2",
        "per_device_train_batch_size=2",
        "per_device_eval_batch_size=4",
        "gradient_accumulation_steps=1",
    ]
    if trainer in LOGGED:
        for split in ("train", "test"):
            file = tmp_path / "logged" / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{json.dumps(LOGGED[trainer])}\n" * 8)
        settings.append(f"dataset_name={tmp_path / 'logged'}")
    elif trainer != "sft":
        settings.append("max_completion_length=4")
    if "dataset_kwargs" in values:
        settings += ["dataset_kwargs.size=16", "dataset_kwargs.eval_size=4"]
    if "reward_funcs" in values and trainer not in LOGGED:
        settings += ["num_generations=2", "num_generations_eval=1"]
        rewards = [
            entry | {"tokenizer": byte_llama} if "tokenizer" in entry else entry
            for entry in values["reward_funcs"]
        ]
        settings.append(f"reward_funcs={json.dumps(rewards)}")
    if "experts" in values:
        settings.append(f"experts={json.dumps(dict.fromkeys(values['experts'], byte_llama))}")
    return settings


@pytest.mark.parametrize("name", TRAINED)
def test_two_steps(name, byte_llama, tmp_path, capsys):
    recipe = read_recipe(name, tiny(name, byte_llama, tmp_path))
    train(recipe)
    samples = "reward_funcs" in recipe.values and recipe.trainer not in LOGGED
    said = capsys.readouterr().out
    assert ("Held-out prompts" in said) == samples
    assert ("reward_funcs: [{name: reward_model" in said) == (recipe.trainer == "reward")
    weights = ("adapter_model.safetensors", "model.safetensors")
    assert any((tmp_path / "out" / file).is_file() for file in weights)


def test_a_list_of_one_module_is_that_module(byte_llama, tmp_path):
    """TRL makes it a text, which peft takes for a pattern of whole names."""
    settings = [*tiny("grpo/smollm2", byte_llama, tmp_path), "lora_target_modules=[q_proj]"]
    trainer = build_trainer(read_recipe("grpo/smollm2", settings))
    assert trainer.model.peft_config["default"].target_modules == {"q_proj"}  # pyright: ignore
