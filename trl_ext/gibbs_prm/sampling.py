"""Rollouts: completions of prefixes, sampled from a model. What a Monte-Carlo score is made of."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from trl_ext.errors import ConfigError
from trl_ext.gibbs_prm.rollout_cache import PrefixCaches, why_not_shared
from trl_ext.gibbs_prm.rollout_checks import (
    as_ids,
    budgets_of,
    check_count,
    check_ids,
    check_temperature,
    until_end,
)
from trl_ext.models.adapter import Causal, device_of, inner_model, reading, wrapped_model
from trl_ext.models.loading import tokenizer_beside


class Rollouts(Protocol):
    """What samples rollouts.

    Attributes:
        max_completion_length: tokens that a completion has at most, its end token included.
        end_ids: the tokens that end a completion.
        note: what the reader of the scores should know of how they are sampled, or None.
    """

    max_completion_length: int
    end_ids: frozenset[int]
    note: str | None

    def sample(
        self,
        prefixes: Sequence[Sequence[int]],
        num_rollouts: int,
        *,
        prompt_lengths: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[list[list[int]]]:
        """The tokens behind each prefix, `num_rollouts` times, independent given the prefix.

        Args:
            prefixes: tokens of a prompt and of a completion begun.
            num_rollouts: K.
            prompt_lengths: how many tokens of each prefix are the prompt's; None: all of them.
            seed: the same rollouts from the same seed, prefixes and settings.

        Returns:
            Of each prefix K lists of tokens. Each ends with an end token, or where the completion
            has max_completion_length tokens with those of the prefix.
        """
        ...


class GenerateSampler:
    """Rollouts by transformers' `generate`, from the model's own distribution.

    What the model's generation config adds to the distribution (top-k, penalties, …) is left out;
    its end tokens count.

    Args:
        model: a causal language model of transformers, or an adapter of one.
        tokenizer: whose end token counts as well; or the end tokens' ids, and then only these.
        max_completion_length: tokens that a completion has at most, its end token included.
        temperature: the logits are divided by it; 0 takes the likeliest token each time.
        stop_token_ids: more tokens that end a completion.
        share: "prefix" reads what prefixes have in common once, where the model's cache allows it
            (see `shares`); "none" reads each prefix for each of its rollouts.
        batch_size: rollouts that are sampled together.

    Attributes:
        shares: whether prefixes share what they have in common.
        note: why they do not although they should, or None.
        tokenizer: the one given, or that beside the model; None: neither is known.

    Raises:
        ConfigError: an argument out of range, or a prompt-learning adapter, whose tokens no prefix
            names.
    """

    def __init__(
        self,
        model: Causal,
        tokenizer: Any = None,
        *,
        max_completion_length: int,
        temperature: float = 1.0,
        stop_token_ids: Iterable[int] = (),
        share: Literal["prefix", "none"] = "prefix",
        batch_size: int = 32,
    ):
        if share not in ("prefix", "none"):
            raise ConfigError(f"share is {share!r}; it must be 'prefix' or 'none'.")
        _refuse_prompt_learning(model)
        self.model = model
        self.max_completion_length = check_count("max_completion_length", max_completion_length)
        self.temperature = check_temperature(temperature, greedy=True)
        self.batch_size = check_count("batch_size", batch_size)
        stops = check_ids("stop_token_ids", stop_token_ids)
        self.end_ids = frozenset([*_end_ids(model, tokenizer), *stops])
        self.tokenizer = tokenizer if hasattr(tokenizer, "get_vocab") else tokenizer_beside(model)
        obstacle = why_not_shared(inner_model(model))
        self.shares = share == "prefix" and obstacle is None
        self.note = None
        if share == "prefix" and obstacle:
            self.note = f"The model reads every prefix anew for each of its rollouts: {obstacle}."

    def sample(
        self,
        prefixes: Sequence[Sequence[int]],
        num_rollouts: int,
        *,
        prompt_lengths: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[list[list[int]]]:
        """As `Rollouts.sample`; the global random state is left as it was.

        Raises:
            ConfigError: num_rollouts is no count, or a prefix has no token, nothing left to sample
                or no room in the model's context; before anything is sampled.
        """
        check_count("num_rollouts", num_rollouts)
        config = inner_model(self.model).config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        budgets = budgets_of(prefixes, prompt_lengths, self.max_completion_length, longest)
        rollouts: list[list[list[int]]] = [[] for _ in prefixes]
        with self._ready(seed) as model:
            caches = PrefixCaches(model, prefixes) if self.shares else None
            order = caches.order if caches else range(len(prefixes))
            rows = [number for number in order for _ in range(num_rollouts)]
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                cache = caches.of(batch) if caches else None
                begun = [prefixes[row] for row in batch]
                left = [budgets[row] for row in batch]
                for row, tokens in zip(batch, self._draw(begun, left, cache), strict=True):
                    rollouts[row].append(tokens)
        return rollouts

    @contextmanager
    def _ready(self, seed: int) -> Iterator[Any]:
        """The model that runs: evaluation mode, this sampler's settings, seeded; then as before."""
        model = inner_model(self.model)
        device = device_of(self.model)
        own = model.generation_config
        kind = "cuda" if device.type == "cpu" else device.type
        forked = [] if device.type == "cpu" else [device]
        with reading(self.model), torch.no_grad(), torch.random.fork_rng(forked, device_type=kind):
            torch.manual_seed(seed)
            model.generation_config = self._generation_config()
            try:
                yield model
            finally:
                model.generation_config = own

    def _generation_config(self) -> GenerationConfig:
        ends = sorted(self.end_ids)
        chosen: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            # transformers would cut to the 50 likeliest tokens.
            chosen = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        # What follows an end token is cut off, so any token can fill up.
        return GenerationConfig(eos_token_id=ends or None, pad_token_id=(ends or [0])[0], **chosen)

    def _draw(
        self, prefixes: list[Sequence[int]], budgets: list[int], cache: Any
    ) -> list[list[int]]:
        """One rollout of each row."""
        ids, mask = _left_padded(prefixes, device_of(self.model))
        spent = _BudgetsSpent(torch.tensor(budgets, device=ids.device), ids.size(1))
        options = {} if cache is None else {"past_key_values": cache}
        tokens = inner_model(self.model).generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(budgets),
            stopping_criteria=StoppingCriteriaList([spent]),
            **options,
        )
        behind = tokens[:, ids.size(1) :].tolist()
        return [until_end(row, self.end_ids, n) for row, n in zip(behind, budgets, strict=True)]


class _BudgetsSpent(StoppingCriteria):
    """A row is done when its budget (B,) is spent: the batch need not wait for what is cut off."""

    def __init__(self, budgets: Tensor, width: int):
        self.budgets = budgets
        self.width = width

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids.size(1) - self.width >= self.budgets


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, W)."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _end_ids(model: Causal, tokenizer: Any) -> list[int]:
    """The ids given, or the end tokens of a tokenizer and of the model, as TRL's trainers have."""
    if tokenizer is not None and not hasattr(tokenizer, "eos_token_id"):
        return as_ids(tokenizer)
    own = as_ids(inner_model(model).generation_config.eos_token_id)
    return [*own, *as_ids(getattr(tokenizer, "eos_token_id", None))]


def _refuse_prompt_learning(model: Causal) -> None:
    config = getattr(wrapped_model(model), "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        kind = type(config).__name__
        raise ConfigError(
            f"The model has an adapter that learns a prompt ({kind}), and rollouts begin with the "
            "tokens of their prefix alone. Give a LoRA adapter or a model without one."
        )
