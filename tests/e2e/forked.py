"""Functions in processes of their own, forked from one that has imported torch and TRL.

Importing takes several seconds, a run on a tiny model less than one. Whoever tests the start itself
starts a fresh interpreter.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# Imported once, before any fork; what is missing here is only slower.
PRELOADED = [
    "tests.e2e.forked",
    "trl_ext.launch",
    "trl_ext.grpo.trainer",
    "trl_ext.ppo.trainer",
    "trl_ext.rwr.trainer",
    "trl.trainer.sft_trainer",
    "transformers.models.llama.modeling_llama",
]


@functools.cache
def _context():
    """Start the server that forks, with the variable that OpenMP reads only when it loads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
        never = context.Process(target=int)
        never.start()
        never.join()
    return context


class Forked:
    """`function(*arguments)` in a process of its own, which works in `folder`."""

    def __init__(
        self, function: Callable, *arguments: Any, folder: Path, environment: dict[str, str]
    ):
        self.printed = folder / f".printed-{time.monotonic_ns()}"
        self.printed.mkdir()
        self.process = _context().Process(
            target=_enter,
            args=(function, arguments, folder, self.printed, {**os.environ, **environment}),
            daemon=True,  # a test that fails leaves nothing to wait for
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    def end(self, timeout: float = 300) -> tuple[int, str, str]:
        """Wait for the end: exit code, standard output, standard error."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            pytest.fail(f"still runs after {timeout} s: {self._read('err')}")
        return self.process.exitcode, self._read("out"), self._read("err")

    def kill(self) -> None:
        """SIGKILL to it and to the processes that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.pid)
            for one in [started, *started.children(recursive=True)]:
                one.kill()
        self.process.join()

    def _read(self, stream: str) -> str:
        return (self.printed / stream).read_text()


def _enter(
    function: Callable, arguments: tuple, folder: Path, printed: Path, environment: dict[str, str]
) -> None:
    for descriptor, stream in ((1, "out"), (2, "err")):
        file = os.open(printed / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    gc.freeze()  # collecting over all that is imported takes longer than a run
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # What a fresh interpreter would do with the variable.
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    function(*arguments)


def trl_ext(*arguments: str) -> None:
    """`python -m trl_ext` with these arguments."""
    sys.argv = ["trl_ext", *arguments]
    runpy.run_module("trl_ext", run_name="__main__", alter_sys=True)


def two_ranks(*function: Any, folder: Path, environment: dict[str, str]) -> list[Forked]:
    """The same twice, as the two processes of one distributed run; the main process is first."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    run = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [
        Forked(
            *function,
            folder=folder,
            environment=environment | run | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def ended(ranks: list[Forked], patience: float = 0) -> list[tuple[int, str, str]]:
    """What each `end` gives, the first to end first.

    Where one fails, the others have `patience` seconds to end by themselves.
    """
    waiting: dict[Any, Forked] = {rank.process.sentinel: rank for rank in ranks}
    results = []
    while waiting:
        for ready in connection.wait(list(waiting), timeout=300) or list(waiting):
            results.append(waiting.pop(ready).end(timeout=1))
            if results[-1][0] != 0:
                for rank in waiting.values():
                    rank.process.join(patience)
                    rank.kill()
                return results + [rank.end() for rank in waiting.values() if patience]
    return results
