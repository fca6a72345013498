"""Causal language models and LoRA adapters from paths; what shares a base is loaded once."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError
from trl_ext.models.adapter import Adapter, Causal, inner_model
from trl_ext.models.damage import Unreadable, reading_files
from trl_ext.models.paths import ADAPTER_FILE
from trl_ext.models.quiet import quiet_loading


def load_causal(
    paths: Mapping[str, str],
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    beside: str = "",
) -> dict[str, Any]:
    """What lies at each path: a model, or an `Adapter` of a base that it shares with others.

    Args:
        paths: what errors call it -> hub id, folder or `bundled:` name of a causal language model
            or of a LoRA adapter. Adapters of one base share it, also with the base itself where
            that is among the paths.
        dtype: of the models; "auto" for what each was saved in.
        device: where all go; a GPU by default if there is one.
        beside: what else such a path may be, for errors.

    Raises:
        ConfigError: if a path cannot be opened; with its name.
    """
    with quiet_loading():
        return _load_causal(paths, dtype, device or default_device(), beside)


def _load_causal(
    paths: Mapping[str, str], dtype: str, device: str | torch.device, beside: str
) -> dict[str, Any]:
    paths = {name: resolve_model(os.fspath(path)) for name, path in paths.items()}
    bases = {name: base_of(name, path) for name, path in paths.items() if is_adapter(path)}
    wrapped = {
        base: _with_adapters(base, {n: paths[n] for n in bases if bases[n] == base}, dtype, device)
        for base in dict.fromkeys(bases.values())
    }
    loaded: dict[str, Any] = {}
    for name, path in paths.items():
        if name in bases:
            of_base = [other for other, base in bases.items() if base == bases[name]]
            loaded[name] = Adapter(wrapped[bases[name]], str(of_base.index(name)))
        elif same_place(path) in wrapped:
            loaded[name] = Adapter(wrapped[same_place(path)], None)
        else:
            loaded[name] = load_model(name, path, dtype, device, beside=beside)
    return loaded


def default_device() -> str:
    """The accelerator if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_adapter(path: str) -> bool:
    """Whether a LoRA adapter lies at a path or hub id."""
    if os.path.isdir(path):
        return os.path.isfile(os.path.join(path, ADAPTER_FILE))
    try:
        return not os.path.exists(path) and find_adapter_config_file(path) is not None
    except (OSError, ValueError):  # no hub id either; loading says so
        return False


def load_model(
    name: str, path: str, dtype: str, device: str | torch.device, *, beside: str = ""
) -> Any:
    """A causal language model in evaluation mode.

    Args:
        name: what errors call it.
        path: resolved.
        dtype: as for `load_causal`.
        device: where it goes.
        beside: as for `load_causal`.

    Raises:
        ConfigError: if there is none; with the name.
    """
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with _opening(name, path, beside):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind)
        return model.to(device).eval()  # pyright: ignore[reportArgumentType]


@contextmanager
def _opening(name: str, path: str, beside: str = "") -> Iterator[None]:
    """Opens what is called `name` at `path`.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        with reading_files():
            yield
    except Unreadable as error:
        is_here = os.path.exists(path)
        missing = "" if is_here else "There is no such folder here, and as a hub id: "
        whole = " Are the files there whole? Copy them once more." if is_here else ""
        raise ConfigError(
            f"{_capital(name)} cannot be opened at {path!r}: {missing}{error}.{whole} It must be a "
            "hub id or folder of a causal language model, or of a LoRA adapter "
            f"({ADAPTER_FILE}) and the base that it belongs to{beside}."
        ) from error


def _with_adapters(
    base: str, adapters: Mapping[str, str], dtype: str, device: str | torch.device
) -> PeftModel:
    model = load_model("the base of " + " and ".join(adapters), base, dtype, device)
    wrapped: Any = None
    # By number: not every name can be that of a module.
    for number, (name, path) in enumerate(adapters.items()):
        with _opening(name, path):
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, path, adapter_name="0")
            else:
                wrapped.load_adapter(path, adapter_name=str(number))
    return wrapped.to(device).eval()


def base_of(name: str, path: str) -> str:
    """The path of the model that an adapter belongs to.

    Raises:
        ConfigError: if the adapter does not say.
    """
    with _opening(name, path):
        base = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise ConfigError(
            f"{_capital(name)}, an adapter at {path!r}, does not say which model it belongs "
            f"to: base_model_name_or_path in its {ADAPTER_FILE} is empty. Write it there."
        )
    return same_place(resolve_model(base))


def same_place(path: str) -> str:
    """One spelling for one place."""
    return str(Path(path).resolve()) if os.path.isdir(path) else path


def tokenizer_at(path: str) -> Any:
    """The tokenizer beside a model or an adapter, or that of the adapter's base; None without."""
    path = resolve_model(path)
    try:
        if is_adapter(path) and not os.path.isfile(os.path.join(path, "tokenizer_config.json")):
            path = base_of("the adapter", path)
        with reading_files():
            return AutoTokenizer.from_pretrained(path)
    except (ConfigError, Unreadable):
        return None


def tokenizer_beside(model: Causal) -> Any:
    """The tokenizer in the folder that a model was loaded from; None without."""
    path = getattr(inner_model(model).config, "_name_or_path", "")
    return tokenizer_at(path) if path and os.path.isdir(path) else None


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a path, a hub id or a `bundled:` name.

    Raises:
        ConfigError: if there is none.
    """
    path = resolve_model(name)
    try:
        with reading_files():
            return AutoTokenizer.from_pretrained(path)
    except Unreadable as error:
        raise ConfigError(
            f"The tokenizer {name!r} cannot be opened: {error}. It must be a hub id, a bundled: "
            "name, or a folder with whole tokenizer files; save it there once more."
        ) from error


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]
