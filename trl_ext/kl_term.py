"""The KL penalty of a policy trainer: of each token, where it enters, how β follows it."""

from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from trl_ext.errors import ConfigError
from trl_ext.functional import masked_sum, next_values, reward_to_go
from trl_ext.kl_penalty import KLController, group_centred, penalty_of
from trl_ext.kl_rules import OVER_THE_VOCABULARY
from trl_ext.packing import backbone_states
from trl_ext.policy_config import PolicyConfig
from trl_ext.rollout import Rollout, generated, whole
from trl_ext.vocabulary_kl import (
    Head,
    exact_kl_of_hidden,
    hidden_states_of,
    topk_kl_of_hidden,
)


class KLTerm:
    """β·KL(π‖π_ref) as the options of `PolicyConfig` say. Equations E27-E30.

    Args:
        args: the trainer's config.
        trainer: the `PolicyTrainer`; asked for its models once there is something to compute.
    """

    def __init__(self, args: PolicyConfig, trainer: Any):
        self.args = args
        self.trainer = trainer
        self.over_vocabulary = args.kl_estimator in OVER_THE_VOCABULARY
        self._penalty = (
            None
            if self.over_vocabulary
            else penalty_of(args.kl_estimator, args.kl_is_correction, args.kl_clamp)
        )
        self._controller = KLController(
            args.kl_controller, args.beta, args.kl_target, args.kl_horizon
        )
        self._heard: list[float] = []
        self._summed = 0.0  # of the passes since it was last logged

    @property
    def beta(self) -> float:
        """β now, in reward units."""
        return self._controller.beta

    @property
    def is_trls(self) -> bool:
        """Whether it is the penalty that TRL has built in."""
        is_k3 = self.args.kl_estimator == "k3" and self.args.kl_clamp is None
        return is_k3 and self.args.kl_placement == "loss"

    def enters(self, placement: str) -> bool:
        """Whether there is a penalty in the "loss", or in the "reward"."""
        return self.args.kl_placement in (placement, "both") and self.beta != 0

    def of_rollout(self, rollout: Rollout) -> Tensor:
        """(B, T) nats: what a penalty in the reward takes from that of each token, over β."""
        if self._penalty is not None:
            # The policy's own, where vLLM sampled and what it weighs is corrected.
            logps = rollout.batch.get("old_per_token_logps")
            logps = self.trainer.sampler_logps(rollout) if logps is None else logps
            return self._penalty.value(logps, rollout.batch["ref_per_token_logps"])
        per_prefix = self._over_vocabulary_of_rollout(rollout)
        if self.args.kl_placement != "both":
            return per_prefix
        # A token is charged for the prefix that it leads to: its own step is differentiated.
        end = per_prefix.new_zeros(len(per_prefix))
        return next_values(per_prefix, rollout.mask.bool(), end)

    def minus_to_go(self, credit: Tensor, rollout: Rollout) -> Tensor:
        """(B, T) credit − β Σ_{s≥t} KL_s, centred in its group as the rewards are."""
        to_go = reward_to_go(self.of_rollout(rollout), rollout.mask)
        centred = rollout.local(group_centred(self.trainer.over_groups(to_go, rollout)))
        credit = credit[:, None] if credit.dim() == 1 else credit
        return (credit - self.beta * centred[:, : to_go.size(1)]) * rollout.mask

    def watching(self) -> AbstractContextManager[list[Tensor]]:
        """Collect the hidden states that `per_token` takes, of the passes made in the context."""
        if self.over_vocabulary and self.trainer.beta != 0.0:
            self._check_model()
            return hidden_states_of(self.trainer.causal_lm)
        return nullcontext([])

    def per_token(
        self,
        logps: Tensor,
        inputs: Any,
        passes: list[Tensor],
        rows: int | None = None,
        *,
        is_last: bool = True,
    ) -> Tensor | None:
        """(B, T) β's factor in the loss, with gradient if it enters there; logged as `kl/sequence`.

        Args:
            logps: (B, T) log π, nats, with gradient.
            inputs: the micro-batch.
            passes: (B, T+1, H) of what `watching` collected in the forward pass of the loss.
            rows: of this pass and those before that were not the last. None: of this one.
            is_last: of the passes whose mean is logged.

        Returns:
            None where no reference was scored.
        """
        in_loss = self.enters("loss")
        if passes:
            _refuse_images(inputs)
            hidden = passes[-1] if in_loss else passes[-1].detach()
            each = self._over_vocabulary(hidden, *whole(inputs), generated(inputs))
            self._hear(each, inputs, rows, is_last)
            return each
        reference = inputs.get("ref_per_token_logps")
        if self._penalty is None or reference is None:
            return None
        self._hear(self._penalty.value(logps.detach(), reference), inputs, rows, is_last)
        if not in_loss:
            return None
        return self._penalty.in_loss(logps, reference, inputs.get("old_per_token_logps"))

    def adapt(self, completions: int) -> bool:
        """Let β follow the KL heard since the last time; whether there was any."""
        if not self._heard:
            return False
        self._controller.update(fmean(self._heard), completions)
        self._heard = []
        self.trainer.log_metric("kl/beta", self.beta)
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"beta": self.beta, "heard": self._heard}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self._controller.beta, self._heard, self._summed = state["beta"], state["heard"], 0.0

    def _check_model(self) -> None:
        """Virtual tokens stand before what a backbone is given: its states would be others.

        Raises:
            ConfigError: for prompt tuning and its like.
        """
        adapters = getattr(self.trainer.model, "peft_config", {}).values()
        if any(adapter.is_prompt_learning for adapter in adapters):
            raise ConfigError(
                f"kl_estimator={self.args.kl_estimator!r} does not know the virtual tokens of "
                "prompt tuning. Use k1, k2 or k3, or LoRA."
            )

    def _hear(self, per_token: Tensor, inputs: Any, rows: int | None, is_last: bool) -> None:
        per_completion = masked_sum(per_token.detach(), generated(inputs))
        of_all = self.trainer.accelerator.gather(per_completion)
        self._summed += of_all.sum().item()
        if not is_last:
            return
        kl, self._summed = self._summed / (rows or len(of_all)), 0.0
        self.trainer.log_metric("kl/sequence", kl)
        if self.trainer.model.training and self._controller.kind != "constant":
            self._heard.append(kl)

    def _over_vocabulary_of_rollout(self, rollout: Rollout) -> Tensor:
        self._check_model()
        _refuse_images(rollout.batch)
        model, size = self.trainer.causal_lm, self.args.per_device_train_batch_size
        columns = (each.split(size) for each in (*whole(rollout.batch), rollout.mask))
        found = []
        with torch.no_grad():
            for ids, attended, mask in zip(*columns, strict=True):
                hidden = self._hidden(model, ids, attended, mask.size(1))
                found.append(self._over_vocabulary(hidden, ids, attended, mask))
        return torch.cat(found)

    def _over_vocabulary(
        self, hidden: Tensor, ids: Tensor, attended: Tensor, mask: Tensor
    ) -> Tensor:
        """(b, T) KL of the next token at each prefix, nats, with hidden's gradient.

        Args:
            hidden: (b, T+1, H) of the policy.
            ids, attended: (b, S) what it read.
            mask: (b, T) of the completion's tokens.
        """
        with torch.no_grad(), self._reference() as reference:
            ref_hidden = self._hidden(reference, ids, attended, mask.size(1))
            ref_head = Head.of(reference)
        of_hidden = exact_kl_of_hidden
        if self.args.kl_estimator == "topk":
            of_hidden = partial(topk_kl_of_hidden, k=self.args.kl_topk)
        with self.trainer.accelerator.autocast():  # as the model was projected
            kl = of_hidden(
                hidden[:, :-1],
                Head.of(self.trainer.causal_lm),
                ref_hidden[:, :-1],
                ref_head,
                temperature=self.trainer.temperature,
                mask=mask,
            )
        limit = self.args.kl_clamp
        return kl if limit is None else kl.clamp(-limit, limit)

    def _hidden(self, model: PreTrainedModel, ids: Tensor, attended: Tensor, kept: int) -> Tensor:
        args = self.args
        is_split = self.trainer.is_fsdp_enabled
        with self.trainer.accelerator.autocast():
            return backbone_states(
                partial(self._through_root, model) if is_split else model.base_model,
                model,
                ids,
                attended,
                kept,
                trim_padding=args.trim_padding,
                share_prompts=args.share_prompts,
            )

    def _through_root(self, model: PreTrainedModel, **inputs: Any) -> SimpleNamespace:
        """What the backbone gives; FSDP2 gathers its parts for the forward pass of the whole."""
        root: Any = self.trainer.model if model is self.trainer.causal_lm else model
        with hidden_states_of(model) as passes:
            root(**inputs, logits_to_keep=1)
        return SimpleNamespace(last_hidden_state=passes[0])

    @contextmanager
    def _reference(self):
        """The transformers model of the reference: TRL's, or the policy without its adapter."""
        trainer = self.trainer
        if trainer.ref_model is not None:
            yield trainer.accelerator.unwrap_model(trainer.ref_model)
        else:
            adapter = "ref" if "ref" in trainer.model.peft_config else None
            with use_adapter(trainer.model, adapter_name=adapter):
                yield trainer.causal_lm


def _refuse_images(batch: Any) -> None:
    if "pixel_values" in batch:
        raise ConfigError(
            "kl_estimator exact and topk run the reference on text alone, and these prompts have "
            "images. Use k1 in the reward, or k3 in the loss with kl_is_correction."
        )
