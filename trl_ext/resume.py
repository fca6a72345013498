"""Whether a recipe goes on with the run that its `output_dir` holds."""

from pathlib import Path
from typing import Any

import yaml

from trl_ext.environment import command_name
from trl_ext.errors import ConfigError
from trl_ext.recipe import Recipe
from trl_ext.record import RECIPE

# What changes how long a run goes on and what it shows, but no step of it.
_MAY_CHANGE = (
    "accelerate_config",
    "disable_tqdm",
    "env",
    "max_steps",
    "num_completions_to_print",
    "num_generations_eval",
    "num_machines",
    "num_processes",
    "num_train_epochs",
    "output_dir",
    "per_device_eval_batch_size",
    "push_to_hub",
    "report_to",
    "reward_timeout",
    "run_name",
)
_MAY_CHANGE_PREFIXES = (
    "dataloader_",
    "eval_",
    "hub_",
    "log_",
    "logging_",
    "save_",
    "machine_",
    "watch_",
)


def check_same_run(recipe: Recipe, checkpoint: Path) -> None:
    """Whether a recipe is the one that a checkpoint's run began with, as far as its steps go.

    A checkpoint holds the optimizer, the schedule and a half-used rollout: with another learning
    rate, β or group size it would go on with neither the old value nor the new one.

    Raises:
        ConfigError: if it differs; it lists every key.
    """
    file = checkpoint.parent / RECIPE
    if not file.is_file():
        return
    began, goes_on = (yaml.safe_load(text) for text in (file.read_text(), recipe.to_yaml()))
    changed = [
        f"  {key}: was {_shown(began, key)}, now {_shown(goes_on, key)}"
        for key in sorted(began.keys() | goes_on.keys())
        if began.get(key) != goes_on.get(key) and not _may_change(key)
    ]
    if changed:
        lines = "\n".join(changed)
        raise ConfigError(
            f"--resume goes on from {checkpoint}, and the recipe differs from the one of that "
            f"run:\n{lines}\nGo on as it began: {command_name()} train {file} --resume. Or begin "
            "another run with output_dir=..."
        )


def _may_change(key: str) -> bool:
    return key in _MAY_CHANGE or key.startswith(_MAY_CHANGE_PREFIXES)


def _shown(settings: dict[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "not set"
