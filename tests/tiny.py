"""A transformer that trains in milliseconds, with a tokenizer and data, for tests of trainers."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_ext.oracle import tabular_tokenizer

VOCABULARY = 6  # <eos>, a, b, c, d, e


def save_tiny_llama(folder: Path) -> str:
    """Random weights on disk: TRL re-reads the reference from there."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=0,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    # Logits near 0 would make every token equally likely and every gradient alike.
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    tabular_tokenizer(VOCABULARY).save_pretrained(folder)
    return str(folder)


def save_byte_llama(folder: Path) -> str:
    """A tiny model that reads any text, chat messages too: it can stand in for any recipe's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prompts(rows: int = 64) -> Dataset:
    """Prompts of one to three letters, so that batches are padded."""
    texts = [("abc" * 3)[i % 3 : i % 3 + 1 + i % 2] for i in range(rows)]
    return Dataset.from_dict({"prompt": texts})


def count_a(completions: list[str], **kwargs) -> list[float]:
    """Reward: the share of "a" among at most four tokens."""
    return [completion.count("a") / 4 for completion in completions]


# What keeps a test run on a CPU short and quiet.
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_completion_length": 4,
}
