"""How `trl_ext train` ends: its exit code, its last line, and that it can be gone on with."""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.e2e.conftest import write_recipe_in
from tests.e2e.forked import REPOSITORY, Forked, trl_ext, two_ranks

pytestmark = pytest.mark.slow

REWARDS = """
import os, signal, time

calls = 0

def score(completions):
    global calls
    calls += 1
    return [float(len(set(text))) for text in completions]

def signalled(completions, **kwargs):
    if calls == 1:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return score(completions)

def fails_on_one(completions, **kwargs):
    if calls == 1 and os.environ.get("RANK") == "1":
        raise KeyError("the answer of sample 3")
    return score(completions)

def rising(completions, trainer_state, **kwargs):
    return [trainer_state.global_step + i % 2 / 10 for i in range(len(completions))]

def falling(completions, trainer_state, **kwargs):
    level = [0.2, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1][trainer_state.global_step]
    return [level + i % 2 / 100 for i in range(len(completions))]

def hangs_on_one(completions, **kwargs):
    if calls == 1 and os.environ.get("RANK") == "1":
        time.sleep(600)
    return score(completions)
"""


@pytest.fixture
def recipe(byte_llama, tmp_path) -> Path:
    written = write_recipe_in(tmp_path, byte_llama, "run", reward="some_rewards:signalled")
    (tmp_path / "some_rewards.py").write_text(REWARDS)
    return written


def same(folder: Path, other: Path) -> bool:
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, other))
    return all(ours[name].equal(theirs[name]) for name in theirs)


def last(err: str) -> str:
    return err.strip().splitlines()[-1]


def go_on(run, tmp_path: Path) -> None:
    code, _, err = run("train", "--resume", tmp_path / "run", SIGNAL="0")
    assert code == 0, err
    assert last(err) == f"trl_ext: finished, exit code 0; output_dir: {tmp_path / 'run'}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_the_run_goes_on_from_there(
    run, recipe, whole, tmp_path, number
):
    """In the second rollout, of steps 3 and 4: after 3, in the middle of its use."""
    code, _, err = run("train", recipe, "save_strategy=no", SIGNAL=str(int(number)))
    assert code == 128 + number
    assert last(err).startswith(f"trl_ext: stopped ({number.name}), exit code {code}; resume: ")
    assert last(err).endswith(f"train --resume {tmp_path / 'run'}")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    go_on(run, tmp_path)
    assert same(tmp_path / "run", whole)


def test_a_folder_that_was_moved_is_gone_on_with(run, recipe, whole, tmp_path):
    assert run("train", recipe, SIGNAL=str(int(signal.SIGTERM)))[0] == 143
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    (tmp_path / "run").rename(moved)
    assert run("train", "--resume", moved, SIGNAL="0")[0] == 0
    assert same(moved, whole) and not (tmp_path / "run").exists()


def broken(where: str, *arguments: str) -> None:
    """`trl_ext`, where the disk is full, or memory, at step 3."""
    calls = 0
    save, backward = torch.save, torch.Tensor.backward

    def full(obj, file, *args, **kwargs):
        if "checkpoint-3" in str(file) and str(file).endswith("optimizer.pt"):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(obj, file, *args, **kwargs)

    def too_much(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\n...")
        return backward(self, *args, **kwargs)

    if where == "disk":
        torch.save = full
    elif where == "memory":
        torch.Tensor.backward = too_much
    trl_ext(*arguments)


@pytest.mark.parametrize(
    ("where", "says", "kind", "ends"),
    [
        ("disk", "Saving at step 3 failed: [Errno 28] No space left", "RunError", 1),
        ("memory", "Out of memory after step 2, in the phase 'train': ", "OutOfMemoryError", 3),
    ],
)
def test_no_room_ends_with_one_error_and_what_was_saved_stays(
    run, recipe, whole, tmp_path, where, says, kind, ends
):
    environment = {"SIGNAL": "0", "PYTHONPATH": str(tmp_path)}
    arguments = (broken, where, "train", str(recipe), "--keep-batch")
    code, _, err = Forked(*arguments, folder=tmp_path, environment=environment).end()
    assert code == ends
    assert f"Error: {says}" in err and "Traceback" not in err
    assert last(err).startswith(f"trl_ext: failed ({kind}), exit code {ends}; resume: ")
    newest = max(int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert newest == 2 and "The newest complete checkpoint is" in err
    go_on(run, tmp_path)
    assert same(tmp_path / "run", whole)


def test_stopped_by_the_watch_is_finished_and_says_so(run, recipe, tmp_path):
    """The gold reward falls from 0.9 to 0.1 while the trained one rises: a run that ends early."""
    watched = "gold_reward_funcs=[some_rewards:falling] watch_action=stop watch_drift=null"
    evaluated = "eval_on_start=true eval_strategy=steps eval_steps=1 num_generations_eval=2"
    rewards = "reward_funcs=[some_rewards:rising]"
    options = f"{watched} {evaluated} {rewards} dataset_kwargs.eval_size=16".split()
    code, out, err = run("train", recipe, *options)
    assert code == 0, err
    best = tmp_path / "run" / "best"
    assert f"The one with the best gold reward is in {best}. Try it" in out
    assert f'model = pipeline("text-generation", "{best}")' in out
    told = "trl_ext: finished (stopped by the reward-hacking watch), exit code 0; output_dir: "
    assert last(err) == f"{told}{tmp_path / 'run'}"
    assert not (tmp_path / "run" / "checkpoint-6").exists()


@pytest.mark.parametrize("reward", ["fails_on_one", "hangs_on_one"])
def test_one_process_that_fails_ends_all_and_says_why(recipe, tmp_path, reward):
    arguments = ("train", str(recipe), "per_device_train_batch_size=4", "ddp_backend=gloo")
    arguments += ("num_processes=2", f"reward_funcs=[some_rewards:{reward}]", "reward_timeout=1")
    told = tmp_path / "told"
    environment = {"TRL_EXT_TOLD": str(told), "PYTHONPATH": str(tmp_path)}
    ranks = two_ranks(trl_ext, *arguments, folder=tmp_path, environment=environment)
    ended = [rank.end(timeout=60) for rank in ranks]
    assert [code for code, _, _ in ended] == [1, 1]
    assert "Another process of this run has ended; its error says why." in ended[0][2]
    assert all("Traceback" not in err for _, _, err in ended)
    code, error, *_ = told.read_text().splitlines()
    assert code == "1" and error.startswith(f"Error of process 1: The reward '{reward}' ")
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


SMALL_CARD = """
import torch
from trl_ext import PPOConfig, PPOTrainer

class SmallCardConfig(PPOConfig):
    pass

class SmallCardTrainer(PPOTrainer):
    def policy_loss(self, micro_batch):
        if self.args.per_device_train_batch_size > 4 and self.state.global_step >= 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().policy_loss(micro_batch)
"""


def test_a_run_that_outgrows_the_card_goes_on_in_smaller_parts_to_the_same_end(
    run, recipe, tmp_path
):
    """Step 2 has no room, in the middle of a rollout: it goes on from the checkpoint of step 1."""
    (tmp_path / "small_card.py").write_text(SMALL_CARD)
    settings = ("num_iterations=2", "steps_per_generation=4", "gradient_accumulation_steps=2")
    settings += (
        "beta=0.1",
        "kl_controller=adaptive",
        "kl_target=0.5",
        "per_device_eval_batch_size=8",
    )
    where = {"SIGNAL": "0", "PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "OMP_NUM_THREADS": "1"}
    code, _, err = run("train", recipe, "trainer=ppo", "output_dir=large", *settings, **where)
    assert code == 0, err
    trainer = "trainer=small_card:SmallCardTrainer"
    code, _, err = run("train", recipe, trainer, "output_dir=small", *settings, **where)
    assert code == 0, err
    smaller = "per_device_train_batch_size=4 gradient_accumulation_steps=4 steps_per_generation=8"
    assert "Out of memory after step 1, in the phase 'train'" in err
    assert f"Going on with the same batch in smaller parts: {smaller}" in err
    left = yaml.safe_load((tmp_path / "small" / "recipe.yaml").read_text())
    assert smaller == " ".join(
        f"{key}={left[key]}" for key in smaller.replace("=", " ").split()[::2]
    )
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("large", "small"))
    for name, value in whole.items():
        # Adam divides by a gradient's own size: one near 0 is rounding, and its step is not.
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "grad_norm" in row] == [1, 2, 3, 4, 5, 6]


def test_the_longest_batch_first(run, recipe, whole, tmp_path):
    code, _, err = run("train", recipe, "--probe", SIGNAL="0")
    assert code == 0, err
    assert "The longest batch fits: 8 rows of up to " in err
    assert same(tmp_path / "run", whole)
