"""What every policy trainer takes, and which options go together."""

import logging
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from trl import GRPOConfig as TRLGRPOConfig

from trl_ext.errors import ConfigError, UnknownNameError
from trl_ext.kl_rules import (
    OVER_THE_VOCABULARY,
    alpha_findings,
    beta_of_alpha,
    kl_findings,
)
from trl_ext.registry import KL_ESTIMATORS
from trl_ext.rewards.guard import LONGEST_TIMEOUT

logger = logging.getLogger(__name__)

# What an annotation of an option stands for. True is no number here, though Python has it be 1.
_KINDS: Mapping[Any, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
    type(None): (type(None), "None"),
}

# TRL's loss types that only say how the losses of tokens add up.
_SUMMED_BY_TOKENS = ("dr_grpo", "luspo", "grpo", "bnpo", "dapo")


@dataclass
class PolicyConfig(TRLGRPOConfig):
    """What every policy trainer here adds to `trl.GRPOConfig`.

    The KL options say how β·KL(π‖π_ref) of sequences is penalised; their defaults are what TRL
    does. `trl_ext kl-table` shows what each combination amounts to, and one whose expected gradient
    is neither that of the KL nor its per-step part is refused.

    Args:
        stop_strings: a completion ends with the first token whose text contains one of these, such
            as "\\n". Such tokens join the model's end-of-sequence tokens for generation, masks and
            metrics.
        reward_timeout: seconds after which one call of a reward function on a batch is an error
            that names it. None waits for ever.
        kl_estimator: k1, k2, k3 (Equation E28) from the sampled tokens, "exact" (Equation E27) and
            "topk" from the whole vocabulary at each of them, or a registered name.
        kl_placement: "loss" differentiates the penalty, summed up as the surrogate is; "reward"
            takes it from the reward of its token, so that reward-to-go carries it to earlier ones;
            "both", for exact: what follows a token by its reward, its own part in the loss;
            "none" only logs the KL.
        kl_topk: tokens that "topk" counts one by one.
        kl_is_correction: in the loss, times the importance ratio, so that the expected gradient is
            right (Equation E29).
        kl_clamp: the estimate of a token stays within ± this, nats. None clamps nothing: a clamp
            is a bias.
        kl_controller: "constant", "adaptive" (β halved or doubled where the KL leaves
            target/1.5 … 1.5·target) or "proportional".
        kl_target: KL of sequences that the controller holds, nats.
        kl_horizon: completions over which the proportional controller corrects an error of 1.
        allow_biased_kl: have a combination that is refused all the same.
        poe_alpha: weight α > 0 of a second model P_N in the product P_N^α·P_θ^(1−α)/Z that the
            reward log P_N − log P_θ (`log_ratio`) trains towards: `beta` becomes 1/α (Equations
            E15, E18). 1 is P_N alone, above 1 goes on in that direction. None: `beta` as given.
            Its weight in `reward_weights` must be 1; that of another reward r tilts the product by
            exp(α·weight·r).
    """

    stop_strings: list[str] | None = field(
        default=None,
        metadata={
            "help": "A completion ends with the first token whose text contains one of these."
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds after which one call of a reward is an error. None waits for ever."
        },
    )
    kl_estimator: str = field(
        default="k3",
        metadata={"help": "Estimator of the KL: k1, k2, k3, exact, topk or a registered name."},
    )
    kl_placement: Literal["loss", "reward", "both", "none"] = field(
        default="loss",
        metadata={
            "help": "Penalise the KL in the loss, the reward or both, or only log it (none)."
        },
    )
    kl_is_correction: bool = field(
        default=True,
        metadata={"help": "Multiply a penalty in the loss by the importance ratio."},
    )
    kl_clamp: float | None = field(
        default=None, metadata={"help": "Clamp the estimate of a token to +- this, in nats."}
    )
    kl_topk: int = field(
        default=64, metadata={"help": "Tokens that the estimator topk counts one by one."}
    )
    kl_controller: Literal["constant", "adaptive", "proportional"] = field(
        default="constant", metadata={"help": "How beta follows the KL."}
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "KL that the controller holds, nats per completion."}
    )
    kl_horizon: float = field(
        default=10_000,
        metadata={"help": "Completions over which the proportional controller corrects."},
    )
    allow_biased_kl: bool = field(
        default=False,
        metadata={"help": "Allow a penalty whose expected gradient is not that of the KL."},
    )
    poe_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of a second model in a product of experts: beta becomes 1/poe_alpha."
        },
    )

    # Inherited options without a meaning here: name -> reason. A literal, so that it can be read
    # without import.
    refused: ClassVar[dict[str, str]] = {
        "use_bias_correction_kl": "kl_is_correction says whether a KL in the loss is corrected",
    }
    # Whether a prompt may have one completion only: nothing is compared within its group.
    takes_single_completions: ClassVar[bool] = False

    def __post_init__(self):
        self._take_alpha()
        try:
            super().__post_init__()
        except ValueError as error:
            # The last of TRL's checks but for those of options that are refused here.
            wanted = self.num_generations == 1 and self.takes_single_completions
            if not (wanted and "at least 2 generations" in str(error)):
                raise
        findings = self.findings()
        if findings:
            raise ConfigError("\n".join([f"{type(self).__name__}:", *findings]))

    def _take_alpha(self) -> None:
        [default] = [option.default for option in fields(self) if option.name == "beta"]
        beta = beta_of_alpha(self.poe_alpha, self.beta, default)
        if beta != self.beta:
            # Of a level that is seen: the user's beta is another one now.
            logger.warning(
                "poe_alpha=%r: beta set to %g = 1/%r, so that the target is P_N^%g * P_ref^%g.",
                self.poe_alpha,
                beta,
                self.poe_alpha,
                1 / beta,
                1 - 1 / beta,
            )
            self.beta = beta

    @classmethod
    def all_refused(cls) -> dict[str, str]:
        """`refused` of this class and of those that it builds on: option -> reason."""
        merged: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            merged |= vars(base).get("refused", {})
        return merged

    def findings(self) -> list[str]:
        """What is wrong with these options, a line each; together, once each has its type."""
        defaults = {option.name: option.default for option in fields(self)}
        refused = [
            f"  {name}={getattr(self, name)!r} does nothing here: {reason}. Remove it."
            for name, reason in self.all_refused().items()
            if getattr(self, name) != defaults[name]
        ]
        wrong_types = self._wrong_types()
        if wrong_types:
            return refused + wrong_types
        of_kl = {name: getattr(self, name) for name in defaults if name.startswith("kl_")}
        of_kl |= {"beta": self.beta, "allow_biased_kl": self.allow_biased_kl}
        of_kl_wrong = [f"  {name}: {problem}" for name, problem in self._of_kl(of_kl)]
        everything = {name: getattr(self, name) for name in defaults}
        of_alpha = [f"  {n}: {why}" for n, why in alpha_findings(everything, self.all_refused())]
        return refused + of_kl_wrong + of_alpha + self._bad_limits()

    def _of_kl(self, options: dict[str, Any]) -> list[tuple[str, str]]:
        if self.kl_estimator not in OVER_THE_VOCABULARY:
            try:
                KL_ESTIMATORS.resolve(self.kl_estimator)
            except UnknownNameError as error:
                return [("kl_estimator", str(error))]
        return kl_findings(options)

    def _wrong_types(self) -> list[str]:
        """Of the options that are not TRL's, and beta: it is what the penalties here scale by."""
        trls = {option.name for option in fields(TRLGRPOConfig)}
        expected = {o.name: o.type for o in fields(self) if o.name not in trls} | {"beta": float}
        return [
            f"  {name}={getattr(self, name)!r} is a {type(getattr(self, name)).__name__}; it must "
            f"be {_in_words(hint)}.{_advice(name, getattr(self, name))}"
            for name, hint in expected.items()
            if not _fits(getattr(self, name), hint)
        ]

    def _bad_limits(self) -> list[str]:
        found = []
        if self.reward_timeout is not None and not 0 < self.reward_timeout <= LONGEST_TIMEOUT:
            found.append(
                f"  reward_timeout={self.reward_timeout!r} must be > 0 and at most "
                f"{LONGEST_TIMEOUT:g} seconds, or None for no limit."
            )
        if self.stop_strings is not None and "" in self.stop_strings:
            found.append(
                f"  stop_strings={self.stop_strings!r} holds an empty text, which every token "
                "contains: each completion would end with its first token. Remove it."
            )
        return found


@dataclass
class OwnLossConfig(PolicyConfig):
    """`PolicyConfig` of a trainer that does not use TRL's surrogate: what belongs to that."""

    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={"help": "Not used: it corrects TRL's surrogate, which is not used here."},
    )

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
        "vllm_importance_sampling_cap": "it corrects TRL's surrogate, which is not used here",
        "vllm_importance_sampling_clip_max": "it corrects TRL's surrogate, which is not used here",
        "vllm_importance_sampling_clip_min": "it corrects TRL's surrogate, which is not used here",
        "vllm_importance_sampling_correction": (
            "it corrects TRL's surrogate, which is not used here"
        ),
        "vllm_importance_sampling_mode": "it corrects TRL's surrogate, which is not used here",
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
        return found if self._wrong_types() else found + self._bad_choices()

    def _bad_choices(self) -> list[str]:
        found = []
        if not 0 <= self.gamma <= 1:
            found.append(f"  gamma={self.gamma!r} must be between 0 and 1.")
        if self.loss_type not in _SUMMED_BY_TOKENS:
            found.append(
                f"  loss_type={self.loss_type!r} must be one of {', '.join(_SUMMED_BY_TOKENS)}."
            )
        return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has an option's type; one that is not listed above is not looked into."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(v, get_args(hint)[0]) for v in value)
    if isinstance(value, bool) and hint in (int, float):
        return False
    return hint not in _KINDS or isinstance(value, _KINDS[hint][0])


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_in_words, reversed(get_args(hint))))
    if get_origin(hint) is list:
        return f"a list, each entry {_in_words(get_args(hint)[0])}"
    return _KINDS[hint][1] if hint in _KINDS else str(hint)


def _advice(name: str, value: Any) -> str:
    return (
        f" Write {name}=[{value!r}]." if name == "stop_strings" and isinstance(value, str) else ""
    )
