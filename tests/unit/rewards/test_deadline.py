"""The time limit of a reward where several processes wait for each other."""

import asyncio
import time
from typing import Any

import pytest
from transformers import TrainingArguments

from tests.tiny import QUIET
from trl_ext.errors import RewardError
from trl_ext.policy_config import PolicyConfig
from trl_ext.rewards import deadline, guarded
from trl_ext.rewards.deadline import RewardTimeout
from trl_ext.rwr import OfflineRWRConfig, RWRConfig

CONFIGS: list[Any] = [PolicyConfig, RWRConfig, OfflineRWRConfig]


@pytest.mark.parametrize("of", CONFIGS)
@pytest.mark.parametrize(
    ("processes", "given", "expected"),
    [(1, None, None), (2, None, 45.0), (2, 600.0, 600.0), (2, 5, 5), (1, 600.0, 600.0)],
)
def test_several_processes_have_a_limit_of_a_minute(
    of, processes, given, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(TrainingArguments, "world_size", processes)
    assert of(str(tmp_path), **QUIET, reward_timeout=given).reward_timeout == expected


def reward(completions, **columns):
    time.sleep(30)


async def later(completions, **columns):
    await asyncio.sleep(30)


def broken(completions, **columns):
    if len(completions) > 1:
        raise ValueError("bad batch")
    time.sleep(30)


async def broken_later(completions, **columns):
    if len(completions) > 1:
        raise ValueError("bad batch")
    await asyncio.sleep(30)


def call(reward_func: Any) -> Any:
    values = reward_func(prompts=["a", "b"], completions=["c", "d"])
    return asyncio.run(values) if asyncio.iscoroutine(values) else values


@pytest.mark.parametrize("reward_func", [reward, later])
def test_the_error_says_whose_limit_it_is_and_how_to_raise_it(reward_func, monkeypatch):
    monkeypatch.setattr(deadline, "OF_SEVERAL_PROCESSES", 0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RewardTimeout) as caught:
        call(guarded(reward_func, "mine", timeout=deadline.default_timeout(2)))
    assert str(caught.value).startswith(
        "The reward 'mine' took longer than its limit of 0.1 s for 2 completions. Make it faster, "
        "give its own calls a time limit, or raise this one: reward_timeout=1. (With several "
        "processes, which wait for each other, 0.1 s is the default; with one there is no limit.)"
    )


@pytest.mark.parametrize("reward_func", [broken, broken_later, reward, later])
def test_the_search_for_the_completion_keeps_the_others_waiting_no_longer(reward_func, monkeypatch):
    """Each sample alone takes 30 s, and the limit of a call is far."""
    monkeypatch.setattr(deadline, "SEARCH_OF_SEVERAL", 0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    timeout = 20 if reward_func in (broken, broken_later) else 0.2
    started = time.monotonic()
    says = "Which completion it was could not be found in time|the slowest takes 0.1 s or more"
    with pytest.raises(RewardError, match=says):
        call(guarded(reward_func, "mine", timeout=timeout))
    assert time.monotonic() - started < 10


def test_no_longer_than_a_day_is_proposed():
    with pytest.raises(RewardTimeout, match="reward_timeout=86400"):
        raise deadline._overrun("mine", 2, 80_000.0)
