"""Whether experts can be multiplied: one vocabulary, one device, one dtype."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from trl_ext.errors import ConfigError
from trl_ext.poe.experts import Adapter, TokenReward
from trl_ext.poe.vocabulary import check_vocabularies


def model_of(expert: Any) -> Any:
    """The transformers or PEFT model that an expert runs; None for one that runs none."""
    if isinstance(expert, Adapter):
        return expert.model
    if isinstance(expert, TokenReward):
        return model_of(expert.reward)
    return expert if isinstance(expert, PreTrainedModel | PeftModel) else None


def device_of(expert: Any) -> torch.device | None:
    """Where an expert's input must be; None where it does not say."""
    held = model_of(expert)
    if held is None:
        held = expert.reward if isinstance(expert, TokenReward) else expert
    return getattr(held, "device", None) and torch.device(held.device)


def check_experts(experts: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> int:
    """The width of the vocabulary that all of them share.

    Models may have more logits than tokens, for padding: where the tokenizers are known and agree,
    the smallest width counts.

    Args:
        experts: name -> expert.
        tokenizers: name -> tokenizer; others are looked for with the expert.

    Raises:
        ConfigError: with the two experts that do not fit, and where.
    """
    _check_names(experts, tokenizers)
    _check_same("device", {name: device_of(expert) for name, expert in experts.items()}, 'to("{}")')
    models = {name: model_of(expert) for name, expert in experts.items()}
    dtypes = {name: model.dtype for name, model in models.items() if model is not None}
    _check_same("dtype", dtypes, "to({})")
    found = {name: tokenizers.get(name) or tokenizer_of(experts[name]) for name in experts}
    known = {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}
    if known:
        check_vocabularies(known)
    widths = {name: width for name in experts if (width := _width(experts[name])) is not None}
    if not widths:
        raise ConfigError(
            "No expert says how many tokens it knows. Add a model, a counted expert, or an object "
            "with vocab_size."
        )
    if len(set(widths.values())) > 1 and not set(widths) <= set(known):
        shown = ", ".join(f"{name!r} has {width}" for name, width in widths.items())
        unknown = next(name for name in widths if name not in known)
        raise ConfigError(
            f"The experts score vocabularies of different size: {shown}. If they have one "
            "tokenizer and the larger one is padded, give tokenizers={name: tokenizer, ...} to "
            f"show it (that of {unknown!r} is not known)."
        )
    return min(widths.values())


def _check_names(experts: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> None:
    unknown = [name for name in tokenizers if name not in experts]
    if unknown:
        raise ConfigError(
            f"tokenizers names {unknown[0]!r}, which is no expert. The experts: "
            f"{', '.join(experts)}."
        )


def _check_same(what: str, values: Mapping[str, Any], move: str) -> None:
    known = [(name, value) for name, value in values.items() if value is not None]
    for name, value in known[1:]:
        first, wanted = known[0]
        if value != wanted:
            raise ConfigError(
                f"The expert {name!r} has the {what} {value}, and {first!r} has {wanted}; a "
                f"product multiplies them in one place. Move it: .{move.format(wanted)}."
            )


def tokenizer_of(expert: Any) -> Any:
    """The tokenizer that lies with an expert: its own, or in its local folder; else None."""
    if hasattr(expert, "tokenizer"):
        return expert.tokenizer
    model = model_of(expert)
    folder = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not any(os.path.isfile(os.path.join(folder, f)) for f in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def _width(expert: Any) -> int | None:
    """How many tokens an expert scores; None if that is known only once it has."""
    model = model_of(expert)
    if model is not None:
        head = model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        # A head in four bits has a weight of another shape.
        features = getattr(head, "out_features", None)
        return features or (len(weight) if weight is not None else model.config.vocab_size)
    if isinstance(expert, TokenReward):
        return len(expert.reward) if isinstance(expert.reward, torch.Tensor) else None
    return getattr(expert, "vocab_size", None)
