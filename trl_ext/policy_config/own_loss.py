"""Configs of the trainers that do not use TRL's surrogate."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trl_ext.policy_config.policy import PolicyConfig

# TRL's loss types that only say how the losses of tokens add up.
_SUMMED_BY_TOKENS = ("dr_grpo", "luspo", "grpo", "bnpo", "dapo")


@dataclass
class OwnLossConfig(PolicyConfig):
    """`PolicyConfig` of a trainer that does not use TRL's surrogate: what belongs to that.

    With `use_vllm` the loss of each token, or the weight of a completion, counts π_old/μ times, μ
    being vLLM's probability of it: `vllm_importance_sampling_correction` and its options are TRL's.
    As in TRL, a KL penalty in the loss does not.
    """

    refused: ClassVar[dict[str, str]] = {
        "delta": "it clips TRL's surrogate, which is not used here",
        "importance_sampling_level": "it belongs to TRL's surrogate, which is not used here",
        "multi_objective_aggregation": "rewards are summed up by reward_weights",
        "off_policy_mask_threshold": "it belongs to TRL's surrogate, which is not used here",
        "sapo_temperature_neg": "there is no SAPO loss",
        "sapo_temperature_pos": "there is no SAPO loss",
        "top_entropy_quantile": "every token of a completion counts",
        "vespo_k_neg": "there is no VESPO loss",
        "vespo_k_pos": "there is no VESPO loss",
        "vespo_lambda_neg": "there is no VESPO loss",
        "vespo_lambda_pos": "there is no VESPO loss",
        "vllm_importance_sampling_cap": "its name is vllm_importance_sampling_clip_max",
    }

    def findings(self) -> list[str]:
        """What is wrong with these options, a line each; together, once each has its type."""
        by_loss = self.metric_for_best_model in (None, "loss", "eval_loss")
        found = super().findings()
        if self.load_best_model_at_end and by_loss:
            found.append(
                "  load_best_model_at_end needs metric_for_best_model: eval_reward and "
                "greater_is_better: true; this trainer's loss says nothing on fresh samples."
            )
        return found


@dataclass
class PolicyGradientConfig(OwnLossConfig):
    """What the trainers with a reward for each token share: REINFORCE, PPO.

    Args:
        beta: KL coefficient β of max E[r] − β KL(π‖π_ref), in reward units (Equation E1). 0 loads
            no reference.
        kl_estimator, kl_placement, kl_is_correction: k1 in the reward by default, whose expected
            gradient is the whole of the KL's (Equation E29).
        gamma: discount γ a token (Equation E36).
        loss_type: how the losses of tokens add up, as in TRL. "dr_grpo" (sums over a fixed length)
            and "luspo" (sums) have the policy gradient; "grpo", "bnpo" and "dapo" divide by the
            number of tokens sampled, and so weigh long completions less.
        num_generations: completions of a prompt; 1 is allowed, unless a baseline needs others.
    """

    beta: float = field(
        default=0.05, metadata={"help": "KL coefficient, in reward units. 0 loads no reference."}
    )
    kl_estimator: str = field(
        default="k1",
        metadata={"help": "Estimator of the KL: k1, k2, k3, exact, topk or a registered name."},
    )
    kl_placement: Literal["loss", "reward", "both", "none"] = field(
        default="reward",
        metadata={
            "help": "Penalise the KL in the loss, the reward or both, or only log it (none)."
        },
    )
    kl_is_correction: bool = field(
        default=False,
        metadata={"help": "Multiply a penalty in the loss by the importance ratio."},
    )
    num_generations: int | None = field(
        default=8, metadata={"help": "Completions of a prompt, 1 or more.", "least": 1}
    )
    scale_rewards: str = field(
        default="none", metadata={"help": "Not used: beta is in reward units."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount a token, between 0 and 1."})
    loss_type: Literal["dr_grpo", "luspo", "grpo", "bnpo", "dapo"] = field(
        default="dr_grpo",
        metadata={"help": "How the losses of tokens add up; dr_grpo and luspo by their sums."},
    )

    refused: ClassVar[dict[str, str]] = {
        "scale_rewards": "beta is in reward units, which a division would change",
    }
    takes_single_completions: ClassVar[bool] = True

    def findings(self) -> list[str]:
        """What is wrong with these options, a line each; together, once each has its type."""
        found = super().findings()
        return found if self.wrong_types() else found + self._bad_choices()

    def _bad_choices(self) -> list[str]:
        found = []
        if not 0 <= self.gamma <= 1:
            found.append(f"  gamma={self.gamma!r} must be between 0 and 1.")
        if self.loss_type not in _SUMMED_BY_TOKENS:
            found.append(
                f"  loss_type={self.loss_type!r} must be one of {', '.join(_SUMMED_BY_TOKENS)}."
            )
        return found
