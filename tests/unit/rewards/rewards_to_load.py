"""Objects that the tests of `build_rewards` load by name."""

from typing import Literal

from trl_ext.errors import DataError, RewardError

not_a_function = 3


def longer(completions, scale=1.0, **columns):
    return [scale * len(completion) for completion in completions]


async def slow_longer(completions, scale=1.0, **columns):
    return [scale * len(completion) for completion in completions]


def takes_anything(**columns):
    return [0.0 for _ in columns["completions"]]


def at_most(limit: int, step: float = 1.0):
    def reward(completions, **columns):
        return [step * (len(completion) <= limit) for completion in completions]

    return reward


def makes_nothing():
    return None


def breaks(path: str = "words.txt"):
    raise OSError(f"no {path}")


def exits():
    raise SystemExit(0)


def refuses():
    raise RewardError("no such words")


def reads(path: str):
    raise DataError(f"There is no file {path!r}.")


def measured(unit: Literal["letters", "words"] = "letters"):
    return longer


class Counter:
    def __init__(self, start: int = 0):
        self.start = start

    def __call__(self, completions, **columns):
        return [float(self.start + len(completion)) for completion in completions]


instance = Counter(5)
