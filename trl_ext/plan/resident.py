"""Bytes of what stays: weights, gradients, optimizer states. All sizes are of one process."""

from math import ceil, prod

from trl_ext.plan.shapes import Shape, numel

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
# bitsandbytes: weights of a block share one float32 maximum; with nested quantisation the maxima
# are 8-bit numbers themselves, of which blocks of 256 share one.
NF4_BLOCK = 64
NESTED_BLOCK = 256
OPTIMIZER_BLOCK = 256
# Smaller tensors keep their states in float32 (`min_8bit_size`).
LEAST_8BIT = 4096


def nf4_bytes(shapes: tuple[Shape, ...], *, nested: bool) -> int:
    """Bytes of linear maps in 4 bits, with what is needed to read them.

    A map of N numbers has ⌈N/2⌉ bytes and ⌈N/64⌉ block maxima, 4 bytes each, and a code of 16
    float32. Nested: maxima of 1 byte, one float32 for 256 of them, a second code of 256 float32,
    and an offset. Source: Dettmers et al. (2023), "QLoRA"; bitsandbytes `QuantState`.
    """
    return sum(_nf4(prod(shape), nested) for shape in shapes)


def _nf4(count: int, nested: bool) -> int:
    blocks = ceil(count / NF4_BLOCK)
    packed = ceil(count / 2) + 16 * 4
    if not nested:
        return packed + 4 * blocks
    return packed + blocks + 4 * ceil(blocks / NESTED_BLOCK) + 256 * 4 + 4


def int8_bytes(shapes: tuple[Shape, ...]) -> int:
    """Bytes of linear maps (out, in) in 8 bits: one a number and one float32 a row (LLM.int8)."""
    return sum(prod(shape) + 4 * shape[0] for shape in shapes)


# Optimizer -> number of states of a parameter's size.
_STATES = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 2,
    "sgd": 0,
    "adagrad": 1,
    "rmsprop": 1,
    "rmsprop_bnb": 1,
    "rmsprop_bnb_32bit": 1,
    "rmsprop_bnb_8bit": 1,
    "lion_32bit": 1,
    "lion_8bit": 1,
    "paged_lion_32bit": 1,
    "paged_lion_8bit": 1,
    "stable_adamw": 2,
    "grokadamw": 3,
}


def knows_optimizer(name: str) -> bool:
    """Whether the states of an optimizer are counted as its own; others are counted as AdamW's."""
    return name in _STATES or name == "adafactor"


def optimizer_bytes(name: str, shapes: tuple[Shape, ...], size: int, *, embedding: int = 0) -> int:
    """Bytes of an optimizer's states on the card.

    AdamW has two states of each parameter in the parameter's dtype (torch) or in float32
    (bitsandbytes, `_32bit`). In 8 bits a state has one byte a number and one float32 a block of
    256; tensors under 4096 numbers, and embeddings (transformers has it so), stay in float32. Paged
    states are unified memory, which the driver moves to the host when the card is full: they count
    as nothing here. Adafactor has a float32 for each row and column of a matrix.

    Args:
        name: transformers' `optim`.
        shapes: of the trained parameters.
        size: bytes of a trained number.
        embedding: how many of the numbers are in embeddings that are trained.
    """
    if name.startswith("paged_"):
        return 0
    if name == "adafactor":
        return 4 * sum(_factored(shape) for shape in shapes)
    states = _STATES.get(name, 2)
    if name.endswith("8bit"):
        return states * (_in_8bit(shapes) + 3 * embedding)
    if name.endswith(("32bit", "_bnb")):
        return states * 4 * numel(shapes)
    return states * size * numel(shapes)


def _in_8bit(shapes: tuple[Shape, ...]) -> int:
    counts = [prod(shape) for shape in shapes]
    blocked = sum(n + 4 * ceil(n / OPTIMIZER_BLOCK) for n in counts if n >= LEAST_8BIT)
    return blocked + 4 * sum(n for n in counts if n < LEAST_8BIT)


def _factored(shape: Shape) -> int:
    return sum(shape[-2:]) * prod(shape[:-2]) if len(shape) > 1 else prod(shape)


def step_bytes(name: str, trained: int) -> int:
    """What an optimizer step needs beside its states, bytes.

    torch's `adamw_torch` without "fused" goes over all parameters at once and keeps one
    intermediate of their size; fused, paged and 8-bit ones work in place.
    """
    return trained if name in ("adamw_torch", "rmsprop", "adagrad") else 0
