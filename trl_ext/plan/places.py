"""The shapes of what lies at a path: a model, a LoRA adapter on its base, a critic of a run."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig

from trl_ext.errors import ConfigError
from trl_ext.models.loading import same_place
from trl_ext.models.paths import ADAPTER_FILE
from trl_ext.plan.opening import open_config
from trl_ext.plan.run import lora_of, shaping
from trl_ext.plan.shapes import Shapes, shapes_of
from trl_ext.ppo.critic import ABOUT, ADAPTER, BACKBONE, of_a_backbone, read_about


def shapes_at(path: str, policy: dict[str, Any] | None = None) -> Shapes | None:
    """What lies at a path, an adapter there on its base.

    Args:
        path: folder, hub id or `bundled:` name.
        policy: fields of TRL's `ModelConfig`, if a model without an adapter gets the policy's.

    Returns:
        None where its config cannot be had, or is of no decoder.
    """
    return _shapes_at(place(path), json.dumps(shaping(policy or {}), sort_keys=True))


@cache
def _shapes_at(path: str, policy: str) -> Shapes | None:
    """Counted once, however many changes to a recipe are tried."""
    fields = json.loads(policy)
    try:
        base, lora = _below(path)
        return shapes_of(open_config(base), lora or (lora_of(fields) if fields else None))
    except ConfigError:  # the plan says that it is left out
        return None


def place(path: str) -> str:
    """One spelling of a path, a hub id or a `bundled:` name; nothing is made or downloaded."""
    return same_place(str(Path(path).expanduser())) if Path(path).expanduser().is_dir() else path


def base_below(path: str) -> str:
    """Where the weights are that lie at a path, or below the adapter there.

    Raises:
        ConfigError: if an adapter there does not say.
    """
    return place(_below(path)[0])


def is_local_adapter(path: str) -> bool:
    """Whether a LoRA adapter lies in a folder. One on the hub counts as a model that is not had."""
    return (Path(path).expanduser() / ADAPTER_FILE).is_file()


def _below(path: str) -> tuple[str, LoraConfig | None]:
    folder = Path(path).expanduser()
    if (folder / ABOUT).is_file():
        about = read_about(folder)
        if about["has_adapter"]:
            return about["base"], _lora_in(folder / ADAPTER)[1]
        return (str(folder / BACKBONE) if about["kind"] == "model" else about["base"]), None
    return _lora_in(folder) if is_local_adapter(path) else (path, None)


def _lora_in(folder: Path) -> tuple[str, LoraConfig | None]:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"The adapter in {folder} cannot be read: {error}") from error
    base = config.base_model_name_or_path
    if isinstance(config, LoraConfig):
        return base or "", of_a_backbone(config)
    return base or "", None
