"""Which models can be run packed."""

from typing import Any

from trl_ext.packing.attention import is_registered

# Text decoders whose layers attend through `transformers.AttentionInterface` and know positions by
# rotary embeddings alone: a shift by padding changes nothing, and nothing but attention looks at
# other tokens. Each is held against its padded pass in tests/unit/packing.
PACKED_MODEL_TYPES = frozenset(
    {
        "arcee",
        "cohere",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma3_text",
        "glm",
        "gpt_neox",
        "granite",
        "helium",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)


def why_not_packed(model: Any) -> str | None:
    """What keeps a model from being run packed; None if nothing does.

    Args:
        model: a transformers model, or a PeftModel around one; not wrapped for several processes.
    """
    adapters = getattr(model, "peft_config", {}).values()
    if any(adapter.is_prompt_learning for adapter in adapters):
        return "prompt tuning puts virtual tokens before the prompt"
    config = model.config.get_text_config()
    if config.model_type not in PACKED_MODEL_TYPES:
        return f"models of type {config.model_type!r} have not been held against padded passes"
    if getattr(config, "output_router_logits", False):
        return "the load-balancing loss of its experts is computed from padded rows"
    if config._attn_implementation != "sdpa":
        return f"attn_implementation={config._attn_implementation!r} has no packed form, sdpa has"
    if not is_registered():
        return "something else than transformers' attention is registered as sdpa"
    if rescales_with_length(model):
        return "its rotary embeddings depend on the width of the padded batch"
    return None


def is_rotary(model: Any) -> bool:
    """Whether a model knows positions by rotary embeddings: padding on the left shifts nothing."""
    config = model.config.get_text_config()
    return getattr(config, "rope_parameters", None) is not None


def rescales_with_length(model: Any) -> bool:
    """Whether a token's rotary embedding depends on how long the longest row of its batch is.

    Then each way to leave out padding, or to form batches, gives other log-probabilities.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # Of all layers, or of each type of layer.
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(one.get("rope_type") in ("dynamic", "longrope") for one in each)
