"""What a classification model says of completions: one number each, or one a token."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from trl_ext.errors import ConfigError, RewardError
from trl_ext.models.vocabulary import check_vocabularies
from trl_ext.poe.opening import tokenised_prompts
from trl_ext.poe.over_tokens import TokenIds, check_takes_tokens
from trl_ext.poe.scoring import batches, padded


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

    def _check_ids(self, rows: TokenIds, advice: str) -> None:
        largest = max((max(ids, default=-1) for ids in rows), default=-1)
        size = getattr(self.model.config.get_text_config(), "vocab_size", math.inf)
        if largest >= size:
            raise RewardError(
                f"The reward model {self.name!r} has {size} tokens, and a completion has the token "
                f"id {largest}. {advice}."
            )


class SequenceModel(RewardModel):
    """A sequence-classification model: one number a completion.

    Args:
        append_eos: read plain texts with special tokens and the end token behind them.
        about: as for `RewardModel`.

    Raises:
        ConfigError: if an end token is to be appended, or texts to be padded, and the tokenizer has
            no token for it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int, *, append_eos: bool, **about: Any
    ):
        super().__init__(model, tokenizer, batch_size, **about)
        self.append_eos = append_eos
        if append_eos and tokenizer.eos_token is None:
            raise ConfigError(
                f"The reward model {self.name!r} is to read texts with the end token behind them, "
                "and its tokenizer has no end token. Set append_eos: false, or give its tokenizer."
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise ConfigError(
                f"The tokenizer of the reward model {self.name!r} has no token to pad with, and no "
                "end token. Set its pad_token, and save it beside the model."
            )
        # transformers looks for the last token that is no padding.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    def __call__(
        self, prompts: list, completions: list, completion_ids: TokenIds, **columns: Any
    ) -> list[float]:
        texts, is_text = self._texts(prompts, completions)
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        scores = [0.0] * len(texts)
        for begin in range(0, len(order), self.batch_size):
            rows = order[begin : begin + self.batch_size]
            inputs = self.tokenizer(
                text=[texts[row] for row in rows],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=is_text and self.append_eos,
            )
            self._check_ids(inputs["input_ids"].tolist(), "Give the tokenizer that it learned with")
            for row, score in zip(rows, self._logits(**inputs).tolist(), strict=True):
                scores[row] = score
        return scores

    def _texts(self, prompts: list, completions: list) -> tuple[list[str], bool]:
        """What is read of each row, and whether it is plain text."""
        from trl import apply_chat_template, is_conversational

        pairs = zip(prompts, completions, strict=True)
        if not prompts or not is_conversational({"prompt": prompts[0]}):
            end = self.tokenizer.eos_token if self.append_eos else ""
            texts = [p + (c if c.endswith(end) else c + end) for p, c in pairs]
            # Without a token there is no place to read; what pads a batch ends a text.
            return [text or self.tokenizer.pad_token for text in texts], True
        if self.tokenizer.chat_template is None:
            raise RewardError(
                f"The reward model {self.name!r} is asked for conversations, and its tokenizer has "
                "no chat template. Take a model that was trained on conversations, or give prompts "
                "as texts."
            )
        messages = [{"messages": prompt + completion} for prompt, completion in pairs]
        return [apply_chat_template(each, self.tokenizer)["text"] for each in messages], False


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
        self._check_ids(completion_ids, "It must have the policy's tokenizer")
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
