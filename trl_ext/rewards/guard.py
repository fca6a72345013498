"""Rewards that fail by name: which reward, which sample, what it gave, what to do.

TRL trains on a NaN reward as "does not apply", takes any infinity, and reports an exception
without the sample. A guarded reward raises `RewardError` instead.
"""

import contextlib
import functools
import inspect
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from trl_ext.errors import ConfigError, RewardError
from trl_ext.rewards.columns import asked_for
from trl_ext.rewards.deadline import (
    LONGEST_TIMEOUT,
    RewardTimeout,
    async_deadline,
    deadline,
    is_timeout,
    search_timeout,
)
from trl_ext.rewards.returned import Checked, cut, shown

# What a reward's failure is. sys.exit in a reward would end the run as if it had succeeded.
FAILURES = (Exception, SystemExit)
# Columns by which a reward writes to TRL's logs; switched off while a failure is looked into.
LOGGERS = ("log_extra", "log_metric")
NO_CULPRIT = (
    "Each completion alone is scored without an error, so it is the batch that it cannot take. "
    "On the command line, --debug shows the traceback."
)
NOT_FOUND = "Which completion it was could not be found in time."


def guarded(reward_func: Any, name: str, timeout: float | None = None) -> Any:
    """The same reward, raising `RewardError` when it fails or returns what is not a reward.

    Args:
        reward_func: a reward function, sync or async. A model (`nn.Module`) and a model's name
            are returned as they are: TRL itself calls those.
        name: what the reward is called in errors, and its `__name__`, so that TRL's metrics keep
            their names.
        timeout: seconds that one call may take; None for any number. See `deadline` for where
            this can only warn.

    Returns:
        A function of the same kind. It gives a list of floats; None, TRL's "does not apply",
        stays None, and a list of one number a token becomes its sum. Its `checked.token_rewards`
        has those lists, and its `asks_for` the columns that it wants of a policy trainer
        (`trl_ext.rewards.columns`).

    Raises:
        ConfigError: if it is none of these, or the time limit is not one.
    """
    import torch

    if isinstance(reward_func, str | torch.nn.Module):
        return reward_func
    _check_reward(reward_func, name, timeout)
    wrap = _guarded_async if is_async(reward_func) else _guarded_sync
    checked = Checked(name)
    wrapper = wrap(reward_func, name, timeout, checked)
    wrapper.checked = checked
    wrapper.asks_for = asked_for(reward_func)
    wrapper.check_tokenizer = getattr(reward_func, "check_tokenizer", None)
    wrapper.check_policy = getattr(reward_func, "check_policy", None)
    wrapper.__name__ = name
    wrapper.__doc__ = reward_func.__doc__
    return wrapper


def guarded_all(reward_funcs: Any, timeout: float | None) -> Any:
    """A trainer's reward functions, one or a list, each guarded under its own name."""
    if reward_funcs is None:
        return None
    several = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    return [guarded(reward_func, _name_of(reward_func), timeout) for reward_func in several]


def _name_of(reward_func: Any) -> str:
    # A partial has no name of its own.
    named = getattr(reward_func, "func", reward_func)
    return getattr(reward_func, "__name__", None) or getattr(
        named, "__name__", type(named).__name__
    )


def _check_reward(reward_func: Any, name: str, timeout: Any) -> None:
    if not callable(reward_func):
        raise ConfigError(
            f"A reward function is given as {cut(reward_func)}, a {type(reward_func).__name__}. "
            "It must be a function (prompts, completions, **columns) -> one number a completion, "
            "a model (torch.nn.Module) or a model's name; several go into a list."
        )
    if timeout is not None and not is_timeout(timeout):
        raise ConfigError(
            f"The time limit of the reward {name!r} is {timeout!r}; it must be > 0 and at most "
            f"{LONGEST_TIMEOUT:g} seconds, or None for no limit."
        )


def is_async(function: Any) -> bool:
    """Whether a call gives something to await."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an instance's async __call__
    )


def _guarded_sync(
    reward_func: Callable[..., Any], name: str, timeout: float | None, checked: Checked
) -> Callable[..., list[float | None]]:
    def reward(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        try:
            with deadline(name, len(completions), timeout):
                values = reward_func(prompts=prompts, completions=completions, **columns)
        except RewardTimeout as failure:
            found = slowest(prompts, completions, columns)
            raise RewardTimeout(f"{failure} {found}") from None
        except RewardError:
            raise
        except FAILURES as failure:
            raise explained(name, raised(failure), find(prompts, completions, columns)) from failure
        return checked(values, prompts, completions, columns.get("completion_ids"))

    def find(prompts: list, completions: list, columns: dict[str, Any]) -> str:
        try:
            with deadline(name, len(completions), search_timeout(timeout)):
                for index, sample in enumerate(samples(prompts, completions, columns)):
                    try:
                        reward_func(**sample)
                    except FAILURES:
                        return culprit(index, prompts, completions)
        except RewardError:
            return NOT_FOUND
        return NO_CULPRIT

    def slowest(prompts: list, completions: list, columns: dict[str, Any]) -> str:
        starts = [time.monotonic()]
        limit = search_timeout(timeout)
        with contextlib.suppress(*FAILURES), deadline(name, len(completions), limit):
            for sample in samples(prompts, completions, columns):
                reward_func(**sample)
                starts.append(time.monotonic())
        return _slowest(starts, prompts, completions)

    return reward


def _slowest(starts: list[float], prompts: list, completions: list) -> str:
    """The completion that takes longest when scored alone, within the same limit again.

    `starts`: when each was begun, in seconds; the last may have been stopped.
    """
    if len(starts) <= len(completions):  # stopped within a completion
        starts.append(time.monotonic())
    seconds = [end - start for start, end in itertools.pairwise(starts)]
    index = seconds.index(max(seconds))
    return (
        f"Scored alone, the slowest takes {seconds[index]:.1f} s or more. "
        f"{shown(index, prompts, completions)}"
    )


def _guarded_async(
    reward_func: Callable[..., Awaitable[Any]], name: str, timeout: float | None, checked: Checked
) -> Callable[..., Awaitable[list[float | None]]]:
    async def reward(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        try:
            async with async_deadline(name, len(completions), timeout):
                values = await reward_func(prompts=prompts, completions=completions, **columns)
        except RewardTimeout as failure:
            found = await slowest(prompts, completions, columns)
            raise RewardTimeout(f"{failure} {found}") from None
        except RewardError:
            raise
        except FAILURES as failure:
            where = await find(prompts, completions, columns)
            raise explained(name, raised(failure), where) from failure
        return checked(values, prompts, completions, columns.get("completion_ids"))

    async def find(prompts: list, completions: list, columns: dict[str, Any]) -> str:
        try:
            async with async_deadline(name, len(completions), search_timeout(timeout)):
                for index, sample in enumerate(samples(prompts, completions, columns)):
                    try:
                        await reward_func(**sample)
                    except FAILURES:
                        return culprit(index, prompts, completions)
        except RewardError:
            return NOT_FOUND
        return NO_CULPRIT

    async def slowest(prompts: list, completions: list, columns: dict[str, Any]) -> str:
        starts = [time.monotonic()]
        with contextlib.suppress(*FAILURES):
            async with async_deadline(name, len(completions), search_timeout(timeout)):
                for sample in samples(prompts, completions, columns):
                    await reward_func(**sample)
                    starts.append(time.monotonic())
        return _slowest(starts, prompts, completions)

    return reward


def samples(prompts: list, completions: list, columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of a call for each completion alone."""
    size = len(completions)
    rows = {"prompts": prompts, "completions": completions, **columns}
    for column in LOGGERS:
        if column in rows:
            rows[column] = lambda *_, **__: None
    for index in range(size):
        yield {
            key: value[index : index + 1]
            if isinstance(value, list) and len(value) == size
            else value
            for key, value in rows.items()
        }


def explained(name: str, what: str, where: str) -> RewardError:
    """The error of a reward that raised `what`; `where` says which sample it was."""
    return RewardError(f"The reward {name!r} raised {what}. {where}")


def raised(failure: BaseException) -> str:
    """An exception's type and message, without a full stop, within a sentence.

    Also where its own code cannot write the message.
    """
    try:
        message = str(failure)
    except Exception as second:
        message = f"(its message cannot be written: {type(second).__name__})"
    return f"{type(failure).__name__}: {message}".rstrip(".")


def culprit(index: int, prompts: list, completions: list) -> str:
    """Which sample a reward raised at, and what to do."""
    return (
        f"{shown(index, prompts, completions)} A policy may write anything: let the reward return "
        "a number for it, or None where it does not apply."
    )
