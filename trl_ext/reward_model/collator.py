"""Batches of comparisons: every completion once, whatever the numbers of completions are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.utils import pad


@dataclass
class ComparisonCollator(DataCollatorMixin):
    """All first completions of a batch, then all second ones, and so on; padded on the right.

    For rows of `chosen_ids` and `rejected_ids` these are the batches of TRL's
    `DataCollatorForPreference`, with the ranks 1 and 2.

    Args:
        pad_token_id: that fills up shorter sequences.
        pad_to_multiple_of: of the width of a batch.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (N, T), `ranks` (B, K), and `margin` where rows have it.

        `ranks` is 0 where a row has fewer completions than others; N is the number of the rest.
        """
        rows = [_ids_and_ranks(example) for example in examples]
        completions = max(len(ranks) for _, ranks in rows)
        ids = [torch.tensor(ids[k]) for k in range(completions) for ids, _ in rows if k < len(ids)]
        padding = {"padding_side": "right", "pad_to_multiple_of": self.pad_to_multiple_of}
        ranks = [[*ranks, *[0.0] * (completions - len(ranks))] for _, ranks in rows]
        batch = {
            "input_ids": pad(ids, padding_value=self.pad_token_id, **padding),
            "attention_mask": pad([torch.ones_like(x) for x in ids], padding_value=0, **padding),
            "ranks": torch.tensor(ranks),
        }
        if "margin" in examples[0]:
            margins = [example["margin"] for example in examples]
            batch["margin"] = torch.tensor(margins, dtype=torch.float)
        return batch


def _ids_and_ranks(example: dict[str, Any]) -> tuple[list[list[int]], list[float]]:
    if "ranking_ids" in example:
        return example["ranking_ids"], example["ranks"]
    return [example["chosen_ids"], example["rejected_ids"]], [1.0, 2.0]


def on_grid(values: Tensor, ranks: Tensor) -> Tensor:
    """Numbers of the sequences of a batch, in their order there, by prompt and completion.

    Args:
        values: (N,) of the sequences.
        ranks: (B, K) as the collator gives them.

    Returns:
        (B, K); 0 where a row has no such completion.
    """
    completion, prompt = (ranks.T > 0).nonzero(as_tuple=True)
    return values.new_zeros(ranks.shape).index_put((prompt, completion), values)
