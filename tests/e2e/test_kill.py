"""A run killed at any moment, and resumed, ends as the run that was never killed, bit for bit."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import REWARDS
from tests.e2e.forked import Forked
from tests.e2e.killing import counted, cut_power

pytestmark = pytest.mark.slow

STEPS, KILLS = 6, 20

# A critic, β that adapts, rollouts that serve two steps, a schedule, dropped checkpoints.
RECIPE = """
trainer: ppo
output_dir: {output_dir}
model_name_or_path: {model}
bf16: false
dataset_name: char_reverse
dataset_kwargs: {{size: 24, eval_size: 8}}
reward_funcs: [my_rewards:slow]
num_iterations: 2
beta: 0.1
kl_controller: adaptive
kl_target: 0.0001
per_device_train_batch_size: 8
max_completion_length: 6
learning_rate: 1.0e-3
max_steps: {steps}
save_steps: 1
save_total_limit: 2
logging_steps: 1
report_to: none
disable_tqdm: true
dataloader_pin_memory: false
"""

# What says how long something took, and nothing else.
CLOCK = ("time", "runtime", "per_second")


def started(folder: Path, model: str, name: str) -> Path:
    """The recipe of a run in `folder`, and the rewards beside it."""
    (folder / "my_rewards.py").write_text(REWARDS)
    recipe = folder / f"{name}.yaml"
    recipe.write_text(RECIPE.format(output_dir=folder / name, model=model, steps=STEPS))
    return recipe


def train(folder: Path, name: str, kill_at: int, *arguments: str) -> tuple[int, str]:
    """The exit code (-9: killed), and what was said."""
    run = (counted, kill_at, str(folder / name), str(folder / f"{name}.log"), "train", *arguments)
    code, _, err = Forked(*run, folder=folder, environment={"PYTHONPATH": str(folder)}).end()
    return code, err


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory, byte_llama) -> tuple[dict[str, Any], int]:
    """What the run leaves that nobody kills, and how many moments it has to be killed at."""
    folder = tmp_path_factory.mktemp("never")
    recipe = started(folder, byte_llama, "run")
    code, err = train(folder, "run", 0, str(recipe))
    assert code == 0, err
    events = int((folder / "run.log").read_text().splitlines()[-1].split()[1])
    return left(folder / "run"), events


def left(output_dir: Path) -> dict[str, Any]:
    """All that a run leaves and that its steps decide."""
    last = output_dir / f"checkpoint-{STEPS}"
    state = json.loads((last / "trainer_state.json").read_text())
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return {
        "model": load_file(output_dir / "model.safetensors"),
        "checkpoint": load_file(last / "model.safetensors"),
        "critic": [load_file(file) for file in sorted(last.glob("critic/*.safetensors"))]
        + [torch.load(file) for file in sorted(last.glob("critic/*.pt"))],
        "optimizer": torch.load(last / "optimizer.pt"),
        "scheduler": torch.load(last / "scheduler.pt"),
        "rollouts": [torch.load(file) for file in sorted(last.glob("rollout_*.pt"))],
        "random": [
            torch.load(file, weights_only=False) for file in sorted(last.glob("rng_state*.pth"))
        ],
        "history": [timeless(row) for row in state["log_history"]],
        "metrics": [timeless(json.loads(line)) for line in lines],
        "checkpoints": sorted(path.name for path in output_dir.glob("checkpoint-*")),
    }


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    # Of the whole call of `train`, which a resumed run makes anew.
    row.pop("train_loss", None)
    return {key: value for key, value in row.items() if not key.endswith(CLOCK)}


def same(ours: Any, theirs: Any, where: str = "") -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            same(one, other, f"{where}.{i}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert repr(ours) == repr(theirs), where


def test_killed_at_twenty_moments_it_ends_as_the_run_that_was_never_killed(
    never_killed, byte_llama, tmp_path
):
    whole, events = never_killed
    draw = random.Random(0)
    kills, ends = 0, 0
    while kills < KILLS:
        name = f"run-{ends}"
        recipe, arguments = started(tmp_path, byte_llama, name), []
        code = -9
        while code == -9:
            # Events are even over the run: half of it before a kill, so that it gets on.
            kill_at = draw.randint(1, events // 2) if kills < KILLS else 0
            code, err = train(tmp_path, name, kill_at, *(arguments or [str(recipe)]))
            if code == -9:
                kills += 1
                if kills % 2:
                    cut_power(tmp_path / name, tmp_path / f"{name}.log")
                if (tmp_path / name / "recipe.yaml").is_file():
                    arguments = ["--resume", str(tmp_path / name)]
        assert code == 0, err
        same(left(tmp_path / name), whole)
        ends += 1
    assert kills == KILLS


def test_killed_while_it_begins_and_again_while_it_goes_on(never_killed, byte_llama, tmp_path):
    """Its record is being written then, and, on resuming, what it holds of later steps removed."""
    whole, events = never_killed
    recipe = started(tmp_path, byte_llama, "run")
    for kill_at in range(1, 12):
        assert train(tmp_path, "run", kill_at, str(recipe), *resuming(tmp_path / "run"))[0] == -9
    code, err = train(tmp_path, "run", events // 2, str(recipe), *resuming(tmp_path / "run"))
    assert code == -9, err
    for kill_at in range(1, 14):
        code, err = train(tmp_path, "run", kill_at, "--resume", str(tmp_path / "run"))
        assert code == -9, err
    code, err = train(tmp_path, "run", 0, "--resume", str(tmp_path / "run"))
    assert code == 0, err
    same(left(tmp_path / "run"), whole)


def resuming(output_dir: Path) -> list[str]:
    return ["--resume"] if (output_dir / "recipe.yaml").is_file() else []


def test_the_power_may_go_at_any_moment_of_a_save(never_killed, byte_llama, tmp_path):
    """A checkpoint that is marked as complete is on the disk: nothing of it is lost."""
    whole, _ = never_killed
    assert whole["checkpoints"] == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
    log, run = tmp_path / "run.log", tmp_path / "run"
    recipe = started(tmp_path, byte_llama, "run")
    assert train(tmp_path, "run", 0, str(recipe))[0] == 0
    assert cut_power(run, log) == 0
