"""The process that an isolated reward runs in: builds it, scores one sample a request.

It imports neither torch nor transformers, so that it starts in a fraction of a second and a crash
costs little; a reward may import what it likes.
"""

import asyncio
import contextlib
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trl_ext.errors import TrlExtError
from trl_ext.rewards.build import build_rewards
from trl_ext.rewards.columns import asked_for
from trl_ext.rewards.guard import FAILURES, is_async, raised

GRACE = 2.0  # seconds after the limit, for the other side to kill this process first


def main(descriptor: int) -> None:
    """Serve the process at the other end of this file descriptor until it closes it."""
    os.set_inheritable(descriptor, False)
    _be_first_to_go()
    with Connection(descriptor) as connection, contextlib.suppress(EOFError, BrokenPipeError):
        entry, timeout = connection.recv()
        reward, reply = _built(entry)
        connection.send(reply)
        own = os.getpid()
        while reward is not None:
            sample, loggers = connection.recv()
            with _alarm(timeout + GRACE):
                reply = _scored(reward, sample, loggers)
                if os.getpid() != own:
                    os._exit(0)  # a fork of the reward's came back, and would answer twice
                _send(connection, reply)
    _end_what_it_started()


def _be_first_to_go() -> None:
    """Let the kernel end this process before the run when memory is short, and keep no core."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    adjustment = Path("/proc/self/oom_score_adj")
    if adjustment.exists():  # Linux
        adjustment.write_text("1000")


def _end_what_it_started() -> None:
    """Kill the processes that the reward left behind, when the other side is gone."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


def _built(entry: Any) -> tuple[Callable[..., Any] | None, tuple[Any, ...]]:
    try:
        (reward,) = build_rewards([entry])
    except TrlExtError as error:
        return None, ("error", type(error).__name__, str(error))
    name = getattr(reward, "__name__", type(reward).__name__)
    if hasattr(reward, "check_policy") or hasattr(reward, "check_tokenizer"):
        message = (
            f"The reward {name!r} is isolated, and checks the policy against its own model: it has "
            "to be in the policy's process. Set isolated: false."
        )
        return None, ("error", "ConfigError", message)
    return reward, ("ready", name, set(asked_for(reward)))


def _scored(
    reward: Callable[..., Any], sample: dict[str, Any], loggers: list[str]
) -> tuple[Any, ...]:
    """What to answer: a kind, and what belongs to it."""
    metrics: list[tuple[str, float]] = []
    extras: list[tuple[str, Any]] = []
    logs = {
        "log_metric": lambda name, value: metrics.append((name, float(value))),
        "log_extra": lambda column, values: extras.append((column, _plain(values))),
    }
    try:
        values = reward(**sample, **{name: logs[name] for name in loggers})
        if is_async(reward):
            values = asyncio.run(values)
        return "values", _plain(values), metrics, extras
    except MemoryError:
        return ("memory",)
    except TrlExtError as error:
        return "error", type(error).__name__, str(error)
    except FAILURES as error:
        return "raised", raised(error)


def _send(connection: Connection, reply: tuple[Any, ...]) -> None:
    try:
        connection.send(reply)
    except (BrokenPipeError, ConnectionResetError):
        raise EOFError from None
    except FAILURES as error:  # a reward may return anything
        connection.send(("raised", f"{raised(error)}, when its result was sent"))


def _plain(values: Any) -> Any:
    """Arrays and tensors as lists and numbers: the other side need not have their library."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return [_plain(value) for value in values] if isinstance(values, list | tuple) else values


@contextlib.contextmanager
def _alarm(seconds: float) -> Any:
    """Let the kernel end this process when nobody is left to do so, inside C code too."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
