"""Options of reward-weighted regression, and the inherited ones that it refuses."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trl_ext.policy_config import OwnLossConfig

# Below, r/beta and its square (the variance of reward samples) would leave float32 for rewards
# that are still ordinary numbers.
LEAST_BETA = 1e-15


@dataclass
class RWRConfig(OwnLossConfig):
    """`trl.GRPOConfig` for reward-weighted regression: what it adds, and what it means otherwise.

    Args:
        beta: KL coefficient β of the Gibbs policy π* ∝ π_ref·exp(r/β), in reward units (Equation
            E1). Weights are softmax(r/β) within each prompt's group. 0 is best of n, inf is
            supervised fine-tuning on all samples. It does not load a reference model.
        reference: what π_ref is. "moving": the policy that sampled the batch, so that every rollout
            tilts the policy once more by exp(r/β). "fixed": the policy before training, so that
            training converges to π* itself: the weights become softmax(r/β + log π_ref/π),
            importance weights of π* against the sampler.
        drop_uniform_groups: give no weight to a group whose rewards are all equal: it says nothing
            about the reward, and its gradient is noise. Off is regression as derived: such a group
            counts like any other. With a fixed reference the log-ratio belongs to what is compared,
            so that a group that only pulls back to the reference is kept.
        token_reduction: "sum" regresses on log π(y|x), as derived; "mean" on its mean per token.
        reward_samples: score each completion this many times and use the mean, for a stochastic
            reward. From 2 on the metric `rwr/optimism` says by how much a single sample would
            inflate the tilt (Equation E11).
        log_kl: load the reference and log the KL of the policy to it, nats per completion, by
            `kl_estimator`.
    """

    beta: float = field(
        default=0.25,
        metadata={
            "help": "KL coefficient of the Gibbs policy, in reward units: weights softmax(r/beta)."
        },
    )
    reference: Literal["moving", "fixed"] = field(
        default="moving",
        metadata={
            "help": "Tilt the policy that sampled (moving), or the one before training (fixed)."
        },
    )
    drop_uniform_groups: bool = field(
        default=True,
        metadata={"help": "Give no weight to groups whose rewards are all equal."},
    )
    token_reduction: Literal["sum", "mean"] = field(
        default="sum",
        metadata={
            "help": "Regress on the completion's log-probability (sum) or its token mean (mean)."
        },
    )
    reward_samples: int = field(
        default=1,
        metadata={"help": "Score each completion this many times and use the mean."},
    )
    log_kl: bool = field(
        default=False,
        metadata={
            "help": "Load the reference and log the KL of the policy to it, nats per completion."
        },
    )
    kl_placement: Literal["loss", "reward", "both", "none"] = field(
        default="none",
        metadata={"help": "Not used: in reward-weighted regression beta is in the weights."},
    )

    refused: ClassVar[dict[str, str]] = {
        "epsilon": "there is no importance ratio to clip",
        "epsilon_high": "there is no importance ratio to clip",
        "allow_biased_kl": "there is no KL penalty: beta is in the weights",
        "kl_clamp": "there is no KL penalty: beta is in the weights",
        "kl_controller": "there is no KL penalty: beta is in the weights",
        "kl_horizon": "there is no KL penalty: beta is in the weights",
        "kl_is_correction": "there is no KL penalty: beta is in the weights",
        "kl_placement": "there is no KL penalty: beta is in the weights; log_kl logs the KL",
        "kl_target": "there is no KL penalty: beta is in the weights",
        "loss_type": "the loss is -sum w_n log pi(y_n|x); token_reduction says how tokens add up",
        "process_baseline": "a weight belongs to a whole completion and is never negative",
        "process_beta": "a weight belongs to a whole completion and is never negative",
        "process_gamma": "a weight belongs to a whole completion and is never negative",
        "process_learning_rate": "a weight belongs to a whole completion and is never negative",
        "process_level": "a weight belongs to a whole completion and is never negative",
        "process_reference": "a weight belongs to a whole completion and is never negative",
        "process_reward": "a weight belongs to a whole completion and is never negative",
        "process_steps": "a weight belongs to a whole completion and is never negative",
        "process_weight": "a weight belongs to a whole completion and is never negative",
        "scale_rewards": "softmax(r/beta) ignores shifts, and the scale is what beta sets",
        "sync_ref_model": "reference: moving already follows the policy",
        "use_bias_correction_kl": "there is no KL term in the loss: beta is in the weights",
        "ref_model_mixup_alpha": "reference: moving already follows the policy",
        "ref_model_sync_steps": "reference: moving already follows the policy",
    }

    def findings(self) -> list[str]:
        """What is wrong with these options, a line each; together, once each has its type."""
        return super().findings() + ([] if self.wrong_types() else self._bad_values())

    def _sampler_is_not_the_policy(self) -> list[str]:
        neutral = {
            "top_p": (1.0,),
            "top_k": (0,),
            "min_p": (None, 0.0),
            "repetition_penalty": (1.0,),
        }
        return [
            f"  {name}={getattr(self, name)!r} with reference='fixed': completions would not be "
            f"samples of the policy, and the weights wrong. Allowed: {values[0]!r}."
            for name, values in neutral.items()
            if getattr(self, name) not in values
        ]

    def _corrects_tokens(self) -> bool:
        is_on = self.use_vllm and self.vllm_importance_sampling_correction
        return is_on and not self.vllm_importance_sampling_mode.startswith("sequence_")

    def _bad_values(self) -> list[str]:
        findings = []
        if not self.beta >= 0:
            findings.append(
                f"  beta={self.beta!r} must be between 0 (best of n) and inf (uniform weights)."
            )
        if 0 < self.beta < LEAST_BETA:
            findings.append(
                f"  beta={self.beta!r} is so small that r/beta overflows. It must be at least "
                f"{LEAST_BETA:g}; beta=0 is its limit, best of n."
            )
        if self.reference == "fixed" and self.beta == 0:
            findings.append(
                "  beta=0 with reference='fixed' has no Gibbs policy to converge to. Use beta > 0."
            )
        if self.reference == "fixed":
            findings += self._sampler_is_not_the_policy()
        if self._corrects_tokens():
            findings.append(
                f"  vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r}: a weight "
                "belongs to a whole completion. Use sequence_mask or sequence_truncate."
            )
        if self.reward_samples < 1:
            findings.append(f"  reward_samples={self.reward_samples!r} must be at least 1.")
        for name, allowed in (
            ("reference", ("moving", "fixed")),
            ("token_reduction", ("sum", "mean")),
        ):
            if getattr(self, name) not in allowed:
                findings.append(f"  {name}={getattr(self, name)!r} must be one of {allowed}.")
        return findings
