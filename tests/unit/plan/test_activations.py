"""The formulas against what autograd really keeps and what really lives, on a CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import trl_ext.plan.activations as activations
from tests.unit.plan.allocations import (
    Peak,
    backbone,
    config_of,
    lora,
    numbers,
    rows,
    saved_bytes,
    small_model,
    storage_bytes,
)
from trl_ext.models.adapter import keep_nf4_gradients_on_cpu
from trl_ext.plan.activations import (
    Batch,
    adapter_casts,
    boundary,
    kept_by_end,
    kept_by_layer,
    weight_casts,
)
from trl_ext.plan.shapes import shapes_of
from trl_ext.plan.work import backward_work, forward_work

HALF, WHOLE = torch.bfloat16, torch.float32
SMALL, LONG = Batch(3, 24), Batch(4, 64)


def run_backbone(model, batch, *, autocast=True, gradients=True):
    with torch.autocast("cpu", HALF, enabled=autocast), torch.set_grad_enabled(gradients):
        given = rows(batch.rows, batch.length)
        return backbone(model)(**given, use_cache=False).last_hidden_state


def kept_in_a_model(kind, dtype, adapter, layers, **changed) -> int:
    config = config_of(kind, num_hidden_layers=layers, **changed)
    model = small_model(config, dtype, adapter)
    return saved_bytes(model, lambda: run_backbone(model, SMALL))


@pytest.mark.parametrize(
    ("kind", "dtype", "targets", "changed"),
    [
        ("llama", WHOLE, None, {}),
        ("llama", HALF, None, {"attn_implementation": "eager"}),
        ("llama", WHOLE, "all-linear", {"attn_implementation": "eager"}),
        ("llama", HALF, ["q_proj", "v_proj"], {}),
        ("qwen2", HALF, "all-linear", {"head_dim": 32}),
        ("qwen3", WHOLE, None, {}),
        ("mistral", HALF, ["down_proj", "o_proj"], {}),
    ],
)
def test_a_layer_keeps_what_autograd_saves(kind, dtype, targets, changed):
    # One layer is what a model of two layers keeps beyond a model of one, to the byte.
    adapter = lora(targets) if targets else None
    two, one = (
        kept_in_a_model(kind, dtype, lora(targets) if targets else None, n, **changed)
        for n in (2, 1)
    )
    shapes = shapes_of(config_of(kind, **changed), adapter)
    how = numbers(dtype, adapter, attention=changed.get("attn_implementation", "sdpa"))
    assert kept_by_layer(shapes.layer, how, SMALL) == two - one


def test_dropout_keeps_its_mask(monkeypatch):
    # On a CPU the mask has the numbers' own dtype, float32; on accelerators one byte.
    monkeypatch.setattr(activations, "MASK_BYTES", 4)
    two, one = (kept_in_a_model("llama", HALF, lora(lora_dropout=0.1), n) for n in (2, 1))
    shapes = shapes_of(config_of(), lora(lora_dropout=0.1))
    assert kept_by_layer(shapes.layer, numbers(HALF, lora(lora_dropout=0.1)), SMALL) == two - one


def in_bfloat16(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(HALF)
    return model


def test_bfloat16_adapters_on_float32_weights():
    def kept(layers: int) -> int:
        model = in_bfloat16(small_model(config_of(num_hidden_layers=layers), WHOLE, lora()))
        return saved_bytes(model, lambda: run_backbone(model, SMALL))

    how = replace(numbers(WHOLE, lora()), adapter=2)
    layer = shapes_of(config_of(), lora()).layer
    assert kept_by_layer(layer, how, SMALL) == kept(2) - kept(1)


def test_a_layer_in_nf4(tmp_path):
    # TRL puts the adapters on quantised weights in bfloat16.
    def kept(layers: int) -> int:
        folder = str(tmp_path / str(layers))
        AutoModelForCausalLM.from_config(config_of(num_hidden_layers=layers)).save_pretrained(
            folder
        )
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=HALF
        )
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=four_bits, dtype=HALF
        )
        model = get_peft_model(loaded, lora())
        model.enable_input_require_grads()
        keep_nf4_gradients_on_cpu(in_bfloat16(model))
        return saved_bytes(model.train(), lambda: run_backbone(model, SMALL))

    how = replace(numbers(HALF, lora()), adapter=2, quantised=True)
    layer = shapes_of(config_of(), lora()).layer
    assert kept_by_layer(layer, how, SMALL) == kept(2) - kept(1)


def test_what_autograd_saves_after_the_last_layer():
    # Saved by a model of one layer: the layer, the last norm, and nothing for the embedding; the
    # hidden states that it returns are counted too, but not saved.
    one = kept_in_a_model("llama", WHOLE, None, 1)
    shapes = shapes_of(config_of(), None)
    how = numbers(WHOLE, None)
    returned = 4 * shapes.layer.hidden * SMALL.tokens
    mine = kept_by_layer(shapes.layer, how, SMALL) + kept_by_end(shapes.layer, how, SMALL)
    # Beside these: tokens, positions and rotations, some bytes a token.
    assert 0 <= one - (mine - returned) <= 1024 * SMALL.length


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("dtype", [HALF, WHOLE])
def test_peak_of_a_checkpointed_backward_pass(dtype, targets):
    # Inside the kernels' own work areas nothing is seen, and the smallest terms are left out of the
    # formulas: 4 % of activations alone, of which weights are no part.
    layers = 3
    adapter = lora(targets) if targets else None
    shapes = shapes_of(config_of(), adapter)
    model = small_model(config_of(num_hidden_layers=layers), dtype, adapter)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with Peak([*model.parameters(), *model.buffers(), *gradients]) as peak:
        before = peak.now
        hidden = run_backbone(model, LONG)
        peak.highest = 0
        hidden.sum().backward()
    how, layer = numbers(dtype, adapter), shapes.layer
    mine = layers * boundary(layer, how, LONG) + LONG.rows * LONG.length**2
    mine += kept_by_layer(layer, how, LONG) + backward_work(layer, how, LONG)
    assert mine == pytest.approx(peak.highest - before, rel=0.04)


@pytest.mark.parametrize(
    ("dtype", "targets", "autocast", "attention"),
    [
        (HALF, None, True, "sdpa"),
        (HALF, "all-linear", True, "sdpa"),
        (HALF, "all-linear", False, "sdpa"),
        (WHOLE, "all-linear", False, "sdpa"),
        (HALF, None, True, "eager"),
        (HALF, None, True, "wide"),
    ],
)
def test_peak_of_a_pass_without_gradients(dtype, targets, autocast, attention):
    adapter = lora(targets) if targets else None
    # An MLP of this width works with more than attention does, one of 352 with less.
    wide: dict[str, Any] = {"intermediate_size": 1000} if attention == "wide" else {}
    attention = "eager" if attention == "eager" else "sdpa"
    config = config_of(attn_implementation=attention, **wide)
    shapes = shapes_of(config, adapter)
    model = small_model(config, dtype, lora(targets) if targets else None)
    with Peak([*model.parameters(), *model.buffers()]) as peak:
        before = peak.now
        run_backbone(model, LONG, autocast=autocast, gradients=False)
    how, layer = numbers(dtype, adapter, attention=attention), shapes.layer
    how = how if autocast else replace(how, compute=how.stream)
    casts = weight_casts if adapter is None else adapter_casts
    mine = boundary(layer, how, LONG) + forward_work(layer, how, LONG, is_autocast=autocast)
    mine += config.num_hidden_layers * casts(layer.projections, how)
    assert mine == pytest.approx(peak.highest - before, rel=0.06)


def test_quantised_weights_are_unpacked_one_at_a_time():
    # By hand: the largest map is 128 by 352, in bfloat16.
    layer = shapes_of(config_of(), lora()).layer
    plain = replace(numbers(HALF, lora()), adapter=2)
    quantised = replace(plain, quantised=True)
    for work in (backward_work, forward_work):
        assert work(layer, quantised, SMALL) - work(layer, plain, SMALL) == 2 * 128 * 352


def test_flash_attention_keeps_neither_mask_nor_repeated_keys():
    # By hand, a token: q and out 2·2·192, k and v 2·2·96, 4 bytes for each of 4 heads; sdpa has
    # k and v at 192 and a mask of 2 bytes a pair.
    layer = shapes_of(config_of(), None).layer
    flash, sdpa = (numbers(HALF, None, attention=name) for name in ("flash", "sdpa"))
    more = kept_by_layer(layer, sdpa, SMALL) - kept_by_layer(layer, flash, SMALL)
    assert more == SMALL.tokens * 2 * 2 * (192 - 96) + 2 * SMALL.rows * SMALL.length**2


def test_storages_are_counted_once():
    tensor = torch.zeros(10)
    assert storage_bytes([tensor, tensor[2:], tensor.view(2, 5)]) == 40
