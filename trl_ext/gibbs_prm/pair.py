"""The two models of a scorer, π and π_ref: objects, paths, or one model with an adapter."""

import os
import re
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError, TrlExtError
from trl_ext.gibbs_prm.saved_run import RECIPE, SavedRun, saved_run
from trl_ext.models.adapter import Adapter, Causal, inner_model
from trl_ext.models.loading import (
    ADAPTER_FILE,
    default_device,
    is_adapter,
    load_causal,
    open_tokenizer,
    tokenizer_at,
    tokenizer_beside,
)
from trl_ext.models.vocabulary import check_vocabularies

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
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
    opened = _opened(paths, dtype, device, run if reference == getattr(run, "start", 0) else None)
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
    if of_policy is of_reference or (isinstance(policy, str) and policy == reference):
        raise ConfigError(
            f"The policy and the reference are one, {_in_words(of_policy, policy)}: every score "
            "would be 0. Give reference= (--reference) the model before training."
        )
    given = open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return Pair(
        of_policy,
        of_reference,
        _one_tokenizer(given, found),
        run,
        {POLICY: _in_words(of_policy, policy), REFERENCE: _in_words(of_reference, reference)},
    )


def _opened(paths: dict[str, str], dtype: str, device: Any, run: SavedRun | None) -> dict[str, Any]:
    """The models at paths; `run`: that whose recipe names the reference."""
    try:
        return load_causal(paths, dtype=dtype, device=device)
    except TrlExtError as error:
        if run is None or REFERENCE not in str(error).lower():
            raise
        raise type(error)(
            f"{error} It is what {run.folder / RECIPE} began with, as seen from where it ran. Give "
            "reference= (--reference) where it is now."
        ) from error


def _plain_path(given: Any) -> Any:
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def _reference_of(policy: str, run: SavedRun | None) -> str | None:
    """Where the reference of a policy at a path is, if something tells."""
    if run is not None and run.start is not None:
        return run.start
    if is_adapter(resolve_model(policy)):
        return None  # the adapter's base
    place = resolve_model(policy)
    is_here = os.path.isdir(place)
    if is_here and not os.path.isfile(os.path.join(place, "config.json")):
        raise ConfigError(
            f"{policy!r} holds neither a model (config.json) nor an adapter ({ADAPTER_FILE})."
            f"{_checkpoint_in(place)} Name the folder where one is saved."
        )
    what = "is a whole model" if is_here else "is no folder here, and no adapter of the hub"
    raise ConfigError(
        f"There is no reference: {policy!r} {what}, and no recipe.yaml beside it tells what it "
        "began as. Give reference= (--reference) the model before training"
        f"{'' if is_here else ', or mend the path'}."
    )


def _checkpoint_in(folder: str) -> str:
    numbers = [int(name[11:]) for name in os.listdir(folder) if re.match(r"checkpoint-\d+\Z", name)]
    last = os.path.join(folder, f"checkpoint-{max(numbers, default=0)}")
    return f" Its run has not ended; the last checkpoint is {last!r}." if numbers else ""


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
        _check_no_tokenizer(resolve_model(given))
    return tokenizer_beside(model)


def _check_no_tokenizer(path: str) -> None:
    """Whether no tokenizer opened at a path because none is there: another's would hide its end."""
    if any(os.path.isfile(os.path.join(path, name)) for name in TOKENIZER_FILES):
        open_tokenizer(path)  # says why
        raise ConfigError(f"The tokenizer {path!r} cannot be opened. Save it there once more.")


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
