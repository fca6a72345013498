"""Rewards that train towards a product of experts: log P_N − log P_θ, and r − log π_ref."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from trl_ext.bundled import PREFIX
from trl_ext.errors import ConfigError
from trl_ext.poe.opening import Opened, open_expert
from trl_ext.poe.over_tokens import (
    POLICY,
    OverTokens,
    Reference,
    TokenIds,
    checked_floor,
    checked_size,
)
from trl_ext.poe.reward_models import reward_model
from trl_ext.rewards.build import build_rewards
from trl_ext.rewards.guard import guarded


def log_ratio(
    expert: Any,
    reference: Any = POLICY,
    *,
    per_token: bool = True,
    tokenizer: Any = None,
    batch_size: int = 8,
    floor: float | None = None,
) -> "LogRatio":
    """The reward log P_N(y_t|y_<t) − log P_θ(y_t|y_<t) of each token, nats. Equation E16.

    With the KL coefficient β = 1/α (`poe_alpha`) its optimum is P_N^α·P_θ^(1−α)/Z: over whole
    completions by γ = 1, and token by token by γ = 0 (Equations E14, E15, E21). Temperature and the
    like are part of P_θ as the policy's reference has them; P_N is as its model says.

    Args:
        expert: P_N; what `open_expert` takes: an object, a path or hub id, or a corpus to count.
        reference: P_θ; "policy" for the reference of the policy that is trained, which its trainer
            runs, or an expert like the other.
        per_token: one number a token; else their sum, which is all that `trl.GRPOTrainer` takes.
        tokenizer: name or object, in place of the one beside an expert: checked against the
            policy's, and what a corpus is counted with.
        batch_size: completions that a model scores at a time.
        floor: log-probabilities below this count as this, nats. None: a token that an expert
            forbids is an error.

    Raises:
        ConfigError: if an expert cannot be opened, or an argument is wrong.
    """
    return LogRatio(
        open_expert(expert, tokenizer=tokenizer),
        Reference.opened(reference, tokenizer),
        tokenizer,
        per_token=per_token,
        batch_size=checked_size(batch_size),
        floor=checked_floor(floor),
    )


def minus_reference(
    reward: Any,
    *,
    reference: Any = POLICY,
    per_token: bool = True,
    tokenizer: Any = None,
    batch_size: int = 8,
) -> "MinusReference":
    """The reward r − log π_ref: r on the last token, −log π_ref(y_t) on each. Equation E18.

    With β = 1/α its optimum is exp(αr)·π_ref^(1−α)/Z, the product of a reward model and the
    reference (Equation E17). What the inner reward does not apply to, this does not either. The
    metric `minus_reference/reward` is the mean of r.

    Args:
        reward: r: an entry as in a recipe (a name, or a mapping with `name`), a reward function, or
            a model or the path or hub id of one (`reward_model`).
        reference, per_token, tokenizer, batch_size: as in `log_ratio`.

    Raises:
        ConfigError, RewardError: if the reward or the reference cannot be made.
    """
    return MinusReference(
        _inner(reward),
        Reference.opened(reference, tokenizer),
        tokenizer,
        per_token=per_token,
        batch_size=checked_size(batch_size),
    )


class LogRatio(OverTokens):
    """What `log_ratio` makes: a reward function with TRL's signature."""

    def __init__(self, expert: Opened, reference: Reference, tokenizer: Any, **options: Any):
        super().__init__("log_ratio", [expert, reference.model], tokenizer, **options)
        self.expert = expert
        self.reference = reference
        self.asks_for = {"prompt_ids"} | reference.asks_for

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: TokenIds,
        prompt_ids: TokenIds | None = None,
        ref_per_token_logps: Sequence[Sequence[float]] | None = None,
        **columns: Any,
    ) -> list[Any]:
        self.reference.check_was_given(self.__name__, ref_per_token_logps)
        self.check_trainer(prompt_ids, columns)
        ids = self.prompt_ids_of(prompts, prompt_ids)
        texts = (prompts, completions)
        of_expert = self.scores(self.expert, texts, ids, completion_ids)
        if self.reference.model is None:
            assert ref_per_token_logps is not None
            of_reference = ref_per_token_logps
        else:
            of_reference = self.scores(self.reference.model, texts, ids, completion_ids)
        return self.returned(
            [
                [float(p - q) for p, q in zip(expert, reference, strict=True)]
                for expert, reference in zip(of_expert, of_reference, strict=True)
            ]
        )


class MinusReference(OverTokens):
    """What `minus_reference` makes: a reward function with TRL's signature."""

    def __init__(self, inner: Any, reference: Reference, tokenizer: Any, **options: Any):
        super().__init__("minus_reference", [reference.model], tokenizer, **options)
        self.inner = inner
        self.reference = reference
        self.asks_for = inner.asks_for | reference.asks_for

    def check_tokenizer(self, tokenizer: Any) -> None:
        super().check_tokenizer(tokenizer)
        if self.inner.check_tokenizer is not None:
            self.inner.check_tokenizer(tokenizer)

    def check_policy(self, policy: nn.Module) -> None:
        super().check_policy(policy)
        if self.inner.check_policy is not None:
            self.inner.check_policy(policy)

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: TokenIds,
        prompt_ids: TokenIds | None = None,
        ref_per_token_logps: Sequence[Sequence[float]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[Any]:
        self.reference.check_was_given(self.__name__, ref_per_token_logps)
        if self.reference.model is not None:
            self.check_trainer(prompt_ids, columns)
            prompt_ids = self.prompt_ids_of(prompts, prompt_ids)
        offered = {"prompt_ids": prompt_ids, "ref_per_token_logps": ref_per_token_logps}
        offered |= {"log_metric": log_metric}
        rewards = self.inner(
            prompts=prompts,
            completions=completions,
            completion_ids=completion_ids,
            **columns,
            **{name: value for name, value in offered.items() if value is not None},
        )
        applies = [reward for reward in rewards if reward is not None]
        if log_metric is not None and applies:
            log_metric("minus_reference/reward", fmean(applies))
        if self.reference.model is None:
            assert ref_per_token_logps is not None
            logps = ref_per_token_logps
        else:
            assert prompt_ids is not None
            texts = (prompts, completions)
            logps = self.scores(self.reference.model, texts, prompt_ids, completion_ids)
        dense = self.inner.checked.token_rewards
        rows = [
            None if reward is None else _less(reward, dense.get(index), row)
            for index, (reward, row) in enumerate(zip(rewards, logps, strict=True))
        ]
        return [
            # Without a token there is none to lay the reward on.
            reward if not row else row if self.per_token else sum(row)
            for reward, row in zip(rewards, rows, strict=True)
        ]


def _less(reward: float, of_tokens: list[float] | None, logps: Sequence[float]) -> list[float]:
    """r − log π_ref, a number a token: r where it was given, else on the last."""
    if of_tokens is None:
        of_tokens = [0.0] * (len(logps) - 1) + [reward] * (len(logps) > 0)
    return [float(r - logp) for r, logp in zip(of_tokens, logps, strict=True)]


def _inner(reward: Any) -> Any:
    """The inner reward as a guarded function of the completions."""
    if isinstance(reward, nn.Module) or (isinstance(reward, str) and _is_model_name(reward)):
        made: Any = reward_model(reward)
    elif callable(reward):
        made = reward
    else:
        [made] = build_rewards([reward])
    name = getattr(made, "__name__", type(made).__name__)
    called = getattr(made, "__call__", None)  # noqa: B004 - an instance's async __call__
    if asyncio.iscoroutinefunction(made) or inspect.iscoroutinefunction(called):
        raise ConfigError(
            f"minus_reference takes no asynchronous reward, and {name!r} is one. Give its "
            "synchronous form."
        )
    return guarded(made, name)


def _is_model_name(name: str) -> bool:
    """A path, a hub id or a bundled model: no reward's name has a slash."""
    return name.startswith(PREFIX) or "/" in name or Path(name).is_dir()
