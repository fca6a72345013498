"""Runs of the real command, in processes of their own, on models that train in milliseconds."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.tiny import save_byte_llama

REPOSITORY = Path(__file__).resolve().parents[2]


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


@pytest.fixture
def write_recipe(tmp_path, byte_llama):
    """Write a recipe of a run that takes about a second; its file."""

    def write(name: str = "run", reward: str = "my_rewards:slow", max_steps: int = 6) -> Path:
        (tmp_path / "my_rewards.py").write_text(REWARDS)
        recipe = tmp_path / f"{name}.yaml"
        settings = {"output_dir": tmp_path / name, "model": byte_llama, "reward": reward}
        recipe.write_text(RECIPE.format(max_steps=max_steps, **settings))
        return recipe

    return write


@pytest.fixture
def command(tmp_path):
    """Start `trl_ext` with arguments, in `tmp_path`; the process."""

    def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
        inherited = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(
            [sys.executable, "-m", "trl_ext", *map(str, arguments)],
            cwd=tmp_path,
            env=inherited | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a command and to the processes that it launched."""
    started = psutil.Process(process.pid)
    for one in [started, *started.children(recursive=True)]:
        one.kill()
    process.communicate()


@pytest.fixture
def run(command):
    """Run `trl_ext` to its end: exit code, standard output, standard error."""

    def to_end(*arguments: object, **environment: str) -> tuple[int, str, str]:
        process = command(*arguments, **environment)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return to_end
