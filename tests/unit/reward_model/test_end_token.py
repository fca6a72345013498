"""A reward model judges texts in the form in which it learned them, whatever it is saved as."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tests.parity.reward_worker import QUIET
from tests.tiny import save_byte_llama
from trl_ext import RewardConfig, RewardTrainer
from trl_ext.errors import ConfigError
from trl_ext.poe.reward_models import reward_model

MARK = "reward_append_eos"
PROMPTS = ["ab", "c", "dd"]
COMPLETIONS = [["cde", "b"], ["d<eos>", "ee"], ["a", "bc"]]
LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Its padding is not its end, which a classifier would else not read; and it has a start."""
    folder = save_byte_llama(tmp_path_factory.mktemp("bytes"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "~"
    start = ("^", tokenizer.convert_tokens_to_ids("^"))
    processor = TemplateProcessing(single="^ $A", special_tokens=[start])
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.save_pretrained(folder)
    return folder


def messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows(form: str) -> list[dict[str, Any]]:
    both = list(zip(PROMPTS, COMPLETIONS, strict=True))
    if form == "pairs":
        return [{"prompt": p, "chosen": c[0], "rejected": c[1]} for p, c in both]
    if form == "messages":
        both = [(messages("user", p), [messages("assistant", x) for x in c]) for p, c in both]
    return [{"prompt": p, "completions": c, "ranks": [1, 2]} for p, c in both]


def trained(base: str, folder: Path, form: str, lora: bool, **options: Any) -> RewardTrainer:
    """Two steps, and what they made saved in `folder`."""
    settings: dict[str, Any] = QUIET | {"max_steps": 2, "learning_rate": 1e-2, "max_length": None}
    settings |= {"gradient_checkpointing": False} | options
    args = RewardConfig(str(folder), **settings)
    config = LoraConfig(**LORA) if lora else None
    data = Dataset.from_list(rows(form))
    trainer = RewardTrainer(base, args, train_dataset=data, peft_config=config)
    trainer.train()
    trainer.save_model(str(folder))
    return trainer


def logits(trainer: RewardTrainer) -> list[float]:
    """Of the trainer's own batch, in its order: all first completions, then all second ones."""
    rows: Any = trainer.train_dataset
    batch = trainer.data_collator([rows[i] for i in range(3)])
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found[:, 0].tolist()


def rewards(reward: Any, form: str = "rankings") -> list[float]:
    prompts: list[Any] = PROMPTS * 2
    completions: list[Any] = [c[k] for k in (0, 1) for c in COMPLETIONS]
    if form == "messages":
        prompts = [messages("user", p) for p in prompts]
        completions = [messages("assistant", c) for c in completions]
    return reward(prompts, completions, [[1]] * 6)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("form", ["rankings", "pairs", "messages"])
def test_a_reward_is_the_logit_that_was_trained(base, tmp_path, form, lora):
    trainer = trained(base, tmp_path, form, lora)
    expected = logits(trainer)
    assert len({round(value, 5) for value in expected}) == 6
    assert rewards(reward_model(str(tmp_path)), form) == pytest.approx(expected, abs=1e-5)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved.get(MARK) == (None if form == "messages" else True)
    if lora:
        several = reward_model(adapters=[str(tmp_path)] * 2)
        assert rewards(several, form) == pytest.approx(expected, abs=1e-5)


def test_what_is_said_counts_and_without_a_mark_it_is_as_in_trl(base, tmp_path):
    trainer = trained(base, tmp_path, "rankings", lora=False)
    model: Any = trainer.model.eval()
    tokenizer: Any = trainer.processing_class
    plain = []
    with torch.no_grad():  # TRL: the text alone, without special tokens
        for k in (0, 1):
            for prompt, completions in zip(PROMPTS, COMPLETIONS, strict=True):
                text = prompt + completions[k]
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                plain.append(model(ids).logits[0, 0].item())
    learned = logits(trainer)
    assert abs(torch.tensor(learned) - torch.tensor(plain)).min() > 1e-4
    path, unmarked = str(tmp_path), AutoTokenizer.from_pretrained(base)
    cases: list[tuple[Any, Any, bool | None, list[float]]] = [
        (path, None, None, learned),
        (path, None, False, plain),
        (path, None, True, learned),
        (path, base, None, learned),  # what lies beside the model is of the model
        (model, None, None, plain),
        (model, unmarked, None, plain),
        (model, unmarked, True, learned),
        (model, tokenizer, None, learned),
        (model, tokenizer, False, plain),
    ]
    for of, beside, append_eos, expected in cases:
        reward = reward_model(of, tokenizer=beside, append_eos=append_eos)
        assert rewards(reward) == pytest.approx(expected, abs=1e-5)
    # Of messages the template says all: no special tokens are added to what it writes.
    both: list[Any] = [reward_model(path, append_eos=said) for said in (None, False)]
    assert rewards(both[0], "messages") == rewards(both[1], "messages")


def test_a_model_that_goes_on_learning_messages_loses_the_mark(base, tmp_path):
    trained(base, tmp_path / "texts", "rankings", lora=False)
    trained(str(tmp_path / "texts"), tmp_path / "both", "messages", lora=False)
    assert MARK not in (tmp_path / "both" / "tokenizer_config.json").read_text()


def test_a_checkpoint_has_the_mark(base, tmp_path):
    trained(base, tmp_path, "rankings", lora=True, save_strategy="steps", save_steps=1)
    saved = json.loads((tmp_path / "checkpoint-1" / "tokenizer_config.json").read_text())
    assert saved[MARK] is True


def test_adapters_that_learned_different_forms(base, tmp_path):
    folders = [str(tmp_path / form) for form in ("rankings", "messages")]
    for form, folder in zip(("rankings", "messages"), folders, strict=True):
        trained(base, Path(folder), form, lora=True)
    with pytest.raises(ConfigError, match=r"rankings' learned .* end token .* Say append_eos"):
        reward_model(adapters=folders)
    with_end, without = (
        rewards(reward_model(adapters=folders, append_eos=said)) for said in (True, False)
    )
    alone = [rewards(reward_model(folder, append_eos=True)) for folder in folders]
    means = [sum(pair) / 2 for pair in zip(*alone, strict=True)]
    assert with_end == pytest.approx(means, abs=1e-5)
    assert with_end != pytest.approx(without, abs=1e-4)


def test_what_append_eos_may_be(base, tmp_path):
    trained(base, tmp_path / "out", "rankings", lora=False)
    path = str(tmp_path / "out")
    with pytest.raises(ConfigError, match="append_eos is 'yes'; it must be true, false or null"):
        reward_model(path, append_eos="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="append_eos is 1; it must be true"):
        reward_model(path, append_eos=1)  # type: ignore[arg-type]
    endless = AutoTokenizer.from_pretrained(path)
    endless.eos_token = None
    with pytest.raises(ConfigError, match=r"its tokenizer has no end token.* append_eos: false"):
        reward_model(path, tokenizer=endless, append_eos=True)
