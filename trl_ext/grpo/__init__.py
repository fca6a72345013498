"""GRPO as TRL has it, with a KL penalty that can be chosen."""

from trl_ext.grpo.config import GRPOConfig
from trl_ext.grpo.trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]
