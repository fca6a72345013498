"""`trl_ext train` as a user meets it: results, interruptions, and what goes wrong."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.forked import REPOSITORY, ended, trl_ext, two_ranks

pytestmark = pytest.mark.slow


def parameters(output_dir: Path, name: str = "model"):
    return load_file(output_dir / f"{name}.safetensors")


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in theirs)


def found(pattern: str, text: str) -> str:
    """What the one group of a pattern matches in a text."""
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in: {text}"
    return match[1]


def wait_for(path: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_a_run_leaves_its_record_and_a_model_that_plain_transformers_loads(write_recipe, tmp_path):
    """In an interpreter of its own, as a user starts it; the other tests save its imports."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "trl_ext", "train", write_recipe(), "eval_on_start=true"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    out, err = done.stdout, done.stderr
    assert done.returncode == 0, err
    assert "Held-out prompts" in out and "95% interval" in out
    assert "The model is in" in out
    output_dir = tmp_path / "run"
    assert yaml.safe_load((output_dir / "recipe.yaml").read_text())["trainer"] == "rwr"
    assert json.loads((output_dir / "environment.json").read_text())["trl"]
    steps = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "grad_norm" in row] == [*range(1, 7)]
    card = (output_dir / "README.md").read_text()
    assert "None" not in card and "rwr" in card
    tried = subprocess.run(out[out.index("Try it") :].splitlines()[1], shell=True, text=True)
    assert tried.returncode == 0, "the command that is printed at the end"
    model: Any = AutoModelForCausalLM.from_pretrained(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    ids = model.generate(**tokenizer("abc>", return_tensors="pt"), max_new_tokens=3)
    assert ids.shape[1] > 4


def test_the_saved_recipe_trains_to_the_same_model(run, whole, tmp_path):
    rewards = {"PYTHONPATH": str(whole.parent)}
    again = run("train", whole / "recipe.yaml", f"output_dir={tmp_path / 'again'}", **rewards)
    assert again[0] == 0, again[2]
    assert same(parameters(tmp_path / "again"), parameters(whole))


def test_a_lora_adapter_loads_with_plain_peft(run, write_recipe, tmp_path):
    code, out, err = run(
        "train", write_recipe(), "use_peft=true", "lora_target_modules=[q_proj, v_proj]"
    )
    assert code == 0, err
    assert "The LoRA adapter is in" in out
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.generate(**tokenizer("abc>", return_tensors="pt"), max_new_tokens=3).shape[1] > 4


def test_killed_at_any_step_and_resumed_a_run_ends_with_the_same_parameters(
    command, run, write_recipe, whole, tmp_path
):
    killed = write_recipe("killed")
    for step in (1, 4):  # in the middle of a rollout that serves two steps, and at its end
        process = command(
            "train", killed, *(["--resume"] if step > 1 else []), REWARD_SECONDS="0.5"
        )
        wait_for(tmp_path / "killed" / f"checkpoint-{step}")
        process.kill()
    code, _, err = run("train", killed, "--resume")
    assert code == 0, err
    assert same(parameters(tmp_path / "killed"), parameters(whole))
    rows = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows if "grad_norm" in row]
    assert steps == [1, 2, 3, 4, 5, 6], "each step is recorded once"


def test_a_half_written_checkpoint_is_passed_over(run, write_recipe, tmp_path):
    recipe = write_recipe()
    assert run("train", recipe, "max_steps=4")[0] == 0
    whole = parameters(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    (checkpoint / "model.safetensors").write_bytes(b"half")
    state = checkpoint / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    code, _, err = run("train", recipe, "max_steps=4", "--resume")
    assert code == 0, err
    assert same(parameters(tmp_path / "run"), whole)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows if "grad_norm" in row] == [1, 2, 3, 4]


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_resume(
    command, run, write_recipe, whole, tmp_path
):
    recipe = write_recipe("stopped")
    process = command("train", recipe, "save_strategy=no", REWARD_SECONDS="0.5")
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    wait_for(metrics)
    os.kill(process.pid, signal.SIGINT)
    code, _, err = process.end(timeout=120)
    assert code == 130
    step = int(found(r"Stopped at step (\d+)", err))
    assert 1 <= step < 6
    assert (tmp_path / "stopped" / f"checkpoint-{step}" / "trainer_state.json").is_file()
    resume = found(r"trl_ext (train --resume \S+)", err).split()
    assert run(*resume)[0] == 0
    assert same(parameters(tmp_path / "stopped"), parameters(whole))


def test_an_output_dir_that_holds_a_run_is_refused(run, write_recipe, tmp_path):
    recipe = write_recipe(max_steps=1)
    assert run("train", recipe)[0] == 0
    before = parameters(tmp_path / "run")
    code, _, err = run("train", recipe)
    assert code == 2
    assert "holds another run" in err and "--resume" in err and "--overwrite" in err
    assert same(parameters(tmp_path / "run"), before)
    assert run("train", recipe, "--overwrite")[0] == 0
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    code, _, err = run("train", recipe, f"output_dir={tmp_path / 'precious'}", "--overwrite")
    assert code == 2 and "no recipe.yaml" in err
    assert (tmp_path / "precious" / "thesis.txt").is_file()


def test_a_reward_that_raises_names_itself_the_sample_and_the_checkpoint(run, write_recipe):
    code, _, err = run("train", write_recipe(reward="my_rewards:broken"))
    assert code == 1
    assert "broken" in err and "the answer of sample 3" in err
    assert re.search(r"newest complete checkpoint is \S+checkpoint-\d+; go on from it with:", err)
    assert "Traceback" not in err


def test_a_full_disk_leaves_the_earlier_checkpoint(command, run, write_recipe, whole, tmp_path):
    """No file may grow over 60 kB once the first checkpoint (adapter and optimizer) is there."""
    recipe = write_recipe()
    process = command("train", recipe, REWARD_SECONDS="0.5")
    wait_for(tmp_path / "run" / "checkpoint-1" / "trainer_state.json")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    code, _, err = process.end(timeout=120)
    assert code == 1
    assert "Traceback" not in err
    assert re.search(r"Saving at step \d+ failed", err)
    newest = Path(found(r"newest complete checkpoint is (\S+);", err))
    assert (newest / "trainer_state.json").is_file()
    left = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert int(newest.name.split("-")[1]) == max(int(name.split("-")[1]) for name in left)
    code, _, err = run("train", recipe, "--resume")  # with room again
    assert code == 0, err
    assert same(parameters(tmp_path / "run"), parameters(whole))


def test_a_trainer_that_takes_no_reward_says_so(run, tmp_path, byte_llama):
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(
        f"trainer: sft\noutput_dir: {tmp_path / 'sft'}\nmodel_name_or_path: {byte_llama}\n"
        "dataset_name: char_reverse\nreward_funcs: [exact_match]\n"
    )
    code, _, err = run("train", recipe)
    assert code == 2
    assert "trainer: sft takes no reward_funcs" in err


def test_a_run_that_died_in_its_final_evaluation_takes_no_step_more(run, write_recipe, tmp_path):
    recipe = write_recipe(max_steps=2)
    assert run("train", recipe)[0] == 0
    before = parameters(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    code, out, err = run("train", recipe, "--resume")
    assert code == 0, err
    assert "The model is in" in out
    assert same(parameters(tmp_path / "run"), before)


def test_a_wrong_recipe_does_not_cost_the_run_that_it_would_replace(run, write_recipe, tmp_path):
    recipe = write_recipe(max_steps=1)
    assert run("train", recipe)[0] == 0
    code, _, err = run("train", recipe, "--overwrite", "dataset_kwargs.sise=3")
    assert code == 2, err
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_two_processes_train_stop_and_resume(run, write_recipe, tmp_path):
    two = ("num_processes=2", "per_device_train_batch_size=4", "eval_on_start=true")

    def launched(recipe: Path, **environment: str):
        # What the launcher, which the resumed run takes, adds: the processes and ddp_backend.
        arguments = ("train", str(recipe), *two, "ddp_backend=gloo")
        return two_ranks(trl_ext, *arguments, folder=tmp_path, environment=environment)

    for code, _, err in ended(launched(write_recipe("whole"))):
        assert code == 0, err[-9000:]
    recipe = write_recipe("killed")
    processes = launched(recipe, REWARD_SECONDS="0.5")
    wait_for(tmp_path / "killed" / "checkpoint-3" / "trainer_state.json")
    for process in processes:
        process.kill()
    code, out, err = run("train", recipe, *two, "--resume")
    assert code == 0, err[-9000:]
    assert "Launching:" in err and "Held-out prompts" in out
    assert same(parameters(tmp_path / "killed"), parameters(tmp_path / "whole"))


def test_overwrite_replaces_a_run_only_when_its_successor_can_be_built(run, write_recipe, tmp_path):
    recipe = write_recipe(max_steps=1)
    assert run("train", recipe)[0] == 0
    kept = tmp_path / "run" / "model.safetensors"
    wrong = (
        ("model_name_or_path=no/such/model", "cannot be opened"),
        ("stop_strings=[€]", "no token of"),
        ("lora_target_modules=[nope]", "cannot be built"),
        (f"model_name_or_path={tmp_path / 'run'}", "lies in the output_dir"),
    )
    for setting, says in wrong:
        code, _, err = run("train", recipe, "--overwrite", setting, "use_peft=true")
        assert code in (1, 2) and says in err, err[-2000:]
        assert "Traceback" not in err
        assert kept.is_file(), setting


def test_a_folder_with_a_recipe_is_not_a_run(run, write_recipe, tmp_path):
    recipe = write_recipe(max_steps=1)
    project = tmp_path / "project"
    project.mkdir()
    (project / "recipe.yaml").write_text(recipe.read_text())
    (project / "thesis.txt").write_text("mine")
    for flag in ("--overwrite", "--resume"):
        code, _, err = run("train", project / "recipe.yaml", flag, f"output_dir={project}")
        assert code == 2 and "holds files but no recipe.yaml and environment.json" in err
    assert (project / "thesis.txt").is_file()


def test_resume_with_another_recipe_is_refused_and_changes_nothing(run, write_recipe, tmp_path):
    recipe = write_recipe(max_steps=2)
    assert run("train", recipe)[0] == 0
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    code, _, err = run("train", recipe, "--resume", "learning_rate=0.5", "use_peft=true")
    assert code == 2
    assert "learning_rate: was 0.001, now 0.5" in err and "use_peft: was not set, now True" in err
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before
    code, _, err = run("train", recipe, "--resume", "max_steps=3", "logging_steps=2")
    assert code == 0, err


def test_a_damaged_checkpoint_is_named_with_the_one_before(run, write_recipe, tmp_path):
    recipe = write_recipe(max_steps=3)
    assert run("train", recipe)[0] == 0
    (tmp_path / "run" / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "model.safetensors").unlink()
    code, _, err = run("train", recipe, "--resume", "max_steps=4")
    assert code == 1 and "Traceback" not in err
    assert re.search(r"checkpoint-3 cannot be resumed from", err)
    earlier = found(r"--resume (\S+checkpoint-2)", err)
    code, _, err = run("train", recipe, "--resume", earlier, "max_steps=4")
    assert code == 0, err


def test_a_resumed_run_evaluates_at_its_end(run, write_recipe, tmp_path):
    recipe = write_recipe(max_steps=2)
    assert run("train", recipe, "eval_on_start=true")[0] == 0
    code, out, err = run("train", recipe, "eval_on_start=true", "max_steps=3", "--resume")
    assert code == 0, err
    assert "after = step 3" in out


def test_a_gradient_that_is_no_number_stops_before_the_weights(run, write_recipe, tmp_path):
    recipe = write_recipe(max_steps=3)
    code, _, err = run("train", recipe, "learning_rate=1e30")
    assert code == 1 and "Traceback" not in err
    assert "not finite" in err


def test_an_output_dir_that_cannot_be(run, write_recipe, tmp_path):
    recipe = write_recipe(max_steps=1)
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/no"):
        code, _, err = run("train", recipe, f"output_dir={folder}")
        assert code == 1 and "cannot be a run's folder" in err, err[-1000:]
        assert "Traceback" not in err
    assert (tmp_path / "file").read_text() == "mine"


def test_home_is_one_folder(run, write_recipe, tmp_path):
    recipe = write_recipe(max_steps=1)
    code, _, err = run("train", recipe, "output_dir=~/trained", HOME=str(tmp_path))
    assert code == 0, err
    assert (tmp_path / "trained" / "checkpoint-1").is_dir()
    assert (tmp_path / "trained" / "recipe.yaml").is_file()
    assert not (tmp_path / "~").exists()
