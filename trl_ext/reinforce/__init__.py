"""REINFORCE with reward-to-go, baselines and off-policy correction."""

from trl_ext.reinforce.config import ReinforceConfig
from trl_ext.reinforce.trainer import ReinforceTrainer

__all__ = ["ReinforceConfig", "ReinforceTrainer"]
