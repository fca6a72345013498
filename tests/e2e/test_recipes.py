"""Every shipped recipe, loaded with its own classes and run for two steps on a tiny model."""

import pytest

from trl_ext.launch import train
from trl_ext.recipe import read_recipe
from trl_ext.recipe.shipped import recipe_names

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", recipe_names())
def test_two_steps(name, byte_llama, tmp_path, capsys):
    settings = [
        f"output_dir={tmp_path / 'out'}",
        f"model_name_or_path={byte_llama}",
        "max_steps=2",
        "dataset_kwargs.size=16",
        "dataset_kwargs.eval_size=4",
        "num_generations=2",
        "num_generations_eval=1",
        "per_device_train_batch_size=2",
        "per_device_eval_batch_size=4",
        "gradient_accumulation_steps=1",
        "max_completion_length=4",
    ]
    train(read_recipe(name, settings))
    assert "Held-out prompts" in capsys.readouterr().out
    weights = ("adapter_model.safetensors", "model.safetensors")
    assert any((tmp_path / "out" / file).is_file() for file in weights)
