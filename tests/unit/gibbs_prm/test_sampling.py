"""Rollouts: shared caches against naive sampling, where rollouts end, what is left as it was."""

import math
import sys
from itertools import pairwise, product
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.tiny import VOCABULARY
from trl_ext.errors import ConfigError, MissingDependencyError
from trl_ext.gibbs_prm.rollout_cache import trunks, why_not_shared
from trl_ext.gibbs_prm.rollout_vllm import VLLMSampler
from trl_ext.gibbs_prm.sampling import GenerateSampler
from trl_ext.models.adapter import Adapter
from trl_ext.oracle import Enumeration, TabularLM, TabularLMConfig, tabular_tokenizer

LENGTH = 7
COMPLETION = [1, 2, 5, 3, 3, 4]
PROMPT = [2, 4]
# The prompt, its prefixes, another completion of it that parts after two tokens, another prompt.
PREFIXES = [
    PROMPT,
    *(PROMPT + COMPLETION[:t] for t in (1, 2, 4, 6)),
    [*PROMPT, 1, 2, 1, 1],
    [3],
]
PROMPT_LENGTHS = [2, 2, 2, 2, 2, 2, 1]
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "max_position_embeddings": 64,
}


@pytest.fixture
def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SETTINGS)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def sampler(model, **options):
    settings: dict[str, Any] = {"max_completion_length": LENGTH}
    return GenerateSampler(model, **settings | options)


def drawn(model, count=1, seed=0, **options):
    return sampler(model, **options).sample(
        PREFIXES, count, prompt_lengths=PROMPT_LENGTHS, seed=seed
    )


def by_hand(model, prefix, prompt_length, ends=(0,)):
    """Greedy, one token at a time, without a cache."""
    said = list(prefix)
    while len(said) < prompt_length + LENGTH:
        said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
        if said[-1] in ends:
            break
    return said[len(prefix) :]


@pytest.mark.parametrize("share", ["prefix", "none"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_greedy_rollouts_are_those_of_the_model(llama, share, batch_size):
    found = drawn(llama, 2, share=share, batch_size=batch_size, temperature=0)
    for prefix, length, rollouts in zip(PREFIXES, PROMPT_LENGTHS, found, strict=True):
        assert rollouts == [by_hand(llama, prefix, length)] * 2
    assert len({len(rollouts[0]) for rollouts in found}) > 2


def test_a_rollout_ends_at_any_end_token(llama):
    greedy = {"temperature": 0, "stop_token_ids": [1, 4]}
    found = drawn(llama, **greedy)
    expected = [
        by_hand(llama, prefix, length, ends=(0, 1, 4))
        for prefix, length in zip(PREFIXES, PROMPT_LENGTHS, strict=True)
    ]
    assert [rollouts[0] for rollouts in found] == expected
    assert any(rollout[-1] in (1, 4) and len(rollout) < LENGTH for rollout in expected)


def test_which_tokens_end(llama):
    tokenizer = tabular_tokenizer(VOCABULARY)
    assert sampler(llama).end_ids == {0}
    llama.generation_config.eos_token_id = [3, 5]
    assert sampler(llama, tokenizer=tokenizer, stop_token_ids=[4]).end_ids == {0, 3, 4, 5}
    assert sampler(llama, tokenizer=[2]).end_ids == {2}
    assert sampler(llama, tokenizer=0).end_ids == {0}
    assert sampler(llama, tokenizer=[]).end_ids == frozenset()
    assert {len(rollout) for rollout in drawn(llama, 3, tokenizer=[])[0]} == {LENGTH}


@pytest.mark.parametrize("batch_size", [4, 64])
def test_sampled_rollouts_do_not_depend_on_sharing(llama, batch_size):
    """One seed draws the same tokens from the same probabilities, in the same batches."""
    # In an order in which both make the same batches.
    order = trunks(PREFIXES)[1]
    prefixes = [PREFIXES[number] for number in order]
    lengths = [PROMPT_LENGTHS[number] for number in order]
    shared, naive = (
        sampler(llama, share=share, batch_size=batch_size).sample(
            prefixes, 9, prompt_lengths=lengths, seed=3
        )
        for share in ("prefix", "none")
    )
    assert shared == naive
    assert len({tuple(rollout) for rollout in shared[0]}) > 3


def next_token_probabilities(model, prefix, temperature):
    logits = model(torch.tensor([prefix])).logits[0, -1].detach().double()
    return (logits / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("share", ["prefix", "none"])
def test_the_first_tokens_have_the_models_frequencies(llama, share, temperature):
    """2000 rollouts a prefix. Pearson's statistic has mean d = cells − 1 and standard deviation
    √(2d); cells that expect less than 5 are put together. At most 4 deviations above d."""
    llama.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=5.0)
    count = 2000
    found = drawn(llama, count, share=share, batch_size=4000, temperature=temperature)
    for prefix, rollouts in zip(PREFIXES, found, strict=True):
        observed = torch.bincount(torch.tensor([r[0] for r in rollouts]), minlength=VOCABULARY)
        expected = count * next_token_probabilities(llama, prefix, temperature)
        rare = expected < 5
        cells = [*zip(observed[~rare].tolist(), expected[~rare].tolist(), strict=True)]
        if rare.any():
            cells.append((observed[rare].sum().item(), expected[rare].sum().item()))
        freedom = len(cells) - 1
        statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
        assert statistic <= freedom + 4 * math.sqrt(2 * freedom)


def test_whole_rollouts_of_a_tabular_model_have_its_distribution():
    """20 000 rollouts of "ab" among completions of at most 3 tokens; the least expects over 20."""
    torch.manual_seed(3)
    model = TabularLM(TabularLMConfig(vocab_size=3, max_completion_length=3, initializer_range=0.3))
    space = Enumeration(model.config)
    tabular = GenerateSampler(model, max_completion_length=3, batch_size=20_000)
    assert not tabular.shares
    assert "no cache" in str(tabular.note)
    (rollouts,) = tabular.sample([[1, 2]], 20_000, prompt_lengths=[1])
    probabilities = space.logps(model)[0].detach().exp() * (space.tokens[:, 0] == 2)
    probabilities /= probabilities.sum()
    whole = torch.tensor([[2, *r, *[0] * (2 - len(r))] for r in rollouts])
    observed = torch.bincount(space.index(whole), minlength=len(space))
    possible = probabilities > 0
    assert observed[~possible].sum() == 0
    expected = 20_000 * probabilities[possible]
    assert expected.min() > 20
    freedom = len(expected) - 1
    statistic = ((observed[possible] - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) <= 4 * math.sqrt(2 * freedom)


def test_the_seed_decides_and_the_random_state_stays(llama):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one, again, other = (drawn(llama, 4, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_model_is_left_as_it_was(llama):
    llama.train()
    llama.model.layers[0].eval()
    config, own = llama.generation_config, llama.generation_config.to_dict()
    modes = [module.training for module in llama.modules()]
    seen = []
    llama.lm_head.register_forward_hook(lambda module, *_: seen.append(module.training))
    drawn(llama)
    with pytest.raises(RuntimeError, match="stop here"):
        llama.lm_head.register_forward_hook(interrupt)
        drawn(llama)
    assert not any(seen)
    assert [module.training for module in llama.modules()] == modes
    assert llama.generation_config is config
    assert config.to_dict() == own


def interrupt(*_):
    raise RuntimeError("stop here")


def tokens_read(model, **options):
    """How many tokens its layers read, batch and time together."""
    read = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: read.append(args[0].numel())
    )
    drawn(model, **options)
    hook.remove()
    return read


def test_what_prefixes_share_is_read_once(llama):
    """No rollout ends here, and all fit into one batch of 7 rows.

    The trunks: the longest prefix of the completion (8 tokens), the other completion (6) and the
    other prompt (1). Then 7 rows read their prefix's last token and one a step; the longest budget
    is 7, its last token is read by nobody. Naively the first step reads 7 rows as wide as the
    longest prefix.
    """
    options = {"tokenizer": [], "batch_size": 100}
    assert sorted(tokens_read(llama, **options)) == sorted([8, 6, 1, 7, *[7] * 6])
    assert tokens_read(llama, share="none", **options) == [7 * 8, *[7] * 6]


def test_a_trunk_is_read_once_for_all_of_its_batches(llama):
    read = tokens_read(llama, count=4, tokenizer=[], batch_size=3)
    assert sorted(n for n in read if n > 3) == [6, 8]


def test_a_batch_stops_when_its_budgets_are_spent(llama):
    """Prefixes with 1 and 2 tokens left: two steps, the second without the first prefix's need."""
    read = []
    llama.model.embed_tokens.register_forward_hook(
        lambda module, args, output: read.append(args[0].numel())
    )
    prefixes = [PROMPT + COMPLETION, [*PROMPT, *COMPLETION[:5]]]
    found = sampler(llama, tokenizer=[], share="none").sample(prefixes, 1, prompt_lengths=[2, 2])
    assert [len(rollouts[0]) for rollouts in found] == [1, 2]
    assert read == [2 * 8, 2]


def test_a_row_that_is_over_holds_nobody_up(llama):
    """The second row may go on for 7 tokens, but ends with its second; the first has 1 left, and
    would not meet that end token in 7."""
    first_two = by_hand(llama, PROMPT, 2, ends=())[:2]
    assert first_two[0] != first_two[1]
    long = next(
        [*PROMPT, *tokens]
        for tokens in product(range(1, VOCABULARY), repeat=6)
        if first_two[1] not in by_hand(llama, [*PROMPT, *tokens], 8, ends=())
    )
    read = []
    llama.model.embed_tokens.register_forward_hook(
        lambda module, args, output: read.append(args[0].numel())
    )
    one = sampler(llama, tokenizer=[first_two[1]], share="none", temperature=0)
    found = one.sample([long, PROMPT], 1, prompt_lengths=[2, 2])
    assert found[1] == [first_two]
    assert len(read) == 2


def test_rare_tokens_are_drawn_too():
    """transformers' default keeps the 50 likeliest; here 200 are nearly alike. Of 500 draws 184
    are expected to be seen, with a standard deviation below √(200·.08) = 4."""
    wide: dict[str, Any] = SETTINGS | {"vocab_size": 200}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**wide)).eval()
    (rollouts,) = sampler(model, max_completion_length=1, batch_size=500).sample([[3]], 500)
    assert len({token for (token,) in rollouts}) > 184 - 16


def test_the_logits_of_a_prefix_are_not_made(llama):
    widths = set()
    llama.lm_head.register_forward_hook(lambda module, args, out: widths.add(out.size(1)))
    drawn(llama)
    assert widths == {1}


def test_trunks():
    texts = [[1, 2], [1], [1, 2, 3], [2], [1, 3], [1, 2], []]
    trunk, order = trunks(texts)
    for number, of in enumerate(trunk):
        begins = [t for t in texts if t[: len(texts[number])] == texts[number]]
        assert texts[of] in begins
        # No text goes on where a trunk ends.
        assert not [
            t for t in texts if len(t) > len(texts[of]) and t[: len(texts[of])] == texts[of]
        ]
    assert sorted(order) == list(range(7))
    blocks = [trunk[number] for number in order]
    assert len([a for a, b in pairwise(blocks) if a != b]) + 1 == len(set(blocks))


def test_caches_that_cannot_be_cut_are_not_shared(llama):
    assert why_not_shared(llama) is None
    assert sampler(llama).shares
    assert sampler(llama).note is None
    assert not sampler(llama, share="none").shares
    assert sampler(llama, share="none").note is None
    settings: dict[str, Any] = SETTINGS | {"sliding_window": 4}
    sliding = MistralForCausalLM(MistralConfig(**settings)).eval()
    slides = sampler(sliding)
    assert not slides.shares
    assert "DynamicSlidingWindowLayer" in str(slides.note)
    assert sampler(sliding, share="none").note is None
    found = drawn(sliding, temperature=0)
    for prefix, length, rollouts in zip(PREFIXES, PROMPT_LENGTHS, found, strict=True):
        assert rollouts == [by_hand(sliding, prefix, length)]
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    stretched = LlamaForCausalLM(LlamaConfig(**SETTINGS, rope_parameters=rope))
    assert "rotary embedding (dynamic)" in str(why_not_shared(stretched))


def test_models_whose_positions_are_their_own_affair():
    config = LlamaConfig(**SETTINGS)
    text = SimpleNamespace(get_text_config=lambda decoder: config)
    model = SimpleNamespace(
        config=text, _supports_default_dynamic_cache=lambda: True, forward=lambda position_ids: None
    )
    assert "more than text" in str(why_not_shared(model))
    model.config = config
    assert why_not_shared(model) is None
    model.forward = lambda input_ids: None
    assert "no position_ids" in str(why_not_shared(model))


def test_adapters_sample_with_what_is_meant(llama):
    torch.manual_seed(5)
    base = drawn(llama, temperature=0)
    peft = get_peft_model(llama, LoraConfig(init_lora_weights=False, r=4, lora_alpha=32))
    config = llama.generation_config
    on, off = Adapter(peft, "default"), Adapter(peft, None)
    assert sampler(on).shares
    assert drawn(off, temperature=0) == base
    adapted = drawn(on, temperature=0)
    assert adapted == drawn(peft, temperature=0)
    assert adapted != base
    peft.eval()
    assert adapted[3] == [by_hand(peft, PREFIXES[3], 2)]
    assert llama.generation_config is config


def test_a_learned_prompt_is_refused(llama):
    prompted = get_peft_model(
        llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ConfigError, match=r"learns a prompt \(PromptTuningConfig\)"):
        sampler(prompted)


@pytest.mark.parametrize(
    ("prefixes", "lengths", "says"),
    [
        ([[1], []], None, "Prefix 1 has 0 tokens"),
        ([[1, 2]], [0], "Prefix 0 has 2 tokens, 0 of them its prompt's"),
        ([[1, 2]], [3], "3 of them its prompt's"),
        ([[1] * 9], [2], "has 7 tokens of a completion, and max_completion_length is 7"),
        ([[1] * 58], None, "58 tokens, with max_completion_length 7 that is 65, .* at most 64"),
        ([[1], [2]], [1], "2 prefixes and 1 prompt_lengths"),
    ],
)
def test_prefixes_without_room(llama, prefixes, lengths, says):
    llama.register_forward_pre_hook(interrupt)
    with pytest.raises(ConfigError, match=says):
        sampler(llama).sample(prefixes, 1, prompt_lengths=lengths)


def test_a_prompt_that_just_fits(llama):
    ((rollout,),) = sampler(llama, tokenizer=[]).sample([[1] * 57], 1)
    assert len(rollout) == LENGTH
    assert sampler(llama).sample([], 3) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_completion_length": 0}, "max_completion_length is 0; it must be a whole number"),
        ({"max_completion_length": True}, "max_completion_length is True"),
        ({"batch_size": 2.0}, r"batch_size is 2\.0"),
        ({"temperature": -1}, "temperature is -1; it must be 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": True}, "temperature is True"),
        ({"share": "all"}, "share is 'all'; it must be 'prefix' or 'none'"),
    ],
)
def test_arguments_out_of_range(llama, options, says):
    with pytest.raises(ConfigError, match=says):
        sampler(llama, **options)


@pytest.mark.parametrize("count", [0, True, 1.5])
def test_a_number_of_rollouts_that_is_none(llama, count):
    with pytest.raises(ConfigError, match="num_rollouts is"):
        drawn(llama, count)


class Engine:
    """Stands in for a `vllm.LLM`: keeps what it is asked and answers with tokens 1, 2, 3, …"""

    def __init__(self, caches=True, longest=64):
        self.asked: Any = None
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(
                max_model_len=longest, try_get_generation_config=lambda: {"eos_token_id": [9]}
            ),
            vllm_config=SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=caches)),
        )

    def get_tokenizer(self):
        return tabular_tokenizer(VOCABULARY)

    def generate(self, prompts, sampling_params, use_tqdm):
        self.asked = (prompts, sampling_params, use_tqdm)
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(token_ids=tuple(range(1 + k, 1 + k + params.max_tokens)))
                    for k in range(params.n)
                ]
            )
            for params in sampling_params
        ]


@pytest.fixture
def vllm(monkeypatch):
    module: Any = ModuleType("vllm")
    module.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_vllm_is_asked_for_the_models_own_distribution(vllm):
    engine = Engine()
    own = VLLMSampler(engine, max_completion_length=4, temperature=0.5, stop_token_ids=[3])
    assert (own.end_ids, own.shares, own.note) == ({0, 3, 9}, True, None)
    found = own.sample([[5], [5, 1], [4, 4, 1]], 2, prompt_lengths=[1, 1, 2], seed=100)
    # Token 3 ends; budgets of 4, 3 and 3.
    assert found == [[[1, 2, 3], [2, 3]], [[1, 2, 3], [2, 3]], [[1, 2, 3], [2, 3]]]
    prompts, parameters, bar = engine.asked
    assert prompts == [{"prompt_token_ids": ids} for ids in ([5], [5, 1], [4, 4, 1])]
    assert bar is False
    assert [(p.n, p.max_tokens, p.seed) for p in parameters] == [
        (2, 4, 100),
        (2, 3, 102),
        (2, 3, 104),
    ]
    for each in parameters:
        assert (each.temperature, each.top_p, each.min_p, each.top_k) == (0.5, 1.0, 0.0, -1)
        assert each.stop_token_ids == [0, 3, 9]
    engine.asked = None
    assert own.sample([], 2) == []
    assert engine.asked is None


def test_vllm_refuses_what_it_would_cut(vllm):
    engine = Engine(longest=4)
    short = VLLMSampler(engine, max_completion_length=4)
    with pytest.raises(ConfigError, match=r"that is 5, .* at most 4"):
        short.sample([[1]], 1)
    with pytest.raises(ConfigError, match="num_rollouts is True"):
        short.sample([[1]], True)
    assert engine.asked is None
    with pytest.raises(ConfigError, match="temperature is 0; it must be a positive"):
        VLLMSampler(engine, max_completion_length=4, temperature=0)
    with pytest.raises(ConfigError, match="max_completion_length is 0"):
        VLLMSampler(engine, max_completion_length=0)


def test_vllm_without_its_prefix_cache_says_so(vllm):
    alone = VLLMSampler(Engine(caches=False), max_completion_length=4)
    assert not alone.shares
    assert "enable_prefix_caching=True" in str(alone.note)


def test_vllm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingDependencyError, match="pip install vllm"):
        VLLMSampler(Engine(), max_completion_length=4)
