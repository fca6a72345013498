"""Runs of the command, in processes of their own, on models that train in milliseconds."""

from pathlib import Path

import pytest

from tests.e2e.forked import REPOSITORY, Forked, trl_ext
from tests.tiny import save_byte_llama


@pytest.fixture(scope="session")
def byte_llama(tmp_path_factory) -> str:
    return save_byte_llama(tmp_path_factory.mktemp("byte_llama"))


RECIPE = """
trainer: rwr
output_dir: {output_dir}
model_name_or_path: {model}
bf16: false
dataset_name: char_reverse
dataset_kwargs: {{size: 64, eval_size: 8}}
reward_funcs: [{reward}]
num_generations: 4
num_iterations: 2
per_device_train_batch_size: 8
per_device_eval_batch_size: 8
max_completion_length: 6
learning_rate: 1.0e-3
max_steps: {max_steps}
save_steps: 1
logging_steps: 1
report_to: none
dataloader_pin_memory: false
"""

# Scores in REWARD_SECONDS seconds, so that a test can meet a run between two steps.
REWARDS = """
import os, time

def slow(completions, **kwargs):
    time.sleep(float(os.environ.get("REWARD_SECONDS", "0")))
    return [float(len(set(text))) for text in completions]

def broken(completions, **kwargs):
    broken.calls = getattr(broken, "calls", 0) + 1
    if broken.calls > 2:
        raise KeyError("the answer of sample 3")
    return [float(len(text)) for text in completions]
"""


def write_recipe_in(
    folder: Path, model: str, name: str, reward: str = "my_rewards:slow", max_steps: int = 6
) -> Path:
    """Write a recipe of a run that takes about a second, and the rewards beside it; its file."""
    (folder / "my_rewards.py").write_text(REWARDS)
    recipe = folder / f"{name}.yaml"
    settings = {"output_dir": folder / name, "model": model, "reward": reward}
    recipe.write_text(RECIPE.format(max_steps=max_steps, **settings))
    return recipe


@pytest.fixture
def write_recipe(tmp_path, byte_llama):
    """Write a recipe of a run that takes about a second; its file."""

    def write(name: str = "run", **settings) -> Path:
        return write_recipe_in(tmp_path, byte_llama, name, **settings)

    return write


@pytest.fixture(scope="session")
def whole(tmp_path_factory, byte_llama) -> Path:
    """The output_dir of the recipe as it is, trained without interruption. To be read only."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe_in(folder, byte_llama, "whole")
    code, _, err = Forked(trl_ext, "train", str(recipe), folder=folder, environment={}).end()
    assert code == 0, err
    return folder / "whole"


@pytest.fixture
def command(tmp_path):
    """Start `trl_ext` with arguments, in `tmp_path`; the process."""

    def start(*arguments: object, **environment: str) -> Forked:
        # Of no use to a fork, but to the launcher that it may turn into.
        inherited = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        environment = inherited | environment
        return Forked(trl_ext, *map(str, arguments), folder=tmp_path, environment=environment)

    return start


@pytest.fixture
def run(command):
    """Run `trl_ext` to its end: exit code, standard output, standard error."""

    def to_end(*arguments: object, **environment: str) -> tuple[int, str, str]:
        return command(*arguments, **environment).end()

    return to_end
