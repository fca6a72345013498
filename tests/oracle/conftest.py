"""A small random policy, its enumeration, and the tokenizer and folder that TRL wants."""

import pytest
import torch

from trl_ext.oracle import Enumeration, TabularLM, TabularLMConfig, tabular_tokenizer


@pytest.fixture
def config() -> TabularLMConfig:
    """V=4, T=3, two prompts: 40 completions of each."""
    return TabularLMConfig(vocab_size=4, max_completion_length=3, num_prompts=2)


@pytest.fixture
def space(config) -> Enumeration:
    return Enumeration(config)


@pytest.fixture
def model(config) -> TabularLM:
    torch.manual_seed(1)
    return TabularLM(config).double()


@pytest.fixture
def reference(config) -> TabularLM:
    torch.manual_seed(2)
    return TabularLM(config).double()


@pytest.fixture
def rewards(space) -> torch.Tensor:
    return torch.randn(2, len(space), dtype=torch.float64)


@pytest.fixture
def folder(config, tmp_path) -> str:
    """A float32 model and its tokenizer on disk, where TRL finds the reference again."""
    TabularLM(config).save_pretrained(tmp_path)
    tabular_tokenizer(config.vocab_size).save_pretrained(tmp_path)
    return str(tmp_path)
