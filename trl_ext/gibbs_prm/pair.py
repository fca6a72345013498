"""The two models of a scorer, π and π_ref: objects, paths, or one model with an adapter."""

import os
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError
from trl_ext.gibbs_prm.saved_run import SavedRun, saved_run
from trl_ext.models.adapter import Adapter, Causal, inner_model
from trl_ext.models.loading import (
    default_device,
    is_adapter,
    load_causal,
    open_tokenizer,
    tokenizer_at,
)
from trl_ext.models.vocabulary import check_vocabularies

POLICY, REFERENCE = "the policy", "the reference"
_MAY_BE = (
    "a causal language model, a PeftModel, an Adapter, or the path, hub id or bundled: name of one"
)


@dataclass(frozen=True)
class Pair:
    """π and π_ref, opened.

    Attributes:
        policy, reference: they may share one model.
        tokenizer: of both.
        run: what the policy's own recipe tells; None without one.
        names: what the two are, in words.
    """

    policy: Causal
    reference: Causal
    tokenizer: Any
    run: SavedRun | None = None
    names: dict[str, str] = field(default_factory=dict)


def open_pair(
    policy: Any,
    reference: Any = None,
    tokenizer: Any = None,
    *,
    dtype: str = "float32",
    device: Any = None,
) -> Pair:
    """Open what is given as a path; let what can be shared be one.

    Args:
        policy: π; see `GibbsScorer`.
        reference: π_ref; see `GibbsScorer`.
        tokenizer: an object or a path; None: the one beside the policy, or the reference.
        dtype, device: of what is opened here.

    Raises:
        ConfigError: if one cannot be opened, there is no reference, or their tokenizers differ.
    """
    policy, reference = _plain_path(policy), _plain_path(reference)
    for name, given in ((POLICY, policy), (REFERENCE, reference)):
        if given is not None and not isinstance(given, str | PreTrainedModel | PeftModel | Adapter):
            raise ConfigError(f"{name} is a {type(given).__name__}; it must be {_MAY_BE}.")
    if policy is None:
        raise ConfigError(f"{POLICY} is None; it must be {_MAY_BE}.")
    run = saved_run(resolve_model(policy)) if isinstance(policy, str) else None
    if reference is None and isinstance(policy, str):
        reference = _reference_of(policy, run)
    paths = {
        name: given
        for name, given in ((POLICY, policy), (REFERENCE, reference))
        if isinstance(given, str) and not _is_named_adapter(given, policy)
    }
    device = device or _device_of(policy, reference)
    opened = load_causal(paths, dtype=dtype, device=device)
    of_policy = opened.get(POLICY) or _as_adapter(policy)
    of_reference = opened.get(REFERENCE) or _reference_beside(of_policy, reference)
    for name, model in ((POLICY, of_policy), (REFERENCE, of_reference)):
        _check_causal(name, model)
    found = {
        name: _tokenizer_of(given, model)
        for name, given, model in (
            (POLICY, policy, of_policy),
            (REFERENCE, reference, of_reference),
        )
    }
    given = open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return Pair(
        of_policy,
        of_reference,
        _one_tokenizer(given, found),
        run,
        {POLICY: _in_words(of_policy, policy), REFERENCE: _in_words(of_reference, reference)},
    )


def _plain_path(given: Any) -> Any:
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def _reference_of(policy: str, run: SavedRun | None) -> str | None:
    """Where the reference of a policy at a path is, if something tells."""
    if run is not None and run.start is not None:
        return run.start
    if is_adapter(resolve_model(policy)):
        return None  # the adapter's base
    raise ConfigError(
        f"There is no reference: {policy!r} is a whole model, and no recipe.yaml beside it tells "
        "what it began as. Give reference= the model before training."
    )


def _is_named_adapter(given: str, policy: Any) -> bool:
    wrapped = policy.model if isinstance(policy, Adapter) else policy
    return isinstance(wrapped, PeftModel) and given in wrapped.peft_config


def _as_adapter(model: Any) -> Causal:
    """A PeftModel as the adapter that is active in it now."""
    if not isinstance(model, PeftModel):
        return model
    [active] = model.active_adapters
    return Adapter(model, active)


def _reference_beside(policy: Causal, reference: Any) -> Causal:
    """The reference that is an object, a named adapter of the policy's model, or that without."""
    if isinstance(reference, str):
        assert isinstance(policy, Adapter)
        return Adapter(policy.model, reference)
    if isinstance(reference, PeftModel):
        is_shared = isinstance(policy, Adapter) and reference is policy.model
        return Adapter(reference, None) if is_shared else _as_adapter(reference)
    if reference is not None:
        return reference
    if not isinstance(policy, Adapter) or policy.name is None:
        raise ConfigError(
            "There is no reference: the policy is a whole model. Give reference= the model before "
            "training; only an adapter brings its own, the model without it."
        )
    return Adapter(policy.model, None)


def _check_causal(name: str, model: Causal) -> None:
    inner = inner_model(model)
    if inner.config.is_encoder_decoder or inner.get_output_embeddings() is None:
        raise ConfigError(
            f"{name} is a {type(inner).__name__}, which is no causal language model; it must be "
            f"{_MAY_BE}."
        )


def _device_of(*models: Any) -> Any:
    held = next((m for m in models if m is not None and not isinstance(m, str)), None)
    if held is None:
        return default_device()
    return (held.model if isinstance(held, Adapter) else held).device


def _tokenizer_of(given: Any, model: Causal) -> Any:
    if isinstance(given, str):
        found = tokenizer_at(given)
        if found is not None:
            return found
    path = getattr(inner_model(model).config, "_name_or_path", "")
    return tokenizer_at(path) if path and os.path.isdir(path) else None


def _one_tokenizer(given: Any, found: dict[str, Any]) -> Any:
    known = {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}
    if given is not None:
        known = {"the tokenizer given": given, **known}
    if len(known) > 1:
        check_vocabularies(known)
    if not known:
        raise ConfigError(
            "There is no tokenizer beside the policy or the reference. Give tokenizer=: an object, "
            "or the path of one."
        )
    return next(iter(known.values()))


def _in_words(model: Causal, given: Any) -> str:
    if isinstance(given, str):
        return given
    name = str(getattr(inner_model(model).config, "_name_or_path", "")) or "a model in memory"
    if isinstance(model, Adapter):
        return f"{name}, adapter {model.name!r}" if model.name else f"{name}, adapters off"
    return name
