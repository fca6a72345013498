"""A guarded reward: the same numbers when it works, an error that names the sample when not."""

import asyncio
import logging
import math
import signal
import threading
import time
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from trl.trainer.utils import get_callable_name, is_async_callable

from trl_ext.errors import ConfigError, RewardError
from trl_ext.rewards import deadline, guarded

PROMPTS = ["first prompt", "second prompt", "third prompt"]
COMPLETIONS = ["one", "two", "three"]


def call(reward, **columns):
    return reward(prompts=PROMPTS, completions=COMPLETIONS, **columns)


def returns(values, **kwargs):
    return guarded(lambda prompts, completions, **columns: values, "mine", **kwargs)


@pytest.fixture(params=["sync", "async"])
def either(request):
    """Guard a function as it is, or as a coroutine function; both calls look alike."""

    def guard(function, **kwargs):
        if request.param == "sync":
            return guarded(function, "mine", **kwargs)

        async def coroutine(**columns):
            return function(**columns)

        reward = guarded(coroutine, "mine", **kwargs)
        assert is_async_callable(reward)
        return lambda **columns: asyncio.run(reward(**columns))

    return guard


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ([1, 0.5, None], [1.0, 0.5, None]),
        ((True, False, True), [1.0, 0.0, 1.0]),
        (np.array([1, 2, 3], dtype=np.float32), [1.0, 2.0, 3.0]),
        (torch.tensor([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0]),
        ([torch.tensor(1.0), np.float32(2), np.bool_(True)], [1.0, 2.0, 1.0]),
        ([Fraction(1, 2), -(10**30), 0], [0.5, -1e30, 0.0]),
    ],
)
def test_numbers_pass(values, numbers):
    got = call(returns(values))
    assert got == numbers
    assert all(value is None or type(value) is float for value in got)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (math.nan, "returned nan, which is not a number"),
        (math.inf, "returned inf, which is not finite in float32"),
        (-math.inf, "-inf, which is not finite"),
        (1e39, "which is not finite in float32"),
        (10**400, "which is not finite in float32"),
        (torch.tensor(math.nan), "which is not a number"),
        ("0.5", "returned '0.5', which is a str"),
        ([0.5], r"returned \[0.5\], which is a list"),
        (torch.tensor([0.5]), "which is a Tensor"),
    ],
)
def test_what_is_no_reward_names_the_sample(bad, says):
    with pytest.raises(RewardError, match=says) as error:
        call(returns([0.0, bad, math.nan]))
    assert "The reward 'mine'" in str(error.value)
    assert "Sample 1 of 3: prompt 'second prompt', completion 'two'." in str(error.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.0, 2.0], "returned 2 values for 3 completions"),
        ([], "returned 0 values for 3"),
        (None, "returned a NoneType, None; it must return a list"),
        (1.0, "returned a float"),
        ({"a": 1}, "returned a dict"),
        ("abc", "returned a str"),
        (torch.tensor([[1.0], [2.0], [3.0]]), r"returned \[1.0\], which is a list"),
    ],
)
def test_the_wrong_shape(values, says):
    with pytest.raises(RewardError, match=says):
        call(returns(values))


def test_a_raise_names_the_sample_and_keeps_the_cause(either):
    """Only 'two' is refused, whatever else is in the batch; columns are cut along with it."""
    seen = []

    def reward(completions, length, trainer_state, **columns):
        seen.append((completions, length, trainer_state))
        if "two" in completions:
            raise KeyError("two")
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"'mine' raised KeyError: 'two'. Sample 1 of 3") as error:
        call(either(reward), length=[3, 3, 5], trainer_state="state")
    assert isinstance(error.value.__cause__, KeyError)
    assert seen[1:] == [(["one"], [3], "state"), (["two"], [3], "state")]


def test_a_raise_of_the_batch_alone_says_so(either):
    def reward(completions, **columns):
        if len(completions) > 1:
            raise ValueError("too many")
        return [1.0]

    with pytest.raises(
        RewardError, match=r"raised ValueError: too many. Each completion alone"
    ) as e:
        call(either(reward))
    assert "--debug" in str(e.value) and "above" not in str(e.value)


def test_a_rewards_own_reward_error_is_left_alone(either):
    def reward(**columns):
        raise RewardError("no such column")

    with pytest.raises(RewardError, match=r"^no such column$"):
        call(either(reward))


def test_nothing_is_logged_while_the_sample_is_looked_for():
    logged = []

    def reward(completions, log_metric, **columns):
        log_metric("calls", len(completions))
        raise ValueError

    with pytest.raises(RewardError):
        call(guarded(reward, "mine"), log_metric=lambda *pair: logged.append(pair))
    assert logged == [("calls", 3)]


def test_sys_exit_is_a_reward_error(either):
    def reward(completions, **columns):
        if "two" in completions:
            raise SystemExit(0)
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"'mine' raised SystemExit: 0. Sample 1 of 3"):
        call(either(reward))


def test_an_exception_that_cannot_be_written_is_still_named(either):
    class Unspeakable(Exception):
        def __str__(self):
            raise KeyError

    def reward(**columns):
        raise Unspeakable

    says = r"'mine' raised Unspeakable: \(its message cannot be written: KeyError\). Sample 0"
    with pytest.raises(RewardError, match=says):
        call(either(reward))


def test_a_reward_that_applies_to_nothing_in_a_batch_is_named_once(either, caplog):
    reward = either(lambda **columns: [None] * 3)
    with caplog.at_level(logging.WARNING):
        assert [call(reward), call(reward)] == [[None] * 3] * 2
    assert caplog.text.count("'mine' returned None, 'does not apply', for all 3") == 1


def test_a_reward_that_applies_to_something_is_not_named(either, caplog):
    with caplog.at_level(logging.WARNING):
        call(either(lambda **columns: [None, None, 0.0]))
    assert not caplog.text


def test_ctrl_c_is_not_a_reward_error(either):
    def reward(**columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(either(reward))


def test_long_texts_are_cut():
    reward = guarded(lambda **columns: [math.nan], "mine")
    with pytest.raises(RewardError) as error:
        reward(prompts=["x" * 5000], completions=["y" * 5000])
    assert len(str(error.value)) < 700


def test_models_and_their_names_pass_through():
    model = torch.nn.Linear(1, 1)
    assert guarded(model, "mine") is model
    assert guarded("some/model", "mine") == "some/model"


class AsyncReward:
    async def __call__(self, completions, **columns):
        return [1.0] * len(completions)


def test_names_and_kinds_are_as_trl_sees_them():
    def reward(completions, scale=1.0, **columns):
        return [scale] * len(completions)

    bound = guarded(partial(reward, scale=2.0), "scaled")
    assert get_callable_name(bound) == "scaled"
    assert call(bound) == [2.0, 2.0, 2.0]
    assert not is_async_callable(bound)
    coroutine = guarded(AsyncReward(), "later")
    assert is_async_callable(coroutine)
    assert asyncio.run(call(coroutine)) == [1.0] * 3


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, 1e300, 86_401, "3", True])
def test_a_time_limit_is_positive_and_at_most_a_day(timeout):
    with pytest.raises(ConfigError, match="must be > 0 and at most 86400 seconds"):
        returns([], timeout=timeout)


def test_a_time_limit_of_a_day_is_one():
    assert call(returns([1, 2, 3], timeout=86_400)) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("given", [(len, len), {"mine": len}, 3, None])
def test_what_is_no_reward_function(given):
    says = rf"given as .*, a {type(given).__name__}. It must be a function \(prompts, completions"
    with pytest.raises(ConfigError, match=says):
        guarded(given, "mine")


def test_a_slow_reward_is_stopped():
    def reward(**columns):
        try:
            time.sleep(30)
        except Exception:  # a reward's own handler must not swallow the limit
            return [0.0] * 3

    started = time.monotonic()
    with pytest.raises(RewardError, match=r"'mine' took longer than its limit of 0.1 s for 3"):
        call(guarded(reward, "mine", timeout=0.1))
    assert time.monotonic() - started < 10


def test_a_slow_coroutine_is_stopped():
    async def reward(**columns):
        await asyncio.sleep(30)

    with pytest.raises(RewardError, match=r"took longer than its limit of 0.1 s"):
        asyncio.run(call(guarded(reward, "mine", timeout=0.1)))


def test_the_slowest_completion_is_named():
    def reward(completions, **columns):
        for text in completions:
            time.sleep(0.3 if text == COMPLETIONS[1] else 0.0)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"slowest takes 0\.\d s or more\. Sample 1 of 3"):
        call(guarded(reward, "mine", timeout=0.2))


def test_the_slowest_completion_of_a_coroutine_is_named():
    async def reward(completions, **columns):
        for text in completions:
            await asyncio.sleep(0.3 if text == COMPLETIONS[1] else 0.0)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"slowest takes 0\.\d s or more\. Sample 1 of 3"):
        asyncio.run(call(guarded(reward, "mine", timeout=0.2)))


def test_an_async_rewards_own_timeout_is_its_failure():
    async def reward(**columns):
        raise TimeoutError("the server")

    with pytest.raises(RewardError, match=r"raised TimeoutError: the server. Sample 0"):
        asyncio.run(call(guarded(reward, "mine", timeout=5)))


def test_a_search_that_takes_too_long_says_so():
    def reward(completions, **columns):
        if len(completions) > 1:
            raise ValueError("bad batch")
        time.sleep(30)

    with pytest.raises(RewardError, match=r"raised ValueError: bad batch. Which completion it was"):
        call(guarded(reward, "mine", timeout=0.1))


def test_handler_and_timer_are_put_back():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        call(returns([1, 2, 3], timeout=20))
        remaining, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < remaining <= 0.2
        time.sleep(0.3)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_in_another_thread_a_slow_reward_is_only_named(caplog):
    scores = []

    def reward(**columns):
        time.sleep(0.3)
        return [1.0, 2.0, 3.0]

    def work():
        scores.append(call(guarded(reward, "mine", timeout=0.05)))

    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
    assert scores == [[1.0, 2.0, 3.0]]
    assert "'mine' has been scoring 3 completions for 0.05 s and still runs" in caplog.text
    assert "cannot be stopped from this thread" in caplog.text


def test_a_reward_that_still_runs_is_named_once(caplog, monkeypatch):
    monkeypatch.setattr(deadline, "WARN_AFTER", 0.05)

    def reward(**columns):
        time.sleep(0.3)
        return [1.0, 2.0, 3.0]

    with caplog.at_level(logging.WARNING):
        call(guarded(reward, "mine"))
        call(returns([1, 2, 3]))
    assert caplog.text.count("still runs") == 1


def test_one_number_a_token_counts_by_its_sum_and_is_kept():
    reward = guarded(lambda **_: [[0.5, 0.25], 1.0, None, torch.tensor([1.0])], "dense")
    ids = [[4, 5], [6], [7], [8]]
    values = reward(prompts=["p"] * 4, completions=["a"] * 4, completion_ids=ids)
    assert values == [0.75, 1.0, None, 1.0]
    assert reward.checked.token_rewards == {0: [0.5, 0.25], 3: [1.0]}


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ([[0.5]], r"'dense' returned 1 numbers for a completion of 2 tokens. Sample 0 of 1"),
        ([[0.5, math.nan]], r"returned nan, which is not a number"),
        ([[3e38, 3e38]], r"returned 6e\+38, which is not finite in float32"),
        ([[0.5, None]], r"returned None, which is a NoneType"),
        ([[[0.5], [0.5]]], r"returned \[0.5\], which is a list"),
    ],
)
def test_one_number_a_token_that_is_not(returned, says):
    with pytest.raises(RewardError, match=says):
        guarded(lambda **_: returned, "dense")(
            prompts=["p"], completions=["a"], completion_ids=[[4, 5]]
        )
