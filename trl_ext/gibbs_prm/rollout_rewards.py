"""The reward of rollouts: a function with TRL's signature, called with whole completions."""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from trl_ext.errors import ConfigError
from trl_ext.rewards.build import build_rewards
from trl_ext.rewards.guard import guarded_all


class RolloutReward:
    """A reward function, asked as TRL's trainers ask it.

    Args:
        reward_func: a function (prompts, completions, completion_ids, **columns) -> numbers, or a
            recipe's entry: a name, or a mapping with `name` and arguments.
        tokenizer: of the policy.

    Raises:
        ConfigError: it is none of these, or reads what only a trainer has.
        RewardError, UnknownNameError, PluginError: an entry cannot be made into a reward.
    """

    def __init__(self, reward_func: Callable[..., Any] | str | Mapping[str, Any], tokenizer: Any):
        if isinstance(reward_func, nn.Module):
            raise ConfigError(
                f"The reward is a model, {type(reward_func).__name__}. Give a function (prompts, "
                "completions, **columns) that returns one number a completion, and call the model "
                "in it."
            )
        if isinstance(reward_func, str | Mapping):
            (reward_func,) = build_rewards([reward_func])
        self.reward_func = guarded_all(reward_func, None)[0]
        self.tokenizer = tokenizer
        if "ref_per_token_logps" in self.reward_func.asks_for:
            raise ConfigError(
                f"The reward {self.reward_func.__name__!r} reads the log-probabilities of a "
                "trainer's reference (ref_per_token_logps), which rollouts do not have. Give a "
                "reward that reads texts or ids."
            )
        if self.reward_func.check_tokenizer is not None:
            self.reward_func.check_tokenizer(tokenizer)

    def of_rollouts(
        self,
        prompt: Any,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, Any],
    ) -> list[float | None]:
        """Rewards of completions of one prompt, decoded as TRL decodes them.

        Args:
            prompt: a text, or messages; completions are of the same kind.
            prompt_ids: its tokens.
            completion_ids: of K whole completions.
            columns: of the prompt.

        Returns:
            K numbers; None where the reward does not apply.

        Raises:
            RewardError: the function raised, or returned something else.
        """
        texts = self.tokenizer.batch_decode(list(completion_ids), skip_special_tokens=True)
        completions: list[Any] = texts
        if not isinstance(prompt, str):
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        return self._asked(prompt, prompt_ids, completions, completion_ids, columns)

    def of_completion(
        self,
        prompt: Any,
        prompt_ids: Sequence[int],
        completion: Any,
        completion_ids: list[int],
        columns: Mapping[str, Any],
    ) -> float | None:
        """Reward of one completion as it was given: messages as they are, a text as rollouts."""
        if isinstance(completion, str):
            return self.of_rollouts(prompt, prompt_ids, [completion_ids], columns)[0]
        return self._asked(prompt, prompt_ids, [completion], [completion_ids], columns)[0]

    def _asked(
        self,
        prompt: Any,
        prompt_ids: Sequence[int],
        completions: list[Any],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, Any],
    ) -> list[float | None]:
        offered = {"prompt_ids": list(prompt_ids)} if self._reads_prompt_ids else {}
        count = len(completions)
        values = self.reward_func(
            prompts=[prompt] * count,
            completions=completions,
            completion_ids=list(completion_ids),
            **{name: [value] * count for name, value in {**columns, **offered}.items()},
        )
        return asyncio.run(values) if inspect.iscoroutine(values) else values

    @property
    def _reads_prompt_ids(self) -> bool:
        return "prompt_ids" in self.reward_func.asks_for
