"""Reward models as reward functions: one number a completion, or one a token."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError, RewardError
from trl_ext.functional.ensemble import Combine
from trl_ext.models.loading import is_adapter, open_tokenizer
from trl_ext.models.vocabulary import check_vocabularies
from trl_ext.poe.adapter_ensemble import AdapterEnsemble, open_adapters
from trl_ext.poe.opening import tokenised_prompts
from trl_ext.poe.over_tokens import TokenIds, check_takes_tokens, checked_size
from trl_ext.poe.scoring import batches, padded
from trl_ext.rewards.returned import cut


def reward_model(
    model: Any = None,
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    adapters: Sequence[str] | None = None,
    combine: Combine = "mean",
    penalty: float = 1.0,
) -> "RewardModel | AdapterEnsemble":
    """A reward function out of a classification model with one label.

    A model for sequence classification gives one number a completion, of the text as `trl` hands it
    to a reward model: its own tokenizer and chat template, padded on the right. One for token
    classification gives one number a token; it reads the policy's own token ids, so that its
    tokenizer must be the policy's.

    Args:
        model: a model, or a path, hub id or `bundled:` name of one or of an adapter with its head.
            With `adapters` their base, which None takes from them.
        tokenizer: name or object, in place of the one beside the model.
        batch_size: completions scored at a time.
        adapters: paths of adapters for sequence classification, each with a head of its own: an
            ensemble on one base, which is in memory once (`AdapterEnsemble`).
        combine, penalty: how their scores become one, as in `ensemble_score`.

    Raises:
        ConfigError: if there is no such model, or it has several labels or no trained head.
    """
    checked_size(batch_size)
    if adapters is not None:
        opened, path = open_adapters(model, adapters, combine, penalty)
        read = tokenizer if tokenizer is not None else path
        read = open_tokenizer(read) if isinstance(read, str) else read
        inner = SequenceModel(opened, read, batch_size, name="reward_model", is_own=True)
        return AdapterEnsemble(inner, combine, penalty)
    if (combine, penalty) != ("mean", 1.0):
        raise ConfigError(
            f"reward_model: combine is {combine!r} and penalty {penalty!r}, and there is one model "
            "to combine. Give adapters, or take reward_ensemble."
        )
    is_own = isinstance(model, str)
    if not is_own and not isinstance(model, PreTrainedModel | PeftModel):
        raise ConfigError(
            f"The reward model is {cut(model)}; it must be a classification model with one label, "
            "or the path, hub id or bundled: name of one."
        )
    path = resolve_model(model) if is_own else getattr(model.config, "_name_or_path", "")
    opened: Any = _opened(model, path) if is_own else model
    if opened.config.num_labels != 1:
        raise ConfigError(
            f"The reward model {path!r} has {opened.config.num_labels} labels; a reward is one "
            "number. Train it with num_labels=1."
        )
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = open_tokenizer(tokenizer or path)
    of = TokenModel if "TokenClassification" in type(opened).__name__ else SequenceModel
    return of(opened, tokenizer, batch_size, name=path, is_own=is_own)


def _opened(name: str, path: str) -> Any:
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    if is_adapter(path):
        return open_adapters(None, [path], "mean", 1.0)[0]
    try:
        config = AutoConfig.from_pretrained(path)
        of_tokens = any("TokenClassification" in a for a in config.architectures or [])
        auto = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
        opened, info = auto.from_pretrained(path, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"The reward model {name!r} cannot be opened: {str(error).strip().splitlines()[0]}"
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ConfigError(
            f"The reward model {name!r} has no {missing} among its weights, and would judge by "
            "random numbers there. Give a model that was trained as a reward model, saved with its "
            "head."
        )
    return opened.eval().requires_grad_(False)


class RewardModel(ABC):
    """A model that judges completions; what its subclasses give is one number each, or one a token.

    Args:
        model: a classification model with one label.
        tokenizer: that it reads.
        batch_size: completions scored at a time.
        name: what errors call it.
        is_own: it was loaded here, and is moved to the device of this process.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, *, name: str, is_own: bool):
        self.__name__ = "reward_model"
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.name = name
        self.is_own = is_own
        self.asks_for: set[str] = set()

    @abstractmethod
    def __call__(
        self, prompts: list, completions: list, completion_ids: TokenIds, **columns: Any
    ) -> list[Any]:
        """As TRL calls a reward function."""

    @torch.no_grad()
    def _logits(self, **inputs: Tensor) -> Tensor:
        """The one label's logit: (B,) or (B, T), float32 on the CPU."""
        if self.is_own:
            from accelerate import PartialState

            self.model.to(PartialState().device)
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            return self.model(**inputs).logits[..., 0].float().cpu()
        finally:
            for module in training:
                module.training = True


class SequenceModel(RewardModel):
    """A sequence-classification model: one number a completion."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, **about: Any):
        super().__init__(model, tokenizer, batch_size, **about)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # transformers looks for the last token that is no padding.
        model.config.pad_token_id = tokenizer.pad_token_id

    def __call__(
        self, prompts: list, completions: list, completion_ids: TokenIds, **columns: Any
    ) -> list[float]:
        texts = self._texts(prompts, completions)
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        scores = [0.0] * len(texts)
        for begin in range(0, len(order), self.batch_size):
            rows = order[begin : begin + self.batch_size]
            inputs = self.tokenizer(
                text=[texts[row] for row in rows],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            )
            for row, score in zip(rows, self._logits(**inputs).tolist(), strict=True):
                scores[row] = score
        return scores

    def _texts(self, prompts: list, completions: list) -> list[str]:
        from trl import apply_chat_template, is_conversational

        pairs = zip(prompts, completions, strict=True)
        if not prompts or not is_conversational({"prompt": prompts[0]}):
            return [prompt + completion for prompt, completion in pairs]
        messages = [{"messages": prompt + completion} for prompt, completion in pairs]
        return [apply_chat_template(each, self.tokenizer)["text"] for each in messages]


class TokenModel(RewardModel):
    """A token-classification model: one number a token of the completion."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, **about: Any):
        super().__init__(model, tokenizer, batch_size, **about)
        self.asks_for = {"prompt_ids"}

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Whether the policy's tokens are those of the model. A policy trainer calls it.

        Raises:
            ConfigError: with the first token that differs.
        """
        check_vocabularies({"the policy": tokenizer, self.name: self.tokenizer})

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: TokenIds,
        prompt_ids: TokenIds | None = None,
        **columns: Any,
    ) -> list[list[float]]:
        if prompt_ids is None:
            check_takes_tokens(
                f"The reward model {self.name!r}", columns, "Take one for sequence classification"
            )
            prompt_ids = tokenised_prompts(prompts, self.tokenizer) if prompts else []
        self._check_ids(completion_ids)
        scores: list[list[float]] = [[] for _ in completion_ids]
        for rows in batches(prompt_ids, completion_ids, self.batch_size):
            begun = [[*prompt_ids[row], *completion_ids[row]] for row in rows]
            # On the right, where padding moves no token's position.
            ids, mask = padded([[]] * len(rows), begun, self.model.device)
            logits = self._logits(input_ids=ids, attention_mask=mask).tolist()
            for row, values in zip(rows, logits, strict=True):
                first = len(prompt_ids[row])
                scores[row] = values[first : first + len(completion_ids[row])]
        return scores

    def _check_ids(self, completion_ids: TokenIds) -> None:
        largest = max((max(ids, default=-1) for ids in completion_ids), default=-1)
        size = self.model.config.get_text_config().vocab_size
        if largest >= size:
            raise RewardError(
                f"The reward model {self.name!r} has {size} tokens, and a completion has the token "
                f"id {largest}. It must have the policy's tokenizer."
            )
