"""TabularLM is the table it says it is, and an ordinary transformers model."""

import itertools

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from trl_ext.errors import ConfigError
from trl_ext.oracle import TabularLM, TabularLMConfig, TabularModel, tabular_tokenizer


def padded(ids, left=0, right=0, filler=0):
    """One sequence with padding around it, and its attention mask, (1, S)."""
    mask = [0] * left + [1] * len(ids) + [0] * right
    return torch.tensor([[filler] * left + ids + [filler] * right]), torch.tensor([mask])


@pytest.mark.parametrize(
    ("left", "right", "filler"), [(0, 0, 0), (3, 0, 0), (0, 2, 0), (2, 1, 0), (2, 1, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_the_table_rows(config, dtype, left, right, filler):
    """Rows in the order of itertools.product, prompt by prompt, to the last bit."""
    model = TabularLM(config).to(dtype)
    prefixes = [p for t in range(3) for p in itertools.product((1, 2, 3), repeat=t)]
    assert len(prefixes) == config.num_prefixes == 13
    table = model.model.table.weight.view(2, 13, 4)
    for prompt, (row, prefix) in itertools.product((1, 2), enumerate(prefixes)):
        ids, mask = padded([prompt, *prefix], left, right, filler)
        logits = model(ids, attention_mask=mask).logits[0, left + len(prefix)]
        assert torch.equal(logits, table[prompt - 1, row])


@pytest.mark.parametrize("ids", [[1, 0], [2, 3, 0], [1, 0, 0, 0], [1, 2, 2, 2], [1, 2, 2, 2, 1]])
def test_the_end_is_certain_once_a_completion_is_over(model, ids):
    """After the end token, and after T = 3 tokens: probability exactly 1, gradient exactly 0."""
    last = model(torch.tensor([ids])).logits[0, -1]
    assert torch.equal(last.softmax(-1), torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
    last.log_softmax(-1)[0].backward()
    assert not model.model.table.weight.grad.any()


def test_the_backbone_gives_each_prefix_its_own_direction(model):
    """A linear value head on the hidden states can tell all prefixes of all prompts apart."""
    ids = torch.tensor([[1, 1, 1], [1, 1, 2], [2, 1, 1], [2, 3, 0]])
    code = model.model(ids).last_hidden_state[..., model.config.vocab_size :]
    expected = [[0, 1, 4], [0, 1, 5], [13, 14, 17], [13, 16, -1]]
    assert code.argmax(-1).where(code.sum(-1) > 0, -1).tolist() == expected


def test_padding_does_not_matter_without_a_mask_either(model):
    """End tokens before the prompt are padding: a prompt never starts with one."""
    ids = torch.tensor([[1, 2, 3], [2, 1, 1]])
    wide = functional.pad(ids, (4, 0))
    assert torch.equal(model(wide).logits[:, 4:], model(ids).logits)
    assert torch.equal(model(wide, torch.ones_like(wide)).logits[:, 4:], model(ids).logits)


def test_a_row_of_padding_is_harmless(model):
    empty = torch.zeros(2, 3, dtype=torch.long)
    assert model(empty, attention_mask=empty).logits.isfinite().all()


def test_loss_and_kept_logits(model):
    ids = torch.tensor([[1, 2, 3, 0], [2, 1, 0, 0]])
    labels = torch.tensor([[-100, 2, 3, 0], [-100, 1, 0, -100]])
    out = model(ids, labels=labels)
    logps = model(ids).logits.log_softmax(-1)
    # Tokens that count: 2 3 0 of the first row, 1 0 of the second, each read one position earlier.
    picked = [logps[0, 0, 2], logps[0, 1, 3], logps[0, 2, 0], logps[1, 0, 1], logps[1, 1, 0]]
    torch.testing.assert_close(out.loss.double(), -sum(picked) / 5, atol=1e-6, rtol=0)
    assert torch.equal(model(ids, logits_to_keep=2).logits, out.logits[:, 2:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([1])).logits, out.logits[:, 1:2])


def test_an_unknown_prompt_is_refused(model):
    with pytest.raises(ValueError, match=r"one of the tokens 1\.\.2 .*got token 3"):
        model(torch.tensor([[1, 1], [3, 1]]))


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"vocab_size": 1}, "vocab_size >= 2"),
        ({"max_completion_length": 0}, "max_completion_length >= 1"),
        ({"vocab_size": 3, "num_prompts": 3}, r"num_prompts must lie in 1\.\.2"),
        ({"num_prompts": 0}, r"num_prompts must lie in 1\.\.3"),
        ({"vocab_size": 9, "max_completion_length": 6}, "37449 rows"),
    ],
)
def test_a_bad_shape_is_refused(shape, says):
    with pytest.raises(ConfigError, match=says):
        TabularLMConfig(**shape)


def test_load_table(model):
    table = torch.randn(2, 13, 4, dtype=torch.float64)
    assert model.load_table(table) is model
    assert torch.equal(model.model.table.weight.view(2, 13, 4), table)
    with pytest.raises(ValueError, match=r"shape \(2, 13, 4\) is needed, got shape \(13, 4\)"):
        model.load_table(table[0])
    table[1, 2, 3] = torch.inf
    with pytest.raises(ValueError, match="1 entries not finite"):
        model.load_table(table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_bit_by_bit(config, tmp_path, dtype):
    model = TabularLM(config).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert isinstance(loaded, TabularLM) and loaded.dtype == dtype
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == ["model.table.weight"]
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TabularLMConfig)
    backbone = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert isinstance(backbone, TabularModel)
    assert torch.equal(backbone.table.weight, model.model.table.weight)


def test_the_initial_table_follows_initializer_range(config):
    config.initializer_range = 0.0
    assert not TabularLM(config).model.table.weight.any()


def test_tokenizer(tmp_path):
    tabular_tokenizer(4).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(["a", "bac"], padding=True)
    assert batch["input_ids"] == [[0, 0, 1], [2, 1, 3]]
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert tokenizer.decode([2, 1, 3, 0]) == "bac<eos>"
    assert tokenizer.decode([2, 1, 3, 0], skip_special_tokens=True) == "bac"
    assert tokenizer("ab<eos>")["input_ids"] == [1, 2, 0]
    assert len(tokenizer) == 4
    for text in ("d", "a b", "a\n"):
        with pytest.raises(Exception, match="Missing \\[UNK\\]"):
            tokenizer(text)
    with pytest.raises(ConfigError, match=r"2\.\.53 tokens, got 54"):
        tabular_tokenizer(54)
