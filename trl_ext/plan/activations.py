"""Bytes of activations: what the layers of a decoder keep for the backward pass.

Letters as in `shapes.Layer`: H hidden, I the MLP's, A the queries', K the keys' width. n = b·s
tokens. w bytes of a number of the residual stream, c of what matrices are multiplied in (2 inside
bfloat16 autocast), l of an adapter's weights. Each term says which operation keeps it; tests count
them with `torch.autograd.graph.saved_tensors_hooks`.
"""

from dataclasses import dataclass
from typing import Literal

from trl_ext.plan.shapes import Layer, Projection

Attention = Literal["eager", "sdpa", "flash"]
MASK_BYTES = 1  # of a number's place in the mask of dropout, on accelerators


@dataclass(frozen=True)
class Numbers:
    """How a model computes.

    Attributes:
        stream: w, bytes of the residual stream: the dtype that the weights are loaded in.
        compute: c, bytes inside matrix products.
        adapter: l, bytes of an adapter's weights; 0 without one.
        trains_base: whether the model's own weights get gradients.
        quantised: whether its linear maps are in 4 or 8 bits.
        dropout: whether the adapter has dropout.
        attention: "eager" keeps the scores of all pairs of tokens, "sdpa" a mask, "flash" neither.
    """

    stream: int
    compute: int
    adapter: int
    trains_base: bool
    quantised: bool
    dropout: bool
    attention: Attention

    @property
    def casts_weights(self) -> bool:
        """Whether autocast makes a copy of each weight in the dtype of the products."""
        return self.compute != self.stream and not self.quantised


@dataclass(frozen=True)
class Batch:
    """b rows of s tokens, all of them padded to the longest."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """n = b·s."""
        return self.rows * self.length


def kept_by_layer(layer: Layer, how: Numbers, batch: Batch) -> int:
    """Bytes that one layer keeps between its forward and its backward pass."""
    mlp = kept_by_mlp(layer, how)
    return (
        batch.tokens * (_kept_by_norms(layer, how) + _kept_by_projections(layer, how) + mlp)
        + _kept_by_attention(layer, how, batch)
        + weight_casts(layer.projections, how)
        + adapter_casts(layer.projections, how)
    )


def _kept_by_norms(layer: Layer, how: Numbers) -> int:
    """A token: a norm over W numbers in g groups squares them in float32, 4·W, and keeps the
    inverse roots, 4·g; a trained weight keeps what it multiplies: w·W in the residual stream, c·W
    of queries or keys, which are a product.
    """
    total = 0
    for width, groups in layer.norms:
        weighed = how.compute if groups > 1 else how.stream
        total += (4 + weighed * how.trains_base) * width + 4 * groups
    return total


def _kept_by_projections(layer: Layer, how: Numbers) -> int:
    """A token: the inputs of trained linear maps, c·in each, and the adapters' r numbers, c·r.

    Maps of one block share an input where nothing casts it on the way; what a block computed last
    is shared with the operation that made it (attention keeps its output, counted there).
    """
    shared: dict[tuple[str, bool], int] = {}
    total = 0
    for each in layer.projections:
        trained = how.trains_base or each.rank > 0
        if not trained:
            continue
        if _has_own_input(each, how):
            total += how.compute * each.width_in
        elif not (each.is_outward and "attn" in each.block and how.attention != "eager"):
            shared[each.block, each.is_outward] = how.compute * each.width_in
        total += how.compute * each.rank
        if each.rank and how.dropout:
            total += MASK_BYTES * each.width_in
    return total + sum(shared.values())


def _has_own_input(each: Projection, how: Numbers) -> bool:
    """Whether a copy of the input is made for this map alone: by a cast to l or c, or by dropout.

    The input of a block is in the stream's dtype, what a block computed in that of the products.
    """
    arrives = how.compute if each.is_outward else how.stream
    if each.rank:
        return how.dropout or not arrives == how.adapter == how.compute
    return arrives != how.compute


def kept_by_mlp(layer: Layer, how: Numbers) -> int:
    """A token: the activation keeps its input c·I, the gate's product both factors, 2·c·I."""
    gated = any("gate" in each.name for each in layer.projections)
    return how.compute * layer.inner * (3 if gated else 1)


def _kept_by_attention(layer: Layer, how: Numbers, batch: Batch) -> int:
    """Bytes: queries, and keys and values, repeated to A where a mask forbids grouped heads.

    "sdpa" also keeps its output c·A, 4 bytes a head and token of normalisers, and the mask as
    numbers, c·b·s². "eager" keeps the softmax in float32 and as cast for the product: (4 + c)·
    heads·b·s², 4 alone where both are float32. "flash" runs on padded rows without a mask.
    """
    a, k, c = layer.attended, layer.keys, how.compute
    pairs = batch.rows * batch.length**2
    if how.attention == "eager":
        scores = (4 + c if c != 4 else 4) * layer.heads * pairs
        return batch.tokens * 3 * c * a + scores
    repeated = a if how.attention == "sdpa" else k
    mask = c * pairs if how.attention == "sdpa" else 0
    return batch.tokens * (2 * c * a + 2 * c * repeated + 4 * layer.heads) + mask


def weight_casts(projections: tuple[Projection, ...], how: Numbers) -> int:
    """Bytes of autocast's copies of linear weights, c·in·out: kept until they are used backward."""
    if not how.casts_weights:
        return 0
    return how.compute * sum(each.width_in * each.width_out for each in projections)


def adapter_casts(projections: tuple[Projection, ...], how: Numbers) -> int:
    """Bytes of autocast's copies of adapter weights, c·r·(in + out)."""
    if how.adapter in (0, how.compute):
        return 0
    return how.compute * sum(each.rank * (each.width_in + each.width_out) for each in projections)


def boundary(layer: Layer, how: Numbers, batch: Batch) -> int:
    """Bytes of a layer's input, w·H a token: all that checkpointing keeps of it."""
    return how.stream * layer.hidden * batch.tokens


def kept_by_end(layer: Layer, how: Numbers, batch: Batch) -> int:
    """Bytes that the last norm keeps, (4·H + 4 and w·H where trained) a token, and its output."""
    weighed = how.stream if how.trains_base else 0
    a_token = (4 + weighed + how.stream) * layer.hidden + 4
    return a_token * batch.tokens
