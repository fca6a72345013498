"""Products of experts: decode from them, reward with them, train towards them. Equations E13-E21.

The names below are imported when first used: counted experts need no trainer.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext.models.adapter import Adapter
    from trl_ext.poe.counted import CountedExpert, NaiveBayesExpert, NGramExpert
    from trl_ext.poe.distillation import PoEDistillationConfig, PoEDistillationTrainer
    from trl_ext.poe.experts import TokenReward
    from trl_ext.poe.loading import load_product
    from trl_ext.poe.product import ProductOfExperts
    from trl_ext.poe.reward_models import reward_model
    from trl_ext.poe.rewards import log_ratio, minus_reference
    from trl_ext.poe.weights import EntropyWeights

_HOMES = {
    "Adapter": "experts",
    "CountedExpert": "counted",
    "EntropyWeights": "weights",
    "NGramExpert": "counted",
    "NaiveBayesExpert": "counted",
    "PoEDistillationConfig": "distillation",
    "PoEDistillationTrainer": "distillation",
    "ProductOfExperts": "product",
    "TokenReward": "experts",
    "load_product": "loading",
    "log_ratio": "rewards",
    "minus_reference": "rewards",
    "reward_model": "reward_models",
}

__all__ = [
    "Adapter",
    "CountedExpert",
    "EntropyWeights",
    "NGramExpert",
    "NaiveBayesExpert",
    "PoEDistillationConfig",
    "PoEDistillationTrainer",
    "ProductOfExperts",
    "TokenReward",
    "load_product",
    "log_ratio",
    "minus_reference",
    "reward_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trl_ext.poe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trl_ext.poe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
