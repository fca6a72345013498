"""A process reward that learns from the outcomes of each rollout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from trl.trainer.utils import disable_dropout_in_model

from trl_ext.errors import ConfigError, RewardError, RunError
from trl_ext.gibbs_prm.online_files import read_learner, write_learner
from trl_ext.gibbs_prm.process_models import is_sharded, open_learner, open_reference
from trl_ext.models.adapter import (
    Causal,
    inner_model,
    keep_nf4_gradients_on_cpu,
    reading,
    wrapped_model,
)
from trl_ext.models.log_probs import TokenIds, batch_log_probs, check_rows
from trl_ext.models.twin import place_below, place_of
from trl_ext.rollout import Rollout
from trl_ext.vocabulary_kl import Head

# Reward units per nat, as PRIME has it.
BETA = 0.05


class OnlineScorer:
    """r_φ(y) = β Σ_t log π_φ(y_t|·)/π_ref(y_t|·), whose π_φ learns to tell outcomes apart.

    Source: PRIME, Cui et al. (2025), "Process reinforcement through implicit rewards", arXiv
    2502.01456. Once a rollout has its rewards o ∈ [0, 1], one pass over its completions gives the
    token rewards β log π_φ/π_ref, as they are before the update, and the gradient of

        −[o log σ(r_φ(y)) + (1 − o) log(1 − σ(r_φ(y)))],

    averaged over the completions of all processes that have a token and a reward. Clipped at
    `max_grad_norm` it makes one AdamW step at `process_learning_rate`, without weight decay.

    Differs from PRIME: the baseline is one of returns, position by position, where PRIME subtracts
    the other completions' average reward of a token, times the tokens that remain. π_φ reads
    without dropout, as it scores what it learns from.

    π_φ begins as `process_reward` names: an adapter goes on learning; on a whole model a policy
    that trains LoRA gets a new adapter of its own configuration, and else all weights learn. A base
    that is the policy's base, too, is there once.

    Logged: `process/loss`, `process/accuracy` (how often σ(r_φ) > ½ and o > ½ are the same), and
    `process/grad_norm`, before it is clipped.

    Args:
        trainer: the `PolicyTrainer`.
        tokenizer: of the policy; saved beside the scorer.

    Raises:
        ConfigError: if the models cannot be opened, or the policy is sharded.
    """

    def __init__(self, trainer: Any, tokenizer: Any):
        args = trainer.args
        if is_sharded(trainer):
            raise ConfigError(
                "A process reward that learns is not sharded: use data parallelism (DDP), or "
                "remove process_learning_rate, so that it is frozen."
            )
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.beta = BETA if args.process_beta is None else args.process_beta
        self._began_as = args.process_reward or place_below(trainer.model)
        self.policy = open_learner(trainer, self._began_as)
        self._reference: Causal | None = None
        if not self._shares_reference:
            self._reference = open_reference(trainer, self._began_as, self.policy)
        self._make_ready()
        self.optimizer = torch.optim.AdamW(
            self.trained(), lr=args.process_learning_rate, weight_decay=0.0
        )

    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that learn."""
        return [p for p in wrapped_model(self.policy).parameters() if p.requires_grad]

    def learn(self, prompt_ids: TokenIds, completion_ids: TokenIds, rollout: Rollout) -> list[Any]:
        """Score B completions, then take one step on them.

        Args:
            prompt_ids, completion_ids: of this process's rows of the rollout, without padding.
            rollout: with its rewards.

        Returns:
            B tensors (T_n,) or empty lists, β·log-ratio of each token, as it was before the step.

        Raises:
            RewardError: if a reward is not between 0 and 1.
            RunError: if the gradient is not finite.
        """
        _check_labels(rollout.rewards_PG)
        for model in (self.policy, *([self._reference] if self._reference else [])):
            check_rows(model, prompt_ids, completion_ids)
        labels = rollout.local(rollout.rewards_PG).float().to(rollout.mask.device)
        counts = ~labels.isnan() & rollout.mask.any(1)
        total = self.trainer.accelerator.reduce(counts.sum().float()).item()
        scores: list[Any] = [[] for _ in completion_ids]
        sums = torch.zeros(2, device=labels.device)
        for rows in self._micro_batches(completion_ids):
            ratios = self._log_ratios(rows, prompt_ids, completion_ids, rollout)
            for row, ratio in zip(rows, ratios, strict=True):
                scores[row] = (self.beta * ratio.detach()).cpu()
            kept = [n for n, row in enumerate(rows) if counts[row]]
            if kept:
                own = [rollout.mask[rows[n]][: len(ratios[n])] for n in kept]
                sequence = torch.stack(
                    [self.beta * (ratios[n] * m).sum() for n, m in zip(kept, own, strict=True)]
                )
                sums += self._backward(sequence, labels[[rows[n] for n in kept]], total)
        if total:
            self._take_step(sums, total)
        return scores

    def save(self, folder: Path) -> None:
        """Write π_φ as `GibbsScorer` opens it, with what it needs to know: β and the reference."""
        about = {
            "model_name_or_path": self.trainer.args.process_reference or self._began_as,
            "beta": self.beta,
            "temperature": self.trainer.temperature,
        }
        write_learner(folder, wrapped_model(self.policy), self.tokenizer, about)

    def restore(self, folder: Path) -> None:
        """Take over the weights that `save` wrote.

        Raises:
            RunError: if they are missing, damaged, or of another model.
        """
        read_learner(folder, wrapped_model(self.policy))

    def _micro_batches(self, completion_ids: TokenIds) -> Iterator[list[int]]:
        """Numbers of the rows that have a token, `per_device_train_batch_size` at a time."""
        rows = [row for row, ids in enumerate(completion_ids) if len(ids)]
        size = self.trainer.args.per_device_train_batch_size
        return (rows[first : first + size] for first in range(0, len(rows), size))

    def _log_ratios(
        self, rows: list[int], prompt_ids: TokenIds, completion_ids: TokenIds, rollout: Rollout
    ) -> list[Tensor]:
        """log π_φ/π_ref of each token of these rows, nats, with π_φ's gradient."""
        prompts, completions = ([ids[row] for row in rows] for ids in (prompt_ids, completion_ids))
        lengths = [len(ids) for ids in completions]
        known = rollout.batch.get("ref_per_token_logps") if self._shares_reference else None
        with self.trainer.accelerator.autocast():
            if known is not None:
                of_rows = zip(rows, lengths, strict=True)
                of_reference = torch.cat([known[row, :length] for row, length in of_rows])
            else:
                of_reference = self._reference_log_probs(prompts, completions)
            of_policy = batch_log_probs(
                self.policy, prompts, completions, temperature=self.trainer.temperature
            )
        return list((of_policy - of_reference).split(lengths))

    def _reference_log_probs(self, prompts: TokenIds, completions: TokenIds) -> Tensor:
        if self._reference is None:
            self._reference = open_reference(self.trainer, self._began_as, self.policy)
        with reading(self._reference):
            # With gradients on it takes the way that π_φ takes: equal models have a ratio of 1.
            return batch_log_probs(
                self._reference, prompts, completions, temperature=self.trainer.temperature
            ).detach()

    def _backward(self, scores: Tensor, labels: Tensor, total: float) -> Tensor:
        """Add the gradient of these rows' part of the mean; their loss and hits, (2,)."""
        losses = binary_cross_entropy_with_logits(scores, labels, reduction="sum")
        # Processes are averaged over, and `total` counts the rows of all of them.
        (losses * self.trainer.accelerator.num_processes / total).backward()
        hits = ((scores > 0) == (labels > 0.5)).sum()
        return torch.stack([losses.detach().float(), hits.float()])

    def _take_step(self, sums: Tensor, total: float) -> None:
        trainer, trained = self.trainer, self.trained()
        for parameter in trained:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = trainer.accelerator.reduce(grad, "mean")
        limit = trainer.args.max_grad_norm if trainer.args.max_grad_norm > 0 else torch.inf
        norm = torch.nn.utils.clip_grad_norm_(trained, limit)
        if not norm.isfinite():
            raise RunError(
                f"The process reward's gradient in step {trainer.state.global_step + 1} is not "
                "finite; its weights are as they were before. A lower process_learning_rate is the "
                "usual cure."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss, hits = trainer.accelerator.reduce(sums).tolist()
        trainer.log_metric("process/loss", loss / total)
        trainer.log_metric("process/accuracy", hits / total)
        trainer.log_metric("process/grad_norm", norm.item())

    def _make_ready(self) -> None:
        model, inner = wrapped_model(self.policy), inner_model(self.policy)
        Head.of(inner)  # it must be readable
        keep_nf4_gradients_on_cpu(model)
        disable_dropout_in_model(model)
        model.train(self.trainer.args.gradient_checkpointing)
        if self.trainer.args.gradient_checkpointing:
            backbone = inner.base_model
            # transformers renamed it within 5.x.
            enable = getattr(backbone, "activation_checkpointing_enable", None)
            (enable or backbone.gradient_checkpointing_enable)({"use_reentrant": False})
        with torch.no_grad():
            # TRL seeds each process differently, and adapters begin at random.
            for parameter in self.trained():
                parameter.copy_(cast(Tensor, broadcast(parameter.detach())))

    @property
    def _shares_reference(self) -> bool:
        """Whether π_ref is the policy's reference, which TRL may have scored the rollout with."""
        trainer, args = self.trainer, self.trainer.args
        # A policy that began as an adapter has a copy of that as its reference.
        is_other = "ref" in getattr(trainer.model, "peft_config", {}) or args.sync_ref_model
        reference = args.process_reference or self._began_as
        is_known = isinstance(trainer.model, PeftModel) or trainer.ref_model is not None
        return is_known and not is_other and place_of(reference) == place_below(trainer.model)


def _check_labels(rewards: Tensor) -> None:
    wrong = rewards[~rewards.isnan() & ((rewards < 0) | (rewards > 1))]
    if len(wrong):
        raise RewardError(
            f"process_learning_rate trains the process reward on outcomes, and one is "
            f"{wrong[0].item():g}: the weighted sum of a completion's rewards must lie between 0 "
            "and 1, as the probability that it is right. Scale it by reward_weights, or remove "
            "process_learning_rate, so that the process reward is frozen."
        )
