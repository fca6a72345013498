"""Columns that a policy trainer itself makes for the reward functions that ask for them.

`prompt_ids`: the prompt's token ids, as generated from. `ref_per_token_logps`: log π_ref of each
token of the completion, nats, one list a completion as long as its `completion_ids`.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl_ext.errors import ConfigError, DataError

OFFERED = ("prompt_ids", "ref_per_token_logps")


def asked_for(reward_func: Any) -> frozenset[str]:
    """Which of the offered columns a reward function takes.

    Those that its signature names, or that its own attribute `asks_for` does: of an object whose
    arguments decide what it reads.
    """
    declared = getattr(reward_func, "asks_for", None)
    if declared is None:
        try:
            declared = inspect.signature(reward_func).parameters
        except (TypeError, ValueError):  # some built-in functions do not say
            return frozenset()
    return frozenset(declared) & frozenset(OFFERED)


def asked_of_trainer(reward_funcs: Iterable[Any]) -> frozenset[str]:
    """Which columns the guarded reward functions of a trainer take between them."""
    return frozenset().union(*(getattr(each, "asks_for", ()) for each in reward_funcs))


def with_columns(rows: list[dict[str, Any]], columns: Mapping[str, Sequence[Any]]) -> list:
    """The rows of a batch with the trainer's columns added; the rows given stay as they are.

    Raises:
        DataError: if the dataset has a column of that name.
    """
    if not columns:
        return rows
    for name in columns:
        if rows and name in rows[0]:
            raise DataError(
                f"The dataset has a column {name!r}, and a reward asks the trainer for that. "
                "Rename the dataset's column."
            )
    return [
        row | dict(zip(columns, values, strict=True))
        for row, *values in zip(rows, *columns.values(), strict=True)
    ]


def check_reference_can_be_had(
    reward_funcs: Iterable[Any], *, masks_truncated: bool, has_reference: bool
) -> None:
    """Whether a trainer's reference can score what the rewards are asked to judge.

    Args:
        reward_funcs: guarded reward functions.
        masks_truncated: completions that are cut off are hidden from the models.
        has_reference: the policy before training can be read from disk, or is there without its
            adapter.

    Raises:
        ConfigError: if a reward asks for the reference's log-probabilities, and it cannot.
    """
    asking = [r for r in reward_funcs if "ref_per_token_logps" in asked_of_trainer([r])]
    if not asking:
        return
    asks = f"The reward {asking[0].__name__!r} asks for ref_per_token_logps, and "
    if masks_truncated:
        raise ConfigError(
            asks + "mask_truncated_completions hides the tokens of truncated completions from the "
            "reference. Set mask_truncated_completions=False."
        )
    if not has_reference:
        raise ConfigError(
            asks + "the policy was given as an object that was never saved, from which TRL cannot "
            "load a reference. Save it (save_pretrained) and give its path, or train an adapter "
            "(peft_config), whose reference is the model without it."
        )


def show_policy(reward_funcs: Iterable[Any], model: Any, tokenizer: Any) -> None:
    """Hand the policy and its tokenizer to the rewards that check them against their own models.

    That is what the methods `check_policy` and `check_tokenizer` of a reward object are for.
    """
    for reward_func in reward_funcs:
        for name, shown in (("check_policy", model), ("check_tokenizer", tokenizer)):
            check = getattr(reward_func, name, None)
            if check is not None:
                check(shown)
