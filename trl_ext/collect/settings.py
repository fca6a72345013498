"""From a recipe to the recipe of a trainer that samples and scores, and does not train."""

import dataclasses
from pathlib import Path
from typing import Any

from trl import GRPOConfig as TRLGRPOConfig

from trl_ext.errors import ConfigError
from trl_ext.policy_config import PolicyConfig
from trl_ext.recipe import Recipe
from trl_ext.registry import TRAINERS
from trl_ext.rwr.config import RWRConfig
from trl_ext.trl_adapter import PolicyTrainer

OFFLINE = "offline_rwr"

# Fields of a config that decide what is sampled and how it is scored.
_SAMPLING = (
    "cache_implementation",
    "chat_template_kwargs",
    "generation_kwargs",
    "max_completion_length",
    "min_p",
    "num_generations",
    "reference",
    "repetition_penalty",
    "reward_samples",
    "reward_weights",
    "stop_strings",
    "temperature",
    "top_k",
    "top_p",
    "use_vllm",
)
# Fields that say how: of precision, device and seed.
_RUNNING = (
    "bf16",
    "fp16",
    "model_init_kwargs",
    "pad_to_multiple_of",
    "per_device_eval_batch_size",
    "seed",
    "tf32",
    "trust_remote_code",
    "use_cpu",
)
# What sampling does not depend on, but needs where an offline trainer's config is translated.
_CARRIED = (
    "beta",
    "dataloader_pin_memory",
    "ddp_backend",
    "ddp_timeout",
    "output_dir",
    "reward_timeout",
)
# Of a policy trainer's config, what is for training alone: left as it is by default.
_TRAINING = (
    "eval_steps",
    "generation_batch_size",
    "hub_model_id",
    "load_best_model_at_end",
    "log_completions",
    "log_completions_hub_repo",
    "max_sampling_rounds",
    "min_mixed_groups",
    "num_train_epochs",
    "push_to_hub",
    "steps_per_generation",
    "torch_compile",
)
_OF_TRAINING = ("gold_", "metric_for_", "process_", "watch_")


def sampling_recipe(recipe: Recipe, *, held_out: bool) -> Recipe:
    """The recipe of a policy trainer with the model, the prompts and the rewards of `recipe`.

    Args:
        recipe: of a policy trainer, or of `offline_rwr`, whose sampling fields it takes over.
        held_out: open the test split as well.

    Raises:
        ConfigError: if the recipe's trainer does not say how to sample.
    """
    given = recipe.groups["config"]
    changes: dict[str, Any] = {}
    if recipe.trainer_target == TRAINERS.resolve(OFFLINE):
        fields = {field.name for field in dataclasses.fields(RWRConfig)}
        wanted = {*_SAMPLING, *_RUNNING, *_CARRIED}
        given = {
            name: value
            for name, value in given.items()
            if name in fields and (name in wanted or name.startswith("vllm_"))
        }
        changes = {"trainer": "rwr", "trainer_target": TRAINERS.resolve("rwr")}
    else:
        _check_samples(recipe)
        given = {
            name: value
            for name, value in given.items()
            if name not in _TRAINING and not name.startswith(_OF_TRAINING)
        }
    config = given | _without_training(given, recipe, held_out=held_out)
    return dataclasses.replace(recipe, groups=recipe.groups | {"config": config}, **changes)


def _check_samples(recipe: Recipe) -> None:
    trainer = TRAINERS.load(recipe.trainer)
    if not (isinstance(trainer, type) and issubclass(trainer, PolicyTrainer)):
        raise ConfigError(
            f"{recipe.path}: trainer: {recipe.trainer} samples nothing, so that its recipe does "
            "not say how. Completions are collected with trainer: rwr, grpo, reinforce or ppo, or "
            f"with trainer: {OFFLINE}."
        )


def _without_training(given: dict[str, Any], recipe: Recipe, *, held_out: bool) -> dict[str, Any]:
    group = given.get("num_generations") or recipe.defaults().get("num_generations")
    assert isinstance(group, int)
    rows = prompts_at_once(given.get("per_device_eval_batch_size", 8), group) * group
    return {
        "eval_on_start": held_out,  # it has the test split opened
        "eval_strategy": "no",
        "gradient_accumulation_steps": 1,
        "mask_truncated_completions": False,  # their log-probabilities are wanted
        "max_steps": 1,  # without which a stream of prompts is refused
        "num_generations_eval": group,
        # vLLM takes from it how many it works on at a time; to transformers it says nothing here.
        "per_device_train_batch_size": rows if given.get("use_vllm") else group,
        "report_to": "none",
        "save_strategy": "no",
        # It corrects a loss, and would score each completion once more for it.
        "vllm_importance_sampling_correction": False,
    }


def prompts_at_once(rows: int, group: int) -> int:
    """Prompts of a batch, whole groups: at least one."""
    return max(1, rows // group)


def is_tempered_only(config: PolicyConfig) -> bool:
    """Whether a token is sampled from softmax(logits/temperature), and from nothing else."""
    return (
        config.top_p == 1.0
        and config.top_k == 0
        and not config.min_p
        and config.repetition_penalty == 1.0
        and not config.generation_kwargs
    )


def what_matters(sampling: Recipe) -> dict[str, Any]:
    """The settings on which the sampled completions and their rewards depend, by key."""
    trls = {field.name for field in dataclasses.fields(TRLGRPOConfig)}
    # Of a plugin's own options nobody here knows what they do.
    is_plugin = not sampling.trainer_target.startswith("trl_ext.")
    config = {
        name: value
        for name, value in sampling.groups["config"].items()
        if name in (*_SAMPLING, *_RUNNING)
        or name.startswith("vllm_")
        or (is_plugin and name not in trls)
    }
    groups = sampling.groups
    name = sampling.values["model_name_or_path"]
    return {
        "trainer": sampling.trainer,
        **groups["model"],
        **groups["script"],
        **groups["mixture"],
        **config,
        "model_name_or_path": name,
        "weights": weights_at(name),
    }


def weights_at(folder: str | Path) -> list[str]:
    """Name, size and time of each file of weights in a local folder: what tells two trainings."""
    return [
        f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
        for file in sorted(Path(folder).expanduser().glob("*.safetensors"))
    ]
