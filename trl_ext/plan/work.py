"""Bytes that a decoder layer works with, beside what it keeps; letters as in `activations`.

Read off the operations in order, and tested against the peak of all that lives on a CPU.
"""

from trl_ext.plan import activations
from trl_ext.plan.activations import Batch, Numbers, kept_by_mlp
from trl_ext.plan.shapes import Layer


def backward_work(layer: Layer, how: Numbers, batch: Batch) -> int:
    """Bytes beside what is kept, at the worst moment of a layer's backward pass.

    In the MLP: either the gradient of the last map's input, c·I a token, and through an adapter of
    another dtype (l + c)·I more, with dropout 2·l·I, and once the gradient of its weight, in c and
    as it is added up; or the three gradients of the gate's product, 3·c·I, less the input of the
    last map, free by then. With eager attention, when the MLP is done, the gradients of the scores
    before and after the softmax, 8·heads·b·s², and those of output and values, 2·c·A. With them the
    layer's gradient and output, 2·c·H, an adapter's gradient as scaled, c·H, and once the largest
    quantised weight as it is unpacked.
    """
    c, tokens = how.compute, batch.tokens
    last = [each for each in layer.projections if each.is_outward and "attn" not in each.block]
    has_adapter = any(each.rank for each in last)
    at_map = c + (_through_adapter(how) if has_adapter else 0)
    at_gate = c * (2 if how.trains_base or has_adapter else 3)
    of_map = at_map * layer.inner * tokens + _weight_gradient(layer, how)
    mlp = max(of_map, at_gate * layer.inner * tokens)
    attention = 0
    if how.attention == "eager":
        scores = 8 * layer.heads * batch.rows * batch.length**2
        attention = scores + tokens * (2 * c * layer.attended - kept_by_mlp(layer, how))
    of_stream = c * layer.hidden * tokens * (3 if has_adapter else 2)
    return max(mlp, attention) + of_stream + _unpacked(layer, how)


def _weight_gradient(layer: Layer, how: Numbers) -> int:
    bytes_each = how.compute + (how.stream if how.stream != how.compute else 0)
    return bytes_each * _largest(layer) if how.trains_base else 0


def _unpacked(layer: Layer, how: Numbers) -> int:
    return how.compute * _largest(layer) if how.quantised else 0


def _largest(layer: Layer) -> int:
    return max((each.width_in * each.width_out for each in layer.projections), default=0)


def _through_adapter(how: Numbers) -> int:
    """Bytes a number of an adapter's input gradient on its way through cast and dropout."""
    if how.adapter == how.compute:
        return how.adapter if how.dropout else 0
    return how.adapter + max(how.compute, how.adapter if how.dropout else 0)


def forward_work(layer: Layer, how: Numbers, batch: Batch, *, is_autocast: bool = True) -> int:
    """Bytes of a layer without gradients, at its worst moment.

    In the MLP the activated gate, the other factor and their product, 3·c·I a token; with an
    adapter see `_in_adapter`. In attention queries as they are rotated, in the stream's dtype by
    then, (2·c + 3·w)·A + 2·c·K; eager 4·c·A and scores as they are, as float32, through the
    softmax and cast, (8 + c)·heads·b·s². With them input, normalised input and residual, 3·w·H, and
    the mask of pairs of tokens, b·s². And once the largest weight as it is unpacked or cast.

    Args:
        is_autocast: whether products are made in c whatever their inputs are: False while text is
            generated with an adapter, which no autocast surrounds.
    """
    c, w, tokens = how.compute, how.stream, batch.tokens
    pairs = batch.rows * batch.length**2
    has_adapter = any(each.rank for each in layer.projections if "attn" not in each.block)
    mlp = 3 * c * layer.inner
    if has_adapter:
        mlp = _in_adapter(layer, how, is_autocast=is_autocast)
    attention = ((2 * c + 3 * w) * layer.attended + 2 * c * layer.keys) * tokens
    if how.attention == "eager":
        attention = 4 * c * layer.attended * tokens + (8 + c) * layer.heads * pairs
    unpacked = c * _largest(layer) if how.quantised or how.casts_weights else 0
    return max(mlp * tokens, attention) + 3 * w * layer.hidden * tokens + pairs + unpacked


def _in_adapter(layer: Layer, how: Numbers, *, is_autocast: bool) -> int:
    """A token, in an MLP with adapters, without gradients.

    Second map: activated gate, its output, the adapter's and their sum, 4·c·I, or where nothing
    casts the adapter's products back 2·c·I + 2·l·I; with the input as cast, l·H. Last map with
    dropout: its input in c, in l, and as dropped, and the mask, (c + 2·l + 1)·I.
    """
    c, l_size = how.compute, max(how.adapter, how.compute)
    product = c if is_autocast else l_size
    cast = l_size * layer.hidden if how.adapter != how.stream else 0
    second = (2 * c + 2 * product) * layer.inner + cast
    copies = 2 if how.adapter != c else 1
    dropped = (c + copies * l_size + activations.MASK_BYTES) * layer.inner if how.dropout else 0
    return max(second, dropped)


def last_norm_work(layer: Layer, batch: Batch) -> int:
    """Bytes of the last norm's backward pass: 16·H a token (3 float32, 2 in c)."""
    return 16 * layer.hidden * batch.tokens
