"""The process of an isolated reward, seen from the trainer: started, asked, ended.

It is started afresh from `sys.executable` and not by `multiprocessing`, whose children would import
the script that trains.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from trl_ext import errors
from trl_ext.errors import ConfigError, RewardError, TrlExtError

START_LIMIT = 120.0  # seconds for a reward to be made: it may import a large library
DEATH_LIMIT = 5.0  # seconds between a process's closing its end of the line and its exit
# With these a library in the reward's process would wait for the other processes of the run.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


class NotScored(Exception):
    """What the process did in place of answering, such as 'took longer than 5 s'."""


class RewardProcess:
    """A process that has made one reward, and the line to it.

    It ends with this object, at exit, and soon after this process is killed.

    Args:
        entry: the reward as in `reward_funcs`.
        timeout: seconds for one request.
        name: the reward's, for errors.

    Attributes:
        name: what the reward calls itself.
        asks_for: the columns that it wants of a trainer.

    Raises:
        ConfigError: if the entry cannot be sent.
        RewardError: if the process ends or hangs meanwhile.
        TrlExtError: what making the reward raises.
    """

    def __init__(self, entry: Any, timeout: float, name: str):
        self.timeout = timeout
        _check_travels(entry, name)
        self._connection, there = Pipe()
        with there:
            self._process = _started(there)
        self._end = weakref.finalize(self, _end, self._process, self._connection, os.getpid())
        try:
            kind, *rest = self._answer((entry, timeout), START_LIMIT)
        except NotScored as failure:
            raise RewardError(
                f"The reward {name!r} is isolated, and its process {failure} while it made the "
                "reward. Make the reward once in Python, without `isolated`, to see why."
            ) from None
        if kind == "error":
            raise error_of(*rest)
        self.name, self.asks_for = rest

    def ask(self, *request: Any) -> tuple[Any, ...]:
        """The answer to a request. Without one in time the process is ended.

        Raises:
            NotScored: if there is none.
        """
        return self._answer(request, self.timeout)

    def end(self) -> None:
        """Kill it."""
        self._end()

    def is_ready(self) -> bool:
        """Whether it runs and is a child of this process, not of one that this was forked from."""
        return self._end.alive and self._process.poll() is None

    def _answer(self, request: tuple[Any, ...], limit: float) -> tuple[Any, ...]:
        try:
            self._connection.send(request)
            if self._connection.poll(limit):
                return self._connection.recv()
        except (EOFError, OSError):
            raise NotScored(self._death()) from None
        except BaseException:  # Ctrl-C, a deadline: the answer may come later, to another request
            self._end()
            raise
        self._end()
        raise NotScored(f"took longer than {limit:g} s")

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(DEATH_LIMIT)
        status = self._process.returncode
        self._end()
        if status is None:
            return "closed the line to this one"
        if status < 0:
            names = {int(known): known.name for known in signal.Signals}
            return f"died of {names.get(-status, f'signal {-status}')}"
        return f"ended by itself, with status {status}"


def error_of(kind: str, message: str) -> TrlExtError:
    """An error of trl_ext that was raised in the process."""
    found = getattr(errors, kind, RewardError)
    return found(message)


def _check_travels(entry: Any, name: str) -> None:
    try:
        pickle.dumps(entry)
    except Exception as error:  # objects may refuse in any way
        raise ConfigError(
            f"The reward {name!r} is isolated, and its arguments cannot be sent to another "
            f"process: {error}. Give plain values, such as paths in place of what they hold."
        ) from error


def _started(line: Connection) -> subprocess.Popen:
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from trl_ext.rewards.worker import main; main({line.fileno()})"
    )
    # -u: what the reward printed before it was killed is seen.
    return subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        pass_fds=[line.fileno()],
        stdin=subprocess.DEVNULL,
        env={key: value for key, value in os.environ.items() if key not in RANK_VARIABLES},
        # Ctrl-C is for the trainer alone; and what the reward itself starts is killed with it.
        start_new_session=True,
    )


def _end(process: subprocess.Popen, connection: Connection, owner: int) -> None:
    connection.close()
    if os.getpid() != owner:  # a fork of the trainer: the process is not its own
        return
    # Also where it is gone itself: what it started may be there yet.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
