"""Reward-weighted regression: project onto the Gibbs policy from samples."""

from trl_ext.rwr.config import RWRConfig
from trl_ext.rwr.trainer import RWRTrainer

__all__ = ["RWRConfig", "RWRTrainer"]
