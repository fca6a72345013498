"""Rows run packed, or trimmed, give what the model gives for padded rows."""

import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.utils import add_fused_lm_head

from trl_ext.packing import (
    PACKED_MODEL_TYPES,
    Packed,
    PackedPass,
    TrimmedPass,
    backbone_states,
    scoring_pass,
    which_prompt,
    why_not_packed,
)
from trl_ext.packing.attention import packed_attention, register

VOCABULARY, PROMPT, COMPLETION = 50, 7, 9
PROMPTS, COMPLETIONS = (5, 5, 1, 7, 5), (3, 0, 9, 1, 6)
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
# Windows that are shorter than the rows.
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "starcoder2": {"sliding_window": 4},
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}
# Of both, angles of short rows are others than those of long ones.
OF_WIDTH: dict[str, dict[str, Any]] = {
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": 12,
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 4.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 12,
        },
    },
}
# In training mode they would draw what they drop.
WITHOUT_DROPOUT = dict.fromkeys(
    ("resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout", "embedding_dropout"), 0.0
)


def tiny(model_type: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **(TINY | WITHOUT_DROPOUT | WINDOWS.get(model_type, {}) | options)
    )
    model = AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Five rows, the first two of one prompt; one completion is empty."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in PROMPTS]
    prompts[1] = prompts[0]
    ids = torch.zeros(len(PROMPTS), PROMPT + COMPLETION, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, length) in enumerate(zip(prompts, COMPLETIONS, strict=True)):
        begin, end = PROMPT - len(prompt), PROMPT + length
        ids[row, begin:PROMPT] = prompt
        ids[row, PROMPT:end] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[row, begin:end] = 1
    return ids, mask


def scored(run: Any, model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and a gradient, as TRL asks for them."""
    model.zero_grad()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-COMPLETION] = -100
    output = run(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    logps = output.log_probs[:, -COMPLETION:]
    weights = torch.linspace(-1, 2, logps.numel()).view_as(logps)
    (logps * weights).sum().backward()
    gradient = torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    )
    return logps.detach(), output.entropy[:, -COMPLETION:].detach(), gradient


def assert_same(run: Any, model: Any, batch: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(scored(run, model, *batch), scored(model, model, *batch), strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


def packed_pass(model: Any, share_prompts: bool = True, keeps_last: bool = False) -> PackedPass:
    found = scoring_pass(
        model, model, COMPLETION, share_prompts=share_prompts, keeps_last=keeps_last
    )
    assert isinstance(found, PackedPass)
    return found


@pytest.mark.parametrize("model_type", sorted(PACKED_MODEL_TYPES))
def test_packed_rows_are_padded_rows(batch, model_type):
    model = tiny(model_type)
    assert_same(packed_pass(model), model, batch)


@pytest.mark.parametrize("keeps_last", [False, True])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_however_they_are_packed(batch, share_prompts, keeps_last):
    model = tiny("llama")
    assert_same(packed_pass(model, share_prompts, keeps_last), model, batch)


@pytest.mark.parametrize("keeps_last", [False, True])
def test_only_what_predicts_a_token_has_a_label(batch, keeps_last):
    ids, mask = batch
    packed = Packed.of(ids, mask, COMPLETION, keeps_last=keeps_last)
    assert packed is not None and packed.labels.shape == packed.ids.shape
    assert packed.labels.ne(-100).sum() == sum(COMPLETIONS)


def test_windows_of_every_length(batch):
    """The longest prompt has 7 tokens, of which its own segment has 6; the longest row has 14."""
    model = tiny("mistral", sliding_window=1, num_hidden_layers=1)
    for window in (1, 2, 5, 6, 7, 12, 13, 14, 15):
        model.config.sliding_window = model.model.layers[0].self_attn.sliding_window = window
        assert_same(packed_pass(model), model, batch)


def test_segments_that_attend_together_are_alike(batch):
    """Of 9, 6, 3 and 1 tokens: 9 is at most 1.5 times 6, but not 1.5 times 3."""
    ids, mask = batch
    packed = Packed.of(ids, mask, COMPLETION)
    assert packed is not None
    assert [each.lengths.tolist() for each in packed.completions] == [[9, 6], [3], [1]]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(batch, use_reentrant):
    model = tiny("llama").train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(packed_pass(model), model, batch)


def test_with_an_adapter(batch):
    model = get_peft_model(
        tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    assert_same(packed_pass(model), model, batch)


def test_each_prompt_is_run_once(batch):
    ids, mask = batch
    model, seen = tiny("llama"), []
    model.model.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["input_ids"].numel()), with_kwargs=True
    )
    scored(packed_pass(model), model, ids, mask)
    scored(packed_pass(model, share_prompts=False), model, ids, mask)
    scored(model, model, ids, mask)
    # A prompt of P tokens takes P - 1, a completion of T takes T. The second prompt is the first.
    # Nothing is saved by leaving out the last token of a prompt: its completions begin with it.
    begins = [length - 1 for length in PROMPTS]
    assert seen[0] == sum(begins) - begins[1] + sum(COMPLETIONS)
    assert seen[1] == sum(begins) + sum(COMPLETIONS)
    assert seen[2] == len(PROMPTS) * (PROMPT + COMPLETION)


@pytest.mark.parametrize("how", ["packed", "trimmed", "trimmed on both sides", "hole"])
def test_states_predict_the_tokens_and_what_would_follow(batch, how):
    ids, mask = (each.clone() for each in batch)
    if how == "hole":  # which keeps a batch from being packed
        mask[0, PROMPT + 1] = 0
    if how == "trimmed on both sides":
        ids, mask = ids[:2], mask[:2]
    model = tiny("llama")
    is_trimmed = how.startswith("trimmed")
    run = TrimmedPass(model, model, 9) if is_trimmed else packed_pass(model, keeps_last=True)
    hidden: list[Tensor] = []
    model.model.register_forward_hook(lambda m, a, output: hidden.append(output.last_hidden_state))
    scored(run, model, ids, mask)
    scored(model, model, ids, mask)
    found, whole = run.states(0, hidden[0]), hidden[1][:, -COMPLETION - 1 :]
    assert found.shape == whole.shape
    of_row = torch.cat([torch.ones(len(ids), 1), mask[:, -COMPLETION:]], dim=1).bool()
    torch.testing.assert_close(found[of_row], whole[of_row])


def test_backbone_states(batch):
    ids, mask = batch
    backbone, seen = tiny("llama").model, []
    backbone.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["input_ids"].numel()), with_kwargs=True
    )
    whole = backbone(input_ids=ids, attention_mask=mask).last_hidden_state[:, -COMPLETION - 1 :]
    of_row = torch.cat([torch.ones(len(ids), 1), mask[:, -COMPLETION:]], dim=1).bool()
    for trim_padding in (False, True):
        found = backbone_states(
            backbone, backbone, ids, mask, COMPLETION, trim_padding=trim_padding
        )
        torch.testing.assert_close(found[of_row], whole[of_row])
    # As in `test_each_prompt_is_run_once`, and the last token of each completion.
    begins = sum(PROMPTS) - len(PROMPTS) - (PROMPTS[1] - 1)
    assert seen == [ids.numel(), ids.numel(), begins + sum(COMPLETIONS) + len(COMPLETIONS)]


@pytest.mark.parametrize(
    "absent",
    [(2, slice(0, PROMPT)), (3, 2), (3, PROMPT - 1), (2, PROMPT + 4)],
    ids=["prompt", "hole in a prompt", "end of a prompt", "hole in a completion"],
)
def test_what_cannot_be_packed_is_trimmed(batch, absent):
    ids, mask = (each.clone() for each in batch)
    mask[absent] = 0
    assert Packed.of(ids, mask, COMPLETION) is None
    model = tiny("llama")
    assert_same(packed_pass(model), model, (ids, mask))


def test_nothing_is_trimmed_to_something(batch):
    ids, mask = batch
    assert Packed.of(ids, mask, ids.size(1)) is None  # no column of a prompt
    model = tiny("llama")
    nothing = mask.clone()
    nothing[:, -COMPLETION:] = 0
    output = packed_pass(model)(
        input_ids=ids, attention_mask=nothing, labels=ids, fused_lm_head=True
    )
    assert output.log_probs.size(1) >= COMPLETION


def test_a_pad_token_may_be_a_token():
    ids, mask = torch.tensor([[0, 5], [0, 5], [3, 5]]), torch.tensor([[0, 1], [1, 1], [1, 1]])
    assert len(set(which_prompt(ids, mask).tolist())) == 3
    assert which_prompt(ids, torch.ones_like(mask)).tolist() == [0, 0, 1]
    rows, one = torch.cat([ids, ids], dim=1), torch.cat([mask, torch.ones_like(mask)], dim=1)
    packed = Packed.of(rows, one, 2)
    # Prompts of 1, 2 and 2 tokens, all but the last of each; what predicts two tokens in each row.
    assert packed is not None and packed.ids.numel() == 0 + 1 + 1 + 3 * 2


def test_only_rotary_positions_are_shifted(batch):
    ids, mask = (each[:2] for each in batch)  # five of seven columns are the longest prompt
    widths = []
    for model_type in ("llama", "gpt2"):
        model = tiny(model_type)
        model.base_model.register_forward_pre_hook(
            lambda module, args, options: widths.append(options["input_ids"].size(1)),
            with_kwargs=True,
        )
        assert_same(TrimmedPass(model, model, COMPLETION), model, (ids, mask))
    longest = max(COMPLETIONS[:2])
    assert widths == [5 + longest, PROMPT + COMPLETION, PROMPT + longest, PROMPT + COMPLETION]


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_width_are_left_alone(batch, rope_type):
    """Rows of 16 columns turn by other angles than those of 12: none may be left out."""
    model = tiny("llama", **OF_WIDTH[rope_type])
    ids, mask = (each[:2] for each in batch)
    run = scoring_pass(model, model, COMPLETION, share_prompts=True, keeps_last=False)
    assert "width" in str(why_not_packed(model)) and isinstance(run, TrimmedPass)
    assert_same(run, model, (ids, mask))
    wide = backbone_states(model.model, model.model, ids, mask, COMPLETION)
    whole = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(wide, whole[:, -COMPLETION - 1 :])


@pytest.mark.parametrize("window", [None, 4])
def test_a_pass_leaves_nothing_behind(batch, monkeypatch, window):
    """Its attention masks are as large as its longest segment squared, and each layer has them."""
    model = tiny("mistral", sliding_window=window, num_hidden_layers=2)
    seen, of = [], Packed.of.__func__
    made = lambda cls, *args, **given: seen.append(of(cls, *args, **given)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(Packed, "of", classmethod(made))
    run = packed_pass(model, keeps_last=True)
    for _ in range(2):
        scored(run, model, *batch)
    known = weakref.WeakSet(seen)
    if window:
        assert seen[0].attended_within(window) is seen[0].attended_within(window)
    seen.clear()
    assert not known and run.states(1, torch.ones(1, 99, 3)).shape == (5, COMPLETION + 1, 3)


def test_another_sdpa_is_left_alone(monkeypatch):
    model = tiny("llama")

    def other(*args, **options):
        raise AssertionError

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", other)
    register()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
    assert "registered" in str(why_not_packed(model))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", sdpa_attention_forward)
    register()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is packed_attention


def test_a_model_that_is_not_packed_is_bit_identical(batch, monkeypatch):
    """With sdpa as transformers has it: padded rows, and generation with each kind of cache."""
    ids, mask = batch
    model = tiny("llama")
    found = []
    for attention in (packed_attention, sdpa_attention_forward):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attention)
        outputs = [model(input_ids=ids, attention_mask=mask).logits]
        for cache in ("dynamic", "static"):
            outputs += [
                model.generate(
                    input_ids=ids[:, :PROMPT],
                    attention_mask=mask[:, :PROMPT],
                    max_new_tokens=4,
                    do_sample=False,
                    cache_implementation=cache,
                    disable_compile=True,
                )
            ]
        found.append(outputs)
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_why_not():
    assert why_not_packed(tiny("llama")) is None
    assert "gpt2" in str(why_not_packed(tiny("gpt2")))
    assert "eager" in str(why_not_packed(tiny("llama", attn_implementation="eager")))
    routed = tiny("mixtral", output_router_logits=True)
    assert "load-balancing" in str(why_not_packed(routed))
    prompted = get_peft_model(
        tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    assert "virtual tokens" in str(why_not_packed(prompted))
    assert isinstance(
        scoring_pass(tiny("gpt2"), tiny("gpt2"), 9, share_prompts=True, keeps_last=False),
        TrimmedPass,
    )
