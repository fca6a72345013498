"""What every policy trainer takes, and which options go together."""

import logging
import math
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
from trl_ext.registry import KL_ESTIMATORS, REWARDS
from trl_ext.rewards.guard import LONGEST_TIMEOUT
from trl_ext.watch_options import config_findings

logger = logging.getLogger(__name__)

# What an annotation of an option stands for. True is no number here, though Python has it be 1.
_KINDS: Mapping[Any, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
    type(None): (type(None), "None"),
}

PROCESS_LEVELS = ("token", "step")
PROCESS_BASELINES = ("none", "batch", "group", "leave_one_out")
# Of these, what a prompt's other completions are needed for.
WITHIN_A_GROUP = ("group", "leave_one_out")

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
        process_reward: a policy whose log-ratio to its reference is a reward for each token, beside
            that of the whole completion (`trl_ext.gibbs_prm.process_reward`): the path, hub id or
            `bundled:` name of a model or a LoRA adapter. None: no process reward, or with a
            `process_learning_rate` the model that the policy begins as.
        process_reference: what its log-ratio is to. None: what the recipe beside it says, or the
            base of an adapter; with a `process_learning_rate` itself, before training.
        process_beta: β of its log-ratio, reward units per nat. None: as the recipe beside it says;
            with a `process_learning_rate` 0.05.
        process_level: "token", or "step": a step's reward lies on its last token.
        process_steps: how a completion is cut into steps: newline, sentence, paragraph, whole, or
            {regex: ...}.
        process_weight: its credit is added this many times to that of the reward, in whose units
            it is: whatever scales or whitens that one leaves it alone.
        process_baseline: what a process return is compared with, as `baseline` of REINFORCE.
        process_gamma: discount of the process reward, a token.
        process_learning_rate: train the scorer, too, by the rewards of each rollout, which must lie
            between 0 and 1 (`trl_ext.gibbs_prm.online`). None: it stays as it is.
        gold_reward_funcs: rewards that training never sees, entries as in a recipe's reward_funcs,
            measured on the held-out prompts of each evaluation (`trl_ext.watch`). Their sum counts.
            None: no watch.
        watch_every: steps between two rollouts that the watch measures.
        watch_rollouts: score the gold reward on those rollouts, too.
        watch_action: "warn" says it once when the gold reward falls while the trained one rises, or
            a measure leaves its bounds; "stop" also ends training, with a checkpoint.
        watch_drift: factor by which length, repetition or distinct n-grams may leave those before
            training. None: any.
        watch_kl_budget: KL to the policy before training, nats per completion. None: any.
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
    process_reward: str | None = field(
        default=None,
        metadata={"help": "A policy whose log-ratio is a reward for each token: path or hub id."},
    )
    process_reference: str | None = field(
        default=None, metadata={"help": "What that log-ratio is to: path or hub id."}
    )
    process_beta: float | None = field(
        default=None, metadata={"help": "Reward units per nat of that log-ratio."}
    )
    process_level: Literal["token", "step"] = field(
        default="token", metadata={"help": "Reward each token, or each step on its last token."}
    )
    process_steps: dict[str, str] | str = field(
        default="newline",
        metadata={"help": "How completions are cut into steps: a name, or {regex: ...}."},
    )
    process_weight: float = field(
        default=1.0, metadata={"help": "How often the process credit is added to the reward's."}
    )
    process_baseline: Literal["none", "batch", "group", "leave_one_out"] = field(
        default="leave_one_out",
        metadata={
            "help": "What a process return is compared with: none, batch, group, leave_one_out."
        },
    )
    process_gamma: float = field(
        default=1.0, metadata={"help": "Discount of process rewards a token, between 0 and 1."}
    )
    process_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Train the scorer by the outcomes, at this rate. None: it is frozen."},
    )
    gold_reward_funcs: list[str | dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Rewards that training never sees, measured on held-out prompts: entries as "
            "in reward_funcs."
        },
    )
    watch_every: int = field(
        default=1, metadata={"help": "Steps between two rollouts that the watch measures."}
    )
    watch_rollouts: bool = field(
        default=False, metadata={"help": "Score the gold reward on those rollouts, too."}
    )
    watch_action: Literal["warn", "stop"] = field(
        default="warn",
        metadata={"help": "What a sign of reward hacking does: warn once, or stop and save."},
    )
    watch_drift: float | None = field(
        default=2.0,
        metadata={"help": "Factor by which length and repetition may change. None: any."},
    )
    watch_kl_budget: float | None = field(
        default=None,
        metadata={"help": "KL to the policy before training, nats per completion. None: any."},
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
        of_process = self.process_findings(is_on=self.has_process_reward)
        of_watch = self._watch_findings()
        return refused + of_kl_wrong + of_alpha + of_process + of_watch + self._bad_limits()

    @property
    def has_process_reward(self) -> bool:
        """Whether these options ask for a process reward."""
        return self.process_reward is not None or self.process_learning_rate is not None

    def unused_process_options(self) -> list[str]:
        """`process_` options that are set: without a process reward they do nothing."""
        return [
            option.name
            for option in fields(self)
            if option.name.startswith("process_") and getattr(self, option.name) != option.default
        ]

    def process_findings(self, *, is_on: bool) -> list[str]:
        """What is wrong with the options of the process reward, a line each.

        Args:
            is_on: whether there is one, by these options or given as an object.
        """
        found = [
            f"  {name}={getattr(self, name)!r} must be one of {', '.join(allowed)}."
            for name, allowed in (
                ("process_level", PROCESS_LEVELS),
                ("process_baseline", PROCESS_BASELINES),
            )
            if getattr(self, name) not in allowed
        ]
        found += [
            f"  {name}={value!r} must be greater than 0, and finite."
            for name in ("process_beta", "process_learning_rate")
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf
        ]
        found += [
            f"  {name}='' must be a path, a hub id or None."
            for name in ("process_reward", "process_reference")
            if getattr(self, name) == ""
        ]
        if not math.isfinite(self.process_weight):
            found.append(f"  process_weight={self.process_weight!r} must be finite.")
        if not 0 <= self.process_gamma <= 1:
            found.append(f"  process_gamma={self.process_gamma!r} must be between 0 and 1.")
        return found + self._useless_process_options(is_on) + self._unfit_for_learning()

    def _useless_process_options(self, is_on: bool) -> list[str]:
        found = []
        if not isinstance(self.process_steps, str | dict):
            found.append(
                f"  process_steps={self.process_steps!r} must be the name of a way to cut, or "
                '{"regex": "..."}.'
            )
        elif is_on and self.process_level == "token" and self.process_steps != "newline":
            found.append(
                f"  process_steps={self.process_steps!r} does nothing with process_level='token'. "
                "Set process_level='step', or remove it."
            )
        if is_on and self.num_generations == 1 and self.process_baseline in WITHIN_A_GROUP:
            found.append(
                f"  process_baseline={self.process_baseline!r} compares a prompt's completions, "
                "and num_generations=1 gives it one. Use process_baseline='batch', or more "
                "completions."
            )
        return found

    def _unfit_for_learning(self) -> list[str]:
        if self.process_learning_rate is None:
            return []
        found = []
        if self.fp16:
            found.append(
                f"  process_learning_rate={self.process_learning_rate!r} with fp16: gradients of "
                "the scorer are not scaled, and would vanish. Use bf16."
            )
        if self.reward_weights is not None and not any(self.reward_weights):
            found.append(
                f"  process_learning_rate={self.process_learning_rate!r} with reward_weights="
                f"{self.reward_weights!r}: the rewards are what the scorer learns, and all of them "
                "are 0. Give one a weight, or remove process_learning_rate."
            )
        return found

    def _watch_findings(self) -> list[str]:
        defaults = {option.name: option.default for option in fields(self)}
        # transformers makes an enumeration of the text.
        strategy = getattr(self.eval_strategy, "value", self.eval_strategy)
        options = {name: getattr(self, name) for name in defaults} | {"eval_strategy": strategy}
        wrong = [f"  {name}: {problem}" for name, problem in config_findings(options, defaults)]
        return wrong + [f"  gold_reward_funcs: {why}" for why in self._unfit_gold()]

    def _unfit_gold(self) -> list[str]:
        found = []
        for entry in self.gold_reward_funcs or []:
            name = entry.get("name") if isinstance(entry, Mapping) else entry
            if not isinstance(name, str):
                found.append(
                    f"{entry!r} is no name, nor a mapping with one. From Python a function is "
                    "given as callbacks=[RewardHackingWatch(gold=...)]."
                )
                continue
            try:
                REWARDS.resolve(name)
            except UnknownNameError as error:
                found.append(str(error))
        return found

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
