"""Options of a process reward: a number for each token, beside that of the whole completion."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trl_ext.options import OwnOptions

PROCESS_LEVELS = ("token", "step")
PROCESS_BASELINES = ("none", "batch", "group", "leave_one_out")
# Of these, what a prompt's other completions are needed for.
WITHIN_A_GROUP = ("group", "leave_one_out")


@dataclass
class ProcessOptions(OwnOptions):
    """What a policy trainer takes for a process reward.

    Args:
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
    """

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
        trls: Any = self
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
        if is_on and trls.num_generations == 1 and self.process_baseline in WITHIN_A_GROUP:
            found.append(
                f"  process_baseline={self.process_baseline!r} compares a prompt's completions, "
                "and num_generations=1 gives it one. Use process_baseline='batch', or more "
                "completions."
            )
        return found

    def _unfit_for_learning(self) -> list[str]:
        trls: Any = self
        if self.process_learning_rate is None:
            return []
        found = []
        if trls.fp16:
            found.append(
                f"  process_learning_rate={self.process_learning_rate!r} with fp16: gradients of "
                "the scorer are not scaled, and would vanish. Use bf16."
            )
        if trls.reward_weights is not None and not any(trls.reward_weights):
            found.append(
                f"  process_learning_rate={self.process_learning_rate!r} with reward_weights="
                f"{trls.reward_weights!r}: the rewards are what the scorer learns, and all of them "
                "are 0. Give one a weight, or remove process_learning_rate."
            )
        return found
