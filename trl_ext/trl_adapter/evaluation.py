"""Rewards on held-out prompts, and rewards that training never sees."""

import math
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from trl_ext.errors import ConfigError, RewardError
from trl_ext.rewards.columns import asked_of_trainer, show_policy, with_columns
from trl_ext.rewards.guard import guarded_all, is_async
from trl_ext.trl_adapter.redraw import Redraw


class Evaluation(Redraw):
    """Keeps the rewards of an evaluation by prompt, and takes rewards that are only watched."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; keeps every reward for `evaluation_rewards`."""
        self._evaluation_rewards = []
        # The order of prompts is drawn from the seed when a loader is made: one that persistent
        # workers keep would go on drawing, and evaluations could not be paired by prompt.
        self.__dict__.pop("_eval_dataloaders", None)
        return super().evaluate(*args, **kwargs)

    def evaluation_rewards(self) -> list[list[float | None]]:
        """Of the last evaluation: the rewards of each prompt's completions, in a fixed order.

        None marks a completion that no reward function scored.
        """
        # Several processes fill up their last batch with the first prompts again.
        prompts = torch.cat(self._evaluation_rewards).tolist()
        if isinstance(self.eval_dataset, Dataset):
            prompts = prompts[: len(self.eval_dataset)]
        return [[None if math.isnan(reward) else reward for reward in group] for group in prompts]

    def held_out_rewards(self, reward_funcs: list[Any]) -> list[Any]:
        """Reward functions as `score_held_out` takes them.

        Raises:
            ConfigError: if one is trained on, or is not an ordinary function.
        """
        for reward_func in reward_funcs:
            name = getattr(reward_func, "__name__", reward_func)
            if any(reward_func is given for given in self._given_rewards):
                raise ConfigError(
                    f"The gold reward {name!r} is also trained on: it would measure nothing held "
                    "out. Give one that training never sees, or remove it from reward_funcs."
                )
            if isinstance(reward_func, str | torch.nn.Module) or is_async(reward_func):
                raise ConfigError(
                    f"The gold reward {name!r} must be an ordinary function (prompts, completions, "
                    "**columns) -> one number a completion: neither async nor a model. Wrap it."
                )
        guarded = guarded_all(reward_funcs, self.args.reward_timeout)
        if "ref_per_token_logps" in asked_of_trainer(guarded):
            raise ConfigError(
                "A gold reward asks for ref_per_token_logps, which only rewards that are trained "
                "on are given. Give another."
            )
        show_policy(guarded, self.model, self._tokenizer)
        return guarded

    def score_held_out(self, reward_funcs: list[Any]) -> Tensor:
        """(P·G, n) what n `held_out_rewards` give the completions of the rollout under way.

        Over all processes; NaN for not applicable. Nothing of it is logged or trained on.

        Raises:
            RewardError: if one fails.
        """
        inputs, *rest = self._to_score
        if "prompt_ids" in asked_of_trainer(reward_funcs):
            inputs = with_columns(inputs, {"prompt_ids": self._prompt_ids})
        trained_on = self.reward_funcs, self.reward_func_names, self.reward_processing_classes
        self.reward_funcs = reward_funcs
        self.reward_func_names = [f"gold/{each.__name__}" for each in reward_funcs]
        self.reward_processing_classes = [None] * len(reward_funcs)
        try:
            return super()._calculate_rewards(inputs, *rest)
        except RewardError as error:
            raise type(error)(f"A gold reward failed. {error}") from error
        finally:
            self.reward_funcs, self.reward_func_names, self.reward_processing_classes = trained_on
            self._pending_extra_logs.clear()
            self._pending_metrics.clear()

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers, with the events that `add_callback` describes."""
        self._tell("on_held_out_begin")
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        # Several processes fill up their last batch with the first prompts again.
        sized = hasattr(getattr(dataloader, "dataset", None), "__len__")
        self._tell("on_held_out_end", prompts=len(dataloader.dataset) if sized else None)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As TRL, but a loss of our own is not evaluated: on fresh samples it measures nothing.

        A forward pass over the evaluation set is saved; rewards are measured as ever.
        """
        if not self._replaces_loss:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._prepare_inputs(inputs)
        return None, None, None
