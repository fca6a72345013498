"""Several reward models as adapters of one base, which is in memory once."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError
from trl_ext.functional.ensemble import Combine
from trl_ext.models.damage import Unreadable, reading_files
from trl_ext.models.quiet import quiet_loading
from trl_ext.rewards.ensemble import combined, log_disagreement
from trl_ext.trl_reward_adapter import appends_eos


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


def open_adapters(base: Any, adapters: Any, append_eos: bool | None) -> tuple[PeftModel, str, bool]:
    """The base with every adapter and its head, their tokenizer's path, and their `append_eos`.

    Raises:
        ConfigError: if one cannot be opened, is of another base or task, or has no trained head; or
            `append_eos` is None and they learned different forms.
    """
    if not _are_paths(adapters) or not (base is None or isinstance(base, str)):
        raise ConfigError(
            f"reward_model: adapters is {adapters!r} and model {base!r}; give a list of adapters' "
            "paths, and the path of their base or nothing."
        )
    configs = {adapter: _config(adapter) for adapter in adapters}
    path = resolve_model(base or _common_base(configs))
    beside = {adapter: tokenizer_config(adapter) for adapter in adapters}
    if append_eos is None:
        append_eos = _common_form(beside)
    opened, missing = _opened(path)
    for number, adapter in enumerate(adapters):
        _check_head(adapter, missing, path)
        opened = _with_adapter(opened, adapter, str(number))
    with_tokenizer = [adapter for adapter, config in beside.items() if config]
    return opened.eval(), (with_tokenizer or [path])[0], append_eos


def tokenizer_config(path: str) -> dict[str, Any]:
    """What lies in the tokenizer_config.json of a model or adapter; nothing without one.

    Raises:
        ConfigError: if it cannot be read.
    """
    with opening(f"The tokenizer_config.json beside {path!r} cannot be read"):
        return get_tokenizer_config(path)


@contextmanager
def opening(failure: str) -> Iterator[None]:
    """Opens files of models without a word but an error's: what is missing is checked here.

    Raises:
        ConfigError: if they cannot be opened; `failure`, and why.
    """
    report = logging.getLogger("transformers")
    level = report.level
    report.setLevel(logging.ERROR)
    try:
        with quiet_loading(), reading_files():
            yield
    except Unreadable as error:
        raise ConfigError(f"{failure}: {error}.") from error
    finally:
        report.setLevel(level)


def _are_paths(adapters: Any) -> bool:
    listed = isinstance(adapters, list | tuple) and len(adapters) > 0
    return listed and all(isinstance(each, str) and each for each in adapters)


def _config(adapter: str) -> PeftConfig:
    with opening(f"The adapter {adapter!r} cannot be opened"):
        config = PeftConfig.from_pretrained(adapter)
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


def _common_form(beside: dict[str, dict[str, Any]]) -> bool:
    """Whether texts are read with the end token behind them."""
    learned = {adapter: appends_eos(config) for adapter, config in beside.items()}
    if len(set(learned.values())) > 1:
        one = next(adapter for adapter, appends in learned.items() if appends)
        other = next(adapter for adapter, appends in learned.items() if not appends)
        raise ConfigError(
            f"The adapter {one!r} learned texts with the end token behind them, and {other!r} did "
            "not, or does not say. Say append_eos: true or false, for all of them."
        )
    return all(learned.values())


def _opened(path: str) -> tuple[Any, set[str]]:
    """The base, and the names of its weights that are nowhere but in an adapter."""
    from transformers import AutoModelForSequenceClassification

    as_what = "cannot be opened as a model with one label"
    with opening(f"The base {path!r} of the reward adapters {as_what}"):
        opened, info = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype="auto", output_loading_info=True
        )
    return opened, set(info["missing_keys"])


def _check_head(adapter: str, missing: set[str], base: str) -> None:
    with opening(f"The weights of the adapter {adapter!r} cannot be opened"):
        weights = load_peft_weights(adapter, device="cpu")
    lacking = sorted(missing - {_in_base(key) for key in weights})
    if lacking:
        raise ConfigError(
            f"The adapter {adapter!r} has no {', '.join(lacking)} and its base {base!r} has none "
            "either: it would judge by random numbers. Train it with modules_to_save: [score]."
        )


def _in_base(key: str) -> str:
    """The name in the base of a weight that an adapter replaces."""
    return key.removeprefix("base_model.model.").replace(".modules_to_save", "")


def _with_adapter(opened: Any, adapter: str, name: str) -> PeftModel:
    with opening(f"The adapter {adapter!r} does not fit its base"):
        if not isinstance(opened, PeftModel):
            return PeftModel.from_pretrained(opened, adapter, adapter_name=name)
        opened.load_adapter(adapter, adapter_name=name)
        return opened
