"""Rewards in a process of their own: what breaks costs one sample, and nothing is left behind."""

import asyncio
import logging
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trl_ext.errors import ConfigError, PluginError, RewardError, UnknownNameError
from trl_ext.rewards import build_rewards, guarded, isolated
from trl_ext.rewards.process import RewardProcess

HERE = "rewards_to_load"
FOLDER = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def loadable(monkeypatch):
    """Found by name here and, since sys.path travels, in the process too."""
    monkeypatch.syspath_prepend(FOLDER)


def built(name="breaks_on", **arguments):
    (reward,) = build_rewards([{"name": f"{HERE}:{name}", "isolated": True, **arguments}])
    return reward


def score(reward, completions, **columns):
    return reward(prompts=["p"] * len(completions), completions=completions, **columns)


def children() -> set[int]:
    """Process ids of this process's children, zombies among them."""
    folder = Path("/proc/self/task")
    return {
        int(child) for task in folder.iterdir() for child in (task / "children").read_text().split()
    }


def is_gone(process: int) -> bool:
    """Not there, or dead and not yet collected by whoever took it over."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_for(condition, seconds=10.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def test_what_breaks_costs_one_sample(caplog, capfd, monkeypatch):
    """Each way of breaking, with whole samples on both sides; a call of the guard as in a run."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is printed is seen all the same
    broken = {
        "sleep": "took longer than 1 s",
        "regex": "took longer than 1 s",
        "abort": "died of SIGABRT",
        "segfault": "died of SIGSEGV",
        "exit": "ended by itself, with status 3",
        "memory": "ran out of memory",
    }
    completions = ["one", *broken, "print", "three"]
    reward = guarded(built(timeout=1), "breaks_on", timeout=60)
    logged = {}
    with caplog.at_level(logging.WARNING):
        scores = score(reward, completions, log_metric=logged.__setitem__)
    assert scores == [3.0, *[None] * 6, 5.0, 5.0]
    assert logged == {"breaks_on/not_scored": 6 / 9}
    lines = [record.getMessage() for record in caplog.records]
    del broken["regex"]  # of the kind of the one before it
    assert lines == [
        "The reward 'breaks_on': one completion is not scored, because the reward's process "
        f"{what} on it. Sample {completions.index(text)} of 9: prompt 'p', completion '{text}'. "
        "This is said once; the metric breaks_on/not_scored is the share of such completions."
        for text, what in broken.items()
    ]
    assert capfd.readouterr().out == "a reward may print\nas it likes\n"


def test_the_process_is_another_after_a_failure_and_the_same_without(caplog):
    others = children()
    reward = built(timeout=5, failure_reward=-1)
    before = children()
    assert score(reward, ["a", "bb"]) == [1.0, 2.0]
    assert children() == before
    with caplog.at_level(logging.WARNING):
        assert score(reward, ["memory", "a"]) == [-1, 1.0]
        replaced = children()
        assert len(replaced) == len(before) and replaced != before
        assert score(reward, ["exit", "bb"]) == [-1, 2.0]
        assert score(reward, ["memory", "bb"]) == [-1, 2.0]
    assert len(caplog.records) == 2, "of each kind one, over all batches"
    assert "one completion gets -1, because the reward's process ran out of memory" in caplog.text
    after = children()
    assert len(after) == len(before) and after != replaced
    # Killed while idle, by the kernel say: nobody's fault.
    (process,) = after - others
    os.kill(process, 9)
    assert wait_for(lambda: not reward._process.is_ready())
    assert score(reward, ["a"]) == [1.0]
    assert len(children()) == len(before)


def test_nothing_is_left_when_the_reward_goes():
    before = children()
    reward = built()
    assert len(children()) == len(before) + 1
    del reward
    assert children() == before


def test_the_kernel_takes_the_rewards_process_first():
    """And keeps no picture of its memory on disk, where others leave one."""
    before = children()
    allowed = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (allowed[1], allowed[1]))
        reward = built()
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, allowed)
    (process,) = children() - before
    assert Path(f"/proc/{process}/oom_score_adj").read_text().strip() == "1000"
    limits = Path(f"/proc/{process}/limits").read_text()
    assert [line.split()[4] for line in limits.splitlines() if "core file size" in line] == ["0"]
    assert os.getsid(process) == process  # Ctrl-C in a terminal goes to the trainer's group
    assert score(reward, ["a"]) == [1.0]


SCRIPT = f"""
import sys, time
sys.path.insert(0, {FOLDER!r})
from trl_ext.rewards import build_rewards
entry = {{"name": "rewards_to_load:breaks_on", "isolated": True, "timeout": 0.5}}
(reward,) = build_rewards([entry])
print(reward._process._process.pid, flush=True)
"""


@pytest.mark.parametrize(
    ("then", "sent"),
    [
        ("reward(['p'], ['a'])", None),
        ("reward(['p'], ['sleep', 'a'] * 9)", 2),  # Ctrl-C within a call
        ("time.sleep(30)", 9),  # killed, so that it cannot clean up
        ("sys.exit(1)", None),
        ("raise ValueError", None),
    ],
)
def test_no_process_outlives_the_run(then, sent):
    """And a script without `if __name__ == '__main__'` is not run again in the child."""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + then],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    if sent is not None:
        variables = Path(f"/proc/{worker}/environ").read_bytes()
        assert b"WORLD_SIZE" not in variables and b"RANK" not in variables
        time.sleep(0.2)
        run.send_signal(sent)
    assert run.communicate(timeout=30)[0] == ""
    assert wait_for(lambda: is_gone(worker))


def test_a_process_that_nobody_waits_for_ends_itself():
    """Within C code that never returns, after its parent was killed: 0.5 s, and 2 s of grace."""
    then = (
        "import os\n"
        "reward._process._connection.send(({'prompts': ['p'], 'completions': ['regex']}, []))\n"
        "time.sleep(0.3); os.kill(os.getpid(), 9)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + then], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert run.stdout is not None
    process = int(run.stdout.readline())
    run.wait(30)
    started = time.monotonic()
    assert not is_gone(process)
    assert wait_for(lambda: is_gone(process))
    assert time.monotonic() - started > 1
    run.stdout.close()


def test_a_deadline_of_the_whole_call_ends_the_sample_and_no_answer_is_mixed_up():
    reward = built(timeout=30)
    with pytest.raises(RewardError, match=r"'mine' took longer than its limit of 0.4 s for 2"):
        score(guarded(reward, "mine", timeout=0.4), ["sleep", "a"])
    assert score(reward, ["abcd"]) == [4.0]


def test_after_a_fork_both_go_on():
    reward = built()
    process = reward._process._process.pid
    child = os.fork()
    if child == 0:
        code = 1
        try:
            own = score(reward, ["abc"]) == [3.0] and reward._process._process.pid != process
            code = 0 if own else 1
            del reward
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    pids = children()
    assert score(reward, ["abcd"]) == [4.0]
    assert children() == pids


def test_an_exception_is_the_error_that_it_is_without_isolation():
    said = []
    for reward in (built(), build_rewards([f"{HERE}:breaks_on"])[0]):
        with pytest.raises(RewardError) as caught:
            score(guarded(reward, "breaks_on"), ["a", "raise", "b"])
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "raised KeyError: 'raise'. Sample 1 of 3" in said[0]
    with pytest.raises(RewardError, match=r"^no such column$"):
        score(built("refuses_all"), ["a"])


def test_too_many_failures_in_a_row_are_the_rewards_own(monkeypatch):
    monkeypatch.setattr(isolated, "MOST_FAILURES", 3)
    reward = built()
    # A success between them starts the count anew, also across calls.
    assert score(reward, ["exit", "exit", "a", "exit"]) == [None, None, 1.0, None]
    with pytest.raises(RewardError, match="scored none of the last 3 completions: its process end"):
        score(reward, ["exit", "exit", "a"])


def test_columns_and_loggers_travel():
    logged = []
    reward = built("reads_columns", scale=2)
    scores = score(
        reward,
        ["a", "bb"],
        length=[3, 4],
        completion_ids=[[1], [2, 3]],
        trainer_state=object(),
        environments=[object(), object()],
        log_metric=lambda *pair: logged.append(pair),
        log_extra=lambda *pair: logged.append(pair),
    )
    # 2·(3 + 1 token), 2·(4 + 2 tokens)
    assert scores == [8.0, 12.0]
    assert ("length", [3, 4]) in logged  # a column of the table, whole
    logged.remove(("length", [3, 4]))
    assert logged == [("length", 3), ("length", 4), ("reads_columns/not_scored", 0.0)]
    assert reward.asks_for == {"prompt_ids"}


def test_cells_of_what_logged_nothing_are_empty():
    """TRL adds columns to its table as they come: as long as the batch, or rows would shift."""
    table = {}
    reward = built("logs_some", timeout=1)
    scores = score(reward, ["exit", "one", "", "three"], log_extra=table.__setitem__)
    assert scores == [None, 3.0, 0.0, 5.0]
    assert table == {"said": [None, "one", None, "three"]}
    assert score(reward, ["one"]) == [3.0]  # nobody listens
    with pytest.raises(RewardError, match=r"gave log_extra\('said', ...\) \['a', 'b'\] in place"):
        score(reward, ["both"], log_extra=table.__setitem__)


def test_a_fork_that_comes_back_answers_nobody():
    reward = built("starts")
    assert score(reward, ["fork"] * 3 + ["1", "22"]) == [4.0, 4.0, 4.0, 1.0, 2.0]


@pytest.mark.parametrize("how", ["gone", "exit", "killed"])
def test_what_a_reward_started_goes_with_it(how, tmp_path):
    """When the reward goes, when its process ends by itself, and when the trainer is killed."""
    file = tmp_path / "pid"
    if how == "killed":
        then = (
            f"(reward,) = build_rewards([{{**entry, 'name': '{HERE}:starts'}}])\n"
            f"reward(['p'], ['child {file}'])\nimport os; os.kill(os.getpid(), 9)"
        )
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        assert subprocess.run([sys.executable, "-c", SCRIPT + then], **quiet).returncode == -9
    else:
        reward = built("starts")
        assert score(reward, [f"child {file}"]) == [float(len(f"child {file}"))]
        assert not is_gone(int(file.read_text()))
        if how == "exit":
            assert score(reward, ["exit"]) == [None]
        else:
            del reward
    assert wait_for(lambda: is_gone(int(file.read_text())))


def test_two_hundred_calls_and_five_failures_leave_nothing():
    (reward,) = build_rewards([{"name": f"{HERE}:starts", "isolated": True}])
    score(reward, ["a"])
    before = children(), len(os.listdir("/proc/self/fd"))
    for call in range(200):
        assert score(reward, ["exit", "a"] if call % 40 == 0 else ["a"])[-1] == 1.0
    assert len(children()) == len(before[0])
    assert len(os.listdir("/proc/self/fd")) == before[1]


def test_what_cannot_be_made_in_another_process():
    for entry in (lambda completions: [], {"name": print}, 3):
        with pytest.raises(ConfigError, match="made in another process, so that it must be a name"):
            isolated.IsolatedReward(entry)  # type: ignore[arg-type]


def test_messages_async_rewards_and_tensors():
    messages = [[{"role": "assistant", "content": "abc"}]]
    assert score(built("longer"), messages) == [1.0]
    assert score(built("slow_longer", scale=2.0), ["abc"]) == [6.0]
    assert not asyncio.iscoroutinefunction(built("slow_longer"))
    assert score(built("gives_arrays"), ["abc", "a"]) == [[3.0, 3.0], 1.0]
    assert score(built("longer"), [], log_metric=print) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gives_one_number", "returned 1.0 in place of a list with one number, or None. Sample 0"),
        ("gives_two", r"returned \[1.0, 2.0\] in place of a list with one number"),
        ("gives_a_function", "when its result was sent. Sample 0 of 1"),
    ],
)
def test_what_is_no_result(name, says):
    with pytest.raises(RewardError, match=says):
        score(built(name), ["a"])


@pytest.mark.parametrize(
    ("entry", "error", "says"),
    [
        ({"isolated": "yes"}, ConfigError, "isolated is 'yes'; it must be true or false"),
        ({"isolated": 1}, ConfigError, "isolated is 1; it must be true or false"),
        ({"timeout": 0}, ConfigError, "timeout is 0; it must be > 0 and at most 86400 seconds"),
        ({"timeout": True}, ConfigError, "timeout is True"),
        ({"timeout": None}, ConfigError, "timeout is None"),
        ({"failure_reward": "0"}, ConfigError, "failure_reward is '0'; it must be a finite number"),
        ({"failure_reward": float("nan")}, ConfigError, "failure_reward is nan"),
        ({"failure_reward": True}, ConfigError, "failure_reward is True"),
        ({"marks": lambda: 0}, ConfigError, "its arguments cannot be sent to another process"),
        ({"marsk": 0}, RewardError, "no argument 'marsk'"),
        ({"isolated": False, "timeout": 3}, RewardError, "no argument 'timeout'"),
        ({"name": f"{HERE}:exits"}, RewardError, r"raised SystemExit: 0"),
        ({"name": f"{HERE}:dies"}, RewardError, "process ended by itself, with status 4 while it"),
        ({"name": f"{HERE}:nothing"}, PluginError, "cannot be loaded"),
        ({"name": "exact_mach"}, UnknownNameError, "Did you mean 'exact_match'"),
        ({"name": f"{HERE}:ChecksPolicy"}, ConfigError, "in the policy's process. Set isolated: f"),
    ],
)
def test_mistakes_are_found_when_it_is_made(entry, error, says):
    before = children()
    with pytest.raises(error, match=says):
        build_rewards([{"name": f"{HERE}:breaks_on", "isolated": True, **entry}])
    assert children() == before


def test_a_reward_that_hangs_when_made_is_given_up(monkeypatch):
    from trl_ext.rewards import process

    monkeypatch.setattr(process, "START_LIMIT", 0.5)
    with pytest.raises(RewardError, match=r"process took longer than 0.5 s while it made the rew"):
        built("never_made")


def test_a_reward_that_declares_it_is_isolated_unless_told():
    (reward,) = build_rewards([f"{HERE}:Declares"])
    assert isinstance(reward, isolated.IsolatedReward) and reward.timeout == 5
    (reward,) = build_rewards([{"name": f"{HERE}:Declares", "timeout": 2}])
    assert reward.timeout == 2  # type: ignore[attr-defined]
    (reward,) = build_rewards([{"name": f"{HERE}:Declares", "isolated": False}])
    assert type(reward).__name__ == "Declares"


def test_what_is_isolated_is_not_imported_here():
    program = (
        f"import sys; sys.path.insert(0, {FOLDER!r}); from trl_ext.rewards import build_rewards\n"
        f"build_rewards([{{'name': '{HERE}:longer', 'isolated': True}}])\n"
        f"print([m for m in ('{HERE}', 'torch', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_the_process_starts_without_torch():
    reward = RewardProcess({"name": f"{HERE}:modules", "isolated": False}, 5.0, "modules")
    answer = reward.ask({"prompts": ["p"], "completions": ["torch"]}, [])
    assert answer[:2] == ("values", [0.0])
    reward.end()
