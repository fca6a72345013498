"""Reward models as reward functions: one number a completion, or one a token."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError
from trl_ext.functional.ensemble import Combine
from trl_ext.models.loading import is_adapter, open_tokenizer
from trl_ext.poe.adapter_ensemble import AdapterEnsemble, open_adapters, opening, tokenizer_config
from trl_ext.poe.judging import RewardModel, SequenceModel, TokenModel
from trl_ext.poe.over_tokens import checked_size
from trl_ext.rewards.ensemble import check_combination
from trl_ext.rewards.returned import cut
from trl_ext.trl_reward_adapter import appends_eos


def reward_model(
    model: Any = None,
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    append_eos: bool | None = None,
    adapters: Sequence[str] | None = None,
    combine: Combine = "mean",
    penalty: float = 1.0,
) -> RewardModel | AdapterEnsemble:
    """A reward function out of a classification model with one label.

    A model for sequence classification gives one number a completion, of the text as `trl` hands it
    to a reward model: its own tokenizer and chat template, padded on the right. One for token
    classification gives one number a token; it reads the policy's own token ids, so that its
    tokenizer must be the policy's.

    Args:
        model: a model, or a path, hub id or `bundled:` name of one or of an adapter with its head.
            With `adapters` their base, which None takes from them.
        tokenizer: name or object, in place of the one beside the model.
        batch_size: completions scored at a time.
        append_eos: read a plain text as reward trainers learn it, with the tokenizer's special
            tokens and the end token behind it, or as `trl` hands it to a reward model, without.
            None does what `RewardTrainer` wrote beside the model (of a model that is no path: into
            its tokenizer), and else as `trl`. Messages are read as the chat template writes them,
            and tokens as they were sampled.
        adapters: paths of adapters for sequence classification, each with a head of its own: an
            ensemble on one base, which is in memory once (`AdapterEnsemble`).
        combine, penalty: how their scores become one, as in `ensemble_score`.

    Raises:
        ConfigError: if there is no such model, or it has several labels or no trained head, or an
            option is wrong.
    """
    checked_size(batch_size)
    if append_eos is not None and not isinstance(append_eos, bool):
        raise ConfigError(
            f"reward_model: append_eos is {append_eos!r}; it must be true, false or null, which "
            "does as was learned where that is known."
        )
    if adapters is not None:
        check_combination("reward_model", combine, penalty)
        inner = _of_adapters(model, adapters, tokenizer, batch_size, append_eos)
        return AdapterEnsemble(inner, combine, penalty)
    if (combine, penalty) != ("mean", 1.0):
        raise ConfigError(
            f"reward_model: combine is {combine!r} and penalty {penalty!r}, and there is one model "
            "to combine. Give adapters, or take reward_ensemble."
        )
    is_own = isinstance(model, str)
    if not is_own and not isinstance(model, PreTrainedModel | PeftModel):
        raise ConfigError(
            f"The reward model is {cut(model)}; it must be a classification model with one label, "
            "or the path, hub id or bundled: name of one."
        )
    path = resolve_model(model) if is_own else getattr(model.config, "_name_or_path", "")
    if is_own and is_adapter(path):
        return _of_adapters(None, [path], tokenizer, batch_size, append_eos)
    opened: Any = _opened(model, path) if is_own else model
    if opened.config.num_labels != 1:
        raise ConfigError(
            f"The reward model {path!r} has {opened.config.num_labels} labels; a reward is one "
            "number. Train it with num_labels=1."
        )
    tokenizer = _tokenizer(tokenizer, path)
    if "TokenClassification" not in type(opened).__name__:
        if append_eos is None:
            append_eos = appends_eos(tokenizer_config(path) if is_own else tokenizer)
        return SequenceModel(
            opened, tokenizer, batch_size, name=path, is_own=is_own, append_eos=append_eos
        )
    if append_eos:
        raise ConfigError(
            f"The reward model {path!r} judges each token as it was sampled, and append_eos is "
            "true. Leave it out."
        )
    return TokenModel(opened, tokenizer, batch_size, name=path, is_own=is_own)


def _of_adapters(
    base: Any, adapters: Any, tokenizer: Any, batch_size: int, append_eos: bool | None
) -> SequenceModel:
    """What scores with the one of its adapters that is active."""
    opened, path, append_eos = open_adapters(base, adapters, append_eos)
    tokenizer = _tokenizer(tokenizer, path)
    name = adapters[0] if len(adapters) == 1 else "reward_model"
    return SequenceModel(
        opened, tokenizer, batch_size, name=name, is_own=True, append_eos=append_eos
    )


def _tokenizer(given: Any, path: str) -> Any:
    """The one that is given, or else the one beside the model."""
    if given is None or isinstance(given, str):
        return open_tokenizer(given or path)
    if not isinstance(given, PreTrainedTokenizerBase):
        raise ConfigError(
            f"reward_model: tokenizer is {cut(given)}; it must be a tokenizer, or the path, hub id "
            "or bundled: name of one."
        )
    return given


def _opened(name: str, path: str) -> Any:
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    with opening(f"The reward model {name!r} cannot be opened"):
        config = AutoConfig.from_pretrained(path)
        of_tokens = any("TokenClassification" in a for a in config.architectures or [])
        auto = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
        opened, info = auto.from_pretrained(path, dtype="auto", output_loading_info=True)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ConfigError(
            f"The reward model {name!r} has no {missing} among its weights, and would judge by "
            "random numbers there. Give a model that was trained as a reward model, saved with its "
            "head."
        )
    return opened.eval().requires_grad_(False)
