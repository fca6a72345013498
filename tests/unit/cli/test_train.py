"""What `train` hands over, and how several processes are started."""

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from trl_ext.cli import launcher
from trl_ext.errors import RunError


@pytest.fixture
def calls(home, monkeypatch) -> list[dict]:
    """Each call of `trl_ext.launch.train`, with the environment at that moment."""
    seen = []

    def train(recipe, *, resume=False, overwrite=False):
        seen.append(
            {"recipe": recipe, "resume": resume, "overwrite": overwrite, "env": dict(os.environ)}
        )

    monkeypatch.setitem(sys.modules, "trl_ext.launch", types.SimpleNamespace(train=train))
    monkeypatch.delenv("SOME_VARIABLE", raising=False)
    return seen


@pytest.mark.parametrize(
    ("argv", "resume", "overwrite", "seed"),
    [
        ([], False, False, 7),
        (["--overwrite", "seed=1"], False, True, 1),
        (["--resume"], True, False, 7),
        (["--resume", "out/checkpoint-3", "seed=1"], "out/checkpoint-3", False, 1),
        (["--resume", "seed=1"], True, False, 1),
        (["--seed", "1", "--resume"], True, False, 1),
        (["--seed=1", "--resume=c"], "c", False, 1),
    ],
)
def test_arguments(calls, trl_ext, argv, resume, overwrite, seed):
    code, _, err = trl_ext("train", "rwr/first", *argv)
    assert code == 0, err
    (call,) = calls
    assert (call["resume"], call["overwrite"]) == (resume, overwrite)
    assert call["recipe"].values["seed"] == seed


@pytest.mark.parametrize(
    ("argv", "seed"),
    [
        (["--resume", "rwr/first"], 7),
        (["--resume", "rwr/first", "seed=1"], 1),
        (["--resume", "mine.yaml", "seed=1"], 1),
    ],
)
def test_resume_before_the_recipe_is_not_a_checkpoint(calls, trl_ext, home, argv, seed):
    Path("mine.yaml").write_text(f"extends: {home / 'recipes/rwr/first.yaml'}\n")
    code, _, err = trl_ext("train", *argv)
    assert code == 0, err
    assert calls[0]["resume"] is True
    assert calls[0]["recipe"].values["seed"] == seed


def test_no_recipe(calls, trl_ext):
    code, _, err = trl_ext("train", "--resume")
    assert code == 2 and "no recipe is given" in err
    assert calls == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--resume", "--overwrite"], "Choose one"),
        (["--resume=c", "--overwrite"], "Choose one"),
        (["--resume", ""], "names no checkpoint"),
        (["--resume="], "names no checkpoint"),
    ],
)
def test_a_resume_that_means_nothing(calls, trl_ext, argv, says):
    code, _, err = trl_ext("train", "rwr/first", *argv)
    assert code == 2 and says in err
    assert calls == []


def test_overwrite_reaches_the_launched(calls, trl_ext, monkeypatch):
    command = launched(monkeypatch, trl_ext, 0, "num_processes=2", "--overwrite")
    assert command[command.index("rwr/first") + 1] == "--overwrite"


def test_the_environment_is_set_before_training(calls, trl_ext, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert trl_ext("train", "rwr/first", "env.SOME_VARIABLE=1e3")[0] == 0
    assert calls[0]["env"]["SOME_VARIABLE"] == "1e3"


def test_a_bad_recipe_starts_nothing(calls, trl_ext):
    assert trl_ext("train", "rwr/first", "beta=x")[0] == 2
    assert calls == []


def launched(monkeypatch, trl_ext, devices, *argv):
    """The command that `train` becomes, without the interpreter."""
    commands = []

    def execv(path, command):
        commands.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(launcher, "_device_count", lambda: devices)
    code, _, err = trl_ext("train", "rwr/first", *argv)
    assert code == 0, err
    return commands[0][1:]


def test_several_processes_without_an_accelerator(calls, trl_ext, monkeypatch):
    argv = ["num_processes=2", "--resume", "c", "--seed", "1"]
    assert launched(monkeypatch, trl_ext, 0, *argv) == [
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
        "-m", "trl_ext", "train", "rwr/first", "--resume", "c",
        "num_processes=2", "--seed", "1", "ddp_backend=gloo",
    ]  # fmt: skip
    assert calls == []


def test_several_processes_with_accelerators(calls, trl_ext, monkeypatch):
    assert launched(monkeypatch, trl_ext, 4, "num_processes=2") == [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
        "--num_machines=1", "-m", "trl_ext", "train", "rwr/first", "num_processes=2",
    ]  # fmt: skip


def test_an_accelerate_config(calls, trl_ext, monkeypatch):
    command = launched(monkeypatch, trl_ext, 8, "accelerate_config=zero2")
    assert command[:2] == ["-m", "accelerate.commands.launch"]
    assert command[2].startswith("--config_file=") and command[2].endswith("zero2.yaml")
    assert "--num_processes=8" in command  # as zero2.yaml says


def test_a_child_trains_in_process(calls, trl_ext, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("launched again"))
    assert trl_ext("train", "rwr/first", "num_processes=2")[0] == 0
    assert len(calls) == 1


def command(devices, monkeypatch, *, values=None, **keys):
    recipe: Any = types.SimpleNamespace(launcher=keys, values=values or {})
    monkeypatch.setattr(launcher, "_device_count", lambda: devices)
    return launcher.launch_command(recipe, ["train", "x"])[1:]


def test_a_backend_is_named_on_a_cpu_and_ones_own_is_kept(monkeypatch):
    # Without one, transformers builds no process group and each process trains alone.
    assert command(0, monkeypatch, num_processes=2)[-1] == "ddp_backend=gloo"
    values = {"ddp_backend": "mpi"}
    assert command(0, monkeypatch, values=values, num_processes=2)[-1] == "x"


def test_use_cpu_hides_the_accelerators(monkeypatch):
    made = command(2, monkeypatch, values={"use_cpu": True}, num_processes=4)
    assert made[:3] == ["-m", "torch.distributed.run", "--nproc_per_node=4"]


def test_several_machines(monkeypatch):
    keys = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "a", "main_process_port": 5}
    assert command(0, monkeypatch, num_processes=4, **keys)[2:-5] == [
        "--nproc_per_node=2", "--nnodes=2", "--node_rank=1", "--master_addr=a", "--master_port=5",
    ]  # fmt: skip
    assert command(2, monkeypatch, num_processes=4, **keys)[2:-4] == [
        "--multi_gpu", "--num_processes=4", "--num_machines=2", "--machine_rank=1",
        "--main_process_ip=a", "--main_process_port=5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "keys", "message"),
    [
        (1, {"num_processes": 2}, "this machine, which has 1 accelerator. Give num_processes=1"),
        (2, {"accelerate_config": "zero1"}, "8 processes are asked for .* has 2 accelerators"),
        (0, {"accelerate_config": "fsdp2"}, "asks for FSDP, and this machine has no accelerator"),
        (0, {"accelerate_config": "zero2", "num_processes": 1}, "asks for DEEPSPEED"),
        (0, {"num_processes": 3, "num_machines": 2}, "not a multiple of num_machines 2"),
    ],
)
def test_fewer_processes_than_asked_for_is_an_error(monkeypatch, devices, keys, message):
    with pytest.raises(RunError, match=message):
        command(devices, monkeypatch, **keys)


def test_only_a_request_for_processes_launches():
    assert not launcher.wants_processes({})
    assert not launcher.wants_processes({"num_processes": 1, "num_machines": 1})
    assert launcher.wants_processes({"num_processes": 2})
    assert launcher.wants_processes({"num_machines": 2})
    assert launcher.wants_processes({"accelerate_config": "single_gpu"})
