"""What a scorer is given, row by row."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl_ext.errors import ConfigError


def each_row(
    prompts: Any, completions: Any, steps: Any, completion_ids: Any, columns: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The arguments of a scorer's `score`, a mapping a row: steps that are a list are one a row.

    Raises:
        ConfigError: they are no lists of one length.
    """
    lists = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    if isinstance(steps, list | tuple):
        lists["steps"] = steps
    lists = {name: values for name, values in {**lists, **columns}.items() if values is not None}
    for name, values in lists.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ConfigError(
                f"{name} is a {type(values).__name__}; it must be a list with one value a row."
            )
        if len(values) != len(prompts):
            raise ConfigError(
                f"prompts has {len(prompts)} values, and {name} has {len(values)} values; give one "
                "for each prompt, the same prompt again where it has several completions."
            )
    return [
        {
            "prompt": prompts[row],
            "completion": completions[row],
            "steps": lists["steps"][row] if "steps" in lists else steps,
            "completion_ids": None if completion_ids is None else completion_ids[row],
            "columns": {name: values[row] for name, values in columns.items()},
        }
        for row in range(len(prompts))
    ]
