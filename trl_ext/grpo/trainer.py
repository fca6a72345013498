"""GRPO: TRL's trainer with a KL penalty that can be chosen."""

from typing import ClassVar

from trl_ext.grpo.config import GRPOConfig
from trl_ext.policy_config import PolicyConfig
from trl_ext.trl_adapter import PolicyTrainer


class GRPOTrainer(PolicyTrainer):
    """`trl.GRPOTrainer` with `kl_estimator`, `kl_placement` and their like.

    Source: Shao et al. (2024), "DeepSeekMath"; Equation E48. At TRL's own setting, the default, it
    gives the same losses, gradients and parameters. Differs from `RWRTrainer`: completions below
    the group's mean are pushed down, and the KL to the reference is a penalty and not a weight.

    Takes the arguments of `trl.GRPOTrainer`, with a `trl_ext.GRPOConfig`.
    """

    config_class: ClassVar[type[PolicyConfig]] = GRPOConfig
    args: GRPOConfig
