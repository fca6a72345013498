"""Bytes of what surrounds the layers: the LM head in tiles, the cache of keys, sampling."""

from trl_ext.plan.activations import Batch, Numbers
from trl_ext.plan.shapes import Layer

# TRL's fused head: tokens and vocabulary entries of a tile (trl.kernels.chunked_logprob).
TILE_TOKENS = 4096
TILE_VOCABULARY = 32768


def head_tile(tokens: int, vocabulary: int, layer: Layer, how: Numbers) -> int:
    """Bytes of the fused LM head without gradients, for the completion tokens of a micro-batch.

    One tile of logits, c·min(tokens, 4096)·32768, however small the vocabulary; where weights are
    not in c, the tile's weights and hidden states as cast, c·H each; the chosen hidden states, w·H
    a token, and seven float32.
    """
    rows = min(tokens, TILE_TOKENS)
    tile = how.compute * rows * TILE_VOCABULARY
    cast = rows + min(vocabulary, TILE_VOCABULARY)
    casts = how.compute * layer.hidden * cast if how.stream != how.compute else 0
    return tile + casts + tokens * (how.stream * layer.hidden + 7 * 4)


def head_backward(
    tokens: int, vocabulary: int, layer: Layer, how: Numbers, *, trains_head: bool, padded: int
) -> int:
    """Bytes of the fused LM head in the backward pass.

    The tile again, and the gradient of the chosen hidden states in float32 and as cast,
    (4 + w)·H a token, or of all `padded` tokens, w·H; with a trained head its gradient in float32,
    4·V·H, and as cast, w·V·H where w is not 4.
    """
    of_hidden = max((4 + how.stream) * layer.hidden * tokens, how.stream * layer.hidden * padded)
    of_weight = 0
    if trains_head:
        cast = how.stream if how.stream != 4 else 0
        of_weight = (4 + cast) * vocabulary * layer.hidden
    return head_tile(tokens, vocabulary, layer, how) + of_hidden + of_weight


def divergence_bytes(tokens: int, teacher: int, how: Numbers, *, backward: bool) -> int:
    """Bytes that TRL's divergence needs beside the fused head (trl.kernels.chunked_divergence).

    Tiles of logits of student and teacher in float32, 8·min(tokens, 4096)·32768, in place of the
    head's own in c, which backward is the gradient's; and the teacher's hidden states.

    Args:
        tokens: completion tokens of a micro-batch.
        teacher: bytes of the teacher's hidden states a token.
        how: the student's.
        backward: in the backward pass.
    """
    of_logit = 8 if backward else 8 - how.compute
    return of_logit * min(tokens, TILE_TOKENS) * TILE_VOCABULARY + teacher * tokens


def cache_bytes(layer: Layer, num_layers: int, batch: Batch, how: Numbers) -> int:
    """Bytes of the keys and values of all layers: 2·L·b·s·K numbers of w bytes.

    Inside autocast too: rotation makes keys of the stream's dtype, and values are stored alike.
    """
    return 2 * num_layers * growing_bytes(layer, batch, how)


def growing_bytes(layer: Layer, batch: Batch, how: Numbers) -> int:
    """Bytes of one layer's keys, w·b·s·K: old and new exist at once while a token is joined on."""
    return how.stream * batch.tokens * layer.keys


def sampling_bytes(rows: int, vocabulary: int, how: Numbers) -> int:
    """Bytes to draw a token for each row: logits in c and in float32, probabilities, and noise.

    (c + 4 + 4 + 4)·V a row.
    """
    return (how.compute + 12) * rows * vocabulary


def vocabulary_kl_bytes(estimator: str, vocabulary: int) -> int:
    """Bytes of a KL over the whole vocabulary (`trl_ext.vocabulary_kl`), in its tiles.

    exact: 11 float32 tiles of 256 tokens by 32768; topk: 7.5 times the float32 logits of 128.
    """
    if estimator == "exact":
        return 11 * 4 * 256 * min(vocabulary, TILE_VOCABULARY)
    return int(7.5 * 4 * 128 * vocabulary) if estimator == "topk" else 0
