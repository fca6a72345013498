"""Which numbers make sense for a key: what a type cannot say, and training finds out too late."""

import math
import sys
from dataclasses import dataclass
from typing import Any

_LARGEST = sys.float_info.max
_DECADES = 1e9  # seconds; the timers of some platforms overflow not far above


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; NaN lies in none.

    Attributes:
        words: the range as an error names it.
        above: whether `low` itself is left out.
        also: a number outside that has a meaning of its own.
        whole_from: from here on only whole numbers.
    """

    words: str
    low: float
    high: float = _LARGEST
    above: bool = False
    also: float | None = None
    whole_from: float | None = None

    def __contains__(self, value: float) -> bool:
        if value == self.also:
            return True
        is_high_enough = value > self.low if self.above else value >= self.low
        may_be_part = self.whole_from is None or value < self.whole_from
        return is_high_enough and value <= self.high and (may_be_part or value % 1 == 0)


_COUNT = Range("a whole number from 1 on", 1)
_POSITIVE = Range("a number greater than 0", 0, above=True)
_FROM_0 = Range("a number from 0 on", 0)
_FROM_0_TO_INF = Range("a number from 0 on, or .inf", 0, math.inf)
_FRACTION = Range("a number between 0 and 1", 0, 1)
_INTERVAL = Range(
    "a whole number from 1 on, or a fraction of all steps between 0 and 1",
    0,
    above=True,
    whole_from=1,
)

# For every config that has the field; null is allowed wherever the field's type has it.
RANGES = {
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "generation_batch_size": _COUNT,
    "steps_per_generation": _COUNT,
    "num_iterations": _COUNT,
    "num_generations": Range("a whole number from 2 on", 2),
    "num_generations_eval": _COUNT,
    "max_completion_length": _COUNT,
    "max_tokens_per_micro_batch": _COUNT,
    "temperature": _POSITIVE,
    "top_p": Range("a number above 0, up to 1", 0, 1, above=True),
    "top_k": Range("a whole number from 0 on; 0 turns it off", 0),
    "min_p": _FRACTION,
    "repetition_penalty": _POSITIVE,
    "gamma": _FRACTION,
    "lam": _FRACTION,
    "critic_lam": _FRACTION,
    "critic_learning_rate": _POSITIVE,
    "early_stop_kl": _POSITIVE,
    "off_policy_truncation": _POSITIVE,
    "min_mixed_groups": Range("a number above 0, up to 1", 0, 1, above=True),
    "max_sampling_rounds": _COUNT,
    "poe_alpha": _POSITIVE,
    "process_beta": _POSITIVE,
    "process_gamma": _FRACTION,
    "process_learning_rate": _POSITIVE,
    "process_weight": Range("a finite number", -_LARGEST),
    "old_kl_coef": _POSITIVE,
    "old_kl_target": _POSITIVE,
    "value_clip": _POSITIVE,
    "learning_rate": _FROM_0,
    "weight_decay": _FROM_0,
    "max_grad_norm": _FROM_0_TO_INF,  # inf clips nothing, and logs the norm
    "warmup_steps": _FROM_0,
    "max_steps": Range("a whole number from 1 on, or -1 for num_train_epochs", 1, also=-1),
    "num_train_epochs": _POSITIVE,
    "logging_steps": _INTERVAL,
    "save_steps": _INTERVAL,
    "eval_steps": _INTERVAL,
    "beta": _FROM_0_TO_INF,
    "reward_weights": Range("finite numbers", -_LARGEST),
    "reward_samples": _COUNT,
    "reward_timeout": Range(f"seconds, from above 0 to {_DECADES:.0e}", 0, _DECADES, above=True),
    "num_processes": _COUNT,
    "num_machines": _COUNT,
}


def allowed_instead(key: str, value: Any, least: float | None = None) -> str | None:
    """What the key allows, in words, if the value (or one in a list) is a number outside it.

    `least` is the lowest count that a trainer takes where it is not the usual one.
    """
    allowed = RANGES.get(key)
    if allowed is not None and least is not None:
        allowed = Range(f"a whole number from {least} on", least)
    numbers = [x for x in (value if isinstance(value, list) else [value]) if _is_number(x)]
    return None if allowed is None or all(x in allowed for x in numbers) else allowed.words


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
