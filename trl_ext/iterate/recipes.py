"""Which recipes can be iterated, and the recipe of the fit of one round."""

from pathlib import Path
from typing import Any

import yaml

from trl_ext.build import config_of
from trl_ext.collect.settings import OFFLINE
from trl_ext.errors import ConfigError
from trl_ext.recipe import Recipe
from trl_ext.recipe.yaml_reader import write_yaml
from trl_ext.record import RECIPE
from trl_ext.registry import TRAINERS

# Of the prompts, their rewards and the held-out evaluation: a fit sees rows that have all that.
_NOT_OF_A_FIT = (
    "dataset_config",
    "dataset_kwargs",
    "dataset_streaming",
    "dataset_test_split",
    "dataset_train_split",
    "datasets",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "reward_funcs",
    "reward_model_name_or_path",
    "reward_timeout",
    "reward_weights",
)


def evaluates(recipe: Recipe) -> bool:
    """Whether a recipe asks for held-out rewards."""
    config = recipe.groups["config"]
    return bool(config.get("eval_on_start")) or config.get("eval_strategy", "no") != "no"


def check_iterates(recipe: Recipe) -> None:
    """Whether rounds can be made of a recipe.

    Raises:
        ConfigError: if not; it lists every reason.
    """
    if recipe.trainer_target != TRAINERS.resolve(OFFLINE):
        raise ConfigError(
            f"{recipe.path}: trainer: {recipe.trainer} cannot be iterated; trainer: {OFFLINE} can. "
            f"`trl_ext train {recipe.path}` trains this one."
        )
    config, found = config_of(recipe), []
    if config.reference == "fixed" and config.temperature != 1.0:
        found.append(
            f"temperature={config.temperature!r} with reference: fixed: the log-probabilities of "
            "the samples would be those at that temperature, and the fit is at temperature 1. "
            "Use temperature: 1.0, or reference: moving."
        )
    if config.reference == "fixed" and config.beta == 0:
        found.append(
            "beta=0 with reference: fixed: best of n has no importance weights. Use beta > 0, or "
            "reference: moving, which takes the best of n in every round."
        )
    if config.importance_weights:
        found.append(
            "importance_weights=True: reference says which weights a round has. Remove it, and set "
            "reference: fixed for weights of the first policy against the one that sampled."
        )
    if config.load_best_model_at_end:
        found.append(
            "load_best_model_at_end=True: a round is evaluated by sampling, at its end. Remove it."
        )
    if config.push_to_hub:
        found.append("push_to_hub=True would push each round. Remove it, and push the last one.")
    if found:
        raise ConfigError("\n".join([f"{recipe.path}:", *(f"  {reason}" for reason in found)]))


def write_fit_recipe(recipe: Recipe, folder: Path, completions: Path, policy: Path | None) -> None:
    """Write the recipe of one round's fit into its folder: a recipe like any other.

    Args:
        recipe: of all rounds.
        folder: of the round.
        completions: the rows to fit to.
        policy: the folder of the model or adapter to go on with; None: the recipe's own.
    """
    public: dict[str, Any] = yaml.safe_load(recipe.to_yaml())  # a file of secrets is no record
    settings = {name: value for name, value in public.items() if name not in _NOT_OF_A_FIT}
    settings |= {"output_dir": str(folder), "dataset_name": str(completions)}
    if policy is not None:
        settings["model_name_or_path"] = str(policy)
    if recipe.values.get("reference") == "fixed":
        settings["importance_weights"] = True
    (folder / RECIPE).write_text(write_yaml(settings), encoding="utf-8")
