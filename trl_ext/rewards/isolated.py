"""A reward in a process of its own, so that a hang or a crash costs one sample and not the run."""

import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

from trl_ext.errors import ConfigError, RewardError
from trl_ext.rewards.guard import LOGGERS, LONGEST_TIMEOUT, culprit, explained, is_timeout, samples
from trl_ext.rewards.process import NotScored, RewardProcess, error_of
from trl_ext.rewards.returned import FLOAT32_MAX, cut, shown

logger = logging.getLogger(__name__)

OPTIONS = ("timeout", "failure_reward")  # of an entry, besides `isolated`
TIMEOUT = 5.0  # seconds
MOST_FAILURES = 20  # in a row: no policy writes so many texts that break a sound reward
# What a trainer passes and is no column: it stays in the trainer's process.
STAYS = ("trainer_state", "environments", *LOGGERS)


class IsolatedReward:
    """A reward function that scores each completion alone, in a process of its own.

    A completion that hangs, crashes the process or fills its memory gets `failure_reward`, and the
    process is replaced; a warning names the first of a kind. An exception of the reward is a
    `RewardError` as ever. What the reward logs by `log_metric` and `log_extra` arrives; the cell of
    a completion for which it logged nothing is empty. The metric `<reward>/not_scored` is the share
    of a batch that got `failure_reward`.

    Args:
        entry: the reward as in `reward_funcs`, a name or a mapping. It is made in the process, so
            its arguments must be plain values.
        timeout: seconds for one completion.
        failure_reward: of a completion that broke the process; None: not scored.

    Raises:
        ConfigError: if an option is wrong, the reward has to see the policy, or this is Windows.
        TrlExtError: what making the reward raises.
    """

    def __init__(
        self,
        entry: str | Mapping[str, Any],
        *,
        timeout: float = TIMEOUT,
        failure_reward: float | None = None,
    ):
        given = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
            raise ConfigError(
                f"An isolated reward is given as {cut(entry)}; it is made in another process, so "
                "that it must be a name, such as 'package.module:object', or a mapping with 'name'."
            )
        name = given["name"]
        check_options(name, timeout, failure_reward)
        self.entry = {**given, "isolated": False}  # in its process it is an ordinary reward
        self.timeout, self.failure_reward = timeout, failure_reward
        self._failures = 0  # in a row
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._process = RewardProcess(self.entry, timeout, name)
        self.__name__, self.asks_for = self._process.name, self._process.asks_for

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[Any]:
        """As TRL calls a reward function."""
        loggers = [name for name in LOGGERS if columns.get(name) is not None]
        sent = {name: value for name, value in columns.items() if name not in STAYS}
        scores, metrics, lost = [], [], 0
        extras: dict[str, list[Any]] = {}
        with self._lock:
            for index, sample in enumerate(samples(prompts, completions, sent)):
                where = shown(index, prompts, completions)
                try:
                    answer = self._answer(sample, loggers)
                except NotScored as failure:
                    self._count(failure, where)
                    lost += 1
                    scores.append(self.failure_reward)
                    continue
                self._failures = 0
                if answer[0] == "raised":
                    raise explained(self.__name__, answer[1], culprit(index, prompts, completions))
                scores.append(_one(answer[1], self.__name__, where))
                metrics += answer[2]
                for column, values in answer[3]:
                    cells = extras.setdefault(column, [None] * len(completions))
                    cells[index] = _one_cell(values, column, self.__name__, where)
        for column, cells in extras.items():
            columns["log_extra"](column, cells)
        if scores and "log_metric" in loggers:
            for name, value in [*metrics, (f"{self.__name__}/not_scored", lost / len(scores))]:
                columns["log_metric"](name, value)
        return scores

    def _answer(self, sample: dict[str, Any], loggers: list[str]) -> tuple[Any, ...]:
        if not self._process.is_ready():
            self._process = RewardProcess(self.entry, self.timeout, self.__name__)
        answer = self._process.ask(sample, loggers)
        if answer[0] == "memory":
            self._process.end()  # what it still holds is unknown
            raise NotScored("ran out of memory")
        if answer[0] == "error":
            raise error_of(*answer[1:])
        return answer

    def _count(self, failure: NotScored, where: str) -> None:
        self._failures += 1
        if self._failures >= MOST_FAILURES:
            raise RewardError(
                f"The reward {self.__name__!r} is isolated, and scored none of the last "
                f"{self._failures} completions: its process {failure} on the last. {where} That is "
                "no accident of a text. Score one without `isolated` to see why, or raise "
                f"`timeout`, now {self.timeout:g} s a completion."
            ) from failure
        if str(failure) in self._said:
            return
        self._said.add(str(failure))
        gets = "is not scored" if self.failure_reward is None else f"gets {self.failure_reward:g}"
        logger.warning(
            "The reward %r: one completion %s, because the reward's process %s on it. %s This is "
            "said once; the metric %s/not_scored is the share of such completions.",
            self.__name__,
            gets,
            failure,
            where,
            self.__name__,
        )


def _one(values: Any, name: str, where: str) -> Any:
    if not isinstance(values, list) or len(values) != 1:
        raise RewardError(
            f"The reward {name!r} is isolated, so that it is asked for one completion at a time, "
            f"and returned {cut(values)} in place of a list with one number, or None. {where}"
        )
    return values[0]


def _one_cell(values: Any, column: Any, name: str, where: str) -> Any:
    if not isinstance(values, list) or len(values) != 1:
        raise RewardError(
            f"The reward {name!r} is isolated, so that it is asked for one completion at a time, "
            f"and gave log_extra({column!r}, ...) {cut(values)} in place of a list of one value. "
            f"{where}"
        )
    return values[0]


def check_options(name: str, timeout: Any = TIMEOUT, failure_reward: Any = None) -> None:
    """Whether an entry's options of isolation are ones.

    Raises:
        ConfigError: if not, or this is Windows.
    """
    if os.name != "posix":
        raise ConfigError(
            f"The reward {name!r} is isolated, which needs Linux or macOS. Set isolated: false."
        )
    if not is_timeout(timeout):
        raise ConfigError(
            f"The reward {name!r}: timeout is {timeout!r}; it must be > 0 and at most "
            f"{LONGEST_TIMEOUT:g} seconds for one completion."
        )
    if failure_reward is not None and not _is_reward(failure_reward):
        raise ConfigError(
            f"The reward {name!r}: failure_reward is {failure_reward!r}; it must be a finite "
            "number, or null for 'not scored'."
        )


def _is_reward(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= FLOAT32_MAX
