"""From a recipe to a trainer: every part is checked before the next, larger one is loaded."""

import importlib
import inspect
import os
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, Trainer
from trl import DatasetMixtureConfig, ModelConfig, get_dataset, get_peft_config
from trl import get_quantization_config as quantization_config_of
from trl.trainer.utils import create_model_from_path

from trl_ext.bundled import BUNDLED, PREFIX, resolve_model
from trl_ext.environment import command_name
from trl_ext.errors import ConfigError, OutOfMemoryError, RunError, TrlExtError
from trl_ext.models.loading import base_of, is_adapter
from trl_ext.recipe import Recipe
from trl_ext.registry import TRAINERS
from trl_ext.resume import is_out_of_memory
from trl_ext.rewards import build_rewards
from trl_ext.smaller import KEYS
from trl_ext.tasks import load_splits

# What TRL, transformers, peft and bitsandbytes raise at values that they do not take.
_REFUSALS = (
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
)


def build_trainer(recipe: Recipe, *, resumed: bool = False) -> Trainer:
    """The trainer of a recipe, ready to train.

    Args:
        recipe: from `read_recipe`.
        resumed: the evaluation before training has been made already.

    Raises:
        TrlExtError: if the recipe's parts do not fit together, or one cannot be opened.
    """
    return build_from(recipe, parts_of(recipe, resumed=resumed))


def build_from(recipe: Recipe, parts: dict[str, Any]) -> Trainer:
    """The trainer of a recipe from its `parts_of`, which it takes for itself.

    Raises:
        TrlExtError: if the parts do not fit together, or one cannot be opened.
    """
    try:
        return TRAINERS.load(recipe.trainer)(**_loaded(parts))
    except TrlExtError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"{recipe.path}: out of memory while the model loads: {error} It depends on "
                f"{KEYS['load']}. What would fit: {command_name()} plan {recipe.path}"
            ) from error
        if not isinstance(error, _REFUSALS):
            raise
        raise ConfigError(
            f"{recipe.path}: the {recipe.trainer} trainer cannot be built: {error} "
            "(--debug shows where)."
        ) from error


def parts_of(recipe: Recipe, *, resumed: bool = False) -> dict[str, Any]:
    """The arguments of a recipe's trainer, each checked: nothing is loaded yet but the data.

    Args:
        recipe: from `read_recipe`.
        resumed: the evaluation before training has been made already.

    Raises:
        TrlExtError: if one of them is wrong.
    """
    trainer_class = TRAINERS.load(recipe.trainer)
    config = config_of(recipe)
    _check_processes(config)
    rewards = _reward_parts(recipe, trainer_class)
    _check_gold(recipe)
    train_dataset, eval_dataset = _datasets(recipe, config)
    if recipe.trainer == "dpo":  # TRL's own trainer, which looks at no row
        from trl_ext.reward_model.rankings import preference_pairs

        train_dataset = preference_pairs(train_dataset, "train_dataset")
        eval_dataset = eval_dataset and preference_pairs(eval_dataset, "eval_dataset")
    if resumed:
        config.eval_on_start = False  # "before training" was measured when the run began
    model_config = ModelConfig(**recipe.groups["model"])
    targets = recipe.groups["model"].get("lora_target_modules")
    if isinstance(targets, list) and targets != ["all-linear"]:
        # TRL makes a list of one a text, which peft takes for a pattern of whole names.
        model_config.lora_target_modules = targets
    config.model_init_kwargs = _model_init_kwargs(model_config, config)
    model = resolve_model(recipe.values["model_name_or_path"])
    adapter = model if os.path.isdir(model) and is_adapter(model) else None
    if adapter:
        _check_same_adapter(recipe, adapter)
        model = base_of("model_name_or_path", adapter)
    _check_model(model, model_config.model_revision, getattr(config, "trust_remote_code", False))
    return {
        "model": OnAdapter(model, adapter) if adapter else model,
        "args": config,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "quantization_config": quantization_config_of(model_config),
        "peft_config": None if adapter else get_peft_config(model_config),
        **rewards,
    }


class OnAdapter(NamedTuple):
    """A model that is a folder with a LoRA adapter: its base is loaded, and the adapter trained."""

    base: str
    adapter: str


def _check_same_adapter(recipe: Recipe, adapter: str) -> None:
    """Whether the adapter that is trained on is of the size that the recipe asks for.

    Raises:
        ConfigError: if not: a recipe does not reshape an adapter.
    """
    has = PeftConfig.from_pretrained(adapter)
    for key in ("lora_r", "lora_alpha"):
        asked, found = recipe.values.get(key), getattr(has, key.replace("lora_r", "r"), None)
        if recipe.values.get("use_peft") and asked is not None and asked != found:
            raise ConfigError(
                f"model_name_or_path: {adapter} is an adapter with {key} {found}, and the recipe "
                f"asks for {key}: {asked}. The adapter is trained on as it is: set {key}={found}, "
                "or remove it."
            )


def _loaded(parts: dict[str, Any]) -> dict[str, Any]:
    """The parts with the base and its adapter in memory: TRL's trainers open no adapter."""
    if not isinstance(parts["model"], OnAdapter):
        return parts
    base, adapter = parts["model"]
    config = parts["args"]
    kwargs = {"trust_remote_code": config.trust_remote_code, **config.model_init_kwargs}
    if parts["quantization_config"] is not None:
        kwargs["quantization_config"] = parts["quantization_config"]
    if config.world_size > 1:
        kwargs["device_map"] = None  # each process has the whole model
    model = create_model_from_path(base, **kwargs)
    config.model_init_kwargs = None
    trained = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return parts | {"model": trained, "quantization_config": None}


def config_of(recipe: Recipe) -> Any:
    """The config of a recipe's trainer.

    Raises:
        ConfigError: if its options do not go together.
    """
    trainer_class = TRAINERS.load(recipe.trainer)
    name = trainer_class.__name__.removesuffix("Trainer") + "Config"
    config_class = getattr(importlib.import_module(trainer_class.__module__), name)
    values = {"use_cpu": not torch.accelerator.is_available(), **recipe.groups["config"]}
    try:
        return config_class(**values)
    except TrlExtError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        # TRL's and transformers' own checks of values that only together make no sense.
        raise ConfigError(f"{recipe.path}: {error}") from error


def _check_processes(config: Any) -> None:
    """Several processes that do not know of each other would each train alone and overwrite."""
    if config.n_gpu > 1:
        raise RunError(
            f"This process sees {config.n_gpu} devices, and transformers would copy the model onto "
            f"each at every step. Give num_processes={config.n_gpu}, or let it see one: "
            "CUDA_VISIBLE_DEVICES=0."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if config.world_size != started:
        raise RunError(
            f"A launcher started {started} processes, but transformers sees {config.world_size}: "
            "they would train apart and overwrite each other. On CPUs set ddp_backend=gloo."
        )


def _reward_parts(recipe: Recipe, trainer_class: type[Trainer]) -> dict[str, Any]:
    script = recipe.groups["script"]
    reward_funcs = build_rewards(script.get("reward_funcs") or [])
    if script.get("reward_model_name_or_path"):
        reward_funcs.insert(0, script["reward_model_name_or_path"])
    takes_rewards = "reward_funcs" in inspect.signature(trainer_class).parameters
    is_optional = getattr(trainer_class, "rewards_are_optional", False)
    if takes_rewards and not reward_funcs and not is_optional:
        raise ConfigError(
            f"trainer: {recipe.trainer} needs a reward. Set reward_funcs, such as "
            "reward_funcs: [reasoning_gym], or reward_model_name_or_path."
        )
    if reward_funcs and not takes_rewards:
        raise ConfigError(
            f"trainer: {recipe.trainer} takes no reward_funcs. Remove them, or use another trainer."
        )
    return {"reward_funcs": reward_funcs} if takes_rewards else {}


def _check_gold(recipe: Recipe) -> None:
    """Refuse a gold reward that is trained on."""
    gold = recipe.groups["config"].get("gold_reward_funcs") or []
    both = [entry for entry in gold if entry in (recipe.groups["script"].get("reward_funcs") or [])]
    if both:
        raise ConfigError(
            f"{recipe.path}: gold_reward_funcs: {both[0]!r} is also in reward_funcs, and would "
            "measure nothing held out. Name a reward that training never sees."
        )


def _datasets(recipe: Recipe, config: Any) -> tuple[Any, Any]:
    """The training split, and the evaluation split if the recipe evaluates."""
    script = recipe.groups["script"]
    if script.get("dataset_name"):
        train_dataset, eval_dataset = load_splits(script)
    else:
        mixture = get_dataset(DatasetMixtureConfig(**recipe.groups["mixture"]))
        train_dataset = mixture[script.get("dataset_train_split", "train")]
        eval_dataset = mixture.get(script.get("dataset_test_split", "test"))
    if not (config.eval_on_start or config.eval_strategy != "no"):
        return train_dataset, None
    if eval_dataset is None:
        raise ConfigError(
            "A test split is asked for (eval_on_start, eval_strategy or --split test), and the "
            "dataset has none. Set dataset_kwargs.eval_size for a generated dataset, "
            "dataset_test_split for another, or turn evaluation off."
        )
    return train_dataset, eval_dataset


def _check_model(model: str, revision: str, trust_remote_code: bool) -> None:
    """Whether a model's config can be read, before anything larger is.

    Raises:
        ConfigError: if not; it says what a model may be.
    """
    try:
        AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"model_name_or_path: {model!r} cannot be opened: {reason} A model is a hub id, a "
            f"folder with a config.json, or one of {', '.join(PREFIX + name for name in BUNDLED)}."
        ) from error


def _model_init_kwargs(model_config: ModelConfig, config: Any) -> dict[str, Any]:
    return {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        **(config.model_init_kwargs or {}),
    }
