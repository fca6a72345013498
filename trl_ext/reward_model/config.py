"""Options of reward models that learn from comparisons."""

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from trl import RewardConfig as TRLRewardConfig

from trl_ext.options import OwnOptions

LOSS_TYPES = ("bradley_terry", "plackett_luce")


@dataclass
class RewardConfig(OwnOptions, TRLRewardConfig):
    """`trl.RewardConfig` for comparisons of K completions: what it adds, and what changes.

    Args:
        loss_type: "bradley_terry": the mean of −log σ(r_w − r_l − margin) over the pairs of a
            prompt (Equations E50, E51), which for K = 2 is TRL's loss; "plackett_luce": −log of
            the probability of the whole ranking, in nats, which is larger for larger K.
        order_effect: learn a number α with the model that is added where the winner was shown first
            and taken off where it was shown last (Equation E49), so that what raters owe to the
            order does not go into the rewards. The completions of a row must be in the order in
            which they were shown. α is logged as `order_effect` and saved beside the model.
        order_effect_learning_rate: of α alone: it is one number of the size of 1, and at a model's
            learning rate would hardly move. The schedule is the model's.
        center_rewards_coefficient: TRL's; for K > 2 the mean of (r_w + r_l)² over the pairs of a
            prompt. A comparison says nothing about a constant that is added to all rewards of a
            prompt: this draws it towards 0.
        max_length: TRL's: a row is left out if one of its sequences is longer. How many, is logged.
    """

    loss_type: Literal["bradley_terry", "plackett_luce"] = field(
        default="bradley_terry",
        metadata={"help": "Compare the pairs of a prompt, or the whole ranking at once."},
    )
    order_effect: bool = field(
        default=False,
        metadata={"help": "Learn how much being shown first helps a completion."},
    )
    order_effect_learning_rate: float = field(
        default=0.01,
        metadata={"help": "Learning rate of the order effect alone."},
    )

    def __post_init__(self):
        self.check()
        super().__post_init__()

    def findings(self) -> list[str]:
        """What is wrong with these options, a line each."""
        wrong = [
            f"  {name}={getattr(self, name)!r} must be {allowed}."
            for name, (is_right, allowed) in _ALLOWED.items()
            if not is_right(getattr(self, name))
        ]
        return wrong or self._bad_combinations()

    def _bad_combinations(self) -> list[str]:
        if not self.order_effect:
            return []
        findings = []
        if self.loss_type != "bradley_terry":
            findings.append(
                f"  order_effect=True with loss_type={self.loss_type!r}: an order effect belongs "
                "to pairs. Use loss_type='bradley_terry'."
            )
        if self.ddp_find_unused_parameters:
            findings.append(
                "  order_effect=True with ddp_find_unused_parameters=True: the order effect is no "
                "part of the model's forward pass, and would count as unused. Remove it."
            )
        return findings


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


# Option -> whether a value is right, and which are.
_ALLOWED = {
    "loss_type": (lambda value: value in LOSS_TYPES, f"one of {LOSS_TYPES}"),
    "order_effect": (lambda value: isinstance(value, bool), "True or False"),
    "order_effect_learning_rate": (
        lambda value: _is_number(value) and value > 0,
        "a number greater than 0",
    ),
    "center_rewards_coefficient": (
        lambda value: value is None or (_is_number(value) and value >= 0),
        "None, or a number from 0 on (0.01 is usual)",
    ),
    "max_length": (
        lambda value: value is None or _is_count(value),
        "None, or a whole number from 1 on",
    ),
}
