"""Token log-probabilities against the plain forward pass, one row at a time."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from trl_ext.errors import ConfigError
from trl_ext.models.adapter import Adapter, reading
from trl_ext.models.log_probs import (
    batch_log_probs,
    batches_of,
    packed_batches_of,
    token_log_probs,
)
from trl_ext.vocabulary_kl import is_readable

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]]
COMPLETIONS = [[12, 13], [14, 15, 16, 17, 18, 19], [], [20], [21, 22, 23]]


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model.eval()


def gemma() -> Gemma2ForCausalLM:
    """Its logits have a soft cap, which weights as these reach."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2, final_logit_softcapping=2.0)
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model.eval()


def gpt2() -> GPT2LMHeadModel:
    """Learned positions, dropout, tied weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )


def one_by_one(model: Any, temperature: float = 1.0) -> list[torch.Tensor]:
    """No padding, no batch, all logits."""
    found = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logps = (model(ids).logits[0] / temperature).log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        found.append(
            torch.stack([logps[p, ids[0, p + 1]] for p in places]) if places else ids[0, :0]
        )
    return found


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", [llama, gemma, gpt2])
@pytest.mark.parametrize("max_tokens", [1, 12, 1000])
def test_each_token_has_what_a_plain_pass_gives_it(make, max_tokens):
    model = make()
    wanted = one_by_one(model.eval(), 0.7)
    model.train()
    found = token_log_probs(model, PROMPTS, COMPLETIONS, max_tokens=max_tokens, temperature=0.7)
    assert_same(found, wanted)
    assert model.training, "left as it was"


@pytest.mark.parametrize("make", [llama, gemma])
def test_with_a_gradient_it_is_the_same_number(make):
    """TRL's kernel in place of the tiles, and its gradient that of the plain pass."""
    model = make()
    rows = [0, 1, 3, 4]
    prompts, completions = ([each[r] for r in rows] for each in (PROMPTS, COMPLETIONS))
    logps = batch_log_probs(model, prompts, completions, temperature=0.7)
    wanted = one_by_one(model, 0.7)
    assert_same(list(logps.detach().split([2, 6, 1, 3])), [wanted[r] for r in rows])
    logps[2:8].sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ids = torch.tensor([PROMPTS[1] + COMPLETIONS[1]])
    plain = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1)
    plain.gather(-1, ids[0, 1:, None]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_read_and_left_alone():
    base = llama()
    wanted_of_base = one_by_one(base)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, lora, "x")
    model.add_adapter("y", lora)
    wanted_of_x = one_by_one(model)
    needed = {n: p.requires_grad for n, p in model.named_parameters()}
    for name, wanted in (("x", wanted_of_x), (None, wanted_of_base)):
        assert_same(token_log_probs(Adapter(model, name), PROMPTS, COMPLETIONS), wanted)
    of_y = token_log_probs(Adapter(model, "y"), PROMPTS, COMPLETIONS)
    assert (of_y[1] - wanted_of_x[1]).abs().max() > 1e-3
    assert model.active_adapters == ["x"]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == needed


def test_an_adapter_on_the_head_is_part_of_it():
    """Its weight is not all there is: the tiles go through the layer itself."""
    lora = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    inner = llama()
    model = get_peft_model(inner, lora).eval()
    assert_same(token_log_probs(model, PROMPTS, COMPLETIONS), one_by_one(model))
    # An accelerator asks this before it takes the kernel.
    assert not is_readable(inner)
    with model.disable_adapter():
        assert is_readable(inner)


def test_no_logits_but_those_of_the_completions():
    model, scored = llama(), []
    model.lm_head.register_forward_hook(lambda _, __, out: scored.append(out[..., 0].numel()))
    token_log_probs(model, PROMPTS * 40, COMPLETIONS * 40, max_tokens=4096)
    assert sum(scored) == 40 * 12
    assert max(scored) <= 64


def test_rows_of_like_length_share_a_batch():
    lengths = [3, 9, 2, 8, 5]
    # 9 and 8 are padded to 2·9 = 18 tokens; a third row would be 27. Then 5, 3, 2: 15.
    assert batches_of(lengths, [True] * 5, 18) == [[1, 3], [4, 0, 2]]
    assert batches_of(lengths, [True, False, True, True, True], 4) == [[3], [4], [0], [2]]
    assert batches_of([], [], 4) == []


def test_a_prompt_is_run_once_for_its_completions():
    model, seen = llama(), []
    model.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    prompts, completions = [[1, 2, 3], [4, 5], [1, 2, 3]], [[6, 7], [8], [9]]
    together = token_log_probs(model, prompts, completions)
    # A prompt of P tokens takes P - 1, a completion of T takes T.
    assert seen == [2 + 1 + 2 + 1 + 1]
    assert_same(
        together,
        [token_log_probs(model, [p], [c])[0] for p, c in zip(prompts, completions, strict=True)],
    )


def test_rows_of_a_prompt_share_a_batch():
    prompts, completions = [[1, 2, 3], [4, 5], [1, 2, 3], [4, 5]], [[6, 7], [8], [9], []]
    keep = [True, True, True, False]
    # The first prompt takes 2 and its completions 2 + 1; the second 1 and 1.
    assert packed_batches_of(prompts, completions, keep, 7) == [[0, 2, 1]]
    assert packed_batches_of(prompts, completions, keep, 6) == [[0, 2], [1]]
    assert packed_batches_of(prompts, completions, keep, 4) == [[0], [2], [1]]
    assert packed_batches_of([], [], [], 4) == []


@pytest.mark.parametrize(
    ("prompts", "completions", "says"),
    [
        ([[1], []], [[2], [3]], "Row 1 has no prompt"),
        ([[1] * 20], [[2] * 13], r"Row 0 has 20 \+ 13 tokens .* reads at most 32"),
        ([[1], [50]], [[2], [3]], "Row 1 has the token id 50, beyond the model's 50"),
    ],
)
def test_rows_that_cannot_be_scored(prompts, completions, says):
    with pytest.raises(ConfigError, match=says):
        token_log_probs(llama(), prompts, completions)


def test_an_empty_completion_needs_no_prompt():
    assert [len(x) for x in token_log_probs(llama(), [[], [1]], [[], [2]])] == [0, 1]


def test_reading_ends_as_it_began_after_an_error():
    model = llama().train()
    model.model.eval()
    with pytest.raises(RuntimeError), reading(model):
        assert not model.training
        raise RuntimeError
    assert model.training and not model.model.training
