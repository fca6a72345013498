"""Options of REINFORCE, and the inherited ones that it refuses."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from trl_ext.functional import Baseline
from trl_ext.policy_config import PolicyGradientConfig

Correction = Literal["none", "token", "prefix", "sequence"]


@dataclass
class ReinforceConfig(PolicyGradientConfig):
    """`trl.GRPOConfig` for REINFORCE: what it adds, and what it means otherwise.

    Args:
        baseline: what a return is compared with: "none", the mean over the "batch" or the "group",
            "leave_one_out" (the mean of the prompt's other completions) or "optimal" (their mean
            weighted by ‖∇log π(y)‖², which is approximated by Σ_t (1 − π(y_t)): Equation E35).
        off_policy_correction: for steps on a rollout of an older policy (`num_iterations`,
            `steps_per_generation`). "none" takes no notice. "token" multiplies by π/π_old of the
            token: the gradient of PPO's surrogate, biased by what prefixes and futures changed.
            "prefix" weighs every reward by the ratios up to its token (Equation E38) and
            "sequence" all of them by the whole completion's: both unbiased, the first of less
            variance.
        off_policy_truncation: importance weights are at most this; a bias that bounds the
            variance. None: as they are.
        entropy_coef: TRL's entropy bonus, times the mean entropy of a token.
    """

    baseline: Literal["none", "batch", "group", "leave_one_out", "optimal"] = field(
        default="leave_one_out",
        metadata={
            "help": "What a return is compared with: none, batch, group, leave_one_out, optimal."
        },
    )
    off_policy_correction: Literal["none", "token", "prefix", "sequence"] = field(
        default="prefix",
        metadata={"help": "Importance ratios for rollouts of an older policy."},
    )
    off_policy_truncation: float | None = field(
        default=None, metadata={"help": "Importance weights are at most this. None: no bound."}
    )

    refused: ClassVar[dict[str, str]] = {
        "epsilon": "nothing is clipped; off_policy_truncation bounds importance weights",
        "epsilon_high": "nothing is clipped; off_policy_truncation bounds importance weights",
    }

    def _bad_choices(self) -> list[str]:
        found = super()._bad_choices()
        for name, allowed in (
            ("baseline", get_args(Baseline)),
            ("off_policy_correction", get_args(Correction)),
        ):
            if getattr(self, name) not in allowed:
                found.append(
                    f"  {name}={getattr(self, name)!r} must be one of {', '.join(allowed)}."
                )
        if self.off_policy_truncation is not None and not self.off_policy_truncation > 0:
            found.append(
                f"  off_policy_truncation={self.off_policy_truncation!r} must be greater than 0, "
                "or None for no bound."
            )
        if self.off_policy_truncation is not None and self.off_policy_correction == "none":
            found.append(
                "  off_policy_truncation bounds importance weights, and off_policy_correction="
                "'none' has none. Remove it."
            )
        if self.num_generations == 1 and self.baseline in ("group", "leave_one_out", "optimal"):
            found.append(
                f"  baseline={self.baseline!r} compares a prompt's completions, and "
                "num_generations=1 gives it one. Use baseline='batch', or more completions."
            )
        return found
