"""The KL penalty of a policy trainer, per token, and the controller of its coefficient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trl_ext.registry import KL_ESTIMATORS

# Schulman et al. (2017): by how much the KL may miss the target, and what β is multiplied with.
_TOLERANCE, _FACTOR = 1.5, 2.0
# Ziegler et al. (2019): the largest relative error that the proportional rule reacts to.
_MAX_ERROR = 0.2


@dataclass(frozen=True)
class KLPenalty:
    """An estimate of KL(π‖π_ref) per token, with what is done to it.

    Attributes:
        estimator: (logps, ref_logps) -> (B, T) nats, one of `KL_ESTIMATORS`.
        corrected: times the importance ratio ρ = π/π_old, which takes part in the gradient; for k2,
            whose gradient k1·∇log π is right as it is,
        weighs_only: ρ is a constant.
        clamp: the estimate stays within ±clamp, nats per token. None: as it is.
    """

    estimator: Callable[[Tensor, Tensor], Tensor]
    corrected: bool = False
    weighs_only: bool = False
    clamp: float | None = None

    def value(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """(B, T) nats: the estimate, without correction. Equation E28."""
        estimate = self.estimator(logps, ref_logps)
        return estimate if self.clamp is None else estimate.clamp(-self.clamp, self.clamp)

    def in_loss(self, logps: Tensor, ref_logps: Tensor, old_logps: Tensor | None) -> Tensor:
        """(B, T) nats, to be differentiated. Equation E29.

        Args:
            logps: (B, T) log π, nats, with gradient.
            ref_logps: (B, T) log π_ref.
            old_logps: (B, T) log π_old; None on-policy.
        """
        value = self.value(logps, ref_logps)
        if not self.corrected:
            return value
        ratio = (logps - (logps if old_logps is None else old_logps).detach()).exp()
        return (ratio.detach() if self.weighs_only else ratio) * value


class KLController:
    """β over a run. Equation E46.

    Args:
        kind: "constant"; "adaptive": β is halved where the KL is under target/1.5 and doubled where
            it is over 1.5·target; "proportional": β·(1 + e·n/horizon) for n completions, with e the
            relative error, at most 0.2.
        beta: β to begin with, in reward units.
        target: KL(π‖π_ref) of sequences to be held, nats.
        horizon: completions over which the proportional rule would correct an error of 1.
    """

    def __init__(
        self,
        kind: Literal["constant", "adaptive", "proportional"],
        beta: float,
        target: float | None = None,
        horizon: float = 10_000,
    ):
        self.kind = kind
        self.beta = beta
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, completions: int) -> None:
        """Hear of the KL of a rollout of so many completions, nats; a NaN changes nothing."""
        if self.kind == "constant" or self.target is None or kl != kl:
            return
        if self.kind == "proportional":
            error = min(max(kl / self.target - 1, -_MAX_ERROR), _MAX_ERROR)
            self.beta *= 1 + error * completions / self.horizon
        elif kl < self.target / _TOLERANCE:
            self.beta /= _FACTOR
        elif kl > self.target * _TOLERANCE:
            self.beta *= _FACTOR


def group_centred(values_PGT: Tensor) -> Tensor:
    """(P, G, T) minus the mean over the group at each position, ended completions counting as 0.

    As much of its own value is in a completion's baseline as there is in the group mean that GRPO
    subtracts from the reward: the two stay in proportion.
    """
    return values_PGT - values_PGT.mean(dim=1, keepdim=True)


def penalty_of(name: str, corrected: bool, clamp: float | None) -> KLPenalty:
    """The penalty that a config asks for, if its estimator looks at sampled tokens alone.

    Raises:
        UnknownNameError: if there is no such estimator.
    """
    estimator = KL_ESTIMATORS.load(name)
    return KLPenalty(estimator, corrected, weighs_only=name == "k2", clamp=clamp)
