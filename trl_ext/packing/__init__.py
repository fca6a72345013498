"""Rows of a padded batch as one row without padding, each prompt once: same log-probabilities."""

from trl_ext.packing.packed import Packed, which_prompt
from trl_ext.packing.partition import PackedTokens, PaddedTokens, RowSize, cut_at, cut_evenly
from trl_ext.packing.passes import (
    PackedPass,
    TrimmedPass,
    backbone_states,
    packed_inputs,
    scoring_pass,
)
from trl_ext.packing.support import (
    PACKED_MODEL_TYPES,
    is_rotary,
    rescales_with_length,
    why_not_packed,
)

__all__ = [
    "PACKED_MODEL_TYPES",
    "Packed",
    "PackedPass",
    "PackedTokens",
    "PaddedTokens",
    "RowSize",
    "TrimmedPass",
    "backbone_states",
    "cut_at",
    "cut_evenly",
    "is_rotary",
    "packed_inputs",
    "rescales_with_length",
    "scoring_pass",
    "which_prompt",
    "why_not_packed",
]
