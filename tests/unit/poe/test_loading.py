from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_byte_llama
from trl_ext.errors import ConfigError
from trl_ext.poe import Adapter, NGramExpert
from trl_ext.poe.loading import load_experts, load_product


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, two adapters of it, another model and a counted expert, on disk."""
    home = tmp_path_factory.mktemp("experts")
    base = save_byte_llama(home / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(1)
    for name in ("x", "y"):
        model = AutoModelForCausalLM.from_pretrained(base)
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(home / name)
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    other.save_pretrained(home / "other")
    tokenizer.save_pretrained(home / "other")
    NGramExpert.fit(["hello there"], tokenizer=tokenizer, progress=False).save(home / "counted")
    return home


def test_adapters_and_their_base_come_as_one_model(home):
    paths = {"b": str(home / "base"), "x": str(home / "x"), "y": str(home / "y")}
    loaded = load_experts(paths)
    assert all(isinstance(expert, Adapter) for expert in loaded.values())
    assert [expert.name for expert in loaded.values()] == [None, "0", "1"]
    assert len({id(expert.model) for expert in loaded.values()}) == 1


def test_a_name_may_be_a_path(home):
    path = str(home / "x")
    [adapter] = load_experts({path + ".v1": path}).values()
    assert adapter.name == "0"


def test_a_product_of_every_kind(home):
    paths = {name: str(home / name) for name in ("x", "base", "other", "counted")}
    product = load_product(paths, dict.fromkeys(paths, 0.25), device="cpu")
    assert list(product.experts) == list(paths)
    assert len(product.sources) == 3
    ids = product.tokenizer(["hi", "hello"], return_tensors="pt", padding=True)
    assert ids["attention_mask"][0].tolist() == [0, 0, 0, 1, 1]
    logps = product.log_probs(**ids)
    torch.testing.assert_close(logps.exp().sum(-1), torch.ones(2, 5))
    alone = AutoModelForCausalLM.from_pretrained(paths["other"])
    torch.testing.assert_close(
        product.expert_log_probs(**ids)["other"][1], alone(**ids).logits[1].log_softmax(-1)
    )


def test_an_adapter_alone_brings_its_base_and_tokenizer(home):
    product = load_product({"x": str(home / "x")}, [1.0], device="cpu")
    assert product.tokenizer.padding_side == "left"
    assert product.config.vocab_size == len(product.tokenizer)


def test_a_counted_expert_alone_brings_its_tokenizer(home):
    product = load_product({"c": str(home / "counted")}, [1.0], device="cpu")
    ids = product.tokenizer(["hel"], return_tensors="pt")["input_ids"]
    out = product.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert product.tokenizer.decode(out[0]) == "hell"


def test_models_come_in_the_dtype_asked_for(home):
    loaded = load_experts({"b": str(home / "base"), "x": str(home / "x")}, dtype="bfloat16")
    assert loaded["x"].model.dtype == torch.bfloat16


@pytest.mark.parametrize("path", ["nowhere/at/all", "/no/such/folder", "no-such-model"])
def test_a_path_that_holds_nothing(path):
    with pytest.raises(
        ConfigError, match=f"'it' cannot be opened at '{path}': There is no such folder"
    ):
        load_experts({"it": path})


def test_what_is_loaded_already():
    model: Any = object()
    with pytest.raises(ConfigError, match="'it' is a object; load_product takes paths"):
        load_experts({"it": model})


def test_a_base_that_has_gone(home, tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    for file in (home / "x").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(home / "base"), str(home / "gone")))
    with pytest.raises(ConfigError, match="The base of the expert 'x' cannot be opened"):
        load_experts({"x": str(folder)})
    config.write_text(config.read_text().replace(f'"{home / "gone"}"', "null"))
    with pytest.raises(ConfigError, match="does not say which model it belongs to"):
        load_experts({"x": str(folder)})
