"""What a reward returned: a finite number, one a token, or None; or an error with the sample."""

import logging
from fractions import Fraction
from typing import Any

from trl_ext.errors import RewardError

logger = logging.getLogger(__name__)

FLOAT32_MAX = 3.4028234663852886e38  # TRL keeps rewards in float32, where more becomes inf
SHOWN_CHARACTERS = 160


class Checked:
    """What a reward returned as a list with one float or None a completion.

    A list of one number a token in place of a number counts by its sum. Where the reward applies to
    nothing in a batch, it says so once, and not as an error: in a mixture of tasks another reward
    may apply.

    Attributes:
        token_rewards: of the last call, the list of each completion that got one number a token.
    """

    def __init__(self, name: str):
        self.name = name
        self.warned = False
        self.token_rewards: dict[int, list[float]] = {}

    def __call__(
        self, values: Any, prompts: list, completions: list, token_ids: list | None = None
    ) -> list[float | None]:
        checked = _numbers(values, self.name, prompts, completions, token_ids is not None)
        dense = {index: row for index, row in enumerate(checked) if isinstance(row, list)}
        for index, row in dense.items():
            assert token_ids is not None
            if len(row) != len(token_ids[index]):
                raise RewardError(
                    f"The reward {self.name!r} returned {len(row)} numbers for a completion of "
                    f"{len(token_ids[index])} tokens. {shown(index, prompts, completions)} Return "
                    "one a token of completion_ids, or one for the completion."
                )
        self.token_rewards = dense
        checked = [
            _number(sum(row), self.name, index, prompts, completions)
            if isinstance(row, list)
            else row
            for index, row in enumerate(checked)
        ]
        if not self.warned and checked and all(value is None for value in checked):
            self.warned = True
            logger.warning(
                "The reward %r returned None, 'does not apply', for all %d completions of a batch. "
                "What no other reward scores trains nothing. This is said once.",
                self.name,
                len(checked),
            )
        return checked


def _numbers(
    values: Any, name: str, prompts: list, completions: list, per_token: bool
) -> list[float | list[float] | None]:
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"The reward {name!r} returned a {type(values).__name__}, {cut(values)}; it must "
            f"return a list with one number, or None, for each of the {len(completions)} "
            "completions."
        )
    if len(values) != len(completions):
        raise RewardError(
            f"The reward {name!r} returned {len(values)} values for {len(completions)} "
            "completions; it must return exactly one a completion, in their order."
        )
    return [
        None
        if value is None
        else [_number(one, name, index, prompts, completions) for one in _listed(value)]
        if per_token and _is_listed(value)
        else _number(value, name, index, prompts, completions)
        for index, value in enumerate(values)
    ]


def _is_listed(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1


def _listed(value: Any) -> list:
    return list(value.tolist() if hasattr(value, "tolist") else value)


def _number(value: Any, name: str, index: int, prompts: list, completions: list) -> float:
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a 0-d tensor, a numpy number
        value = value.item()
    if isinstance(value, int | float | Fraction):
        if abs(value) <= FLOAT32_MAX:  # false for NaN too
            return float(value)
        problem = "is not a number" if value != value else "is not finite in float32"
    else:
        problem = f"is a {type(value).__name__}"
    raise RewardError(
        f"The reward {name!r} returned {cut(value)}, which {problem}. "
        f"{shown(index, prompts, completions)} Return a finite number, or None where the reward "
        "does not apply."
    )


def shown(index: int, prompts: list, completions: list) -> str:
    """One sample of a batch, for an error message."""
    return (
        f"Sample {index} of {len(completions)}: prompt {cut(prompts[index])}, "
        f"completion {cut(completions[index])}."
    )


def cut(value: Any) -> str:
    """A value's repr, its middle left out where it is long: a prompt's end asks the question."""
    text = repr(value)
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"
