"""A model's config, without its weights: from a folder, a hub id, or the table of common models."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from trl_ext.bundled import PREFIX, resolve_model
from trl_ext.errors import ConfigError

# Architecture numbers by model type and name, as the hub's config.json has them. A suffix such as
# -Instruct changes none of them.
_TABLE = Path(__file__).with_name("models.json")
_SUFFIXES = ("-Instruct", "-Base", "-Instruct-2507")
_SAME_AS = {"bundled:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M"}


def open_config(name: str, revision: str | None = None) -> Any:
    """The transformers config of a model; nothing but a config.json is read.

    A name in the table needs no network; its revision is not looked at.

    Raises:
        ConfigError: if there is no such model here, and the hub cannot be reached.
    """
    known = known_models()
    plain = _SAME_AS.get(name, name)
    for suffix in ("", *_SUFFIXES):
        entry = known.get(plain.removesuffix(suffix))
        if entry is not None and not Path(name).is_dir():
            kind, numbers = entry
            return AutoConfig.for_model(kind, dtype="bfloat16", **numbers)
    path = resolve_model(name) if name.startswith(PREFIX) else name
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model_name_or_path: the config of {name!r} cannot be read: "
            f"{str(error).strip().splitlines()[0]} plan needs its config.json alone: give a folder "
            "that holds one, or a hub id that is cached or can be reached (HF_HUB_OFFLINE unset). "
            f"Known without the hub: {', '.join(known)}."
        ) from error


@cache
def known_models() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> model type and the fields of its config."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    return {
        name: (kind, numbers) for kind, models in table.items() for name, numbers in models.items()
    }
