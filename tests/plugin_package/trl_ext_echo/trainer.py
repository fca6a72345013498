"""Reward-weighted regression with louder weights: the least that a new algorithm is made of."""

from dataclasses import dataclass, field

from trl_ext import RWRConfig, RWRTrainer


@dataclass
class EchoConfig(RWRConfig):
    """`RWRConfig` and one field.

    Args:
        gain: factor on every completion's weight.
    """

    gain: float = field(default=1.0, metadata={"help": "Factor on every completion's weight."})


class EchoTrainer(RWRTrainer):
    """`RWRTrainer` whose weights are multiplied by `gain`; 1 is its parent."""

    config_class = EchoConfig
    args: EchoConfig

    def assign_credit(self, rollout):
        return self.args.gain * super().assign_credit(rollout)
