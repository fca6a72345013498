"""Experts from paths: models, LoRA adapters on one shared base, counted experts."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError
from trl_ext.poe.counted import CountedExpert
from trl_ext.poe.experts import Adapter
from trl_ext.poe.product import ProductOfExperts

Kind = Literal["counted", "adapter", "model"]
COUNTED_FILE = "counted_expert.json"
ADAPTER_FILE = "adapter_config.json"


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
    of_models = {name: tokenizer_at(name, path) for name, path in experts.items()}
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
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = {name: resolve_model(os.fspath(path)) for name, path in paths.items()}
    kinds = {name: kind_of(path) for name, path in paths.items()}
    bases = {n: _base_of(n, paths[n]) for n, kind in kinds.items() if kind == "adapter"}
    wrapped = {
        base: _with_adapters(base, {n: paths[n] for n in bases if bases[n] == base}, dtype, device)
        for base in dict.fromkeys(bases.values())
    }
    loaded: dict[str, Any] = {}
    for name, path in paths.items():
        if kinds[name] == "counted":
            loaded[name] = CountedExpert.load(path).to(device)
        elif kinds[name] == "adapter":
            of_base = [other for other, base in bases.items() if base == bases[name]]
            loaded[name] = Adapter(wrapped[bases[name]], str(of_base.index(name)))
        elif _same(path) in wrapped:
            loaded[name] = Adapter(wrapped[_same(path)], None)
        else:
            loaded[name] = load_model(name, path, dtype, device)
    return loaded


def kind_of(path: str) -> Kind:
    """What lies at a path or hub id: a counted expert, an adapter, or else a model."""
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, COUNTED_FILE)):
            return "counted"
        return "adapter" if os.path.isfile(os.path.join(path, ADAPTER_FILE)) else "model"
    try:
        is_adapter = not os.path.exists(path) and find_adapter_config_file(path) is not None
    except (OSError, ValueError):  # no hub id either; loading says so
        is_adapter = False
    return "adapter" if is_adapter else "model"


def load_model(name: str, path: str, dtype: str, device: str | torch.device) -> Any:
    """A causal language model in evaluation mode.

    Raises:
        ConfigError: if there is none; with the expert's name.
    """
    try:
        kind = dtype if dtype == "auto" else getattr(torch, dtype)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        missing = "" if os.path.exists(path) else "There is no such folder here, and as a hub id: "
        raise ConfigError(
            f"The expert {name!r} cannot be opened at {path!r}: {missing}{reason}. "
            "An expert is a hub id or folder of a causal language model, of a LoRA adapter "
            "(adapter_config.json), or of a counted expert (`trl_ext count` makes one)."
        ) from error
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]


def _with_adapters(
    base: str, adapters: Mapping[str, str], dtype: str, device: str | torch.device
) -> PeftModel:
    model = load_model("base of " + ", ".join(adapters), base, dtype, device)
    # By number: not every expert's name can be that of a module.
    first, *others = adapters.values()
    wrapped = PeftModel.from_pretrained(model, first, adapter_name="0")
    for number, path in enumerate(others, start=1):
        wrapped.load_adapter(path, adapter_name=str(number))
    return wrapped.to(device).eval()


def _base_of(name: str, path: str) -> str:
    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise ConfigError(
            f"The expert {name!r}, an adapter at {path!r}, does not say which model it belongs "
            f"to: base_model_name_or_path in its {ADAPTER_FILE} is empty. Write it there."
        )
    return _same(resolve_model(base))


def _same(path: str) -> str:
    """One spelling for one place."""
    return str(Path(path).resolve()) if os.path.isdir(path) else path


def tokenizer_at(name: str, path: str) -> Any:
    """The tokenizer of a model, or of an adapter's base; None for a counted expert's own."""
    path = resolve_model(path)
    kind = kind_of(path)
    if kind == "counted":
        return None
    try:
        return AutoTokenizer.from_pretrained(_base_of(name, path) if kind == "adapter" else path)
    except (OSError, ValueError, KeyError):
        return None


def _left_padded(tokenizer: Any) -> Any:
    if tokenizer is not None:
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
