"""KL(π‖π_ref) over the whole vocabulary, from hidden states, tile by tile.

The logits of B·T tokens are B·T·V numbers, of which a loss keeps several copies. Here only those of
`TOKENS_AT_ONCE` tokens exist at one time, in the forward and in the backward pass. What is needed
of a model is its last hidden states (`hidden_states_of`) and its LM head (`Head`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from trl_ext.errors import ConfigError
from trl_ext.functional import topk_kl
from trl_ext.functional.masking import at_least_float32

# TRL's kernel takes 4096 tokens at once, and on a CPU 11 times their tile of 32768 float32 logits:
# for 2816 tokens the peak of a step is 17 % above that of the sampled penalty. With 256 it is the
# same, for TRL's fused head takes more than these 0.36 GB before (benchmarks/kl_memory.py). Fewer
# tokens save memory that is not missed and take longer: 64 at once 11 %.
TOKENS_AT_ONCE = 256
# Autograd keeps 7.5 times a chunk's logits, over the whole vocabulary: 0.58 GB for 152k tokens.
TOPK_TOKENS_AT_ONCE = 128


@dataclass(frozen=True, eq=False)
class Head:
    """What turns hidden states into logits: z = s (W h + b), or c tanh(z/c) with a softcap.

    Attributes:
        weight: W, (V, H).
        bias: b, (V,), or None.
        logit_scale: s.
        softcap: c, which no logit exceeds; None: no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """The head of a causal LM, with the adapters that are active now.

        Source: `trl.trainer.utils.add_fused_lm_head`, whose rules for the logits these are. A head
        that FSDP2 has split up is gathered, with gradient.

        Args:
            model: the transformers model; of a PeftModel its `get_base_model()`.

        Raises:
            ConfigError: a wrapped model, or a head whose weight is not the whole of it: with an
                active adapter on it, quantised, or partitioned by DeepSpeed ZeRO-3.
        """
        _check_unwrapped(model)
        layer: Any = model.get_output_embeddings()
        _check_readable(layer)
        config = model.config.get_text_config()
        return cls(
            weight=_gathered(layer.weight),
            bias=None if layer.bias is None else _gathered(layer.bias),
            logit_scale=_logit_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, H) -> (…, V), before any temperature."""
        projected = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return _bounded(projected * self.logit_scale, self.softcap)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(…, H) -> (…, V), by the head as it is: with an adapter or quantised too."""
    config = model.config.get_text_config()
    layer: Any = model.get_output_embeddings()
    scaled = layer(hidden) * _logit_scale(config)
    return _bounded(scaled, getattr(config, "final_logit_softcapping", None))


def _bounded(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def _gathered(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _logit_scale(config: Any) -> float:
    """Cohere and Muse Glimmer multiply, so does Falcon-H1; Granite and MiniCPM3 divide."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return scale
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    # HyperCLOVA X has the name of a divisor and multiplies.
    return divisor if config.model_type == "hyperclovax" else 1 / divisor


@contextmanager
def hidden_states_of(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the last hidden states of every forward pass of `model` inside the context.

    It costs nothing where a loss runs the model anyway. Passes under `no_grad` or with another
    adapter are collected as well, in order. A pass through DDP or a PeftModel counts, if the model
    inside is given here. Under FSDP2 the loss must contain an output of the pass too, as a policy
    loss does: its hooks on the backward pass are on the outputs.

    Args:
        model: the causal LM; of a PeftModel its `get_base_model()`.

    Yields:
        A list that grows by (B, S, H) at each pass; with the gradient of that pass.

    Raises:
        ConfigError: a wrapped model, or one without a backbone.
    """
    _check_unwrapped(model)
    collected: list[Tensor] = []

    def collect(module: Any, args: Any, output: Any) -> None:
        collected.append(output.last_hidden_state)

    hook = model.base_model.register_forward_hook(collect)
    try:
        yield collected
    finally:
        hook.remove()


def exact_kl_of_hidden(
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor,
    ref_head: Head,
    *,
    temperature: float,
    mask: Tensor,
) -> Tensor:
    """KL(π‖π_ref) of the next token at each position, over the whole vocabulary. Equation E27.

    `functional.exact_kl` of the heads' logits, in float32. It is a difference of log-normalisers:
    its error is their rounding, some 1e-6 nats, also where the KL is smaller than that. The
    projections are made in the dtype of `hidden`, or in autocast's inside one.

    Args:
        hidden: (B, T, H) of π, such that [:, t] predicts completion token t.
        head: of π.
        ref_hidden: (B, T, H') of π_ref, aligned likewise; a constant.
        ref_head: of π_ref, over the same vocabulary; a constant.
        temperature: both logits are divided by it; TRL's sampling temperature.
        mask: (B, T), 1 or True = keep. Of a position masked out nothing is read, NaN included.

    Returns:
        (B, T) nats, float32, 0 where masked out; with gradient to `hidden` and `head`, a zero one
        if nothing is kept.

    Raises:
        ConfigError: the two vocabularies differ in size.
        ValueError: shapes that do not fit.
    """
    return _kernel(1.0, hidden, head, ref_hidden, ref_head, temperature, mask)


def exact_forward_kl_of_hidden(
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor,
    ref_head: Head,
    *,
    temperature: float,
    mask: Tensor,
) -> Tensor:
    """KL(π_ref‖π) of the next token at each position, over the whole vocabulary. Equation E26.

    `functional.exact_forward_kl` of the heads' logits; the gradient still goes to π only.

    Args:
        hidden, head, ref_hidden, ref_head, temperature, mask: as of `exact_kl_of_hidden`.

    Returns:
        (B, T) nats, float32, 0 where masked out, with gradient as `exact_kl_of_hidden`.

    Raises:
        ConfigError: the two vocabularies differ in size.
        ValueError: shapes that do not fit.
    """
    return _kernel(0.0, hidden, head, ref_hidden, ref_head, temperature, mask)


def topk_kl_of_hidden(
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor,
    ref_head: Head,
    *,
    k: int,
    temperature: float,
    mask: Tensor,
) -> Tensor:
    """KL(π‖π_ref) with all but the k likeliest tokens of π merged into one: a lower bound.

    Source: `functional.topk_kl`, of which it has value and gradient. The logits are computed again
    in the backward pass.

    Args:
        hidden, head, ref_hidden, ref_head, temperature, mask: as of `exact_kl_of_hidden`.
        k: tokens that count one by one, at least 1.

    Returns:
        (B, T) nats, float32 (float64 for float64 input), 0 where masked out, with gradient as
        `exact_kl_of_hidden`.

    Raises:
        ConfigError: the two vocabularies differ in size.
        ValueError: shapes that do not fit, or k is less than 1.
    """
    _check_shapes(hidden, head, ref_hidden, ref_head, mask)
    dtype, ref_dtype = _projection_dtype(hidden), _projection_dtype(ref_hidden)
    head, ref_head = _rounded_head(head, dtype), _rounded_head(ref_head, ref_dtype)

    def values(h: Tensor, ref_h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            with torch.no_grad():
                ref_logits = ref_head.logits(_rounded(ref_h, ref_dtype))
            return topk_kl(head.logits(_rounded(h, dtype)), ref_logits, k, temperature=temperature)

    again = partial(checkpoint, values, use_reentrant=False, preserve_rng_state=False)
    return _of_kept(again, hidden, ref_hidden, mask, TOPK_TOKENS_AT_ONCE)


def _kernel(
    beta: float,
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor,
    ref_head: Head,
    temperature: float,
    mask: Tensor,
) -> Tensor:
    """TRL's divergence of student π and teacher π_ref: reverse KL at β = 1, forward at 0."""
    _check_shapes(hidden, head, ref_hidden, ref_head, mask)
    head = _summed_in_float32(head)

    def values(h: Tensor, ref_h: Tensor) -> Tensor:
        divergence, _ = ChunkedDivergenceFunction.apply(
            *(h, head.weight, head.bias),
            *(ref_h, ref_head.weight, ref_head.bias),
            *(beta, temperature),
            *(head.logit_scale, head.softcap),
            *(ref_head.logit_scale, ref_head.softcap),
        )
        return divergence

    return _of_kept(values, hidden, ref_hidden, mask, TOKENS_AT_ONCE)


def _of_kept(
    values: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    ref_hidden: Tensor,
    mask: Tensor,
    tokens: int,
) -> Tensor:
    """(N, H), (N, H') -> (N,) applied to `tokens` kept positions at a time, put back into (B, T).

    With nothing kept there is one chunk of no tokens, and so a graph.
    """
    kept = mask.bool()
    chunks = zip(hidden[kept].split(tokens), ref_hidden[kept].split(tokens), strict=True)
    found = torch.cat([values(h, ref_h) for h, ref_h in chunks])
    return found.new_zeros(kept.shape).masked_scatter(kept, found)


def _summed_in_float32(head: Head) -> Head:
    """The gradients of the chunks add up in float32, and are rounded to half precision once."""
    if not head.weight.requires_grad:
        return head
    bias = None if head.bias is None else at_least_float32(head.bias)
    return replace(head, weight=at_least_float32(head.weight), bias=bias)


def _projection_dtype(hidden: Tensor) -> torch.dtype:
    """What TRL's kernels round hidden states and weights to before they multiply in float32."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return at_least_float32(values.to(dtype))


def _rounded_head(head: Head, dtype: torch.dtype) -> Head:
    bias = None if head.bias is None else _rounded(head.bias, dtype)
    return replace(head, weight=_rounded(head.weight, dtype), bias=bias)


def _check_unwrapped(model: Any) -> None:
    if isinstance(model, PreTrainedModel) and model.base_model is not model:
        return
    raise ConfigError(
        f"got a {type(model).__name__}; the hidden states and the LM head of a transformers model "
        "with a backbone are needed. Unwrap it: accelerator.unwrap_model(model), then "
        ".get_base_model() if that is a PeftModel."
    )


def is_readable(model: PreTrainedModel) -> bool:
    """Whether the weight of the LM head is all there is to it, as `Head.of` needs it."""
    return _why_unreadable(model.get_output_embeddings()) is None


def _check_readable(layer: Any) -> None:
    found = _why_unreadable(layer)
    if found is not None:
        problem, step = found
        raise ConfigError(f"the LM head is read as a matrix here, and it {problem}. {step}")


def _why_unreadable(layer: Any) -> tuple[str, str] | None:
    """What `layer.weight` does not hold of the LM head, and what to do about it."""
    if isinstance(layer, BaseTunerLayer) and not (layer.merged or layer.disable_adapters):
        problem = "has an adapter, which its weight does not contain"
        step = "Leave lm_head out of target_modules, or train it whole: modules_to_save: [lm_head]."
    elif not layer.weight.is_floating_point():
        problem = f"is quantised to {layer.weight.dtype}"
        step = "Leave it out of the quantisation, as bitsandbytes does by default."
    elif layer.weight.numel() == 0:
        problem = "is partitioned by DeepSpeed ZeRO-3"
        step = "Use ZeRO-2 or FSDP2."
    else:
        return None
    return problem, step


def _check_shapes(
    hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head, mask: Tensor
) -> None:
    if not hidden.shape[:-1] == ref_hidden.shape[:-1] == mask.shape:
        raise ValueError(
            "hidden (B, T, H), ref_hidden (B, T, H') and mask (B, T) do not fit: got "
            f"{tuple(hidden.shape)}, {tuple(ref_hidden.shape)}, {tuple(mask.shape)}."
        )
    for states, of in ((hidden, head), (ref_hidden, ref_head)):
        if states.size(-1) != of.weight.size(-1):
            raise ValueError(
                f"hidden states of width {states.size(-1)} do not fit a head (V, H) of shape "
                f"{tuple(of.weight.shape)}."
            )
    if len(head.weight) != len(ref_head.weight):
        raise ConfigError(
            f"the policy's LM head has {len(head.weight)} tokens and the reference's "
            f"{len(ref_head.weight)}: a KL needs one vocabulary. Choose a reference with the "
            "policy's tokenizer and embedding size."
        )
