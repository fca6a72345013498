"""The bundled models themselves. Converting takes 15 s and training 15 s, so these are slow."""

import random
from itertools import islice

import pytest

from trl_ext.bundled import resolve_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model("bundled:smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path)


def _greedy(model, tokenizer, inputs, new_tokens):
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokens[0, inputs["input_ids"].size(1) :]


def test_text_comes_back(smollm2):
    _, tokenizer = smollm2
    for text in (
        "Hello, world!\n\n  x = 12",
        "naïve 日本 don't",
        "<|im_start|>user\nhi<|im_end|>\n",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_split_off_before_the_byte_level_rules(smollm2):
    """As in training. Byte-level rules alone give Ġ Ġ 1 2 Ċ Ċ 3, leaving white space in pieces."""
    _, tokenizer = smollm2
    assert tokenizer.tokenize("a  12\n\n3") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]


def test_special_tokens(smollm2):
    model, tokenizer = smollm2
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [
        0,
        1,
        2,
    ]
    assert tokenizer("<|im_end|>").input_ids == [2]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert set(model.generation_config.eos_token_id) == {0, 2}
    assert model.generation_config.pad_token_id == 2


def test_plain_text_goes_on_sensibly(smollm2):
    model, tokenizer = smollm2
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(_greedy(model, tokenizer, inputs, 1)) == " Paris"


def test_a_chat_turn_answers_and_ends(smollm2):
    model, tokenizer = smollm2
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = _greedy(model, tokenizer, inputs, 40)
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] == tokenizer.eos_token_id


def test_float32_and_bfloat16_hold_the_same_numbers(smollm2):
    import torch

    model, _ = smollm2
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())


def test_the_character_model_starts_at_about_forty_percent():
    """512 fresh held-out strings: the standard error of a share of .4 is .022.

    Training stops when a probe of 256 (standard error .031) reaches .40, so the accuracy itself
    lies within 4 * (.022² + .031²)^½ = .15 below that, and at most ten steps' gain above.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_ext.bundled.char_reverse import sampled_accuracy
    from trl_ext.tasks.char_reverse import draw

    path = resolve_model("bundled:char-reverse-1m")
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert 1_000_000 < model.num_parameters() < 1_100_000
    torch.manual_seed(1)
    held_out = list(islice(draw(random.Random(1), held_out=True), 512))
    assert 0.25 <= sampled_accuracy(model, tokenizer, held_out) <= 0.60


def test_the_character_tokenizer_is_one_token_a_letter():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("bundled:char-reverse-1m"))
    assert tokenizer.tokenize("abz>") == ["a", "b", "z", ">"]
    assert tokenizer.decode(tokenizer("abz>").input_ids) == "abz>"
    assert tokenizer("a?").input_ids[1] == tokenizer.unk_token_id
