"""Log-probabilities of completions: under the policy, the one that sampled, the reference."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import use_adapter

from trl_ext.functional import k1, masked_sum
from trl_ext.packing import PackedPass, TrimmedPass, scoring_pass
from trl_ext.rollout import Rollout, whole
from trl_ext.trl_adapter.hooks import Hooks
from trl_ext.vocabulary_kl import hidden_states_of

# What TRL's rollouts carry for models that read images, and its log-probability method takes.
MULTIMODAL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class Passes(Hooks):
    """Keeps what each scoring pass found, so that none is made twice."""

    def __init__(self, *args: Any, **kwargs: Any):
        # Log-probabilities and readout of each scoring pass since the last rollout or loss.
        self._scored: list[tuple[Tensor, Tensor | None]] = []
        self._sampled: Tensor | None = None
        self._latest: TrimmedPass | PackedPass | None = None
        self._shown_ref_logps: Tensor | None = None
        self._begins_as_base = kwargs.get("peft_config") is not None
        super().__init__(*args, **kwargs)

    def sampler_logps(self, rollout: Rollout) -> Tensor:
        """(B, T) per-token log-probabilities, nats, under the policy that generated the rollout."""
        vllms = rollout.batch.get("sampling_per_token_logps")
        if vllms is not None and not vllms.isnan().any():
            return vllms
        ours = rollout.batch.get("old_per_token_logps")
        ours = self._sampler_pass(rollout)[0] if ours is None else ours
        # vLLM may leave out a token's; TRL corrects nothing there, and takes the policy's.
        return ours if vllms is None else torch.where(vllms.isnan(), ours, vllms)

    def sampler_readout(self, rollout: Rollout) -> Tensor:
        """What `read_hidden` made of the policy that generated the rollout, (B, …)."""
        readout = self._sampler_pass(rollout)[1]
        assert readout is not None
        return readout

    def log_ratio_to_reference(self, rollout: Rollout) -> Tensor | None:
        """(P, G) log π/π_ref of each completion of the rollout under way, nats.

        Its mean estimates KL(π‖π_ref) of completions without bias (Equation E28, k1).

        Returns:
            None where the policy before training is not at hand: there is no reference model and no
            new adapter to switch off. NaN for completions whose tokens are masked.
        """
        reference = self._reference_logps(rollout.batch)
        if reference is None:
            return None
        ratios = masked_sum(k1(self.sampler_logps(rollout), reference), rollout.mask)
        return self.over_groups(ratios.masked_fill(~rollout.mask.any(dim=1), torch.nan), rollout)

    def _sampler_pass(self, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and readout of the policy now, which is the one that sampled."""
        batch = rollout.batch
        known = batch.get("old_per_token_logps", self._sampled)
        for logps, readout in self._scored:
            if logps is known:
                return logps, readout
        self._sampled = self._logps_under(self.model, batch)
        return self._scored[-1]

    def _reference_logps(self, batch: dict[str, Any]) -> Tensor | None:
        if "ref_per_token_logps" in batch:
            return batch["ref_per_token_logps"]
        if self.ref_model is not None:
            return self._logps_under(self.ref_model, batch)
        if not self._begins_as_base:
            return None
        with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
            return self._logps_under(self.model, batch)

    def _logps_under(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """(B, T) nats, one pass without gradient."""
        with torch.no_grad():
            return self._get_per_token_logps_and_entropies(
                model,
                *whole(batch),
                batch["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                **{name: batch[name] for name in MULTIMODAL_INPUTS if name in batch},
            )[0]

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
    ):
        self.phase = "train" if torch.is_grad_enabled() else "score"
        reads = self.read_hidden is not None and model is not self.ref_model
        stand_in = self._stand_in(model, logits_to_keep, kwargs, reads=reads)
        score = partial(
            super()._get_per_token_logps_and_entropies,
            stand_in or model,
            input_ids,
            attention_mask,
            logits_to_keep,
        )
        if not reads:
            result, readout = score(*args, **kwargs), None
        else:
            with hidden_states_of(self.causal_lm) as passes:
                result = score(*args, **kwargs)
            read: Any = self.read_hidden
            readout = torch.cat([read(each) for each in self._states(passes, logits_to_keep)])
        self._scored.append((result[0], readout))
        return result

    def _stand_in(
        self, model: Any, kept: int, options: dict[str, Any], *, reads: bool
    ) -> TrimmedPass | PackedPass | None:
        """What runs the rows without padding; None where TRL is to do it."""
        self._latest = None
        as_trl = options.get("compute_aux_loss")
        has_images = any(options.get(name) is not None for name in MULTIMODAL_INPUTS)
        if self._trims and not as_trl and not has_images:
            self._latest = scoring_pass(
                model,
                self.accelerator.unwrap_model(model),
                kept,
                share_prompts=self.args.share_prompts,
                keeps_last=reads or self.kl.over_vocabulary,
            )
        return self._latest

    def _states(self, passes: list[Tensor], kept: int) -> list[Tensor]:
        """(b, T+1, H) that predict the tokens 0..T-1 and what would follow, of the latest passes.

        Args:
            passes: the backbone's hidden states in each.
            kept: T.
        """
        if self._latest is None:
            return [hidden[:, -kept - 1 :] for hidden in passes]
        return [self._latest.states(call, hidden) for call, hidden in enumerate(passes)]

    def _forget_passes(self) -> None:
        self._scored, self._sampled, self._shown_ref_logps = [], None, None
