"""`ProductTeacher`: a product of experts as the teacher of TRL's `DistillationTrainer`."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from trl_ext.errors import ConfigError, RunError
from trl_ext.functional.masking import at_least_float32
from trl_ext.poe.cache import ProductOfExpertsConfig
from trl_ext.poe.checks import check_finite
from trl_ext.poe.distillation_rules import NO_ZEROS
from trl_ext.poe.experts import ModelSource, Step
from trl_ext.poe.product import ProductOfExperts
from trl_ext.vocabulary_kl import Head, hidden_states_of

logger = logging.getLogger(__name__)

# A logit whose probability is 0, and which unlike −inf survives being multiplied by 0.
FORBIDDEN = -1e4
# How far the log-probabilities of two ways to the same product may be apart, nats.
AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-3}
AGREEMENT_OF_HALVES = 0.2


@dataclass(frozen=True)
class LinearPart:
    """Experts of one source and one LM head, with their places in the product."""

    source: ModelSource
    places: list[int]

    @property
    def head(self) -> Head:
        """The head as it is now."""
        return Head.of(self.source.model)


class ProductTeacher(nn.Module):
    """Π_k p_k^{w_k} as hidden states and an LM head, which is all that TRL asks of a teacher.

    Equation E14. TRL never makes the logits of a teacher; it multiplies hidden states by a head,
    tile by tile. A product of models with linear heads is such a model itself: up to a constant,

        log Π_k p_k^{w_k} = Σ_k w_k s_k (W_k h_k + b_k) = [W_1 … W_K b_1 … b_K]·[w_1 s_1 h_1; …]

    with the states h_k, heads (W_k, b_k) and logit scales s_k. Experts of one head (LoRA adapters
    of one model, and that model) add up their states before it, and no head is copied. Whether the
    heads are linear is found out by comparison with the product at two tokens.

    Every other product (counted experts, rewards, soft caps, adapters on the head, weights that
    follow the entropy, a cut-off) is scored over the whole vocabulary, N tokens of a micro-batch at
    once. Their log-probabilities L (N, V) are then the head L^T, and the hidden state of token n is
    the n-th unit vector. TRL asks for the head after the states, so that both are of one batch.

    Args:
        product: of the experts. It is put into evaluation mode, and left as it is otherwise.
        vocab_size: of the student; at most that of the product, by default the same.
        may_forbid: whether the divergence is finite where the product has probability 0.
    """

    def __init__(
        self, product: ProductOfExperts, vocab_size: int | None = None, *, may_forbid: bool = True
    ):
        super().__init__()
        width = product.config.vocab_size
        if vocab_size is not None and vocab_size > width:
            raise ConfigError(
                f"The student has {vocab_size} logits and the product {width}: it says nothing of "
                f"the last {vocab_size - width}. Take away what pads the student's vocabulary: "
                f"model.resize_token_embeddings({width})."
            )
        self.product = product
        self.config = ProductOfExpertsConfig()
        self.config.vocab_size = vocab_size or width
        self.may_forbid = may_forbid
        self.parts: list[LinearPart] | None = None
        self.stacked: Tensor | None
        self.register_buffer("stacked", None, persistent=False)
        self._of_batch: Head | None = None
        why_not = self._use_heads()
        if why_not:
            self.parts, self.stacked = None, None
            logger.info("The product is scored over the whole vocabulary: %s.", why_not)
        self.eval()

    @property
    def is_linear(self) -> bool:
        """Whether it is one LM head on the experts' states, or scored over the vocabulary."""
        return self.parts is not None

    @torch.no_grad()
    def base_model(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int | None = None,
        use_cache: bool = False,
        **more: Any,
    ) -> BaseModelOutput:
        """States that `get_output_embeddings` turns into the product's logits.

        Args:
            input_ids: (B, S) prompts, padded on the left, and completions, padded on the right.
            attention_mask: (B, S), 1 = token.
            logits_to_keep: T + 1 for completions of T tokens, which a schedule counts from.
            use_cache: no.
            more: refused.

        Returns:
            `last_hidden_state` (B, T + 1, H), or (B, S, H) where T is not given.
        """
        if more:
            raise RunError(
                f"A product of experts reads text only, and the batch has {', '.join(more)}."
            )
        if logits_to_keep is None and self.product.weights.is_scheduled:
            raise ConfigError(
                "A weight of the product is a function of positions, and the student does not say "
                "where completions begin: its forward takes no logits_to_keep. Give numbers."
            )
        keep = logits_to_keep or input_ids.size(1)
        prompts = attention_mask[:, : input_ids.size(1) - keep + 1].sum(1)
        read = self._linear_states if self.is_linear else self._unit_states
        return BaseModelOutput(last_hidden_state=read(input_ids, attention_mask, keep, prompts))  # pyright: ignore[reportArgumentType]

    def get_output_embeddings(self) -> Head:
        """The head that belongs to the states of the last `base_model`."""
        if self.parts is None:
            assert self._of_batch is not None, "base_model comes first"
            head, self._of_batch = self._of_batch, None
            return head
        if self.stacked is not None:
            return Head(self.stacked)
        return Head(self.parts[0].head.weight[: self.config.vocab_size])

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int | None = None
    ) -> Tensor:
        """(B, T + 1, V) logits of the product, not normalised; TRL makes them tile by tile."""
        states = self.base_model(input_ids, attention_mask, logits_to_keep).last_hidden_state
        assert states is not None
        return self.get_output_embeddings().logits(states)

    def _use_heads(self) -> str | None:
        """Take the experts' heads for that of the product; or say why it cannot be."""
        product, parts = self.product, []
        if product.weights.by_entropy:
            return "the weights follow the experts' entropies"
        if product.plausibility is not None:
            return "it is cut off by plausibility"
        for source, places in product.sources:
            names = ", ".join(repr(name) for name in _at(places, list(product.experts)))
            if not isinstance(source, ModelSource) or hasattr(source.model, "new_cache"):
                return f"{names} is not a model with an LM head"
            parts.append(LinearPart(source, places))
            try:
                head = parts[-1].head
            except ConfigError as error:
                return f"of {names}, {error}"
            if head.softcap is not None:
                return f"the logits of {names} have a soft cap"
        self.parts, self.stacked = parts, self._stack(parts)
        return None if self._agrees() else "an LM head does more than to multiply"

    def _stack(self, parts: list[LinearPart]) -> Tensor | None:
        """The heads side by side, a bias in a column of its own; None for one without a bias."""
        heads = [part.head for part in parts]
        if len(heads) == 1 and heads[0].bias is None:
            return None
        columns = [c for h in heads for c in (h.weight, h.bias) if c is not None]
        wide = [c if c.dim() == 2 else c[:, None] for c in columns]
        return torch.cat([c.detach()[: self.config.vocab_size] for c in wide], dim=1)

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether the heads give the product, at two tokens."""
        ids = torch.arange(2, device=self.product.device)[None]
        given = self(ids, torch.ones_like(ids), 2).log_softmax(-1)
        lengths = torch.ones_like(ids[:, 0])
        wanted = self.product.log_probs(ids, prompt_lengths=lengths)[..., : given.size(-1)]
        wanted = wanted.log_softmax(-1)
        atol = AGREEMENT.get(self.product.dtype, AGREEMENT_OF_HALVES)
        return torch.allclose(given.to(wanted), wanted, atol=atol, rtol=atol)

    def _linear_states(self, ids: Tensor, mask: Tensor, keep: int, prompts: Tensor) -> Tensor:
        assert self.parts is not None
        own = (mask.cumsum(1) - 1).clamp(min=0)
        step = Step(ids, own, ids, mask, has_padding=True, keep=1, use_cache=False)
        positions = (own[:, -keep:] + 1 - prompts[:, None]).clamp(min=0)
        weights = self.product.weights([], positions).to(ids.device)
        weights = weights.reshape(len(weights), *(weights.shape[1:] or (1, 1)), 1)
        names, is_token = list(self.product.experts), mask[:, -keep:].bool()
        columns = []
        for part in self.parts:
            head = part.head
            with hidden_states_of(part.source.model) as passes:
                part.source.scores(step, None)
            [states] = passes
            states = at_least_float32(states[:, -keep:].unflatten(0, (len(part.places), len(ids))))
            # The largest is NaN or infinite where any is.
            check_finite(_at(part.places, names), list(states.abs().amax(-1)), is_token)
            scaled = weights[part.places].to(states) * head.logit_scale
            columns.append((scaled * states).sum(0))
            if head.bias is not None:
                columns.append(scaled.sum(0).expand(len(ids), keep, 1))
        return torch.cat(columns, dim=-1).to(self.product.dtype)

    def _unit_states(self, ids: Tensor, mask: Tensor, keep: int, prompts: Tensor) -> Tensor:
        """Unit vectors; and the log-probabilities of all tokens but the last column's as a head."""
        output = self.product(ids, mask, logits_to_keep=keep, prompt_lengths=prompts)
        is_token = mask[:, -keep:-1, None].bool()
        logits = at_least_float32(output.logits[:, :-1, : self.config.vocab_size])
        logps = logits.log_softmax(-1)
        if not self.may_forbid and (logps.isneginf() & is_token).any():
            raise RunError(NO_ZEROS.format(what="An expert of the product"))
        logps = torch.where(is_token, logps.clamp(min=FORBIDDEN), 0.0).flatten(0, 1)
        parts = _parts(logps)
        self._of_batch = Head(torch.cat(parts).t())
        units = torch.eye(len(logps), device=logps.device).repeat(1, len(parts))
        states = units.view(len(ids), keep - 1, -1)
        return nn.functional.pad(states, (0, 0, 0, 1))


def _parts(values: Tensor) -> list[Tensor]:
    """What adds up to `values` also where TRL rounds each to autocast's dtype."""
    device = values.device.type
    if not torch.is_autocast_enabled(device):
        return [values]
    first = values.to(torch.get_autocast_dtype(device)).to(values)
    return [first, values - first]


def _at(places: list[int], names: list[str]) -> list[str]:
    return [names[place] for place in places]
