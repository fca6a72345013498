"""What the recipe beside a trained policy tells of it: β, the temperature, where it began."""

import sys
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from trl_ext.errors import ConfigError, TrlExtError
from trl_ext.gibbs_prm.encoding import short
from trl_ext.gibbs_prm.row_values import is_number
from trl_ext.registry import TRAINERS

RECIPE = "recipe.yaml"
_WAYS = "Mend it, or move the file away and give beta= and reference= (--beta, --reference)."
# Their `beta` is not that of π*, or they have none.
_WITHOUT_BETA = ("sft", "poe_distillation")


@dataclass(frozen=True)
class SavedRun:
    """A run of `trl_ext train`, as far as a scorer needs it.

    Attributes:
        folder: the run's `output_dir`.
        beta: β of the target π* ∝ π_ref·exp(r/β), in units of the reward; None: it has none.
        temperature: at which the policy was sampled, and its log-probabilities are meant.
        start: the model that the policy began as, its reference; None: the recipe does not say.
        notes: what makes the policy's log-ratio something else than r/β.
    """

    folder: Path
    beta: float | None
    temperature: float
    start: str | None
    notes: list[str] = field(default_factory=list)


def saved_run(policy: str) -> SavedRun | None:
    """The run that left a policy in its output_dir, or in a checkpoint there; None without one.

    Raises:
        ConfigError: if its recipe cannot be read.
    """
    folder = Path(policy)
    if not folder.is_dir():
        return None
    places = [folder, folder.resolve().parent] if "checkpoint" in folder.name else [folder]
    found = next((place for place in places if (place / RECIPE).is_file()), None)
    if found is None:
        return None
    try:
        values = yaml.safe_load((found / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{found / RECIPE} cannot be read: {str(error).splitlines()[0]}. {_WAYS}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{found / RECIPE} is no recipe: it holds no keys. {_WAYS}")
    return _read(found, values)


def _read(folder: Path, values: dict[str, Any]) -> SavedRun:
    trainer = values.get("trainer")
    beta = None if trainer in _WITHOUT_BETA else _beta(folder, values)
    start = values.get("model_name_or_path")
    # A path of the recipe is meant from where the run was started, which may not be here.
    notes = []
    if trainer == "rwr" and values.get("reference", "moving") == "moving" and beta is not None:
        notes.append(
            "trained with reference=moving, so that each rollout tilted the policy by exp(r/beta) "
            "once more: ranks are those of the reward, its units are not."
        )
    if values.get("kl_controller", "constant") != "constant":
        notes.append(
            f"trained with kl_controller={values['kl_controller']}, which moved beta: the recipe's "
            f"{beta} is where it began."
        )
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        notes.append(
            "trained on a quantised model, and opened by its path it is not quantised: rewards are "
            "off by what quantising changes. Give the loaded models to be exact."
        )
    return SavedRun(
        folder,
        beta,
        _number(folder, values, "temperature", 1.0, positive=True),
        start and str(start),
        notes,
    )


def _beta(folder: Path, values: dict[str, Any]) -> float | None:
    if values.get("poe_alpha") is not None:
        alpha = _number(folder, values, "poe_alpha", 1.0)
        return 1 / alpha if alpha else None  # 0: no reward
    default = _default(values.get("trainer"))
    if "beta" not in values and default is None:
        return None
    return _number(folder, values, "beta", default) or None  # 0: no KL, hence no target


def _number(
    folder: Path, values: dict[str, Any], key: str, default: Any, *, positive: bool = False
) -> float:
    value = values.get(key, default)
    if not is_number(value) or value < 0 or (positive and not value):
        allowed = "greater than 0" if positive else "from 0"
        raise ConfigError(
            f"{folder / RECIPE}: {key} is {short(value)}; it must be a finite number {allowed}. "
            f"{_WAYS}"
        )
    return float(value)


def _default(trainer: Any) -> float | None:
    """β of a trainer whose recipe does not set it; None where that is not known here."""
    try:
        made = TRAINERS.load(str(trainer))
    except TrlExtError:  # a plugin that is not installed here
        return None
    if not isinstance(made, type):
        return None
    name = f"{made.__name__.removesuffix('Trainer')}Config"
    config = getattr(sys.modules[made.__module__], name, None)
    options = fields(config) if config is not None and is_dataclass(config) else ()
    defaults: list[Any] = [option.default for option in options if option.name == "beta"]
    return defaults[0] if defaults else None
