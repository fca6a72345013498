"""What a model consists of, counted on the meta device: no weight is allocated or downloaded."""

import copy
import warnings
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForCausalLM

from trl_ext.errors import ConfigError

Shape = tuple[int, ...]
# The projection out of a block reads what the block computed, all others read its input.
_OUTWARD = ("o_proj", "out_proj", "down_proj", "dense", "c_proj", "fc2")
# Decoders whose activations are those of `activations.py`, tested.
CHECKED_TYPES = ("llama", "qwen2", "qwen3", "mistral", "smollm3")


@dataclass(frozen=True)
class Projection:
    """One linear map of a decoder layer.

    Attributes:
        block: the module that it belongs to, such as "self_attn".
        is_outward: whether it reads what its block computed, and not the block's input.
        rank: of the LoRA adapter on it; 0 without one.
    """

    name: str
    block: str
    width_in: int
    width_out: int
    is_outward: bool
    rank: int


@dataclass(frozen=True)
class Layer:
    """One decoder layer: H hidden size, I width of the MLP, A = heads·head size, K = KV heads·size.

    Attributes:
        norms: (width of all that is normalised, number of groups) a token, of each norm.
        parameters: all of the layer, adapters left out.
    """

    hidden: int
    inner: int
    heads: int
    head_size: int
    kv_heads: int
    projections: tuple[Projection, ...]
    norms: tuple[tuple[int, int], ...]
    parameters: int

    @property
    def attended(self) -> int:
        """A, the width of the queries."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """K, the width of the keys."""
        return self.kv_heads * self.head_size


@dataclass(frozen=True)
class Shapes:
    """A causal language model and the adapter on it.

    Attributes:
        model_type: of the config.
        layer: one decoder layer; all are taken to be alike.
        num_layers: L.
        vocabulary: V.
        linear: shapes of the linear maps that bitsandbytes quantises.
        other: shapes of all other parameters: embeddings, LM head, norms, biases.
        adapter: shapes of the adapter's trained parameters.
        saved_whole: shapes of what `lora_modules_to_save` trains beside its untrained original.
        head: shapes of the LM head's own parameters; none where it is tied to the embedding.
        dtype: as the checkpoint has it, such as "bfloat16"; None where the config does not say.
    """

    model_type: str
    layer: Layer
    num_layers: int
    vocabulary: int
    linear: tuple[Shape, ...]
    other: tuple[Shape, ...]
    adapter: tuple[Shape, ...]
    saved_whole: tuple[Shape, ...]
    head: tuple[Shape, ...]
    dtype: str | None

    @property
    def parameters(self) -> tuple[Shape, ...]:
        """The shapes of the model's own parameters."""
        return self.linear + self.other

    @property
    def headless(self) -> "Shapes":
        """The same without the LM head's own parameters; an embedding may have their shape."""
        other = list(self.other)
        for shape in self.head:
            other.remove(shape)
        return replace(self, other=tuple(other), head=())


def numel(shapes: tuple[Shape, ...]) -> int:
    """The number of parameters in all shapes."""
    return sum(prod(shape) for shape in shapes)


def shapes_of(config: Any, lora: LoraConfig | None) -> Shapes:
    """Build the model, and the adapter on it, on the meta device, and count.

    Args:
        config: a transformers config of a causal language model.
        lora: the adapter that is trained; None for full fine-tuning.

    Raises:
        ConfigError: if it is no such model, or the adapter finds nothing to sit on.
    """
    text = config.get_text_config()
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # peft asks transformers by a name that is to be renamed; nothing a user could mend.
            warnings.simplefilter("ignore", FutureWarning)
            model: Any = AutoModelForCausalLM.from_config(config)
            tied = bool(text.tie_word_embeddings)
            head = model.get_output_embeddings()
            linear, other = _parameters(model, head)
            # peft writes into the config which modules it found; others may use it after us.
            adapted = model if lora is None else get_peft_model(model, copy.deepcopy(lora))
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(
            f"model_name_or_path: a {config.model_type} model cannot be laid out as the recipe "
            f"says: {str(error).strip().splitlines()[0]} plan knows causal language models, with "
            "LoRA on linear layers."
        ) from error
    return Shapes(
        model_type=text.model_type,
        layer=_layer(model, text),
        num_layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        linear=linear,
        other=other,
        adapter=tuple(_trained(adapted, "lora_")) if lora else (),
        saved_whole=tuple(_saved_whole(adapted)) if lora else (),
        head=() if tied else tuple(tuple(p.shape) for p in _own(head)),
        dtype=_dtype_name(config),
    )


def _parameters(model: Any, head: nn.Module) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    quantised = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    linear, other = [], []
    for parameter in model.parameters():
        (linear if id(parameter) in quantised else other).append(tuple(parameter.shape))
    return tuple(linear), tuple(other)


def _trained(model: nn.Module, part: str) -> list[Shape]:
    return [tuple(p.shape) for name, p in model.named_parameters() if part in name]


def _saved_whole(model: nn.Module) -> list[Shape]:
    wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    return [
        tuple(parameter.shape)
        for wrapper in wrappers
        for parameter in wrapper.modules_to_save.parameters()
    ]


def _own(head: nn.Module) -> list[nn.Parameter]:
    base = head.original_module if isinstance(head, ModulesToSaveWrapper) else head
    return list(base.parameters())


def _layer(model: Any, text: Any) -> Layer:
    first = _decoder_layers(model, text.num_hidden_layers)[0]
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    base = [p for name, p in first.named_parameters() if "lora_" not in name]
    return Layer(
        hidden=text.hidden_size,
        inner=_inner(text),
        heads=heads,
        head_size=size,
        kv_heads=kv_heads,
        projections=tuple(_projections(first)),
        norms=tuple(_norms(first, size, heads, kv_heads)),
        parameters=sum(p.numel() for p in base),
    )


def _inner(text: Any) -> int:
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None)
    return inner if isinstance(inner, int) else 4 * text.hidden_size


def _decoder_layers(model: nn.Module, number: int) -> nn.ModuleList:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ConfigError(
        f"model_name_or_path: no list of {number} decoder layers is found in a "
        f"{type(model).__name__}; plan knows decoders alone."
    )


def _projections(layer: nn.Module) -> list[Projection]:
    found = []
    for path, module in layer.named_modules():
        inside_adapter = "lora_" in path or path.endswith("base_layer")
        if inside_adapter or not isinstance(module, nn.Linear | LoraLayer):
            continue
        block, _, name = path.rpartition(".")
        linear: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
        rank = next(iter(module.r.values()), 0) if isinstance(module, LoraLayer) else 0
        is_outward = name in _OUTWARD
        sizes = linear.in_features, linear.out_features
        found.append(Projection(name, block, *sizes, is_outward, rank))
    return found


def _norms(layer: nn.Module, size: int, heads: int, kv_heads: int) -> list[tuple[int, int]]:
    """A norm over a head's width runs once for each head."""
    found = []
    for path, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" not in path.lower() or not isinstance(weight, nn.Parameter):
            continue
        width = weight.numel()
        is_of_heads = width == size and "attn" in path
        groups = 1 if not is_of_heads else kv_heads if "k_norm" in path else heads
        found.append((width * groups, groups))
    return found


def _dtype_name(config: Any) -> str | None:
    dtype = getattr(config, "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")
