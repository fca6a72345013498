"""Which rows a pass with gradient takes."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext.errors import ConfigError
from trl_ext.packing import (
    PackedTokens,
    PaddedTokens,
    RowSize,
    cut_at,
    cut_evenly,
    is_rotary,
    which_prompt,
)
from trl_ext.rollout import generated, whole
from trl_ext.trl_adapter.evaluation import Evaluation
from trl_ext.trl_adapter.passes import MULTIMODAL_INPUTS

# Loss types that divide by the number of tokens of all micro-batches and processes.
OVER_THE_BATCH = ("dapo", "cispo", "vespo")


@dataclass(frozen=True, eq=False)
class Part:
    """Rows that one pass takes, and how much of a micro-batch of TRL's they are.

    Attributes:
        batch: as TRL's micro-batch, of these rows.
        of_rows: what the mean of a loss over these rows is to be multiplied with.
        of_loss_type: the same for a loss that is added up as the loss type says.
        rows: of all processes and of all passes of its optimizer step's part, for a metric that is
            their mean. None: those of the batch.
        is_last: of these passes.
    """

    batch: dict[str, Any]
    of_rows: float = 1.0
    of_loss_type: float = 1.0
    rows: int | None = None
    is_last: bool = True


class MicroBatches(Evaluation):
    """Forms micro-batches of rows that carry signal, out of those that TRL has for a step."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._formed_from: list[Any] | None = None
        self._formed: list[list[Part]] = []
        super().__init__(*args, **kwargs)
        limit = self.args.max_tokens_per_micro_batch
        if limit is not None and (why := self._why_trls_micro_batches()):
            raise ConfigError(
                f"max_tokens_per_micro_batch={limit} has no effect here: {why}. Remove it. "
                "For less memory lower per_device_train_batch_size and raise "
                "gradient_accumulation_steps."
            )

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or not self._forms_its_own(inputs):
            return inputs
        buffered: Any = self._buffered_inputs
        if self._formed_from is not buffered:
            self._formed_from, self._formed = buffered, self._form(buffered)
        return self._formed[self._step % self._steps_per_generation]

    def _forms_its_own(self, inputs: dict[str, Any]) -> bool:
        args = self.args
        wanted = args.trim_padding or args.skip_zero_credit or args.max_tokens_per_micro_batch
        has_images = any(name in inputs for name in MULTIMODAL_INPUTS)
        return bool(wanted) and not self._has_means_over_rows and not has_images

    @property
    def _has_means_over_rows(self) -> bool:
        """Whether the loss has terms that are means over all rows of a micro-batch of TRL's."""
        of_entropy = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0
        return of_entropy or self.aux_loss_enabled

    def _why_trls_micro_batches(self) -> str | None:
        """What keeps the number of passes what it is with TRL; None if nothing does."""
        if self.is_deepspeed_enabled:
            return "DeepSpeed counts the passes of a step"
        if self._has_means_over_rows:
            return (
                "entropy_coef, use_adaptive_entropy, top_entropy_quantile and router_aux_loss_coef "
                "have terms that are means over the rows of a micro-batch"
            )
        return None

    def _form(self, batches: list[dict[str, Any]]) -> list[list[Part]]:
        """The passes in the place of each of TRL's micro-batches."""
        # As many as certainly belong to one optimizer step.
        together = math.gcd(self.args.gradient_accumulation_steps, self._steps_per_generation)
        if self.loss_type == "bnpo":
            together = 1  # it divides by the tokens of TRL's micro-batch
        return [
            passes
            for first in range(0, len(batches), together)
            for passes in self._shared_out(batches[first : first + together])
        ]

    def _shared_out(self, batches: list[dict[str, Any]]) -> list[list[Part]]:
        rows, slots = _joined(batches), len(batches)
        chosen = self._chosen(rows, slots)
        last = len(chosen) - 1
        parts = [
            self._part(rows, each, slots, is_last=number == last)
            for number, each in enumerate(chosen)
        ]
        return _spread(parts, slots)

    def _chosen(self, rows: dict[str, Any], slots: int) -> list[list[int]]:
        """The rows of each pass; on every process as many passes, and at least one."""
        sizes, tokens = self._sizes(rows), PackedTokens if self.packs else PaddedTokens
        has_signal = self._has_signal(rows).tolist()
        by_use = sorted(
            range(len(sizes)), key=lambda row: (not has_signal[row], sizes[row].completion)
        )
        taken = self._in_order(by_use[: sum(has_signal)], sizes)
        limit = self.args.max_tokens_per_micro_batch
        padded = whole(rows)[0].numel() // slots
        passes = len(cut_at(limit or padded // 2, [sizes[row] for row in taken], tokens))
        if self.is_deepspeed_enabled:  # which counts the backward passes
            passes = slots
        elif limit is None:
            passes = min(passes, slots)
        passes = max(1, self._largest(passes))
        if passes > len(taken):
            taken = self._in_order(by_use[:passes], sizes)
        counts = cut_evenly(passes, [sizes[row] for row in taken], tokens)
        each = iter(taken)
        return [[next(each) for _ in range(count)] for count in counts]

    def _sizes(self, rows: dict[str, Any]) -> list[RowSize]:
        """What each row adds to a pass, as it is run."""
        masks = rows["completion_mask"], rows["prompt_mask"]
        completions, prompts = (mask.sum(1) for mask in masks)
        if self.packs:
            completions, prompts = completions + self._keeps_last, (prompts - 1).clamp(min=0)
        if not self._trims:
            completions = torch.full_like(completions, masks[0].size(1))
        if not self._trims or not is_rotary(self.model):
            prompts = torch.full_like(prompts, masks[1].size(1))
        which = which_prompt(rows["prompt_ids"], rows["prompt_mask"])
        columns = (each.tolist() for each in (completions, prompts, which))
        return [RowSize(*row) for row in zip(*columns, strict=True)]

    def _in_order(self, rows: list[int], sizes: list[RowSize]) -> list[int]:
        """Rows of a prompt together; where they are padded, those of similar length."""
        if self.packs:
            return sorted(rows, key=lambda row: (sizes[row].prompt, row))
        return sorted(rows, key=lambda row: (-sizes[row].completion, row))

    def _has_signal(self, rows: dict[str, Any]) -> Tensor:
        """(B,) bool: rows that have a part in the loss."""
        credit, mask = rows["advantages"], generated(rows)
        of_kl = "ref_per_token_logps" in rows or (self.kl.over_vocabulary and self.beta != 0.0)
        if not self.args.skip_zero_credit or self.needs_every_row(rows) or of_kl:
            return torch.ones(len(credit), dtype=torch.bool)
        return ((credit if credit.dim() > 1 else credit[:, None]) * mask).ne(0).any(dim=1)

    def _part(self, rows: dict[str, Any], chosen: list[int], slots: int, *, is_last: bool) -> Part:
        count, everything = len(chosen), len(rows["advantages"])
        # Numbers of each row are gathered over processes: there must be as many rows on each.
        fillers = self._largest(count) - count
        index = torch.tensor(chosen + chosen[:1] * fillers, device=rows["advantages"].device)
        batch = {name: _rows_of(value, index, everything) for name, value in rows.items()}
        if fillers:
            batch["completion_mask"][count:] = 0
        of_rows = len(index) * slots / everything
        of_loss_type = of_rows
        if self.loss_type in OVER_THE_BATCH:
            of_loss_type = 1.0
        elif self.loss_type == "bnpo":
            tokens, of_these = (generated(each).sum().clamp(min=1) for each in (rows, batch))
            of_loss_type = (of_these / tokens).item()
        of_all = everything * self.accelerator.num_processes
        return Part(batch, of_rows, of_loss_type, of_all, is_last)

    def _largest(self, count: int) -> int:
        """Of the counts of all processes."""
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.gather(torch.tensor(count, device=self.args.device)).max())


def _joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Micro-batches one below the other."""
    if len(batches) == 1:
        return batches[0]
    rows = len(batches[0]["advantages"])
    return {
        name: torch.cat([batch[name] for batch in batches]) if _is_of_rows(value, rows) else value
        for name, value in batches[0].items()
    }


def _rows_of(value: Any, index: Tensor, rows: int) -> Any:
    return value[index] if _is_of_rows(value, rows) else value


def _is_of_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


def _spread(parts: list[Part], slots: int) -> list[list[Part]]:
    """Passes over micro-batches; the last one has some, as processes share gradients there."""
    number = len(parts)
    if number > slots:
        where = [part * slots // number for part in range(number)]
    else:
        where = [(part + 1) * slots // number - 1 for part in range(number)]
    return [[parts[part] for part in range(number) if where[part] == slot] for slot in range(slots)]
