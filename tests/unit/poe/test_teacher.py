"""The teacher's logits are the product's, by whichever way they are had."""

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from trl_ext.errors import ConfigError, RunError
from trl_ext.poe import Adapter, EntropyWeights, ProductOfExperts, TokenReward
from trl_ext.poe.teacher import ProductTeacher

VOCABULARY = 11
SHAPE: dict = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.4,
}
# Prompts padded on the left, completions of three tokens on the right.
IDS = torch.tensor([[0, 0, 4, 5, 6, 7], [1, 2, 3, 4, 5, 0], [0, 9, 8, 7, 0, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]])
KEEP = 4
PROMPTS = MASK[:, :3].sum(1)


def model(seed, kind=(LlamaConfig, LlamaForCausalLM), hidden=16, **shape):
    torch.manual_seed(seed)
    config, causal_lm = kind
    return causal_lm(config(hidden_size=hidden, intermediate_size=24, **(SHAPE | shape))).eval()


COHERE = (CohereConfig, CohereForCausalLM)
GRANITE = (GraniteConfig, GraniteForCausalLM)
GEMMA = (Gemma2Config, Gemma2ForCausalLM)


def gpt2(seed):
    torch.manual_seed(seed)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "initializer_range": 0.4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape)).eval()


def with_bias(seed):
    phi = model(seed, (PhiConfig, PhiForCausalLM))
    torch.nn.init.normal_(phi.lm_head.bias, std=2.0)
    return phi


def adapted(targets=("q_proj", "down_proj"), **options) -> PeftModel:
    """Two LoRA adapters on one base, "y" the active one."""
    lora = {"init_lora_weights": False, "target_modules": list(targets), **options}
    torch.manual_seed(3)
    peft_model = get_peft_model(model(1), LoraConfig(r=4, **lora), "x")
    peft_model.add_adapter("y", LoraConfig(r=2, **lora))
    peft_model.set_adapter("y")
    return peft_model.eval()


class Table:
    """A counted expert in miniature: what comes next depends on the last token alone."""

    vocab_size = VOCABULARY

    def __init__(self, forbids=()):
        torch.manual_seed(8)
        scores = torch.randn(VOCABULARY, VOCABULARY)
        scores[:, list(forbids)] = -torch.inf
        self.logps = scores.log_softmax(-1)

    def log_probs(self, input_ids, attention_mask=None):
        return self.logps[input_ids]


def late(positions):
    return 0.3 * positions


def early(positions):
    return 1.0 - 0.2 * positions


def lora_products():
    one = adapted()
    return ProductOfExperts([one, Adapter(one, "x"), one.get_base_model()], [0.5, 0.9, -0.3])


LINEAR = {
    "two models of different width": lambda: ProductOfExperts(
        [model(1), model(2, hidden=32)], [0.4, 0.8]
    ),
    "one model": lambda: ProductOfExperts([model(1)], [1.7]),
    "a negative weight": lambda: ProductOfExperts([model(1), model(2)], [1.5, -0.5]),
    "adapters of one base": lora_products,
    "adapters and another model": lambda: ProductOfExperts(
        {"x": Adapter(one := adapted(), "x"), "other": model(4), "base": Adapter(one, None)},
        {"x": 0.5, "other": 0.3, "base": 0.4},
    ),
    "a bias": lambda: ProductOfExperts([with_bias(1), model(2)], [0.6, 0.7]),
    "only a bias": lambda: ProductOfExperts([with_bias(1)], [0.6]),
    "a logit scale": lambda: ProductOfExperts(
        [model(1, COHERE, logit_scale=0.3), model(2, GRANITE, logits_scaling=2.5)], [0.6, 0.7]
    ),
    "positions that are learned": lambda: ProductOfExperts([gpt2(1), model(2)], [0.6, 0.7]),
    "a token reward by a model": lambda: ProductOfExperts(
        [model(1), TokenReward(model(2))], [1.0, 0.5]
    ),
    "a schedule": lambda: ProductOfExperts([model(1), model(2)], [late, early]),
    "a schedule and a bias": lambda: ProductOfExperts([with_bias(1), model(2)], [late, 1.0]),
    "a schedule of adapters": lambda: ProductOfExperts(
        [Adapter(one := adapted(), "x"), Adapter(one, None)], [late, early]
    ),
    "half precision": lambda: ProductOfExperts([model(1).bfloat16(), model(2).bfloat16()], [1, 1]),
    "double precision": lambda: ProductOfExperts([model(1).double(), model(2).double()], [1, 1]),
}
OVER_THE_VOCABULARY = {
    "a table": (lambda: ProductOfExperts([model(1), Table()], [0.6, 0.4]), "'1' is not a model"),
    "a schedule": (lambda: ProductOfExperts([model(1), Table()], [early, late]), "not a model"),
    "a soft cap": (
        lambda: ProductOfExperts(
            [model(1, GEMMA, final_logit_softcapping=3.0, head_dim=8), model(2)], [0.6, 0.7]
        ),
        "the logits of '0' have a soft cap",
    ),
    "an adapter on the head": (
        lambda: ProductOfExperts([adapted(("lm_head",)), model(2)], [0.6, 0.7]),
        "of '0', the LM head is read as a matrix here, and it has an adapter",
    ),
    "a head of each adapter": (
        lambda: two_heads(),
        "an LM head does more than to multiply",
    ),
    "entropy": (
        lambda: ProductOfExperts([model(1), model(2)], EntropyWeights([0.6, 0.7])),
        "the weights follow the experts' entropies",
    ),
    "a cut-off": (
        lambda: ProductOfExperts([model(1), model(2)], [1, -1], plausibility=0.1),
        "it is cut off by plausibility",
    ),
    "a product within": (
        lambda: ProductOfExperts([ProductOfExperts([model(1)], [0.5]), model(2)], [1, 1]),
        "'0' is not a model with an LM head",
    ),
    "a forbidden token": (lambda: ProductOfExperts([model(1), Table([3])], [1, 1]), "'1' is not"),
}


def two_heads() -> ProductOfExperts:
    """Adapters that bring an LM head of their own each."""
    peft_model = adapted(modules_to_save=["lm_head"])
    base: Any = peft_model.get_base_model()
    for copy in base.lm_head.modules_to_save.values():
        torch.nn.init.normal_(copy.weight)
    return ProductOfExperts([Adapter(peft_model, "x"), Adapter(peft_model, "y")], [0.6, 0.7])


def softmaxes(teacher, product, ids=IDS, mask=MASK):
    """Of the teacher and of the product, where both predict a token of a completion."""
    kept = mask[:, -KEEP:].bool() & torch.tensor([True] * (KEEP - 1) + [False])
    given = teacher(ids, mask, KEEP).double().softmax(-1)
    wanted = product.log_probs(ids, mask, prompt_lengths=PROMPTS)[:, -KEEP:].double().exp()
    return given[kept], wanted[kept]


@pytest.mark.equation("E14")
@pytest.mark.parametrize("kind", LINEAR)
def test_one_head_is_the_product(kind):
    product = LINEAR[kind]()
    teacher = ProductTeacher(product)
    assert teacher.is_linear
    # Half precision: 8 bits of mantissa, rounded at other places.
    tolerance = 0.05 if kind == "half precision" else 1e-5
    given, wanted = softmaxes(teacher, product)
    torch.testing.assert_close(given, wanted, atol=tolerance, rtol=0)


@pytest.mark.equation("E14", "E20")
@pytest.mark.parametrize("kind", OVER_THE_VOCABULARY)
def test_any_product_over_the_vocabulary(kind, caplog):
    make, why = OVER_THE_VOCABULARY[kind]
    product = make()
    with caplog.at_level(logging.INFO):
        teacher = ProductTeacher(product)
    assert not teacher.is_linear
    assert why in caplog.text
    given, wanted = softmaxes(teacher, product)
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=0)


def test_what_trl_rounds_still_adds_up():
    """Under autocast TRL's kernel takes states and head in bf16, and adds in float32."""
    product = ProductOfExperts([model(1), Table()], [0.6, 0.4])
    teacher = ProductTeacher(product)
    with torch.autocast("cpu", torch.bfloat16):
        states: Any = teacher.base_model(IDS, MASK, KEEP).last_hidden_state
        head = teacher.get_output_embeddings()
        wanted = product(IDS, MASK, logits_to_keep=KEEP).logits[:, :-1].log_softmax(-1)
    rounded = states.bfloat16().float() @ head.weight.bfloat16().float().t()
    kept = MASK[:, -KEEP:-1].bool()
    # Two numbers of 8 bits have 16: 2^-17 of 8 nats.
    torch.testing.assert_close(rounded[:, :-1][kept], wanted[kept].float(), atol=1e-4, rtol=0)


def test_one_head_is_not_copied():
    peft_model = adapted()
    product = ProductOfExperts([peft_model, Adapter(peft_model, None)], [0.5, 0.6])
    head = ProductTeacher(product).get_output_embeddings()
    base: Any = peft_model.get_base_model()
    assert head.weight.data_ptr() == base.lm_head.weight.data_ptr()


def test_no_logits_are_made():
    """Of a model with a linear head, those of one position only, whatever the length."""
    one, made = model(1), []
    one.lm_head.register_forward_hook(lambda module, args, output: made.append(output.shape))
    teacher = ProductTeacher(ProductOfExperts([one], [1.0]))
    made.clear()
    teacher.base_model(IDS, MASK, KEEP)
    assert made == [(3, 1, VOCABULARY)]


def test_the_peft_model_stays_as_it_is():
    peft_model = adapted()
    before = {name: value.clone() for name, value in peft_model.state_dict().items()}
    trained = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    teacher = ProductTeacher(ProductOfExperts([Adapter(peft_model, "x"), model(4)], [0.5, 0.5]))
    teacher(IDS, MASK, KEEP)
    assert peft_model.active_adapters == ["y"]
    assert {name for name, p in peft_model.named_parameters() if p.requires_grad} == trained
    assert all(torch.equal(before[name], v) for name, v in peft_model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in peft_model.modules())


def test_a_student_with_fewer_logits():
    """The last logits pad the experts' vocabulary; the student has none for them."""
    product = ProductOfExperts([model(1), with_bias(2)], [0.5, 0.6])
    whole, part = ProductTeacher(product), ProductTeacher(product, VOCABULARY - 2)
    assert part.config.get_text_config().vocab_size == VOCABULARY - 2
    wanted = whole(IDS, MASK, KEEP)[..., :-2]
    torch.testing.assert_close(part(IDS, MASK, KEEP), wanted)
    shared = ProductOfExperts([model(1)], [1.0])
    assert len(ProductTeacher(shared, VOCABULARY - 2).get_output_embeddings().weight) == 9
    table = ProductOfExperts([Table()], [1.0])
    assert ProductTeacher(table, VOCABULARY - 2)(IDS, MASK, KEEP).size(-1) == VOCABULARY - 2


def test_a_student_with_more_logits():
    with pytest.raises(ConfigError) as error:
        ProductTeacher(ProductOfExperts([model(1)], [1.0]), VOCABULARY + 2)
    assert str(error.value) == (
        "The student has 13 logits and the product 11: it says nothing of the last 2. Take away "
        "what pads the student's vocabulary: model.resize_token_embeddings(11)."
    )


def test_a_forbidden_token_and_the_reverse_divergence():
    product = ProductOfExperts([model(1), Table(forbids=[3])], [0.5, 0.5])
    with pytest.raises(RunError) as error:
        ProductTeacher(product, may_forbid=False).base_model(IDS, MASK, KEEP)
    assert str(error.value) == (
        "An expert of the product gives tokens probability 0, and KL(student‖product), "
        "divergence: reverse_kl, is then infinite. Use divergence: forward_kl or jsd."
    )


def test_a_schedule_needs_to_know_where_completions_begin():
    teacher = ProductTeacher(ProductOfExperts([model(1), model(2)], [late, early]))
    with pytest.raises(ConfigError, match="its forward takes no logits_to_keep"):
        teacher.base_model(IDS, MASK)


def test_images_are_refused():
    teacher = ProductTeacher(ProductOfExperts([model(1)], [1.0]))
    with pytest.raises(RunError, match="reads text only, and the batch has pixel_values"):
        teacher.base_model(IDS, MASK, KEEP, pixel_values=torch.zeros(1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_expert_whose_states_are_not_numbers_is_named(value):
    one, other = model(1), model(2)
    teacher = ProductTeacher(ProductOfExperts({"whole": one, "broken": other}, [0.5, 0.5]))
    assert teacher.is_linear
    other.model.embed_tokens.weight.data[10] = value
    teacher.base_model(IDS, MASK, KEEP)
    ids = IDS.clone()
    ids[1, 3] = 10
    with pytest.raises(RunError, match=r"expert 'broken' gives NaN .* in row 1 of the batch"):
        teacher.base_model(ids, MASK, KEEP)
