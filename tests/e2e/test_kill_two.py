"""A run of two processes, of which one or both are killed, ends as the one that never was."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.forked import ended, two_ranks
from tests.e2e.killing import counted_by_rank, cut_power, late_second
from tests.e2e.test_kill import left, same, started
from tests.parity import recipe_worker

pytestmark = pytest.mark.slow

# Which processes are killed, kill after kill; of two, who first comes to the moment drawn for it.
KILLED = [[0], [1], [0, 1], [1], [0], [0, 1]]
IN_TWO = ("per_device_train_batch_size=4", "ddp_backend=gloo")


def train(folder: Path, name: str, kill_at: list[int], *arguments: str) -> list[tuple[int, str]]:
    """The exit code (-9: killed) and what was said, of who ends first, and then of the other."""
    run = (counted_by_rank, kill_at, str(folder / name), str(folder / f"{name}.log"), "train")
    ranks = two_ranks(*run, *arguments, folder=folder, environment={"PYTHONPATH": str(folder)})
    return [(code, err) for code, _, err in ended(ranks, patience=5)]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory, byte_llama) -> tuple[dict[str, Any], list[int]]:
    """What the run leaves that nobody kills, and how many events each of its processes has."""
    folder = tmp_path_factory.mktemp("never")
    recipe = started(folder, byte_llama, "run")
    for code, err in train(folder, "run", [0, 0], str(recipe), *IN_TWO):
        assert code == 0, err
    logs = [(folder / f"run.log-{rank}").read_text() for rank in range(2)]
    whole = left(folder / "run")
    assert [len(whole[name]) for name in ("rollouts", "random")] == [2, 2]
    return whole, [int(log.splitlines()[-1].split()[1]) for log in logs]


def test_killed_in_one_process_or_both_it_ends_as_the_run_that_was_never_killed(
    never_killed, byte_llama, tmp_path
):
    whole, events = never_killed
    draw = random.Random(0)
    run, log = tmp_path / "run", tmp_path / "run.log-0"
    arguments = [str(started(tmp_path, byte_llama, "run")), *IN_TWO]
    for kills, ranks in enumerate(KILLED):
        at = [draw.randint(1, events[rank] // 3) if rank in ranks else 0 for rank in range(2)]
        (first, _), (second, err) = train(tmp_path, "run", at, *arguments)
        assert first == -9 and second in (-9, 1)
        # It hears of it when it next waits for the other.
        assert second == -9 or "Another process of this run has ended" in err
        if kills % 2:
            cut_power(run, log)
        if (run / "recipe.yaml").is_file():
            arguments = ["--resume", str(run)]
    for code, err in train(tmp_path, "run", [0, 0], *arguments):
        assert code == 0, err
    same(left(run), whole)


@pytest.mark.parametrize("name", ["ppo", "sft", "dpo", "offline_rwr_sum"])
def test_a_checkpoint_is_marked_when_every_process_has_written_its_part(name, byte_llama, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    if name == "ppo":
        recipe = started(tmp_path, byte_llama, "run")
    else:
        recipe_worker.write(name, [byte_llama], tmp_path, 1)
    saves = ("max_steps=2", "save_strategy=steps", "save_steps=1")
    run = (late_second, "train", str(recipe), *saves, *IN_TWO)
    for code, _, err in ended(
        two_ranks(*run, folder=tmp_path, environment={"PYTHONPATH": str(tmp_path)})
    ):
        assert code == 0, err
    assert sorted(path.name for path in tmp_path.glob("run/checkpoint-*/rng_state_*")) == [
        f"rng_state_{rank}.pth" for rank in (0, 0, 1, 1)
    ]
