"""The loss of a micro-batch: TRL's, or an algorithm's own with what TRL adds to it."""

from typing import Any

import torch
from torch import Tensor

from trl_ext.functional import TokenAggregation, aggregate_tokens
from trl_ext.rollout import MicroBatch, generated
from trl_ext.trl_adapter.micro_batches import OVER_THE_BATCH, MicroBatches, Part

# TRL's loss type -> how it adds up a loss per token.
_AGGREGATION: dict[str, TokenAggregation] = {
    "grpo": "completion means",
    "sapo": "completion means",
    "bnpo": "tokens",
    "dr_grpo": "fixed length",
    "luspo": "completion sums",
}


class Loss(MicroBatches):
    """Adds a KL penalty of ours to TRL's loss, or a loss of ours to TRL's penalties."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As TRL, but nothing is done for a rollout that `end_rollout` has put aside."""
        if self._rollout_is_spent and self._step % self._generate_every:
            self._step += 1
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def _compute_loss(self, model, inputs):
        if not isinstance(inputs, list):
            return self._loss_of(model, Part(inputs))
        if not inputs:  # others have its rows, or none has
            return torch.zeros((), device=self.args.device, requires_grad=True)
        earlier = torch.zeros((), device=self.args.device)
        for part in inputs[:-1]:
            loss = self._loss_of(model, part)
            self.accelerator.backward(loss)
            earlier += loss.detach()
        return self._loss_of(model, inputs[-1]) + earlier

    def _loss_of(self, model: Any, part: Part) -> Tensor:
        inputs = part.batch
        self._scored = []
        is_trls = self.kl.is_trls and not self._replaces_loss
        with self.kl.watching() as passes:
            if self._replaces_loss:
                loss = self._own_loss(model, part)
            elif is_trls:
                loss = super()._compute_loss(model, inputs) * part.of_loss_type
            else:
                with self._trl_beta(0.0):
                    loss = super()._compute_loss(model, inputs) * part.of_loss_type
        [(logps, _)] = self._scored
        self._scored = []
        passes = self._states(passes, logps.size(1))
        per_token = self.kl.per_token(logps, inputs, passes, part.rows, is_last=part.is_last)
        if per_token is not None and self.kl.enters("loss") and not is_trls:
            loss = loss + self.kl.beta * self._added_up(per_token, part)
        return loss

    def _own_loss(self, model: Any, part: Part) -> Tensor:
        inputs = part.batch
        # Without credit and KL, TRL's loss is what it adds to the policy term: entropy bonus,
        # router loss. Without the old log-probabilities, no ratio can overflow.
        rows = {name: value for name, value in inputs.items() if name != "old_per_token_logps"}
        with self._trl_beta(0.0):
            rest = super()._compute_loss(
                model, rows | {"advantages": torch.zeros_like(inputs["advantages"])}
            )
        [(logps, readout)] = self._scored
        loss = self.policy_loss(
            MicroBatch(logps, generated(inputs), inputs["advantages"], inputs, readout)
        )
        self._drop_surrogate_metrics()
        if loss.dim() != 2:  # of completions: their credit has the correction
            return rest + loss * part.of_rows / self._accumulated
        # vLLM's probabilities are not the policy's: π_old/μ, which TRL's surrogate counts by too.
        return rest + self._added_up(loss * inputs.get("importance_sampling_ratio", 1.0), part)

    def _added_up(self, per_token: Tensor, part: Part) -> Tensor:
        """A loss (B, T) summed up over tokens as TRL does for its loss type."""
        inputs = part.batch
        mask = generated(inputs)
        if self.loss_type in OVER_THE_BATCH:
            # The count spans the generation batch, of which an accumulation window is a part.
            count = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if self.model.training:
                count = count * self._accumulated / self.args.steps_per_generation
            return aggregate_tokens(per_token, mask, "tokens", count=count)
        how = _AGGREGATION[self.loss_type]
        length = self.max_completion_length if how == "fixed length" else None
        total = aggregate_tokens(per_token, mask, how, count=length)
        return total * part.of_loss_type / self._accumulated

    def _drop_surrogate_metrics(self) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        surrogate = [n for n in metrics if n.startswith("clip_ratio/") or n == "policy_loss"]
        for name in surrogate:
            del metrics[name]
