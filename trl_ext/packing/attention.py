"""Attention of a packed row: each prompt to itself, each completion to its prompt and itself."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_ext.packing.packed import Packed


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`transformers`' sdpa attention; of a packed row, segment by segment.

    Args:
        module: the attention layer.
        query, key, value: (1, heads, N, d) of a packed row, positions already in them.
        attention_mask: as transformers gives it; of a packed row, nothing.
        packed: how the row is packed. None: the row is not packed, and nothing is different.
        options: dropout, scaling, sliding_window and so on, as transformers gives them.

    Returns:
        (1, N, heads, d), and None.
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window = options.get("sliding_window")
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    found, before = [], None
    if packed.prompts is not None:
        before = packed.prompts.pad(k), packed.prompts.pad(v)
        mask = None if window is None else _within(before[0].size(2), window, key.device)
        seen, _ = sdpa_attention_forward(module, packed.prompts.pad(q), *before, mask, **options)
        found.append(packed.prompts.unpad(seen))
    masks = packed.attended if window is None else packed.attended_within(window)
    for segments, mask in zip(packed.completions, masks, strict=True):
        keys, values = segments.pad(k), segments.pad(v)
        if before is not None:
            keys, values = (
                torch.cat([of_prompt[segments.prompt_of], own], dim=2)
                for of_prompt, own in zip(before, (keys, values), strict=True)
            )
        seen, _ = sdpa_attention_forward(module, segments.pad(q), keys, values, mask, **options)
        found.append(segments.unpad(seen))
    return torch.cat(found)[None], None


def _within(length: int, window: int, device: torch.device) -> Tensor | None:
    """(1, 1, L, L) bool: causal and no further back than the window; None if that is causal."""
    if window >= length:
        return None
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)[None, None]


def register() -> None:
    """Stand in for transformers' sdpa attention; for no other that somebody has put in its place.

    A layer looks its attention up by name in each pass, also where checkpointing runs it again in
    the backward pass: what is packed must be known by the arguments, and not by a name set
    meanwhile.
    """
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
        AttentionInterface.register("sdpa", packed_attention)


def is_registered() -> bool:
    """Whether a layer that asks for sdpa gets `packed_attention`."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"] is packed_attention


register()
