"""What every policy trainer takes, and which options go together."""

from trl_ext.policy_config.own_loss import OwnLossConfig, PolicyGradientConfig
from trl_ext.policy_config.policy import PolicyConfig
from trl_ext.policy_config.process import ProcessOptions

__all__ = ["OwnLossConfig", "PolicyConfig", "PolicyGradientConfig", "ProcessOptions"]
