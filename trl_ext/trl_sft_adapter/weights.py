"""The weight of each token, in a batch and on the log-probabilities of a model."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

TokenReduction = Literal["sum", "mean", "batch"]

IGNORED = -100
# What the collator adds to a batch: (B, S) weight of each token, and how many rows it holds.
TOKEN_WEIGHTS, ROWS = "token_weights", "num_rows"


@dataclass
class WeightedCollator(DataCollatorForLanguageModeling):
    """TRL's collator, and beside its tensors `token_weights` (B, S) and `num_rows`."""

    token_reduction: TokenReduction = "sum"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Examples with `input_ids`, `labels` and `weight`, or packed ones, as tensors."""
        batch = super().torch_call(examples)
        packed = TOKEN_WEIGHTS in examples[0]
        rows = [
            torch.tensor(
                example[TOKEN_WEIGHTS]
                if packed
                else token_weights(example["weight"], example["labels"], self.token_reduction)
            )
            for example in examples
        ]
        rows = [torch.cat(rows)] if self.padding_free else rows
        batch[TOKEN_WEIGHTS] = torch.zeros(batch["labels"].shape)
        for filled, row in zip(batch[TOKEN_WEIGHTS], rows, strict=True):
            filled[: len(row)] = row
        held = sum(len(e["seq_lengths"]) for e in examples) if packed else len(examples)
        batch[ROWS] = torch.tensor(held)
        return batch


class WeightedModel:
    """The model as TRL's loss calls it, with weighted log-probabilities.

    Attributes:
        of_rows: (B, 3) of the last call: of each row the weighted sum of −log π over tokens, the
            plain sum, and the number of tokens.
    """

    def __init__(self, model: Any, weights: Tensor, rows: Tensor | None):
        self.model, self.weights, self.rows = model, weights, rows
        self.of_rows = torch.zeros(0, 3)

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        log_probs = getattr(outputs, "log_probs", None)
        if log_probs is None:
            return outputs
        tokens = outputs.label_mask.sum(1)
        # Prompt learning puts virtual tokens in front; the first token of all is predicted by none.
        virtual = log_probs.size(1) + 1 - self.weights.size(1)
        weights = torch.nn.functional.pad(self.weights.to(log_probs), (virtual, 0))[:, 1:]
        nll = -log_probs.detach()
        self.of_rows = torch.stack([(nll * weights).sum(1), nll.sum(1), tokens.to(nll)], dim=1)
        if self.rows is not None:
            # TRL divides by the number of tokens where nobody has counted a step's items.
            weights = weights * tokens.sum().clamp(min=1) / self.rows
        outputs.log_probs = log_probs * weights
        return outputs


def token_weights(weight: float, labels: list[int], token_reduction: TokenReduction) -> list[float]:
    """The weight of each token of a row: 0 where nothing is predicted.

    Args:
        weight: of the row.
        labels: token ids, -100 where nothing is predicted; nothing predicts the first.
        token_reduction: "mean" spreads the weight evenly over the row's tokens.
    """
    predicted = [position > 0 and label != IGNORED for position, label in enumerate(labels)]
    each = weight / max(sum(predicted), 1) if token_reduction == "mean" else weight
    return [each if counts else 0.0 for counts in predicted]


def with_token_weights(row: dict[str, Any], token_reduction: TokenReduction) -> dict[str, Any]:
    return {TOKEN_WEIGHTS: token_weights(row["weight"], row["labels"], token_reduction)}


def as_tokens(row: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = list(row["prompt_ids"]), list(row["completion_ids"])
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}
