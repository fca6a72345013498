"""Options of GRPO: TRL's, and those of the KL penalty."""

from dataclasses import dataclass

from trl_ext.policy_config import PolicyConfig


@dataclass
class GRPOConfig(PolicyConfig):
    """`trl.GRPOConfig` with the KL options of `PolicyConfig`, at TRL's own setting by default.

    That is k3 times the importance ratio in the loss, whose expected gradient is the per-step part
    of the KL's. The whole of it, and π* as the fixed point, is what `kl_estimator="k1",
    kl_placement="reward", kl_is_correction=False` gives, with `scale_rewards="none"` and a
    `loss_type` that does not divide by a completion's length (dr_grpo, luspo): `beta` is in the
    units of the advantage, which `scale_rewards` otherwise divides by a standard deviation.
    """
