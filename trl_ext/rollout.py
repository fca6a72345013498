"""What the hooks of a policy trainer are given: whole groups, and then their micro-batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """The completions of one generation batch, whole groups, before TRL shuffles and splits them.

    P prompts and G completions each, over all processes; B rows and T completion tokens on this
    one.

    Attributes:
        rewards_PG: (P, G) weighted sum of the reward functions; NaN where every one of them
            returned None.
        batch: this process's tensors as TRL made them: `completion_ids`, `completion_mask` (B, T),
            `advantages` (B,), and `old_per_token_logps`, `ref_per_token_logps` (B, T) where TRL
            computed them. A tensor (B, …) that a hook puts here reaches the micro-batches.
        local_rows: where this process's B rows lie among the P·G of all processes.
    """

    rewards_PG: Tensor
    batch: dict[str, Any]
    local_rows: slice

    @property
    def mask(self) -> Tensor:
        """(B, T), 1 = a token that the policy generated: neither padding nor a tool's answer."""
        return generated(self.batch)

    @property
    def last_tokens(self) -> Tensor:
        """(B, T) bool: the last token that the policy generated; none where there is none."""
        positions = torch.arange(self.mask.size(1), device=self.mask.device)
        last = torch.where(self.mask.bool(), positions, -1).amax(1, keepdim=True)
        return positions == last

    def local(self, values_PG: Tensor) -> Tensor:
        """(P, G, …) over all processes -> (B, …) of this one."""
        return values_PG.flatten(0, 1)[self.local_rows]


@dataclass(frozen=True)
class MicroBatch:
    """What a loss is computed from: B rows of a rollout, T completion tokens.

    Which rows, and how many, differs from pass to pass: those that carry signal, of an optimizer
    step, in parts of about as many tokens.

    Attributes:
        per_token_logps: (B, T) log π of the sampled tokens, nats, with gradient.
        mask: (B, T), 1 = a token that the policy generated.
        credit: (B,) or (B, T), what `assign_credit` returned.
        batch: these rows of the tensors of the rollout's `batch`.
        readout: what the trainer's `read_hidden` made of this pass; None without one.
    """

    per_token_logps: Tensor
    mask: Tensor
    credit: Tensor
    batch: Mapping[str, Any]
    readout: Tensor | None = None

    @property
    def old_per_token_logps(self) -> Tensor:
        """(B, T) under the policy that made the rollout; that of now where it is still the same."""
        return self.batch.get("old_per_token_logps", self.per_token_logps.detach())

    @property
    def log_ratios(self) -> Tensor:
        """(B, T) log π/π_old of the sampled tokens, nats, without gradient."""
        return (self.per_token_logps - self.old_per_token_logps).detach()


def generated(batch: Mapping[str, Any]) -> Tensor:
    """(B, T), 1 = a token that the policy generated."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def whole(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(B, S) prompts with their completions, and which of it is no padding."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
