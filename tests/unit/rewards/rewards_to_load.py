"""Objects that the tests of `build_rewards` load by name."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
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


def breaks_on(completions, marks=None, **columns):
    """Breaks in the way that a completion names; else its length."""
    return [_broken(text) for text in completions]


def _broken(text: str) -> float:
    if text == "sleep":
        time.sleep(60)
    elif text == "regex":  # backtracks 2^40 times without returning to Python
        re.fullmatch(r"(a|a)*b", "a" * 40)
    elif text == "abort":
        os.abort()
    elif text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif text == "exit":
        os._exit(3)
    elif text == "memory":
        raise MemoryError
    elif text == "raise":
        raise KeyError(text)
    elif text == "print":
        print("a reward may print")
        os.write(1, b"as it likes\n")
    return float(len(text))


def refuses_all(completions, **columns):
    raise RewardError("no such column")


def reads_columns(
    completions, length, completion_ids, log_metric, log_extra, prompt_ids=None, scale=1, **columns
):
    log_metric("length", length[0])
    log_extra("length", length)
    return [scale * (n + len(ids)) for n, ids in zip(length, completion_ids, strict=True)]


def logs_some(completions, log_extra=None, **columns):
    for text in completions:
        if text == "exit":
            os._exit(3)
        if text and log_extra:
            log_extra("said", ["a", "b"] if text == "both" else [text])
    return [float(len(text)) for text in completions]


def starts(completions, **columns):
    """Leaves behind what a completion says: a fork, or a child whose number goes to a file."""
    for text in completions:
        if text == "exit":
            os._exit(0)
        if text == "fork":
            os.fork()
        if text.startswith("child"):
            child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
            Path(text.removeprefix("child ")).write_text(str(child.pid))
    return [float(len(text)) for text in completions]


class Array:
    def __init__(self, numbers):
        self.numbers = numbers

    def tolist(self):
        return self.numbers


def gives_arrays(completions, **columns):
    """What a tensor or an array looks like, with a dimension and without."""
    return [Array([3.0, 3.0]) if len(text) > 1 else Array(1.0) for text in completions]


def gives_one_number(completions, **columns):
    return 1.0


def gives_two(completions, **columns):
    return [1.0, 2.0]


def gives_a_function(completions, **columns):
    return [lambda: 0]


def modules(completions, **columns):
    return [float(text in sys.modules) for text in completions]


def dies():
    os._exit(4)


def never_made():
    time.sleep(60)


class ChecksPolicy(Counter):
    def check_policy(self, model):
        """A trainer shows its model."""


class Declares(Counter):
    isolated = True


def only_of_three(completions, **columns):
    return [-1.0 if len(text) == 3 else None for text in completions]


def asks(completions, prompt_ids, **columns):
    return [float(len(ids)) for ids in prompt_ids]
