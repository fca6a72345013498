"""Options of PPO, and the inherited ones that it refuses."""

import math
from dataclasses import dataclass, field
from typing import Literal

from trl_ext.policy_config import PolicyGradientConfig

CRITICS = ("head", "adapter", "model")
SURROGATES = ("clip", "penalty")


@dataclass
class PPOConfig(PolicyGradientConfig):
    """`trl.GRPOConfig` for PPO: what it adds, and what it means otherwise.

    Epochs over a rollout are `num_iterations`, its minibatches `steps_per_generation` over
    `gradient_accumulation_steps`, and ε of the clip `epsilon` and `epsilon_high`, all as in TRL.

    Args:
        lam: λ of the advantages (Equation E42): 1 is the return minus the value, 0 the one-step
            advantage.
        whiten_advantages: subtract their mean and divide by their standard deviation, over the
            tokens of all processes. Steps no longer depend on the scale of the reward; `beta` is in
            the reward, and stays in its units.
        surrogate: "clip" (Equation E45), or "penalty": no clip, and a coefficient times
            KL(π_old‖π) that is adapted to `old_kl_target` (Equation E46).
        old_kl_coef: that coefficient to begin with, in units of the advantage.
        old_kl_target: KL(π_old‖π) a token that it aims at, nats.
        early_stop_kl: take no more steps on a rollout once KL(π_old‖π) a token is above this, nats;
            the step that finds it so is not taken either. Steps that are left out count, for
            `max_steps` and the learning rate's schedule. None: take them all.
        critic: what values states. "head": a linear head on the policy's own hidden states, no
            forward pass more. "adapter": such a head on the policy's frozen weights with a LoRA
            adapter of its own. "model": a model of its own, with a LoRA adapter if the policy has
            one.
        critic_model_name_or_path: what the critic begins as: a reward model (for sequence
            classification, one label), its LoRA adapter, the `critic` folder of an earlier run, or
            for "model" any model. "head" takes only the head of a reward model, and so does
            "adapter" of one that is not an adapter itself. None: the policy's weights under a head
            that says 0.
        critic_learning_rate: of the critic; the schedule is the policy's.
        critic_lam: λ of its targets (Equation E41): 1 is the Monte-Carlo return, 0 the bootstrapped
            reward plus next value.
        value_clip: a value moves at most this far from what it was in the rollout, in reward units.
            None: as far as it likes.
        bootstrap_truncated: take the critic's value of what would follow a completion that was cut
            off, in place of a reward for it as it stands. Off: its end is its end.
    """

    num_generations: int | None = field(
        default=1, metadata={"help": "Completions of a prompt, 1 or more.", "least": 1}
    )
    lam: float = field(
        default=0.95, metadata={"help": "Lambda of the advantages, between 0 and 1."}
    )
    whiten_advantages: bool = field(
        default=True,
        metadata={"help": "Give the advantages mean 0 and deviation 1, over all processes."},
    )
    surrogate: Literal["clip", "penalty"] = field(
        default="clip", metadata={"help": "Hold the policy near the old one by clip or penalty."}
    )
    old_kl_coef: float = field(
        default=1.0, metadata={"help": "Coefficient of KL(old||new) to begin with."}
    )
    old_kl_target: float = field(
        default=0.01, metadata={"help": "KL(old||new) that its coefficient aims at, nats a token."}
    )
    early_stop_kl: float | None = field(
        default=None,
        metadata={"help": "Leave a rollout once KL(old||new) is above this, nats a token."},
    )
    critic: Literal["head", "adapter", "model"] = field(
        default="head",
        metadata={"help": "A head on the policy, one with an adapter of its own, or a model."},
    )
    critic_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "What the critic begins as: a reward model or an earlier critic."},
    )
    critic_learning_rate: float = field(
        default=1e-4, metadata={"help": "Learning rate of the critic."}
    )
    critic_lam: float = field(
        default=1.0,
        metadata={"help": "Lambda of the critic's targets: 1 Monte Carlo, 0 bootstrapped."},
    )
    value_clip: float | None = field(
        default=None,
        metadata={"help": "How far a value may move from that of the rollout, in reward units."},
    )
    bootstrap_truncated: bool = field(
        default=False,
        metadata={"help": "Value what would follow a truncated completion, not what there is."},
    )

    def _bad_choices(self) -> list[str]:
        return [
            *super()._bad_choices(),
            *(
                f"  {name}={getattr(self, name)!r} must be one of {', '.join(allowed)}."
                for name, allowed in (("critic", CRITICS), ("surrogate", SURROGATES))
                if getattr(self, name) not in allowed
            ),
            *(
                f"  {name}={getattr(self, name)!r} must be between 0 and 1."
                for name in ("lam", "critic_lam")
                if not 0 <= getattr(self, name) <= 1
            ),
            *(
                f"  {name}={getattr(self, name)!r} must be greater than 0, and finite."
                for name in (
                    "old_kl_coef",
                    "old_kl_target",
                    "early_stop_kl",
                    "critic_learning_rate",
                    "value_clip",
                )
                if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf
            ),
            *self._without_effect(),
        ]

    def _without_effect(self) -> list[str]:
        """Options that would do nothing, or do harm with others."""
        assert self.steps_per_generation is not None
        uses = self.steps_per_generation * self.num_iterations
        one_step = uses > 0 and self.gradient_accumulation_steps % uses == 0
        found = [
            f"  {name}={getattr(self, name)!r} does nothing with one step a rollout: the policy is "
            "still the old one. Raise num_iterations, or steps_per_generation above "
            "gradient_accumulation_steps."
            for name, is_wanted in (
                ("surrogate", self.surrogate == "penalty"),
                ("early_stop_kl", self.early_stop_kl is not None),
            )
            if one_step and is_wanted
        ]
        if self.early_stop_kl is not None and uses % self.gradient_accumulation_steps:
            found.append(
                f"  early_stop_kl={self.early_stop_kl!r} with steps that span two rollouts: the KL "
                f"of one would end the other. steps_per_generation x num_iterations, {uses}, must "
                f"be a multiple of gradient_accumulation_steps, "
                f"{self.gradient_accumulation_steps}."
            )
        clips = self.surrogate == "clip"
        for name, default in (
            (("old_kl_coef", 1.0), ("old_kl_target", 0.01))
            if clips
            else (("epsilon", 0.2), ("epsilon_high", None))
        ):
            if getattr(self, name) != default:
                found.append(
                    f"  {name}={getattr(self, name)!r} does nothing with "
                    f"surrogate={self.surrogate!r}. Remove it."
                )
        if self.early_stop_kl is not None and self.fp16:
            found.append(
                "  early_stop_kl leaves steps without gradient, which fp16's gradient scaler does "
                "not take. Use bf16, or remove it."
            )
        return found
