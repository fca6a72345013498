"""Reward models that cannot judge what they are given say so, and nothing else is said."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from tests.tiny import save_byte_llama, save_tiny_llama
from tests.unit.poe.test_adapter_ensemble import save_adapter
from trl_ext.errors import ConfigError, RewardError
from trl_ext.poe.reward_models import reward_model


def save_classifier(folder: Path, base: str) -> str:
    torch.manual_seed(1)
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory) -> str:
    return save_byte_llama(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def of_letters(tmp_path_factory) -> str:
    """A classifier of six tokens, without a chat template."""
    folder = tmp_path_factory.mktemp("letters")
    return save_classifier(folder / "classifier", save_tiny_llama(folder / "base"))


def test_a_tokenizer_of_another_vocabulary(of_bytes, of_letters):
    reward: Any = reward_model(of_letters, tokenizer=of_bytes)
    with pytest.raises(RewardError, match=r"has 6 tokens, and .* id 6\d\. Give the tokenizer that"):
        reward(["a"], ["b"], [[1]])


def test_conversations_without_a_chat_template(of_letters):
    said = [{"role": "user", "content": "a"}]
    with pytest.raises(RewardError, match=r"its tokenizer has no chat template\. Take a model"):
        reward_model(of_letters)([said], [said], [[1]])


def test_what_is_no_tokenizer_or_cannot_pad(of_letters):
    with pytest.raises(ConfigError, match="reward_model: tokenizer is 3; it must be a tokenizer"):
        reward_model(of_letters, tokenizer=3)
    bare = AutoTokenizer.from_pretrained(of_letters)
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ConfigError, match=r"has no token to pad with, and no end token. Set its"):
        reward_model(of_letters, tokenizer=bare)


def test_an_empty_text_is_read_as_what_pads_a_batch(of_bytes, tmp_path):
    """Alone and beside others: the logit of the padding token as the only one."""
    path = save_classifier(tmp_path, of_bytes)
    model = LlamaForSequenceClassification.from_pretrained(path)
    torch.nn.init.normal_(model.model.embed_tokens.weight)  # that of the padding was 0
    model.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        expected = model(torch.tensor([[tokenizer.pad_token_id]])).logits.item()
    assert abs(expected) > 1e-3
    reward: Any = reward_model(path)
    assert reward([""], [""], [[]]) == pytest.approx([expected], abs=1e-5)
    assert reward(["", "a"], ["", "b"], [[], [1]])[0] == pytest.approx(expected, abs=1e-5)


def test_damaged_files(of_letters, of_bytes, tmp_path):
    adapter = save_adapter(tmp_path / "whole", of_bytes, 1)
    cases = [
        (of_letters, "model.safetensors", "The reward model '.*' cannot be opened: .*header"),
        (of_letters, "config.json", "The reward model '.*' cannot be opened: .*not a valid JSON"),
        (adapter, "adapter_model.safetensors", "weights of the adapter '.*' cannot be opened: "),
        (adapter, "adapter_config.json", "The adapter '.*' cannot be opened: Unterminated"),
    ]
    for number, (whole, name, says) in enumerate(cases):
        damaged = tmp_path / f"{number}"
        shutil.copytree(whole, damaged)
        (damaged / name).write_bytes((damaged / name).read_bytes()[:20])
        with pytest.raises(ConfigError, match=says):
            reward_model(str(damaged))


def test_a_damaged_tokenizer_config_beside_an_adapter(of_bytes, tmp_path):
    adapter = save_adapter(tmp_path / "whole", of_bytes, 1)
    (tmp_path / "whole" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"The tokenizer_config.json beside '.*' cannot be read"):
        reward_model(adapters=[adapter])


def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(of_bytes, tmp_path):
    adapter = save_adapter(tmp_path / "alone", of_bytes, 1)
    one: Any = reward_model(adapter)
    both: Any = reward_model(adapters=[adapter])
    assert one.tokenizer.name_or_path == of_bytes
    assert one(["a"], ["b"], [[1]]) == both(["a"], ["b"], [[1]])


class Recorder(logging.Handler):
    """Of a logger whose stream was opened before the test began."""

    def __init__(self):
        super().__init__()
        self.said: list[str] = []

    def emit(self, record):
        self.said.append(record.getMessage())


def test_opening_says_nothing(of_bytes, tmp_path, capfd):
    """transformers would print a table of the head that the base lacks, and bars."""
    adapters = [save_adapter(tmp_path / f"{n}", of_bytes, n) for n in (1, 2)]
    path = save_classifier(tmp_path / "whole", of_bytes)
    capfd.readouterr()
    handler = Recorder()
    of_transformers = logging.getLogger("transformers")
    level = of_transformers.level
    of_transformers.addHandler(handler)
    of_transformers.setLevel(logging.WARNING)
    try:
        reward_model(adapters=adapters)
        reward_model(path)
        with pytest.raises(ConfigError, match=r"has no score.weight"):
            reward_model(of_bytes)
        assert of_transformers.level == logging.WARNING, "afterwards it speaks as before"
    finally:
        of_transformers.removeHandler(handler)
        of_transformers.setLevel(level)
    assert (handler.said, capfd.readouterr()) == ([], ("", ""))


def test_a_model_of_tokens_appends_none(of_bytes, tmp_path):
    LlamaForTokenClassification.from_pretrained(of_bytes, num_labels=1).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(of_bytes).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"judges each token as .* append_eos is true. Leave it"):
        reward_model(str(tmp_path), append_eos=True)
    reward_model(str(tmp_path), append_eos=False)
