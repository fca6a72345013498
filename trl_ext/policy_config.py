"""What every policy trainer takes, and what the hooks of one are given."""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from torch import Tensor
from trl import GRPOConfig as TRLGRPOConfig

from trl_ext.errors import ConfigError
from trl_ext.kl_rules import kl_findings
from trl_ext.rewards.guard import LONGEST_TIMEOUT

# What an annotation of an option stands for. True is no number here, though Python has it be 1.
_KINDS: Mapping[Any, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
    type(None): (type(None), "None"),
}


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
        kl_estimator: k1, k2, k3 (Equation E28), or a registered name.
        kl_placement: "loss" differentiates the penalty, summed up as the surrogate is; "reward"
            takes it from the reward of its token, so that reward-to-go carries it to earlier ones;
            "none" only logs the KL.
        kl_is_correction: in the loss, times the importance ratio, so that the expected gradient is
            right (Equation E29).
        kl_clamp: the estimate of a token stays within ± this, nats. None clamps nothing: a clamp
            is a bias.
        kl_controller: "constant", "adaptive" (β halved or doubled where the KL leaves
            target/1.5 … 1.5·target) or "proportional".
        kl_target: KL of sequences that the controller holds, nats.
        kl_horizon: completions over which the proportional controller corrects an error of 1.
        allow_biased_kl: have a combination that is refused all the same.
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
        default="k3", metadata={"help": "Estimator of the KL: k1, k2, k3 or a registered name."}
    )
    kl_placement: Literal["loss", "reward", "none"] = field(
        default="loss",
        metadata={"help": "Penalise the KL in the loss or in the reward, or only log it (none)."},
    )
    kl_is_correction: bool = field(
        default=True,
        metadata={"help": "Multiply a penalty in the loss by the importance ratio."},
    )
    kl_clamp: float | None = field(
        default=None, metadata={"help": "Clamp the estimate of a token to +- this, in nats."}
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

    # Inherited options without a meaning here: name -> reason. A literal, so that it can be read
    # without import.
    refused: ClassVar[dict[str, str]] = {
        "use_bias_correction_kl": "kl_is_correction says whether a KL in the loss is corrected",
    }

    def __post_init__(self):
        super().__post_init__()
        findings = self.findings()
        if findings:
            raise ConfigError("\n".join([f"{type(self).__name__}:", *findings]))

    def findings(self) -> list[str]:
        """What is wrong with these options, a line each; together, once each has its type."""
        defaults = {option.name: option.default for option in fields(self)}
        refused = [
            f"  {name}={getattr(self, name)!r} does nothing here: {reason}. Remove it."
            for name, reason in self.refused.items()
            if getattr(self, name) != defaults[name]
        ]
        wrong_types = self._wrong_types()
        if wrong_types:
            return refused + wrong_types
        of_kl = {name: getattr(self, name) for name in defaults if name.startswith("kl_")}
        of_kl |= {"beta": self.beta, "allow_biased_kl": self.allow_biased_kl}
        of_kl_wrong = [f"  {name}: {problem}" for name, problem in kl_findings(of_kl)]
        return refused + of_kl_wrong + self._bad_limits()

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


@dataclass(frozen=True)
class Rollout:
    """The completions of one generation batch, whole groups, before TRL shuffles and splits them.

    P prompts and G completions each, over all processes; B rows and T completion tokens on this
    one.

    Attributes:
        rewards_PG: (P, G) weighted sum of the reward functions; NaN where every one of them
            returned None.
        batch: this process's tensors as TRL made them: `completion_ids`, `completion_mask` (B, T),
            `advantages` (B,), and `old_per_token_logps`, `ref_per_token_logps` (B, T) where TRL
            computed them.
        local_rows: where this process's B rows lie among the P·G of all processes.
    """

    rewards_PG: Tensor
    batch: dict[str, Any]
    local_rows: slice

    @property
    def mask(self) -> Tensor:
        """(B, T), 1 = a token that the policy generated: neither padding nor a tool's answer."""
        return generated(self.batch)

    def local(self, values_PG: Tensor) -> Tensor:
        """(P, G, …) over all processes -> (B, …) of this one."""
        return values_PG.flatten(0, 1)[self.local_rows]


@dataclass(frozen=True)
class MicroBatch:
    """What a loss is computed from: B rows of a rollout, T completion tokens.

    Attributes:
        per_token_logps: (B, T) log π of the sampled tokens, nats, with gradient.
        mask: (B, T), 1 = a token that the policy generated.
        credit: (B,) or (B, T), what `assign_credit` returned.
        ref_per_token_logps: (B, T) under the reference, nats; None if no reference is loaded.
    """

    per_token_logps: Tensor
    mask: Tensor
    credit: Tensor
    ref_per_token_logps: Tensor | None


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


def generated(batch: dict[str, Any]) -> Tensor:
    """(B, T), 1 = a token that the policy generated."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)
