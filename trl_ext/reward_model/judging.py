"""The rewards of a batch of comparisons, and what a log line says of them."""

from typing import Any

import torch
from torch import Tensor

from trl_ext.functional import preference_margins
from trl_ext.metrics.comparisons import comparison_scores
from trl_ext.reward_model.collator import on_grid


class Judge:
    """The model as TRL calls it: all completions go in, rewards of the best and worst come out.

    Args:
        model: a sequence classifier with one label.
        ranks: (B, K) of a batch, 0 where there is no completion.

    Attributes:
        rewards: (B, K), once it was called; 0 where there is no completion.
    """

    def __init__(self, model: Any, ranks: Tensor):
        self.model = model
        self.ranks = ranks
        self.rewards: Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        self.rewards = on_grid(outputs.logits.squeeze(-1), self.ranks)
        real = self.ranks > 0
        best = torch.where(real, self.ranks, torch.inf).argmin(1, keepdim=True)
        worst = torch.where(real, self.ranks, -torch.inf).argmax(1, keepdim=True)
        outputs.logits = torch.cat([self.rewards.gather(1, best), self.rewards.gather(1, worst)])
        return outputs


def comparison_metrics(batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """What a log line says of batches of (B, K) rewards and ranks, 0 for none, by name.

    Accuracy, margin and calibration are over the pairs of all batches; the least and the greatest
    reward, as in TRL, are means over batches.
    """
    rewards = [each[ranks > 0] for each, ranks in batches]
    margins = [preference_margins(each, ranks, mask=ranks > 0) for each, ranks in batches]
    found = comparison_scores(torch.cat(margins))
    metrics = {
        "min_reward": torch.stack([each.min() for each in rewards]).mean().item(),
        "mean_reward": torch.cat(rewards).mean().item(),
        "max_reward": torch.stack([each.max() for each in rewards]).mean().item(),
        "accuracy": found.accuracy,
        "margin": found.margin,
        "log_loss": found.log_loss,
    }
    if found.bins.count.any():
        metrics["ece"] = found.ece
    for low, high, accuracy, _ in found.by_margin:
        metrics[f"accuracy_margin_{low:g}_to_{high:g}"] = accuracy
    return metrics
