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
from fractions import Fraction
from typing import Any

from trl_ext.errors import ConfigError, RewardError
from trl_ext.rewards.deadline import RewardTimeout, async_deadline, deadline

FLOAT32_MAX = 3.4028234663852886e38  # TRL keeps rewards in float32, where more becomes inf
SHOWN_CHARACTERS = 160
# Columns by which a reward writes to TRL's logs; switched off while a failure is looked into.
LOGGERS = ("log_extra", "log_metric")
NO_CULPRIT = (
    "Each completion alone is scored without an error, so it is the batch that it cannot take; "
    "the traceback above says where."
)
NOT_FOUND = "Which completion it was could not be found within the reward's time limit."


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
        stays None.
    """
    import torch

    if isinstance(reward_func, str | torch.nn.Module):
        return reward_func
    if timeout is not None and not timeout > 0:
        raise ConfigError(f"The time limit of the reward {name!r} is {timeout!r}; it must be > 0.")
    wrap = _guarded_async if _is_async(reward_func) else _guarded_sync
    wrapper = wrap(reward_func, name, timeout)
    wrapper.__name__ = name
    wrapper.__doc__ = reward_func.__doc__
    return wrapper


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an instance's async __call__
    )


def _guarded_sync(
    reward_func: Callable[..., Any], name: str, timeout: float | None
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
        except Exception as failure:
            raise _explained(name, failure, find(prompts, completions, columns)) from failure
        return _checked(values, name, prompts, completions)

    def find(prompts: list, completions: list, columns: dict[str, Any]) -> str:
        try:
            with deadline(name, len(completions), timeout):
                for index, sample in enumerate(_samples(prompts, completions, columns)):
                    try:
                        reward_func(**sample)
                    except Exception:
                        return _culprit(index, prompts, completions)
        except RewardError:
            return NOT_FOUND
        return NO_CULPRIT

    def slowest(prompts: list, completions: list, columns: dict[str, Any]) -> str:
        starts = [time.monotonic()]
        with contextlib.suppress(Exception), deadline(name, len(completions), timeout):
            for sample in _samples(prompts, completions, columns):
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
        f"{_shown(index, prompts, completions)}"
    )


def _guarded_async(
    reward_func: Callable[..., Awaitable[Any]], name: str, timeout: float | None
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
        except Exception as failure:
            raise _explained(name, failure, await find(prompts, completions, columns)) from failure
        return _checked(values, name, prompts, completions)

    async def find(prompts: list, completions: list, columns: dict[str, Any]) -> str:
        try:
            async with async_deadline(name, len(completions), timeout):
                for index, sample in enumerate(_samples(prompts, completions, columns)):
                    try:
                        await reward_func(**sample)
                    except Exception:
                        return _culprit(index, prompts, completions)
        except RewardError:
            return NOT_FOUND
        return NO_CULPRIT

    async def slowest(prompts: list, completions: list, columns: dict[str, Any]) -> str:
        starts = [time.monotonic()]
        with contextlib.suppress(Exception):
            async with async_deadline(name, len(completions), timeout):
                for sample in _samples(prompts, completions, columns):
                    await reward_func(**sample)
                    starts.append(time.monotonic())
        return _slowest(starts, prompts, completions)

    return reward


def _samples(prompts: list, completions: list, columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
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


def _explained(name: str, failure: Exception, where: str) -> RewardError:
    return RewardError(f"The reward {name!r} raised {type(failure).__name__}: {failure}. {where}")


def _culprit(index: int, prompts: list, completions: list) -> str:
    return (
        f"{_shown(index, prompts, completions)} A policy may write anything: let the reward return "
        "a number for it, or None where it does not apply."
    )


def _checked(values: Any, name: str, prompts: list, completions: list) -> list[float | None]:
    """What a reward returned as a list with one float or None a completion."""
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"The reward {name!r} returned a {type(values).__name__}, {_cut(values)}; it must "
            f"return a list with one number, or None, for each of the {len(completions)} "
            "completions."
        )
    if len(values) != len(completions):
        raise RewardError(
            f"The reward {name!r} returned {len(values)} values for {len(completions)} "
            "completions; it must return exactly one a completion, in their order."
        )
    return [_number(value, name, index, prompts, completions) for index, value in enumerate(values)]


def _number(value: Any, name: str, index: int, prompts: list, completions: list) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a 0-d tensor, a numpy number
        value = value.item()
    if isinstance(value, int | float | Fraction):
        if abs(value) <= FLOAT32_MAX:  # false for NaN too
            return float(value)
        problem = "is not a number" if value != value else "is not finite in float32"
    else:
        problem = f"is a {type(value).__name__}"
    raise RewardError(
        f"The reward {name!r} returned {_cut(value)}, which {problem}. "
        f"{_shown(index, prompts, completions)} Return a finite number, or None where the reward "
        "does not apply."
    )


def _shown(index: int, prompts: list, completions: list) -> str:
    return (
        f"Sample {index} of {len(completions)}: prompt {_cut(prompts[index])}, "
        f"completion {_cut(completions[index])}."
    )


def _cut(value: Any) -> str:
    """A value's repr, its middle left out where it is long: a prompt's end asks the question."""
    text = repr(value)
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"
