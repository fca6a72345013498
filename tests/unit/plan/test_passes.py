"""The cache of keys and the LM head, against the tensors that there are."""

from typing import Any

import torch
from transformers import DynamicCache

from tests.unit.plan.allocations import (
    Peak,
    config_of,
    lora,
    numbers,
    rows,
    small_model,
    storage_bytes,
)
from trl_ext.plan.activations import Batch
from trl_ext.plan.passes import (
    cache_bytes,
    growing_bytes,
    head_backward,
    head_tile,
    sampling_bytes,
    vocabulary_kl_bytes,
)
from trl_ext.plan.shapes import shapes_of

HALF, WHOLE = torch.bfloat16, torch.float32
BATCH = Batch(3, 10)


def filled_cache(model, config, *, autocast: bool):
    cache: Any = DynamicCache(config=config)
    with torch.no_grad(), torch.autocast("cpu", HALF, enabled=autocast):
        model(**rows(BATCH.rows, BATCH.length), past_key_values=cache, use_cache=True)
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def test_cache_of_a_bfloat16_model():
    config = config_of()
    keys, values = filled_cache(small_model(config, HALF), config, autocast=False)
    layer, how = shapes_of(config, None).layer, numbers(HALF, None)
    assert cache_bytes(layer, 2, BATCH, how) == storage_bytes([*keys, *values])
    assert growing_bytes(layer, BATCH, how) == storage_bytes(keys[:1])


def test_cache_of_float32_weights_in_autocast():
    config = config_of()
    keys, values = filled_cache(small_model(config, WHOLE), config, autocast=True)
    assert keys[0].dtype == values[0].dtype == WHOLE
    layer = shapes_of(config, None).layer
    assert cache_bytes(layer, 2, BATCH, numbers(WHOLE, None)) == storage_bytes([*keys, *values])


def test_head_without_gradients():
    # By hand: 5000 tokens, V = 40000, H = 128: a tile of 4096 by 32768 in 2 bytes; hidden states of
    # 2 bytes and seven float32 a token. float32 weights are cast, a tile of them and of tokens.
    layer = shapes_of(config_of(), None).layer
    tile = 2 * 4096 * 32768  # TRL's buffer, whose width does not depend on V
    assert head_tile(5000, 40000, layer, numbers(HALF, None)) == tile + 5000 * (2 * 128 + 28)
    casts = 2 * 128 * (4096 + 32768)
    assert head_tile(5000, 40000, layer, numbers(WHOLE, None)) == tile + casts + 5000 * (512 + 28)


def test_head_backward():
    # By hand, 10 tokens of 64, V = 300: beside the tile 6·128 a token; then w·128 of all 64. With
    # a trained head its gradient in float32, and in bfloat16.
    layer = shapes_of(config_of(), None).layer
    half, whole = numbers(HALF, None), numbers(WHOLE, None)
    tile = head_tile(10, 300, layer, half)
    frozen = head_backward(10, 300, layer, half, trains_head=False, padded=64)
    assert frozen == tile + 2 * 128 * 64
    trained = head_backward(60, 300, layer, half, trains_head=True, padded=64)
    assert trained == head_tile(60, 300, layer, half) + 6 * 128 * 60 + 6 * 300 * 128
    in_float32 = head_backward(60, 300, layer, whole, trains_head=True, padded=64)
    assert in_float32 == head_tile(60, 300, layer, whole) + 8 * 128 * 60 + 4 * 300 * 128


def test_sampling_and_kl():
    assert sampling_bytes(3, 1000, numbers(HALF, lora())) == 14 * 3 * 1000
    assert vocabulary_kl_bytes("k3", 150_000) == 0
    assert vocabulary_kl_bytes("exact", 150_000) == 11 * 4 * 256 * 32768
    assert vocabulary_kl_bytes("topk", 100) == 7.5 * 4 * 128 * 100


def test_the_judge_sees_what_lives_and_forgets_what_died():
    # 400 bytes there before, 800 and 1200 more; the 800 die, then 400 are made.
    first = torch.zeros(100)
    with Peak([first]) as peak:
        second = torch.ones(200)
        third = torch.ones(300)
        assert (peak.now, peak.highest) == (2400, 2400)
        del second
        fourth = third[:100] + first
    assert (peak.now, peak.highest) == (2000, 2400)
    assert fourth.numel() == 100
