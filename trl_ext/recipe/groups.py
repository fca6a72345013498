"""Checks over several keys: how many processes there are, and whether groups fill the batch."""

import os
from typing import Any

from trl_ext.errors import ConfigError
from trl_ext.recipe.check import first_origin
from trl_ext.recipe.findings import Finding, Origin
from trl_ext.recipe.schema import Fields
from trl_ext.recipe.shipped import read_accelerate_config
from trl_ext.recipe.yaml_reader import Entries

_KEYS = (
    "num_generations",
    "generation_batch_size",
    "per_device_train_batch_size",
    "steps_per_generation",
    "gradient_accumulation_steps",
    "num_processes",
)
_EVAL_KEYS = (
    "per_device_eval_batch_size",
    "num_generations_eval",
    "num_generations",
    "eval_on_start",
    "eval_strategy",
)


def check_launcher(
    launcher: dict[str, Any], entries: Entries, findings: list[Finding]
) -> dict[str, Any]:
    """The launcher's keys, and what the Accelerate config says where they are silent."""
    try:
        config = read_accelerate_config(launcher.get("accelerate_config"))
    except ConfigError as error:
        origin = entries["accelerate_config"].origin
        findings.append(Finding(origin, "accelerate_config", str(error)))
        config = {}
    return config | {key: value for key, value in launcher.items() if value is not None}


def process_count(launcher: dict[str, Any]) -> int | None:
    """How many processes will train: those that run now, those asked for, or one.

    None: as many as the machine has devices, which nobody has looked for.
    """
    running = os.environ.get("WORLD_SIZE")
    if running:
        return int(running)
    by_device = bool(launcher.get("accelerate_config"))
    return launcher.get("num_processes") or (None if by_device else 1)


def check_group_size(
    entries: Entries,
    fields: Fields,
    values: dict[str, Any],
    launcher: dict[str, Any],
    recipe: Origin,
    findings: list[Finding],
) -> None:
    """Each generation batch holds whole groups of `num_generations` completions."""
    samples_while_training = "steps_per_generation" in fields
    if not samples_while_training or _is_any_wrong(_KEYS, findings):
        return
    known = {key: values.get(key, fields[key].default) for key in _KEYS if key in fields}
    group = known.get("num_generations")
    processes = process_count(launcher)
    if processes is None:
        return
    batch, how = _generation_batch(known, processes)
    if not isinstance(group, int) or batch is None or batch % group == 0:
        return
    near = " or ".join(str(size) for size in _nearest_divisors(batch, group))
    message = (
        f"a group of {group} does not divide the generation batch of {batch}{how}; "
        f"nearest group size: {near}"
    )
    origin = first_origin(entries, _KEYS, recipe)
    findings.append(Finding(origin, "num_generations", message))


def check_eval_group_size(
    entries: Entries,
    fields: Fields,
    values: dict[str, Any],
    launcher: dict[str, Any],
    recipe: Origin,
    findings: list[Finding],
) -> None:
    """Each evaluation batch holds whole groups; TRL looks only where eval_strategy is set."""
    samples_to_evaluate = "num_generations_eval" in fields
    if not samples_to_evaluate or _is_any_wrong((*_EVAL_KEYS, "num_processes"), findings):
        return
    known = {key: values.get(key, fields[key].default) for key in _EVAL_KEYS if key in fields}
    evaluates = known.get("eval_on_start") or known.get("eval_strategy") not in (None, "no", False)
    group = known.get("num_generations_eval") or known.get("num_generations")
    rows = known.get("per_device_eval_batch_size")
    if not (evaluates and isinstance(group, int) and isinstance(rows, int)):
        return
    processes = process_count(launcher)
    if processes is not None and rows * processes % group:
        message = (
            f"an evaluation group of {group} (num_generations_eval, else num_generations) does not "
            f"divide the evaluation batch of {rows * processes} (per_device_eval_batch_size {rows} "
            f"× {processes} process{'es' if processes > 1 else ''}); nearest batch size: "
            f"{-(-rows // group) * group}"
        )
        origin = first_origin(entries, _EVAL_KEYS, recipe)
        findings.append(Finding(origin, "per_device_eval_batch_size", message))


def _is_any_wrong(keys: tuple[str, ...], findings: list[Finding]) -> bool:
    """Whether a number that the batch is computed from is itself wrong."""
    return any(finding.key in keys for finding in findings)


def _generation_batch(known: dict[str, Any], processes: int) -> tuple[int | None, str]:
    """The number of completions generated at once, and how it comes about."""
    if isinstance(known.get("generation_batch_size"), int):
        return known["generation_batch_size"], ""
    rows = known.get("per_device_train_batch_size")
    key = "steps_per_generation"
    if known.get(key) is None:
        key = "gradient_accumulation_steps"
    steps = known.get(key)
    if not isinstance(rows, int) or not isinstance(steps, int):
        return None, ""
    how = (
        f" (per_device_train_batch_size {rows} × {processes} "
        f"{'process' if processes == 1 else 'processes'} × {key} {steps})"
    )
    return rows * processes * steps, how


def _nearest_divisors(batch: int, group: int) -> list[int]:
    """The divisors of the batch next to the group size, from 2 on: one is no group."""
    divisors = [size for size in range(2, batch + 1) if batch % size == 0]
    below = [size for size in divisors if size < group]
    above = [size for size in divisors if size > group]
    return below[-1:] + above[:1]
