"""Algorithms around the Gibbs policy π* ∝ π_ref · exp(r/β), as plugins on top of Hugging Face TRL.

The names below are imported when first used, so that `import trl_ext` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext.grpo import GRPOConfig, GRPOTrainer
    from trl_ext.poe.distillation import PoEDistillationConfig, PoEDistillationTrainer
    from trl_ext.ppo import PPOConfig, PPOTrainer
    from trl_ext.reinforce import ReinforceConfig, ReinforceTrainer
    from trl_ext.reward_model import RewardConfig, RewardTrainer
    from trl_ext.rwr import OfflineRWRConfig, OfflineRWRTrainer, RWRConfig, RWRTrainer
    from trl_ext.watch import RewardHackingWatch

__version__ = "0.1.0.dev0"

# An algorithm adds its two public names here, and once more above, for editors.
_HOMES = {
    "GRPOConfig": "trl_ext.grpo",
    "GRPOTrainer": "trl_ext.grpo",
    "OfflineRWRConfig": "trl_ext.rwr",
    "OfflineRWRTrainer": "trl_ext.rwr",
    "PPOConfig": "trl_ext.ppo",
    "PPOTrainer": "trl_ext.ppo",
    "PoEDistillationConfig": "trl_ext.poe.distillation",
    "PoEDistillationTrainer": "trl_ext.poe.distillation",
    "RWRConfig": "trl_ext.rwr",
    "RWRTrainer": "trl_ext.rwr",
    "ReinforceConfig": "trl_ext.reinforce",
    "ReinforceTrainer": "trl_ext.reinforce",
    "RewardConfig": "trl_ext.reward_model",
    "RewardHackingWatch": "trl_ext.watch",
    "RewardTrainer": "trl_ext.reward_model",
}

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "OfflineRWRConfig",
    "OfflineRWRTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PoEDistillationConfig",
    "PoEDistillationTrainer",
    "RWRConfig",
    "RWRTrainer",
    "ReinforceConfig",
    "ReinforceTrainer",
    "RewardConfig",
    "RewardHackingWatch",
    "RewardTrainer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trl_ext' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
