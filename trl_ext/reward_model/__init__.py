"""Reward models from comparisons: pairs, or rankings of K completions."""

from trl_ext.reward_model.config import RewardConfig
from trl_ext.reward_model.trainer import RewardTrainer

__all__ = ["RewardConfig", "RewardTrainer"]
