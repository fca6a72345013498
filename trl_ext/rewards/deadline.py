"""A time limit for one call of a reward, and a word to the user while a call is slow."""

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any

from trl_ext.errors import RewardError

logger = logging.getLogger(__name__)

WARN_AFTER = 60.0  # seconds; long for a reward, short against wondering why a run stands still
LONGEST_TIMEOUT = 86_400.0  # seconds, a day: timers overflow some way above
# Seconds. Other processes wait meanwhile, by default for half an hour before they give up.
OF_SEVERAL_PROCESSES = 45.0
SEARCH_OF_SEVERAL = 10.0  # and once more for the completion that it was


class RewardTimeout(RewardError):
    """A call took longer than its limit."""


class _OutOfTime(BaseException):
    """Not an `Exception`, so that a reward's own `except Exception` does not swallow it."""


@contextmanager
def deadline(name: str, completions: int, timeout: float | None) -> Iterator[None]:
    """Raise `RewardTimeout` when the body takes longer than `timeout` seconds.

    It uses SIGALRM, which exists on Linux and macOS and works in the main thread only; elsewhere
    a body that overruns is named in a warning and goes on. Code that never returns to Python (a
    call that blocks inside an extension) is stopped when it returns. A reward that sets SIGALRM
    itself, as math_verify does, switches this limit off for that call.

    Args:
        name: the reward's, for messages.
        completions: how many it scores, for messages.
        timeout: in seconds; None for no limit.
    """
    can_stop = hasattr(signal, "setitimer") and (
        threading.current_thread() is threading.main_thread()
    )
    with _slow_warning(name, completions, None if can_stop else timeout):
        if timeout is None or not can_stop:
            yield
            return
        try:
            with _alarm(timeout):
                yield
        except _OutOfTime:
            raise _overrun(name, completions, timeout) from None


@asynccontextmanager
async def async_deadline(name: str, completions: int, timeout: float | None) -> AsyncIterator[None]:
    """As `deadline`, for a coroutine; it can be stopped wherever it awaits, in any thread."""
    with _slow_warning(name, completions, None):
        try:
            async with asyncio.timeout(timeout) as limit:
                yield
        except TimeoutError:
            if not limit.expired():  # it is the reward's own error
                raise
            raise _overrun(name, completions, timeout) from None


def is_timeout(timeout: Any) -> bool:
    """Whether this is a number of seconds that a call may be limited to."""
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    return is_number and 0 < timeout <= LONGEST_TIMEOUT


def default_timeout(processes: int) -> float | None:
    """Seconds that a trainer gives a reward if nothing is said; None: any number.

    Args:
        processes: that train together, and wait for each other after each rollout.
    """
    return OF_SEVERAL_PROCESSES if processes > 1 else None


def search_timeout(timeout: float | None) -> float | None:
    """Seconds for finding the completion of a failed call whose limit was `timeout`.

    Where several processes train, no more than SEARCH_OF_SEVERAL: the failure ends them all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return timeout
    return SEARCH_OF_SEVERAL if timeout is None else min(timeout, SEARCH_OF_SEVERAL)


def _overrun(name: str, completions: int, timeout: float | None) -> RewardTimeout:
    assert timeout is not None  # nothing runs over no limit
    longer, default = min(10 * timeout, LONGEST_TIMEOUT), OF_SEVERAL_PROCESSES
    return RewardTimeout(
        f"The reward {name!r} took longer than its limit of {timeout:g} s for {completions} "
        "completions. Make it faster, give its own calls a time limit, or raise this one: "
        f"reward_timeout={longer:g}. (With several processes, which wait for each other, "
        f"{default:g} s is the default; with one there is no limit.)"
    )


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `_OutOfTime` in the body after that time; handler and timer are put back after it."""

    def ring(number: int, frame: FrameType | None) -> Any:
        raise _OutOfTime

    started = time.monotonic()
    earlier_handler = signal.signal(signal.SIGALRM, ring)
    earlier_delay, earlier_interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier_handler)
        if earlier_delay:
            # An earlier timer that ran out meanwhile rings at once.
            left = max(earlier_delay - (time.monotonic() - started), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, earlier_interval)


@contextmanager
def _slow_warning(name: str, completions: int, limit: float | None) -> Iterator[None]:
    """Warn once, while the body still runs, after WARN_AFTER seconds or an earlier limit."""
    wait = WARN_AFTER if limit is None else min(limit, WARN_AFTER)

    def warn() -> None:
        logger.warning(
            "The reward %r has been scoring %d completions for %g s and still runs.%s",
            name,
            completions,
            wait,
            " It cannot be stopped from this thread." if limit is not None else "",
        )

    timer = threading.Timer(wait, warn)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
