"""What a model consists of, against published counts, bitsandbytes' and peft's own choices."""

import pytest
import torch
from transformers.quantizers.base import get_keys_to_not_convert

from tests.unit.plan.allocations import config_of, lora, small_model
from trl_ext.errors import ConfigError
from trl_ext.plan.opening import known_models, open_config
from trl_ext.plan.shapes import Shapes, numel, shapes_of

# Number of parameters in the safetensors files, as the hub's model pages give it.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
}


@pytest.mark.parametrize("name", [*PUBLISHED])
def test_published_parameter_counts(name):
    assert numel(shapes_of(open_config(name), None).parameters) == PUBLISHED[name]


def test_every_known_model_has_a_count():
    assert known_models().keys() == {*PUBLISHED, "bundled:char-reverse-1m"}


def test_the_bundled_table_is_what_the_builder_builds():
    from trl_ext.bundled.char_reverse import SYMBOLS

    known = known_models()["bundled:char-reverse-1m"][1]
    assert known["vocab_size"] == len(SYMBOLS)


@pytest.mark.parametrize("tied", [True, False])
def test_bitsandbytes_leaves_out_what_other_holds(tied):
    config = config_of(tie_word_embeddings=tied)
    model = small_model(config, torch.float32)
    kept = get_keys_to_not_convert(model)
    converted = [
        tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in kept
    ]
    shapes = shapes_of(config, None)
    assert sorted(shapes.linear) == sorted(converted)
    assert len(shapes.linear) == 2 * 7
    # By hand: the embedding, and untied a head, of 300 by 128; two norms a layer and the last.
    assert sorted(shapes.other) == sorted([(300, 128)] * (1 if tied else 2) + [(128,)] * 5)
    assert shapes.head == (() if tied else ((300, 128),))


def test_layer_of_a_model_with_a_head_size_of_its_own():
    layer = shapes_of(config_of("qwen3"), lora(["q_proj"])).layer
    assert (layer.hidden, layer.inner, layer.attended, layer.keys) == (128, 352, 192, 96)
    assert [(p.name, p.rank) for p in layer.projections[:2]] == [("q_proj", 8), ("k_proj", 0)]
    assert {p.name for p in layer.projections if p.is_outward} == {"o_proj", "down_proj"}
    # Two norms of 128, one over each of 4 heads of queries and 2 of keys, 48 wide.
    assert sorted(layer.norms) == [(96, 2), (128, 1), (128, 1), (192, 4)]


def adapter_by_hand(layers: int) -> int:
    """r (in + out) of each map, r = 8."""
    maps = [(128, 192), (128, 96), (128, 96), (192, 128), (128, 352), (128, 352), (352, 128)]
    return layers * 8 * sum(map(sum, maps))


def test_adapter_and_what_is_saved_whole():
    shapes = shapes_of(config_of(), lora(modules_to_save=["lm_head"]))
    assert numel(shapes.adapter) == adapter_by_hand(2)
    assert shapes.saved_whole == ((300, 128),)
    real = small_model(config_of(), torch.float32, lora(modules_to_save=["lm_head"]))
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert numel(shapes.adapter + shapes.saved_whole) == trained


def test_the_adapter_given_is_left_as_it_was():
    # peft writes into it which modules it found in a model of two layers.
    adapter = lora()
    shapes_of(config_of(), adapter)
    assert numel(shapes_of(config_of(num_hidden_layers=3), adapter).adapter) == adapter_by_hand(3)


def test_an_adapter_that_finds_nothing():
    with pytest.raises(ConfigError, match="cannot be laid out"):
        shapes_of(config_of(), lora(["no_such_layer"]))


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])
def test_other_architectures_are_counted(kind):
    config = config_of(kind, head_dim=32)
    shapes = shapes_of(config, None)
    assert isinstance(shapes, Shapes)
    real = small_model(config_of(kind, head_dim=32, attn_implementation="eager"), torch.float32)
    assert numel(shapes.parameters) == sum(p.numel() for p in real.parameters())


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(ConfigError, match=r"no/such-model.*Known without the hub: "):
        open_config("no/such-model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_config(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-4B-Instruct-2507"]
)
def test_suffixes_change_no_architecture(name):
    assert open_config(name).num_hidden_layers == (36 if "4B" in name else 28)


def test_a_folder_comes_before_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config_of().save_pretrained("Qwen/Qwen2.5-1.5B")
    assert open_config("Qwen/Qwen2.5-1.5B").hidden_size == 128
