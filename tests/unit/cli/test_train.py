"""What `train` hands over, and how several processes are started."""

import os
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from trl_ext.callbacks import Stopped
from trl_ext.cli import launcher, main
from trl_ext.cli import train as train_command
from trl_ext.errors import DataError, OutOfMemoryError, RewardError, RunError


@pytest.fixture
def calls(home, monkeypatch) -> list[dict]:
    """Each call of `trl_ext.launch.train`, with the environment at that moment."""
    seen = []

    def train(recipe, **options):
        seen.append({"recipe": recipe, **options, "env": dict(os.environ)})
        return "finished"

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


@pytest.fixture
def ran(home) -> Path:
    """A folder as a run leaves it, begun from elsewhere."""
    folder = Path("runs/a")
    (folder / "checkpoint-3").mkdir(parents=True)
    recipe = f"extends: {home / 'recipes/rwr/first.yaml'}\noutput_dir: /somewhere/else\n"
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "environment.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("argv", "resume", "seed"),
    [
        (["--resume", "runs/a"], True, 7),
        (["--resume=runs/a/"], True, 7),
        (["--resume", "runs/a", "seed=1"], True, 1),
        (["--resume", "runs/a", "--seed=1"], True, 1),
        (["seed=1", "--resume", "runs/a"], True, 1),
        (["--resume", "runs/a/checkpoint-3", "seed=1"], "runs/a/checkpoint-3", 1),
        (["--resume", "runs/a", "--seed", "1"], True, 1),
        (["--seed", "1", "--resume", "runs/a"], True, 1),
        (["--resume", "runs/a", "--save_steps", "3", "--seed", "1"], True, 1),
        (["--resume", "runs/a", "--save_steps=3", "--seed", "1"], True, 1),
        (["--resume", "runs/a", "--seed", "1", "save_steps=3"], True, 1),
        (["--resume", "runs/a/checkpoint-3", "--seed", "1"], "runs/a/checkpoint-3", 1),
    ],
)
def test_a_run_is_gone_on_with_by_its_folder_alone(calls, trl_ext, ran, argv, resume, seed):
    code, _, err = trl_ext("train", *argv)
    assert code == 0, err
    (call,) = calls
    assert call["resume"] == resume
    assert call["recipe"].values["seed"] == seed
    assert Path(call["recipe"].values["output_dir"]).resolve() == ran.resolve()


def test_launched_it_is_the_same_run(calls, trl_ext, ran, monkeypatch):
    commands = []
    monkeypatch.setattr(train_command, "launched", lambda *given: commands.append(given[0]) or 0)
    monkeypatch.setattr(launcher, "_device_count", lambda: 0)
    assert trl_ext("train", "--resume", str(ran), "num_processes=2")[0] == 0
    arguments = commands[0][commands[0].index("train") :]
    assert arguments[:4] == ["train", "runs/a/recipe.yaml", "--resume", 'output_dir="runs/a"']
    assert calls == []


def test_a_folder_that_is_no_run_is_not_gone_on_with(calls, trl_ext, ran):
    Path("empty").mkdir()
    code, _, err = trl_ext("train", "--resume", "empty")
    assert code == 2 and "empty is no run and no checkpoint of one" in err
    (ran / "iterate.json").write_text("{}")
    code, _, err = trl_ext("train", "--resume", "runs/a")
    assert code == 2 and "trl_ext iterate runs/a/recipe.yaml --resume" in err
    assert calls == []


def last(err: str) -> str:
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (None, 0, "trl_ext: finished, exit code 0; output_dir: runs/a"),
        (RewardError("no"), 1, "trl_ext: failed (RewardError), exit code 1; resume: "),
        (RunError("no"), 1, "trl_ext: failed (RunError), exit code 1; resume: "),
        (DataError("no"), 2, "trl_ext: failed (DataError), exit code 2"),
        (Stopped(15), 143, "trl_ext: stopped (SIGTERM), exit code 143; resume: "),
        (Stopped(2), 130, "trl_ext: stopped (SIGINT), exit code 130; resume: "),
        (KeyboardInterrupt(), 130, "trl_ext: stopped (SIGINT), exit code 130; resume: "),
    ],
)
def test_the_exit_code_and_the_last_line(calls, trl_ext, ran, monkeypatch, raised, code, line):
    def train(recipe, **_):
        if raised is not None:
            raise raised
        return "finished"

    monkeypatch.setattr(sys.modules["trl_ext.launch"], "train", train)
    ended, out, err = trl_ext("train", "--resume", "runs/a")
    assert ended == code
    assert last(err).startswith(line) and out == ""
    assert last(err).endswith("train --resume runs/a") == ("resume: " in line)
    assert ("no" in err.splitlines()[0]) == isinstance(raised, RewardError | RunError | DataError)


def test_a_recipe_that_cannot_be_read_ends_with_the_line_too(calls, trl_ext):
    code, _, err = trl_ext("train", "rwr/first", "beta=x")
    assert (code, last(err)) == (2, "trl_ext: failed (ConfigError), exit code 2")


def test_what_nobody_foresaw_keeps_its_traceback_and_ends_with_the_line(
    calls, trl_ext, ran, monkeypatch
):
    def train(recipe, **_):
        raise AttributeError("deep inside")

    monkeypatch.setattr(sys.modules["trl_ext.launch"], "train", train)
    with pytest.raises(AttributeError) as caught:
        trl_ext("train", "--resume", "runs/a")
    assert caught.value.__notes__[-1].startswith("trl_ext: failed (AttributeError), exit code 1; r")


def test_a_launched_process_tells_the_one_above_once(calls, trl_ext, ran, monkeypatch):
    def train(recipe, **_):
        raise fails

    monkeypatch.setattr(sys.modules["trl_ext.launch"], "train", train)
    told = Path("told")
    monkeypatch.setenv("TRL_EXT_TOLD", str(told))
    monkeypatch.setenv("RANK", "1")
    fails: BaseException = RewardError("no")
    for _ in range(2):
        assert trl_ext("train", "--resume", "runs/a")[0] == 1
        first, error, line = told.read_text().splitlines()
        assert (first, error) == ("1", "Error of process 1: no")
        assert line.startswith("trl_ext: failed (RewardError), exit code 1; resume: ")
        fails = RunError("and then")  # what came first stays
    told.unlink()
    monkeypatch.setenv("RANK", "0")
    fails = Stopped(15)
    code, _, err = trl_ext("train", "--resume", "runs/a")
    assert code == 0 and err == ""  # no crash, to the launcher
    assert told.read_text().startswith("143\ntrl_ext: stopped (SIGTERM), exit code 143; resume: ")


# What stands in for a launcher: it starts one process, waits for it, reports at length.
LAUNCHER = """
import subprocess, sys
code = subprocess.call([sys.executable, "-c", sys.argv[1]])
print("A long report.", file=sys.stderr)
sys.exit(1 if code else 0)
"""
# A process of a run: waits for a signal, or fails.
PROCESS = """
import os, signal, sys, time
told = os.environ["TRL_EXT_TOLD"]
def stop(number, frame):
    open(told, "w").write(f"{128 + number}\\ntrl_ext: stopped ({number})")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
"""


def under(program: str, capfd) -> tuple[int, str]:
    command = [sys.executable, "-c", LAUNCHER, PROCESS + program]
    code = train_command.launched(command, train_command.Ending())
    return code, capfd.readouterr().err


@pytest.mark.parametrize(
    ("program", "code", "says"),
    [
        ("", 0, "trl_ext: finished, exit code 0"),
        ("sys.exit(1)", 1, "trl_ext: failed (in the launcher), exit code 1"),
        ("open(told, 'w').write('2\\nError.\\nlast'); sys.exit(2)", 2, "Error.\nlast"),
        # The first to end has finished, and another has failed after that.
        ("open(told, 'w').write('0\\nlast'); sys.exit(1)", 1, "failed (in the launcher)"),
    ],
)
def test_a_launched_run_ends_with_the_line_of_its_first_process(home, capfd, program, code, says):
    ended, err = under(program, capfd)
    assert ended == code
    assert err.index("A long report.") < err.index(says)


@pytest.mark.parametrize(
    ("signals", "program", "code", "line"),
    [
        ([signal.SIGTERM], "", 143, "trl_ext: stopped (15)"),
        # Not yet so far that it can stop in order: it dies of it.
        ([signal.SIGTERM], "signal.signal(15, signal.SIG_DFL)", 143, "trl_ext: stopped (SIGTERM)"),
        # It does not listen; the second Ctrl-C ends it.
        ([signal.SIGINT] * 2, "signal.signal(2, signal.SIG_IGN)", 130, "trl_ext: stopped (SIGINT)"),
    ],
)
def test_a_signal_reaches_the_launched_processes_and_not_the_launcher(
    home, capfd, signals, program, code, line
):
    """The stand-in dies of a SIGTERM of its own: its report would be missing."""

    def send():
        while not Path("ready").exists():
            time.sleep(0.01)
        for number in signals:
            time.sleep(0.2)
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    sender = threading.Thread(target=send)
    sender.start()
    ended, err = under(f"{program}\nopen('ready', 'w')\ntime.sleep(60)", capfd)
    sender.join()
    assert ended == code and line in last(err)
    assert ("A long report." in err) == (len(signals) == 1)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


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
    """The command that `train` launches, without the interpreter."""
    commands = []

    def run(command, ending):
        commands.append(command)
        return 0

    monkeypatch.setattr(train_command, "launched", run)
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
    monkeypatch.setattr(train_command, "launched", lambda *_: pytest.fail("launched again"))
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


@pytest.fixture
def no_room(monkeypatch):
    """`train` runs out of memory in a phase that is set, in a process of its own."""
    phases: list[str] = []
    programs: list[list[str]] = []

    def train(recipe, **_):
        raise OutOfMemoryError("No room.", phases[0])

    def execv(path, program):
        programs.append(program[1:])
        raise SystemExit(0)

    monkeypatch.setitem(sys.modules, "trl_ext.launch", types.SimpleNamespace(train=train))
    monkeypatch.setattr(os, "execv", execv)
    return phases, programs


@pytest.mark.parametrize("phase", ["score", "train"])
def test_out_of_memory_goes_on_with_smaller_micro_batches(home, trl_ext, no_room, capsys, phase):
    phases, programs = no_room
    phases.append(phase)
    argv = ["--overwrite", "seed=1", "per_device_train_batch_size=6", "steps_per_generation=4"]
    with pytest.raises(SystemExit):
        main(["train", "rwr/first", *argv])
    smaller = ["per_device_train_batch_size=3", "gradient_accumulation_steps=2"]
    expected = ["rwr/first", "--resume", *argv[1:], *smaller, "steps_per_generation=8"]
    assert programs == [["-m", "trl_ext", "train", *expected]]
    assert f"No room.\nGoing on with {' '.join(smaller)}" in capsys.readouterr().err.replace(
        "the same batch in smaller parts: ", ""
    )


def test_a_vllm_in_the_process_does_not_make_it_a_launched_one(home, trl_ext, no_room, monkeypatch):
    """TRL sets these for a colocated vLLM: what goes on would look for other processes."""
    phases, programs = no_room
    phases.append("train")
    ours = sys.modules["trl_ext.launch"].train

    def with_vllm(recipe, **options):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.setenv(name, "0")
        return ours(recipe, **options)

    monkeypatch.setattr(sys.modules["trl_ext.launch"], "train", with_vllm)
    with pytest.raises(SystemExit):
        main(["train", "rwr/first", "per_device_train_batch_size=6", "steps_per_generation=4"])
    assert len(programs) == 1
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} & os.environ.keys()


@pytest.mark.parametrize(
    ("phase", "argv"),
    [
        ("generate", []),
        ("train", ["--keep-batch"]),
        ("train", ["per_device_train_batch_size=1", "gradient_accumulation_steps=8"]),
    ],
)
def test_out_of_memory_ends_the_run(home, trl_ext, no_room, phase, argv):
    phases, programs = no_room
    phases.append(phase)
    code, _, err = trl_ext("train", "rwr/first", *argv)
    assert code == 3 and programs == []
    assert err == "Error: No room.\ntrl_ext: failed (OutOfMemoryError), exit code 3\n"


def test_launched_processes_without_room_are_launched_again(home, trl_ext, monkeypatch):
    commands: list[list[str]] = []

    def run(command, ending):
        commands.append(command)
        ending.phase = "train" if len(commands) == 1 else None
        return 3 if len(commands) == 1 else 0

    monkeypatch.setattr(train_command, "launched", run)
    monkeypatch.setattr(launcher, "_device_count", lambda: 0)
    argv = ["num_processes=2", "per_device_train_batch_size=4"]
    assert trl_ext("train", "rwr/first", "--probe", *argv)[0] == 0
    first, second = (command[command.index("train") + 1 :] for command in commands)
    assert first == ["rwr/first", "--probe", *argv, "ddp_backend=gloo"]
    smaller = ["per_device_train_batch_size=2", "gradient_accumulation_steps=2"]
    assert second == ["rwr/first", "--probe", "--resume", *argv, *smaller, "ddp_backend=gloo"]


def test_a_launched_process_tells_the_phase_of_too_little_memory(
    home, trl_ext, no_room, monkeypatch
):
    no_room[0].append("train")
    monkeypatch.setenv("TRL_EXT_TOLD", "told")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    assert trl_ext("train", "rwr/first")[0] == 3
    assert Path("told").read_text().startswith("3 train\nError of process 0: No room.\n")


def test_what_was_told_of_the_phase_is_read(home, capfd):
    ending = train_command.Ending()
    program = "open(os.environ['TRL_EXT_TOLD'], 'w').write('3 score\\nError.')"
    code = train_command.launched([sys.executable, "-c", f"import os; {program}"], ending)
    assert (code, ending.phase) == (3, "score")
