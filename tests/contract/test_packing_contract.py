"""What a packed pass relies on in TRL and transformers."""

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.trainer.utils import add_fused_lm_head

from trl_ext.packing.attention import packed_attention

IDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    found = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).eval()
    add_fused_lm_head(found, outputs=("log_probs", "entropy"))
    return found


def test_labels_that_are_shifted_already_are_taken_as_they_are(model):
    labels = torch.tensor([[5, -100, 6, 7]])
    output = model(input_ids=IDS, shift_labels=labels, fused_lm_head=True)
    logps = model(input_ids=IDS).logits.log_softmax(-1)[0]
    expected = torch.stack([logps[0, 5], torch.tensor(0.0), logps[2, 6], logps[3, 7]])
    torch.testing.assert_close(output.log_probs[0], expected)


def test_a_mask_of_four_dimensions_and_other_arguments_reach_attention(model, monkeypatch):
    seen = []

    def attention(module, query, key, value, attention_mask, packed=None, **options):
        seen.append((attention_mask, packed))
        return sdpa_attention_forward(module, query, key, value, None, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attention)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    model(input_ids=IDS, attention_mask=mask, packed="how")
    assert [packed for _, packed in seen] == ["how", "how"]
    assert all(given is mask for given, _ in seen)


def test_whoever_is_not_packed_gets_transformers_own(model, monkeypatch):
    assert AttentionInterface()["sdpa"] is packed_attention
    mask = torch.tensor([[0, 1, 1, 1]])
    ours = model(input_ids=IDS, attention_mask=mask).logits
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    assert torch.equal(ours, model(input_ids=IDS, attention_mask=mask).logits)
