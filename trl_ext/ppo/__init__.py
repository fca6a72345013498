"""PPO with a critic, on today's TRL."""

from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.critic import Critic
from trl_ext.ppo.trainer import PPOTrainer

__all__ = ["Critic", "PPOConfig", "PPOTrainer"]
