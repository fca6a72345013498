"""What every policy trainer takes, and which options go together."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from trl import GRPOConfig as TRLGRPOConfig

from trl_ext.errors import UnknownNameError
from trl_ext.kl_rules import (
    OVER_THE_VOCABULARY,
    alpha_findings,
    beta_of_alpha,
    kl_findings,
)
from trl_ext.policy_config.process import ProcessOptions
from trl_ext.policy_config.signal import SignalOptions
from trl_ext.registry import KL_ESTIMATORS, REWARDS
from trl_ext.rewards.deadline import LONGEST_TIMEOUT, default_timeout
from trl_ext.watch_options import config_findings

logger = logging.getLogger(__name__)


@dataclass
class PolicyConfig(ProcessOptions, SignalOptions, TRLGRPOConfig):
    """What every policy trainer here adds to `trl.GRPOConfig`.

    The KL options say how β·KL(π‖π_ref) of sequences is penalised; their defaults are what TRL
    does. `trl_ext kl-table` shows what each combination amounts to, and one whose expected gradient
    is neither that of the KL nor its per-step part is refused.

    Args:
        stop_strings: a completion ends with the first token whose text contains one of these, such
            as "\\n". Such tokens join the model's end-of-sequence tokens for generation, masks and
            metrics.
        reward_timeout: seconds after which one call of a reward function on a batch is an error
            that names it. None: 45 where several processes train, which wait for each other; with
            one process it waits for ever.
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
            "help": "Seconds after which one call of a reward is an error. None: 45 with several "
            "processes, no limit with one."
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

    refused: ClassVar[dict[str, str]] = {
        "use_bias_correction_kl": "kl_is_correction says whether a KL in the loss is corrected",
    }
    # It is what the penalties here scale by.
    typed: ClassVar[dict[str, Any]] = {"beta": float}
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
        self.check()
        self.reward_timeout = self.reward_timeout or default_timeout(self.world_size)

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

    def findings(self) -> list[str]:
        """What is wrong with these options, a line each; together, once each has its type."""
        defaults = {option.name: option.default for option in fields(self)}
        refused = self.refused_findings()
        if wrong_types := self.wrong_types():
            return refused + wrong_types
        of_kl = {name: getattr(self, name) for name in defaults if name.startswith("kl_")}
        of_kl |= {"beta": self.beta, "allow_biased_kl": self.allow_biased_kl}
        of_kl_wrong = [f"  {name}: {problem}" for name, problem in self._of_kl(of_kl)]
        everything = {name: getattr(self, name) for name in defaults}
        of_alpha = [f"  {n}: {why}" for n, why in alpha_findings(everything, self.all_refused())]
        of_process = self.process_findings(is_on=self.has_process_reward)
        of_watch = self._watch_findings()
        of_limits = self.signal_findings() + self._bad_limits()
        return refused + of_kl_wrong + of_alpha + of_process + of_watch + of_limits

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

    def _bad_limits(self) -> list[str]:
        found = []
        if self.reward_timeout is not None and not 0 < self.reward_timeout <= LONGEST_TIMEOUT:
            found.append(
                f"  reward_timeout={self.reward_timeout!r} must be > 0 and at most "
                f"{LONGEST_TIMEOUT:g} seconds, or None for the default."
            )
        if self.stop_strings is not None and "" in self.stop_strings:
            found.append(
                f"  stop_strings={self.stop_strings!r} holds an empty text, which every token "
                "contains: each completion would end with its first token. Remove it."
            )
        return found
