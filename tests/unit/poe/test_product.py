import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from tests.tiny import save_byte_llama
from trl_ext.errors import ConfigError, RunError
from trl_ext.functional import entropy_weights, weighted_scores
from trl_ext.poe import Adapter, EntropyWeights, NGramExpert, ProductOfExperts, TokenReward

VOCABULARY = 23
SHAPE: dict = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def llama(seed: int, hidden: int = 32, **shape) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=2 * hidden, **(SHAPE | shape))
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def one() -> LlamaForCausalLM:
    return llama(1)


@pytest.fixture(scope="module")
def other() -> LlamaForCausalLM:
    return llama(2, hidden=48)


@pytest.fixture
def adapted() -> PeftModel:
    """Two LoRA adapters of different rank and place on one base."""
    torch.manual_seed(3)
    lora = {"init_lora_weights": False, "lora_alpha": 16}
    model = get_peft_model(
        llama(1), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **lora), "x"
    )
    model.add_adapter("y", LoraConfig(r=2, target_modules=["k_proj", "up_proj"], **lora))
    return model.eval()


def merged(model: PeftModel, adapter: str, folder) -> LlamaForCausalLM:
    """What one adapter is, as a model of its own."""
    model.save_pretrained(folder, selected_adapters=[adapter])
    alone = PeftModel.from_pretrained(llama(1), folder / adapter)
    return alone.merge_and_unload().eval()


PADDED = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 9, 8], [0, 11, 12, 4, 21]])
MASK = (PADDED > 0).long()
PROMPTS = {"input_ids": PADDED, "attention_mask": MASK, "max_new_tokens": 9}


def generate(model, seed: int = 0, **options):
    torch.manual_seed(seed)
    return model.generate(**(PROMPTS | options))


HOW = [
    {"do_sample": False},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 11},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": True, "num_return_sequences": 2},
    {"do_sample": False, "use_cache": False},
    {"do_sample": False, "prefill_chunk_size": 2},
    {"do_sample": False, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_one_expert_of_weight_one_generates_token_for_token_what_the_model_does(one, how):
    product = ProductOfExperts({"it": one}, {"it": 1.0})
    assert torch.equal(generate(product, **how), generate(one, **how))


@pytest.mark.equation("E14")
def test_log_probs_are_the_product_of_each_alone(one, other):
    product = ProductOfExperts({"one": one, "other": other}, {"one": 0.7, "other": 0.3})
    expected = (
        0.7 * one(PADDED, attention_mask=MASK).logits.log_softmax(-1)
        + 0.3 * other(PADDED, attention_mask=MASK).logits.log_softmax(-1)
    ).log_softmax(-1)
    logps = product.log_probs(PADDED, MASK)
    real = MASK.bool()
    torch.testing.assert_close(logps[real], expected[real])
    torch.testing.assert_close(logps.exp().sum(-1), torch.ones(3, 5))
    torch.testing.assert_close(logps[~real].exp(), torch.full((3, VOCABULARY), 1 / VOCABULARY))


def test_what_each_expert_said_comes_with_the_same_pass(one, other):
    reward = TokenReward(torch.linspace(-1, 1, VOCABULARY))
    product = ProductOfExperts({"one": one, "other": other, "r": reward}, [0.5, 0.5, 1.0])
    output = product(PADDED, MASK, logits_to_keep=2, output_expert_logits=True)
    alone = product.expert_log_probs(PADDED, MASK)
    for name, logits in zip(product.experts, output.expert_logits, strict=True):
        torch.testing.assert_close(product.own_log_probs(name, logits), alone[name][:, -2:])
    assert product(PADDED, MASK).expert_logits is None


def test_log_z_is_zero_for_one_mind_and_negative_for_two(one, other):
    same = ProductOfExperts([one, one], [0.4, 0.6])
    torch.testing.assert_close(same.log_z(PADDED, MASK), torch.zeros(3, 5), atol=1e-6, rtol=0)
    product = ProductOfExperts({"one": one, "other": other}, [0.4, 0.6])
    alone = product.expert_log_probs(PADDED, MASK)
    expected = (0.4 * alone["one"] + 0.6 * alone["other"]).logsumexp(-1)
    torch.testing.assert_close(product.log_z(PADDED, MASK)[MASK > 0], expected[MASK > 0])
    assert (product.log_z(PADDED, MASK)[MASK > 0] < 0).all()


@pytest.mark.parametrize("how", [HOW[0], HOW[3]], ids=str)
def test_generation_with_a_cache_is_generation_without(one, other, how):
    product = ProductOfExperts([one, other], [0.7, 0.3])
    assert torch.equal(generate(product, **how), generate(product, **how, use_cache=False))


def test_greedy_generation_follows_log_probs(one, other):
    product = ProductOfExperts([one, other], [0.7, 0.6])
    out = generate(product, do_sample=False, eos_token_id=None)
    mask = torch.cat([MASK, torch.ones(3, 9, dtype=torch.long)], dim=1)
    likeliest = product.log_probs(out, mask).argmax(-1)
    assert torch.equal(out[:, 5:], likeliest[:, 4:-1])


def test_left_padding_changes_nothing(one, other):
    product = ProductOfExperts([one, other], [0.7, 0.6])
    together = product.log_probs(PADDED, MASK)
    for row, mask in enumerate(MASK.bool()):
        alone = product.log_probs(PADDED[row : row + 1, mask])
        torch.testing.assert_close(together[row, mask], alone[0], atol=1e-5, rtol=1e-4)


def test_a_forward_pass_that_goes_on_from_a_cache(one, other):
    product = ProductOfExperts([one, other, NGramExpert.fit(CORPUS, **COUNTED)], [0.5, 0.3, 0.2])
    whole = product(PADDED, MASK).logits
    first = product(PADDED[:, :3], MASK[:, :3], use_cache=True)
    second = product(PADDED[:, 3:], MASK, past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, whole[:, 3:], atol=1e-5, rtol=1e-4)
    last = product(PADDED, MASK, logits_to_keep=2)
    torch.testing.assert_close(last.logits, whole[:, 3:], atol=1e-5, rtol=1e-4)


def test_adapters_in_one_batch_are_the_models_merged_one_by_one(adapted, tmp_path):
    models = {name: merged(adapted, name, tmp_path) for name in ("x", "y")}
    weights = {"base": 0.5, "x": 0.9, "y": -0.2}
    apart = ProductOfExperts({"base": llama(1), **models}, weights)
    together = ProductOfExperts(
        {"base": Adapter(adapted), "x": Adapter(adapted, "x"), "y": Adapter(adapted, "y")},
        weights,
    )
    assert len(apart.sources) == 3 and len(together.sources) == 1
    torch.testing.assert_close(
        together.log_probs(PADDED, MASK), apart.log_probs(PADDED, MASK), atol=2e-5, rtol=1e-4
    )
    for how in (HOW[0], HOW[3], HOW[4]):
        assert torch.equal(generate(together, **how), generate(apart, **how))


def test_adapters_share_one_copy_of_the_base(adapted):
    experts = {"base": adapted.get_base_model(), "x": adapted, "y": Adapter(adapted, "y")}
    product = ProductOfExperts(experts, [0.4, 0.3, 0.3])
    assert len(product.sources) == 1
    assert sum(p.numel() for p in product.parameters()) == sum(
        p.numel() for p in adapted.parameters()
    )
    ids = [id(p) for p in adapted.parameters()]
    assert all(id(p) in ids for p in product.parameters())


def test_which_adapter_is_active_makes_no_difference_and_stays(adapted):
    product = ProductOfExperts({"base": Adapter(adapted), "y": Adapter(adapted, "y")}, [0.5, 0.5])
    before = product.log_probs(PADDED, MASK)
    adapted.set_adapter("y")
    assert torch.equal(product.log_probs(PADDED, MASK), before)
    assert adapted.active_adapters == ["y"]
    base = product.expert_log_probs(PADDED, MASK)["base"]
    with adapted.disable_adapter():
        own = adapted(PADDED, attention_mask=MASK).logits.log_softmax(-1)
    torch.testing.assert_close(base[MASK > 0], own[MASK > 0])


CORPUS = [[3, 4, 5, 3, 4, 6], [3, 4, 5, 5, 9], [11, 12, 4, 21]]
COUNTED = {"vocab_size": VOCABULARY, "order": 3, "pseudo_count": 0.5, "progress": False}


def test_a_counted_expert_beside_a_model(one):
    counted = NGramExpert.fit(CORPUS, **COUNTED)
    product = ProductOfExperts({"one": one, "counted": counted}, {"one": 0.6, "counted": 0.4})
    own = one(PADDED, attention_mask=MASK).logits.log_softmax(-1)
    expected = (0.6 * own + 0.4 * counted.log_probs(PADDED, MASK)).log_softmax(-1)
    real = MASK.bool()
    torch.testing.assert_close(product.log_probs(PADDED, MASK)[real], expected[real])
    for how in (HOW[0], HOW[3]):
        assert torch.equal(generate(product, **how), generate(product, **how, use_cache=False))


def test_counted_experts_alone_generate():
    counted = NGramExpert.fit(CORPUS, **COUNTED)
    out = ProductOfExperts([counted], [1.0]).generate(
        torch.tensor([[3]]), max_new_tokens=2, do_sample=False, pad_token_id=0
    )
    # 4 follows 3 both times; 5 follows 3 4 twice of three times.
    assert out.tolist() == [[3, 4, 5]]


@pytest.mark.equation("E19")
def test_a_token_reward_tilts_the_reference(one):
    """Logits r/β + log π_ref, with β = 1/2."""
    reward = torch.linspace(-1, 1, VOCABULARY)
    product = ProductOfExperts({"ref": one, "r": TokenReward(reward)}, {"ref": 1.0, "r": 2.0})
    own = one(PADDED, attention_mask=MASK).logits.log_softmax(-1)
    expected = (own + 2 * reward).log_softmax(-1)
    torch.testing.assert_close(
        product.log_probs(PADDED, MASK)[MASK > 0], expected[MASK > 0], atol=1e-5, rtol=1e-4
    )


def test_a_token_reward_may_depend_on_the_prefix_and_forbid(one, other):
    def no_token_twice(ids, mask):
        seen = torch.zeros(*ids.shape, VOCABULARY).scatter(2, ids[..., None], 1.0).cumsum(1)
        return torch.where(seen > 0, -math.inf, 0.0)

    product = ProductOfExperts([one, TokenReward(no_token_twice)], [1.0, 1.0])
    for row in generate(product, do_sample=False, num_beams=2, eos_token_id=None):
        said = [token for token in row.tolist() if token > 0]
        assert len(set(said)) == len(said)
    as_logits = ProductOfExperts([one, TokenReward(other)], [1.0, 0.5])
    torch.testing.assert_close(
        as_logits.log_probs(PADDED[1:2]),
        (one(PADDED[1:2]).logits + 0.5 * other(PADDED[1:2]).logits).log_softmax(-1),
    )


def test_weights_by_position_start_where_the_prompt_ends(one, other):
    def fading(positions):
        return 0.5 ** positions.float()

    product = ProductOfExperts({"one": one, "other": other}, {"one": 1.0, "other": fading})
    out = generate(product, do_sample=False, eos_token_id=None)
    assert torch.equal(out, generate(product, do_sample=False, eos_token_id=None, use_cache=False))
    for row in range(3):
        ids = out[row : row + 1, PADDED.size(1) - MASK[row].sum() :]
        alone = product.expert_log_probs(ids)
        for token in range(9):
            last = MASK[row].sum() - 1 + token
            scores = alone["one"][0, last] + 0.5**token * alone["other"][0, last]
            assert scores.argmax() == ids[0, last + 1]


def test_weights_by_position_with_beams_and_several_sequences(one, other):
    def fading(positions):
        return 0.5 ** positions.float()

    product = ProductOfExperts([one, other], [1.0, fading])
    for how in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        assert torch.equal(generate(product, **how), generate(product, **how, use_cache=False))


@pytest.mark.equation("E20")
def test_weights_by_entropy(one, other):
    counted = NGramExpert.fit(CORPUS, **COUNTED)
    experts = {"one": one, "counted": counted}
    product = ProductOfExperts(experts, EntropyWeights([0.5, 0.5], {"one": 2.0}))
    alone = list(product.expert_log_probs(PADDED, MASK).values())
    priors = torch.tensor([2.0, counted.prior_entropy])
    weights = entropy_weights(alone, torch.tensor([0.5, 0.5]), priors)
    assert (weights[:, MASK > 0].std(1) > 0.01).all()
    expected, real = weighted_scores(alone, weights), MASK > 0
    torch.testing.assert_close(
        product.log_probs(PADDED, MASK)[real], expected[real].log_softmax(-1)
    )
    torch.testing.assert_close(product.log_z(PADDED, MASK)[real], expected[real].logsumexp(-1))


def test_a_contrast_with_a_cut_off_by_hand():
    """Li et al.: log p − log q over the tokens with p ≥ 0.3·max p; without, the last would win."""
    p, q = torch.tensor([0.5, 0.3, 0.19, 0.01]), torch.tensor([0.6, 0.2, 0.1999, 0.0001])
    experts = {"p": TokenReward(p.log()), "q": TokenReward(q.log())}
    product = ProductOfExperts(experts, [1.0, -1.0], plausibility=0.3)
    ratios = torch.tensor([0.5 / 0.6, 0.3 / 0.2, 0.19 / 0.1999, 0.0])
    for _ in range(2):
        torch.testing.assert_close(
            product.log_probs(torch.tensor([[0]]))[0, 0].exp(), ratios / ratios.sum()
        )
        product = ProductOfExperts(experts, [1.0, -1.0], plausibility=0.3, plausible_under="p")
    under_q = ProductOfExperts(experts, [1.0, -1.0], plausibility=0.3, plausible_under="q")
    assert under_q.log_probs(torch.tensor([[0]]))[0, 0].exp()[3] == 0


def test_a_product_within_a_product(one, other):
    inner = ProductOfExperts([one, other], [0.5, 0.5])
    counted = NGramExpert.fit(CORPUS, **COUNTED)
    outer = ProductOfExperts([inner, counted], [0.8, 0.2])
    flat = ProductOfExperts([one, other, counted], [0.4, 0.4, 0.2])
    torch.testing.assert_close(
        outer.log_probs(PADDED, MASK), flat.log_probs(PADDED, MASK), atol=1e-5, rtol=1e-4
    )
    for how in (HOW[0], HOW[3]):
        assert torch.equal(generate(outer, **how), generate(flat, **how))


def test_a_product_of_adapters_within_a_product(adapted, other):
    inner = ProductOfExperts([Adapter(adapted), Adapter(adapted, "x")], [0.5, 0.5])
    outer = ProductOfExperts([inner, other], [0.8, 0.2])
    flat = ProductOfExperts([Adapter(adapted), Adapter(adapted, "x"), other], [0.4, 0.4, 0.2])
    for how in (HOW[0], HOW[3]):
        assert torch.equal(generate(outer, **how), generate(flat, **how))


def test_it_streams_each_token(one, other):
    class Listener(BaseStreamer):
        def __init__(self):
            self.heard = []

        def put(self, value):
            self.heard += value.flatten().tolist()

        def end(self):
            self.heard.append("end")

    listener, product = Listener(), ProductOfExperts([one, other], [0.5, 0.5])
    out = product.generate(PADDED[1:2], max_new_tokens=4, do_sample=False, streamer=listener)
    assert listener.heard == [*out[0].tolist(), "end"]


def test_a_chat_template(tmp_path):
    folder = save_byte_llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    product = ProductOfExperts({"a": model, "b": model}, [0.3, 0.7])
    chat = [{"role": "user", "content": "hello"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    assert torch.equal(
        product.generate(**inputs, max_new_tokens=5, do_sample=False),
        model.generate(**inputs, max_new_tokens=5, do_sample=False),
    )


def test_it_takes_the_first_models_generation_config(one):
    first = llama(4)
    first.generation_config.temperature = 0.3
    product = ProductOfExperts([first, one], [0.5, 0.5])
    assert product.generation_config.temperature == 0.3
    assert product.generation_config.eos_token_id == 2


def test_models_are_put_into_evaluation_mode():
    model = llama(5, attention_dropout=0.5).train()
    product = ProductOfExperts([model], [1.0])
    assert not model.training
    torch.testing.assert_close(product.log_probs(PADDED), product.log_probs(PADDED))


def test_gradients_reach_an_expert_through_forward(one, other):
    product = ProductOfExperts([llama(6), other], [0.5, 0.5])
    product(PADDED, MASK).logits[MASK > 0].logsumexp(-1).sum().backward()
    assert product.experts["0"].lm_head.weight.grad is not None
    assert not product.log_probs(PADDED).requires_grad


def naive(product: ProductOfExperts, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """Greedy tokens, the whole text read anew for each."""
    for _ in range(tokens):
        next_one = product.log_probs(prompt)[:, -1:].argmax(-1)
        prompt = torch.cat([prompt, next_one], dim=1)
    return prompt


@pytest.mark.parametrize("how", ["prompt_lookup_num_tokens", "assistant_model"])
def test_guesses_of_an_assistant_that_were_wrong_are_forgotten(one, other, adapted, how):
    experts = {"x": Adapter(adapted, "x"), "base": Adapter(adapted), "other": other}
    product = ProductOfExperts({**experts, "c": NGramExpert.fit(CORPUS, **COUNTED)}, [0.25] * 4)
    prompt = torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4]])
    guess = {"prompt_lookup_num_tokens": 3, "assistant_model": one}[how]
    out = product.generate(
        prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, **{how: guess}
    )
    assert torch.equal(out, naive(product, prompt, 12))


def test_threads_take_turns_with_one_peft_model(adapted):
    products = [
        ProductOfExperts([Adapter(adapted), Adapter(adapted, name)], [0.2, 0.8]) for name in "xy"
    ]
    alone = [generate(product, do_sample=False) for product in products]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            both = pool.map(lambda product: product.generate(**PROMPTS, do_sample=False), products)
            assert all(torch.equal(one, other) for one, other in zip(both, alone, strict=True))


def test_a_model_without_a_cache_in_a_padded_batch(one):
    shape: Any = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 32,
    }
    torch.manual_seed(8)
    model: Any = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**shape, initializer_range=0.5)).eval()
    product = ProductOfExperts({"it": model, "one": one}, [0.8, 0.2])
    real, whole = MASK.bool(), product(PADDED, MASK)
    steps = product(PADDED[:, :4], MASK[:, :4], use_cache=True)
    last = product(PADDED[:, 4:], MASK, past_key_values=steps.past_key_values)
    torch.testing.assert_close(last.logits[:, 0], whole.logits[:, 4], atol=1e-5, rtol=1e-4)
    for row, mask in enumerate(real):
        alone = product(PADDED[row : row + 1, mask]).logits[0, -1]
        torch.testing.assert_close(last.logits[row, 0], alone, atol=1e-5, rtol=1e-4)


def test_log_z_of_weights_by_entropy_beside_a_reward(one):
    reward = torch.linspace(-2, 2, VOCABULARY)
    product = ProductOfExperts([one, TokenReward(reward)], EntropyWeights([0.5, 0.5]))
    own = one(PADDED, attention_mask=MASK).logits.log_softmax(-1)
    normalised = [own, reward.log_softmax(-1).expand_as(own)]
    priors = torch.full((2,), math.log(VOCABULARY))
    weights = entropy_weights(normalised, torch.tensor([0.5, 0.5]), priors)
    expected = weighted_scores([own, reward.expand_as(own)], weights).logsumexp(-1)
    log_z = product.log_z(PADDED, MASK)
    torch.testing.assert_close(log_z[MASK > 0], expected[MASK > 0], atol=1e-5, rtol=1e-4)


def test_what_generate_may_be_asked_to_return_and_to_leave_out(one, other):
    product = ProductOfExperts([one, other], [0.5, 0.5])
    full = generate(
        product,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert len(full.logits) == full.sequences.size(1) - 5
    first = llama(1)
    first.generation_config.use_cache = False
    without = ProductOfExperts([first, other], [0.5, 0.5])
    assert torch.equal(generate(without, do_sample=False), full.sequences)


def broken() -> LlamaForCausalLM:
    model = llama(7)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    return model


def tokenizer_with(*tokens: str):
    class Tokenizer:
        def get_vocab(self):
            return {token: index for index, token in enumerate(tokens)}

    return Tokenizer()


SAME = tokenizer_with("a", "b", "c")
SCHEDULE: Any = abs
NOTHING: Any = None
ONES: Any = [1.0]


@pytest.mark.parametrize(
    "experts, weights, options, said",
    [
        ({}, [], {}, "at least one expert"),
        ({"a": llama(1)}, [1.0, 2.0], {}, "1 experts need as many weights, got 2"),
        ({"a": llama(1)}, {"b": 1.0}, {}, "'b', which is no expert. The experts: a"),
        ({"a": llama(1), "b": llama(2)}, {"b": 1.0}, {}, "no weight for the expert 'a'"),
        ({"a": llama(1)}, ["1"], {}, "weight of the expert 'a' is '1'"),
        ({"a": llama(1)}, [math.nan], {}, "must be finite"),
        ({"a": llama(1)}, [0.0], {}, "sum to nothing"),
        ({"a": llama(1), "b": llama(2)}, [1.0, -1.0], {}, "sum to nothing: a=1.0, b=-1.0"),
        ({"a": llama(1), "b": llama(2)}, [0.0, 0.0], {"plausibility": 0.1}, "sum to nothing"),
        ({"a": llama(1)}, [1.0], {"plausibility": 0.0}, "plausibility=0.0 must be greater"),
        ({"a": llama(1)}, [1.0], {"plausible_under": "z"}, "'z' is no expert"),
        ({"a": llama(1)}, [1.0], {"tokenizers": {"z": SAME}}, "names 'z', which is no expert"),
        ({"a": llama(1)}, EntropyWeights([SCHEDULE]), {}, "EntropyWeights takes numbers"),
        ({"a": llama(1)}, EntropyWeights([1.0], {"z": 1.0}), {}, "prior_entropies names 'z'"),
        ({"a": llama(1), "b": llama(2).half()}, [1, 1], {}, "'b' has the dtype torch.float16"),
        ({"a": llama(1), "b": llama(2).to("meta")}, [1, 1], {}, "'b' has the device meta"),
        ({"a": 3}, [1.0], {}, "'a' is a int"),
        (llama(1), [1.0], {}, "experts is a LlamaForCausalLM"),
        (None, [1.0], {}, "experts is a NoneType"),
        ({"a": llama(1)}, 1.0, {}, "weights is 1.0; it must be a mapping"),
        ({"a": llama(1)}, EntropyWeights(NOTHING), {}, "weights is None; it must be a mapping"),
        ({"a": llama(1)}, [1e38], {}, "at most 1e+06 in size, got a=1e+38"),
        ({"a": llama(1)}, [lambda positions: NOTHING], {}, "its schedule gave None"),
        ({"a": llama(1)}, [lambda positions: positions * 1j], {}, "its schedule gave tensor"),
        ({"a": llama(1)}, EntropyWeights([1.0], {"a": math.nan}), {}, "entropy of the expert 'a'"),
        ({"a": llama(1)}, [1.0], {"plausibility": "0.1"}, "plausibility='0.1' must be greater"),
        ({"a": Adapter(llama(1), "x")}, [1.0], {}, "Adapter of a LlamaForCausalLM"),
        ({"a": llama(1).model}, [1.0], {}, "no head over a vocabulary"),
        ({"a": TokenReward(torch.zeros(3, 3))}, [1.0], {}, "must be (V,)"),
        ({"a": TokenReward(ONES)}, [1.0], {}, "TokenReward of a list"),
        ({"a": llama(1)}, [EntropyWeights([1.0])], {}, "stands for the weights of all experts"),
        (
            {"a": llama(1)},
            [lambda positions: 1.0 if positions[0] < torch.tensor([1, 2]) else 0.0],
            {},
            "raised RuntimeError: Boolean value",
        ),
        ({"a": TokenReward(lambda ids, mask: ids)}, [1.0], {}, "how many tokens"),
        (
            {"a": llama(1), "b": llama(2, vocab_size=29)},
            [1.0, 1.0],
            {},
            "different size: 'a' has 23, 'b' has 29",
        ),
        (
            {"a": llama(1), "b": llama(2)},
            [1.0, 1.0],
            {"tokenizers": {"a": SAME, "b": tokenizer_with("a", "c", "b")}},
            "token 1 is 'b' for 'a' and 'c' for 'b'",
        ),
        (
            {"a": llama(1), "b": llama(2)},
            [1.0, 1.0],
            {"tokenizers": {"a": SAME, "b": tokenizer_with("a", "b")}},
            "token 2 is 'c' for 'a' and no token for 'b'",
        ),
    ],
)
def test_what_cannot_be_a_product(experts, weights, options, said):
    with pytest.raises(ConfigError) as refusal:
        ProductOfExperts(experts, weights, **options)
    assert said in str(refusal.value)


def test_padded_vocabularies_of_one_tokenizer_fit(one):
    wide = llama(2, vocab_size=29)
    same = {"a": SAME, "b": SAME}
    product = ProductOfExperts({"a": one, "b": wide}, [0.5, 0.5], tokenizers=same)
    assert product.log_probs(PADDED).shape == (3, 5, VOCABULARY)
    assert generate(product, do_sample=True).max() < VOCABULARY


IA3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])


def with_biases(model: PeftModel) -> Adapter:
    """The base, whose biases an adapter has replaced."""
    model.add_adapter("z", LoraConfig(target_modules=["o_proj"], bias="all"))
    return Adapter(model)


@pytest.mark.parametrize(
    "adapter, said",
    [
        (lambda m: Adapter(m, "z"), "does not have. It has: x, y"),
        (with_biases, "adapter 'z' is trained with bias='all'"),
        (lambda m: get_peft_model(llama(1), IA3), "'default' is of the kind IA3"),
        (lambda m: Adapter(get_peft_model(llama(1), IA3)), "'default' is of the kind IA3"),
        (lambda m: m.get_base_model(), "a model with adapters inside"),
    ],
)
def test_adapters_that_are_refused(adapted, adapter, said):
    with pytest.raises(ConfigError, match=said):
        ProductOfExperts({"a": adapter(adapted)}, [1.0])


def test_merged_adapters_and_dora_are_refused(adapted):
    dora = get_peft_model(llama(1), LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="kind DoRA; only plain LoRA"):
        ProductOfExperts({"d": dora}, [1.0])
    adapted.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        ProductOfExperts({"x": Adapter(adapted, "x")}, [1.0])


def test_two_peft_models_around_one_base_are_refused():
    base, lora = llama(1), LoraConfig(target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="second time"):
        experts = {"1": get_peft_model(base, lora), "2": get_peft_model(base, lora)}
    with pytest.raises(ConfigError, match="'2' is a second PeftModel around one model"):
        ProductOfExperts(experts, [0.5, 0.5])


def test_a_peft_model_that_was_changed_behind_the_products_back(adapted):
    product = ProductOfExperts([Adapter(adapted), Adapter(adapted, "x")], [0.5, 0.5])
    with adapted.disable_adapter(), pytest.raises(RunError, match="its adapters disabled"):
        product.log_probs(PADDED)
    adapted.train()
    with pytest.raises(RunError, match=r"training mode.*product.eval\(\) first"):
        product.log_probs(PADDED)
    product.eval()
    adapted.merge_adapter(["x"])
    with pytest.raises(RunError, match="merged into it"):
        product.log_probs(PADDED)


def test_adapters_that_cannot_share_a_batch_are_found_before_they_are_used():
    lora = {"target_modules": ["q_proj"], "init_lora_weights": False}
    model = get_peft_model(llama(1), LoraConfig(**lora, modules_to_save=["lm_head"]), "x")
    model.add_adapter("y", LoraConfig(**lora))
    with pytest.raises(ConfigError, match="'x, y' cannot score a text: KeyError"):
        ProductOfExperts({"x": Adapter(model, "x"), "y": Adapter(model, "y")}, [0.5, 0.5])


def test_models_that_look_ahead_or_at_padding():
    sizes: Any = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "intermediate_size": 16, "initializer_range": 0.5}
    torch.manual_seed(9)
    with pytest.raises(ConfigError, match="'bert' looks ahead"):
        ProductOfExperts({"bert": BertForMaskedLM(BertConfig(**sizes, **heads))}, [1.0])
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=16, num_layers=1))
    with pytest.raises(ConfigError, match="'t5' is an encoder-decoder model"):
        ProductOfExperts({"t5": t5}, [1.0])
    recurrent = RwkvForCausalLM(RwkvConfig(**sizes, context_length=32)).eval()
    product = ProductOfExperts({"rwkv": recurrent}, [1.0])
    assert product.log_probs(PADDED[1:2]).isfinite().all()
    with pytest.raises(RunError, match="RwkvForCausalLM reads padding as text"):
        product.log_probs(PADDED, MASK)


def test_an_expert_that_gives_nan_is_named(one):
    product = ProductOfExperts({"good": one, "bad": broken()}, [0.5, 0.5])
    with pytest.raises(RunError, match="The expert 'bad' gives NaN or infinite logits in row 0"):
        generate(product)
    # Left out of the product, it still speaks: its own answer would be nonsense.
    with pytest.raises(RunError, match="'bad'"):
        ProductOfExperts({"good": one, "bad": broken()}, [1.0, 0.0]).log_probs(PADDED)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda p: p.log_probs(torch.tensor([[3, 23]])), "token 23; the experts share"),
        (lambda p: p.generate(torch.tensor([[-1]])), "token -1"),
        (lambda p: p.log_probs(torch.tensor([3, 4])), "must be whole numbers (B, T)"),
        (lambda p: p.log_probs(torch.tensor([[0.5]])), "torch.float32 (1, 1)"),
        (lambda p: p.log_probs(PADDED, MASK[:, :3]), "attention_mask is (3, 3) for tokens (3, 5)"),
        (lambda p: p.log_probs(PADDED.to("meta")), "input_ids are on meta and the experts on cpu"),
        (lambda p: p.generate(), "generate needs input_ids"),
        (lambda p: p.generate({"input_ids": PADDED}), "Unpack what a tokenizer returns"),
        (lambda p: p.log_probs(PADDED[:0]), "B and T at least 1, got torch.int64 (0, 5)"),
        (lambda p: p.log_probs(PADDED[:, :0]), "B and T at least 1, got torch.int64 (3, 0)"),
        (lambda p: p.generate(PADDED, past_key_values=DynamicCache()), "is a DynamicCache"),
        (lambda p: p.generate(PADDED, cache_implementation="static"), "'static' is not for a prod"),
        (lambda p: p.save_pretrained("somewhere"), "no weights of its own to save"),
    ],
)
def test_calls_that_are_refused(one, other, call, said):
    with pytest.raises(ConfigError) as refusal:
        call(ProductOfExperts([one, other], [0.5, 0.5]))
    assert said in str(refusal.value)


def test_products_that_leave_nothing(one):
    nothing = TokenReward(torch.full((VOCABULARY,), -math.inf))
    with pytest.raises(RunError, match="leave no token"):
        ProductOfExperts({"one": one, "nothing": nothing}, [1.0, 1.0]).log_probs(PADDED)
    one_less = torch.zeros(VOCABULARY)
    one_less[4] = -math.inf
    with pytest.raises(RunError, match="negative weight gives a token probability 0"):
        ProductOfExperts([one, TokenReward(one_less)], [1.0, -0.5]).log_probs(PADDED)


def test_prompt_lengths_and_rewards_of_a_wrong_shape(one):
    product = ProductOfExperts([one, one], [1.0, lambda positions: 0.5])
    lengths: Any = [1, 2, 3]
    with pytest.raises(ConfigError, match=r"must be a tensor \(3,\), one length a row"):
        product.log_probs(PADDED, prompt_lengths=lengths)
    wide = TokenReward(lambda ids, mask: torch.zeros(*ids.shape, VOCABULARY + 1))
    with pytest.raises(RunError, match="'1' scores 24 tokens, and the experts share 23"):
        ProductOfExperts([one, wide], [1.0, 1.0]).log_probs(PADDED)
    none: Any = TokenReward(lambda ids, mask: NOTHING)
    with pytest.raises(RunError, match="returned a NoneType for tokens"):
        ProductOfExperts([one, none], [1.0, 1.0]).log_probs(PADDED)


def test_a_schedule_that_sums_to_nothing_or_fits_no_position(one, other):
    def fading(positions):
        return 1 - positions.float() / 3

    with pytest.raises(ConfigError, match="sum to nothing: the weights at position 3"):
        generate(ProductOfExperts([one, other], [fading, 0.0]), eos_token_id=None)
    with pytest.raises(ConfigError, match=r"schedule gave \[1.0, 2.0\]"):
        generate(ProductOfExperts([one, other], [1.0, lambda positions: [1.0, 2.0]]))
