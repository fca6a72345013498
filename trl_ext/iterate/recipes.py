"""Which recipes can be iterated, and the recipe of the fit of one round."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from trl_ext.build import config_of
from trl_ext.collect import Collector
from trl_ext.collect.settings import OFFLINE
from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.row_values import is_number
from trl_ext.iterate.progress import COMPLETIONS
from trl_ext.recipe import Recipe
from trl_ext.recipe.yaml_reader import write_yaml
from trl_ext.record import RECIPE
from trl_ext.registry import TRAINERS
from trl_ext.resume import check_same_run
from trl_ext.rwr.offline_data import TAKEN

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
# What a round that is not finished may be gone on with another value of: what its samples come
# from, and what only its fit reads. The target, which all rounds share, is not among them.
_OF_SAMPLES = ("num_generations", "temperature")
_OF_FITS = (
    "drop_uniform_groups",
    "gradient_accumulation_steps",
    "learning_rate",
    "max_length",
    "max_weight",
    "min_effective_sample_size",
    "per_device_train_batch_size",
    "reward_threshold",
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
    least = config.min_effective_sample_size
    if config.baseline == "group" and least is not None and least > config.num_generations:
        found.append(
            f"min_effective_sample_size={least:g}: of num_generations={config.num_generations} no "
            "more than these can be effective. Lower it, or raise num_generations."
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


def check_prompts(collector: Collector) -> None:
    """Whether the prompts have beside them what a fit needs, and nothing that it refuses.

    Raises:
        ConfigError, DataError: if not; before anything is sampled.
    """
    dataset = collector.dataset("train")
    first = next(iter(dataset))
    for column, reason in TAKEN.items():
        if column in first:
            raise DataError(
                f"The train split has the column {column!r}, which a fit does not take: {reason}. "
                "Rename or remove it."
            )
    if collector.first.values.get("baseline") != "value":
        return
    if "value" not in first:
        raise ConfigError(
            f"baseline: value needs the column 'value', and the dataset has {', '.join(first)}. "
            "Add it, or use baseline: group."
        )
    for number, value in enumerate(dataset["value"] if isinstance(dataset, Dataset) else ()):
        if not is_number(value):
            raise DataError(
                f"The train split, row {number}: value is {value!r:.80}; with baseline: value it "
                "must be a finite number in every row."
            )


def may_change(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """What an unfinished round may be gone on with: done anew by it -> keys.

    Rewards of held-out prompts are compared over rounds, and depend on the temperature.
    """
    compared = evaluates(recipe)
    of_samples = tuple(key for key in _OF_SAMPLES if not compared or key != "temperature")
    return {"collected": of_samples, "fitted": _OF_FITS}


def check_goes_on(recipe: Recipe, output_dir: Path, rounds: int) -> None:
    """Whether a recipe is that of the rounds in `output_dir`, but for what may change.

    Raises:
        ConfigError: if not; it lists every key.
    """
    check_same_run(
        recipe,
        output_dir / "iterate.json",
        command="iterate",
        flags=f"--rounds {rounds} --resume",
        may_change=sum(may_change(recipe).values(), ()),
    )


def begin_anew(recipe: Recipe, output_dir: Path, folder: Path) -> str | None:
    """Remove of an unfinished round what was made with other settings; what to say of it.

    Args:
        recipe: that goes on; the one before is in `output_dir`.
        output_dir: of all rounds.
        folder: of the unfinished round.
    """
    file = output_dir / RECIPE
    if not (file.is_file() and folder.is_dir()):
        return None
    before, now = (yaml.safe_load(text) for text in (file.read_text(), recipe.to_yaml()))
    for done, keys in may_change(recipe).items():
        changed = [key for key in keys if before.get(key) != now.get(key)]
        if changed:
            for path in folder.iterdir():
                if done == "collected" or not path.name.startswith(COMPLETIONS):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            return f"{folder.name} is {done} anew: another {', '.join(changed)}"
    return None


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
