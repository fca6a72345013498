"""Experts from paths: models, LoRA adapters on one shared base, counted experts."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError
from trl_ext.models.loading import default_device, load_causal, tokenizer_at
from trl_ext.poe.counted import CountedExpert
from trl_ext.poe.product import ProductOfExperts

COUNTED_FILE = "counted_expert.json"


def load_product(
    experts: Mapping[str, str],
    weights: Any,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    plausibility: float | None = None,
) -> ProductOfExperts:
    """A `ProductOfExperts` of what lies at these paths, with `tokenizer` to go with it.

    Args:
        experts: name -> hub id, folder or `bundled:` name of a causal language model, of a LoRA
            adapter, or of a counted expert. Adapters of one base share it, also with the base
            itself where it is among the experts.
        weights: as `ProductOfExperts` takes them.
        dtype: of the models; "auto" for what each was saved in.
        device: where all experts go; a GPU by default if there is one.
        plausibility: as `ProductOfExperts` takes it.

    Raises:
        ConfigError: if a path cannot be opened as an expert, or the experts do not fit together.
    """
    loaded = load_experts(experts, dtype=dtype, device=device)
    of_models = {name: expert_tokenizer(path) for name, path in experts.items()}
    known = {name: tokenizer for name, tokenizer in of_models.items() if tokenizer is not None}
    product = ProductOfExperts(loaded, weights, plausibility=plausibility, tokenizers=known)
    of_counted = [getattr(expert, "tokenizer", None) for expert in loaded.values()]
    product.tokenizer = _left_padded(next(filter(None, [*known.values(), *of_counted]), None))
    return product


def load_experts(
    paths: Mapping[str, str], *, dtype: str = "float32", device: str | torch.device | None = None
) -> dict[str, Any]:
    """What lies at each path, as an expert. Arguments and errors as for `load_product`."""
    for name, path in paths.items():
        if not isinstance(path, str | os.PathLike):
            raise ConfigError(
                f"The expert {name!r} is a {type(path).__name__}; load_product takes paths and hub "
                "ids. Give what is loaded to ProductOfExperts."
            )
    device = device or default_device()
    counted = {name: path for name, path in paths.items() if _is_counted(path)}
    others = {f"the expert {n!r}": path for n, path in paths.items() if n not in counted}
    models = load_causal(
        others, dtype=dtype, device=device, beside=", or of a counted expert (`trl_ext count`)"
    )
    return {
        name: CountedExpert.load(os.fspath(path)).to(device)
        if name in counted
        else models[f"the expert {name!r}"]
        for name, path in paths.items()
    }


def expert_tokenizer(path: str) -> Any:
    """The tokenizer of a model or an adapter; None for a counted expert, which has its own."""
    return None if _is_counted(path) else tokenizer_at(os.fspath(path))


def _is_counted(path: str) -> bool:
    return os.path.isfile(os.path.join(resolve_model(os.fspath(path)), COUNTED_FILE))


def _left_padded(tokenizer: Any) -> Any:
    if tokenizer is not None:
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
