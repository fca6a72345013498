"""Several reward models as adapters of one base, which is in memory once."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError
from trl_ext.functional.ensemble import Combine
from trl_ext.rewards.ensemble import check_combination, combined, log_disagreement


class AdapterEnsemble:
    """A reward function out of one sequence-classification model and several adapters of it.

    Each completion is scored with one adapter, and its head, after the other, and the scores are
    combined by `ensemble_score`. The metric `reward_model/disagreement` is their standard
    deviation, mean over the completions.

    Args:
        inner: scores completions with the adapter that is active; its `model` is a `PeftModel`.
        combine: "mean", "min" or "uncertainty".
        penalty: of "uncertainty".
    """

    def __init__(self, inner: Any, combine: Combine, penalty: float):
        self.__name__ = inner.__name__
        self.inner, self.penalty = inner, penalty
        self.combine: Combine = combine
        self.asks_for: set[str] = set()

    def __call__(
        self, prompts: list, completions: list, completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """As TRL calls a reward function."""
        rows = []
        for name in list(self.inner.model.peft_config):
            self.inner.model.set_adapter(name, inference_mode=True)
            rows.append(self.inner(prompts, completions, completion_ids, **columns))
        scores = torch.tensor(rows, dtype=torch.float64)
        log_disagreement(scores, self.__name__, columns.get("log_metric"))
        return combined(scores, self.combine, self.penalty)


def open_adapters(base: Any, adapters: Any, combine: Any, penalty: Any) -> tuple[PeftModel, str]:
    """The base with every adapter and its head, and the path of their tokenizer.

    Raises:
        ConfigError: if one cannot be opened, is of another base or task, or has no trained head.
    """
    check_combination("reward_model", combine, penalty)
    if not _are_paths(adapters) or not (base is None or isinstance(base, str)):
        raise ConfigError(
            f"reward_model: adapters is {adapters!r} and model {base!r}; give a list of adapters' "
            "paths, and the path of their base or nothing."
        )
    configs = {adapter: _config(adapter) for adapter in adapters}
    path = resolve_model(base or _common_base(configs))
    opened, missing = _opened(path)
    for number, adapter in enumerate(adapters):
        _check_head(adapter, missing, path)
        opened = _with_adapter(opened, adapter, str(number))
    beside = [a for a in adapters if (Path(a) / "tokenizer_config.json").exists()]
    return opened.eval(), (beside or [path])[0]


def _are_paths(adapters: Any) -> bool:
    listed = isinstance(adapters, list | tuple) and len(adapters) > 0
    return listed and all(isinstance(each, str) and each for each in adapters)


def _config(adapter: str) -> PeftConfig:
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"The adapter {adapter!r} cannot be opened: {str(error).strip().splitlines()[0]}"
        ) from error
    if config.task_type != "SEQ_CLS":
        raise ConfigError(
            f"The adapter {adapter!r} is for the task {config.task_type!r}; one of a reward model "
            "is for 'SEQ_CLS'. trainer: reward makes such."
        )
    return config


def _common_base(configs: dict[str, PeftConfig]) -> str:
    bases = {adapter: config.base_model_name_or_path for adapter, config in configs.items()}
    [first, *others] = dict.fromkeys(bases.values())
    if others or not first:
        raise ConfigError(
            "The adapters name no base in common: "
            f"{', '.join(f'{adapter} has {base!r}' for adapter, base in bases.items())}. Say it: "
            "model."
        )
    return first


def _opened(path: str) -> tuple[Any, set[str]]:
    """The base, and the names of its weights that are nowhere but in an adapter."""
    from transformers import AutoModelForSequenceClassification

    try:
        opened, info = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype="auto", output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"The base {path!r} of the reward adapters cannot be opened as a model with one label: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    return opened, set(info["missing_keys"])


def _check_head(adapter: str, missing: set[str], base: str) -> None:
    lacking = sorted(missing - {_in_base(key) for key in load_peft_weights(adapter, device="cpu")})
    if lacking:
        raise ConfigError(
            f"The adapter {adapter!r} has no {', '.join(lacking)} and its base {base!r} has none "
            "either: it would judge by random numbers. Train it with modules_to_save: [score]."
        )


def _in_base(key: str) -> str:
    """The name in the base of a weight that an adapter replaces."""
    return key.removeprefix("base_model.model.").replace(".modules_to_save", "")


def _with_adapter(opened: Any, adapter: str, name: str) -> PeftModel:
    try:
        if not isinstance(opened, PeftModel):
            return PeftModel.from_pretrained(opened, adapter, adapter_name=name)
        opened.load_adapter(adapter, adapter_name=name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"The adapter {adapter!r} does not fit its base: {str(error).strip().splitlines()[0]}"
        ) from error
    return opened
