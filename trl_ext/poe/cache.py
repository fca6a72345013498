"""What a forward pass of a product gives, and what its experts remember between two of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from trl_ext.poe.experts import Source


class ProductOfExpertsConfig(PretrainedConfig):
    """The width of the shared vocabulary, for transformers' `generate`."""

    model_type = "product_of_experts"


@dataclass
class ProductOutput(ModelOutput):
    """What a forward pass gives.

    Attributes:
        logits: (B, keep, V) Σ_k w_k·logits_k of the next token: those of one model of weight 1 as
            they are, so that transformers' logits processors do to it what they do to the model.
        log_z: (B, keep) log Σ_v Π_k p_k(v)^{w_k}, nats.
        past_key_values: what the experts remember.
        expert_logits: of each expert (B, keep, V), not normalised, if they were asked for.
        attentions, hidden_states: None; transformers' `generate` may ask for them.
    """

    logits: Tensor | None = None
    log_z: Tensor | None = None
    past_key_values: Cache | None = None
    expert_logits: tuple[Tensor, ...] | None = None
    attentions: None = None
    hidden_states: None = None


class ProductCache(Cache):
    """The tokens read so far, and each expert's own cache."""

    def __init__(self, sources: Sequence[Source]):
        super().__init__(layers=[])
        self.sources = sources
        self.caches = [source.new_cache() for source in sources]
        self.ids: Tensor | None = None

    def append(self, ids: Tensor) -> Tensor:
        """All tokens, these included; (B, S + T)."""
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        return self.ids

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return 0 if self.ids is None else self.ids.size(1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on from these rows: beam search."""
        assert self.ids is not None
        batch = len(self.ids)
        self.ids = self.ids.index_select(0, beam_idx)
        for source, cache in zip(self.sources, self.caches, strict=True):
            source.reorder(cache, beam_idx, batch)  # pyright: ignore[reportArgumentType]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on from these rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times, behind one another."""
        assert self.ids is not None
        rows = torch.arange(len(self.ids), device=self.ids.device)
        self.reorder_cache(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −`tokens_to_remove` tokens: those that an assistant guessed wrong."""
        assert self.ids is not None
        self.ids = self.ids[:, : self.ids.size(1) - abs(tokens_to_remove)]
        for cache in filter(None, self.caches):
            cache.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Keep what `crop` may want back."""
        for cache in filter(None, self.caches):
            cache.activate_past_recording()

    @property
    def is_compileable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Never: it grows."""
        return False
