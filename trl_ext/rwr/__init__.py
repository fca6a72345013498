"""Reward-weighted regression: project onto the Gibbs policy from samples, fresh or logged."""

from trl_ext.rwr.config import RWRConfig
from trl_ext.rwr.offline import OfflineRWRTrainer
from trl_ext.rwr.offline_config import OfflineRWRConfig
from trl_ext.rwr.trainer import RWRTrainer

__all__ = ["OfflineRWRConfig", "OfflineRWRTrainer", "RWRConfig", "RWRTrainer"]
