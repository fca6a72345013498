"""Reward adapters on one base: the scores of separate models, the memory of one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import GRPOConfig, GRPOTrainer

from tests.tiny import QUIET, VOCABULARY, prompts, save_tiny_llama
from trl_ext.errors import ConfigError
from trl_ext.oracle import tabular_tokenizer
from trl_ext.poe.reward_models import reward_model
from trl_ext.rewards import build_rewards

PROMPTS = ["a", "abc", "ba", "c"]
COMPLETIONS = ["bc", "a", "abcde", "ee"]
BATCH: dict[str, Any] = {
    "prompts": PROMPTS,
    "completions": COMPLETIONS,
    "completion_ids": [[2, 3], [1], [1, 2, 3, 4, 5], [5, 5]],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


def save_adapter(folder: Path, base: str, seed: int, **options: Any) -> str:
    """A LoRA adapter with random weights, and a head of its own."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(**{"task_type": TaskType.SEQ_CLS, "r": 2, **options})
    made = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.normal_()
    made.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base) -> list[str]:
    """Three of different rank."""
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(folder / f"{n}", base, n, r=n) for n in (1, 2, 3)]


def alone(base: str, adapter: str) -> list[Any]:
    """What one adapter gives, opened by PEFT on a base of its own."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    one = PeftModel.from_pretrained(model, adapter)
    return reward_model(one, tokenizer=tabular_tokenizer(VOCABULARY))(**BATCH)


def test_scores_are_those_of_separate_models(base, adapters):
    rows = torch.tensor([alone(base, adapter) for adapter in adapters], dtype=torch.float64)
    assert rows.std(dim=0).min() > 0.01  # they disagree everywhere
    mean, std = rows.mean(dim=0), rows.std(dim=0, correction=0)
    expected = {"mean": mean, "min": rows.amin(dim=0), "uncertainty": mean - 0.5 * std}
    for combine, values in expected.items():
        reward = reward_model(adapters=adapters, combine=combine, penalty=0.5, batch_size=3)  # type: ignore[arg-type]
        logged = {}
        for _ in range(2):  # the adapter that was scored last is no longer in the way
            got = torch.tensor(reward(**BATCH, log_metric=logged.__setitem__), dtype=torch.float64)
            torch.testing.assert_close(got, values, rtol=1e-5, atol=1e-6)
        assert logged == {"reward_model/disagreement": pytest.approx(std.mean().item(), rel=1e-5)}


def stored(model: Any) -> int:
    """Bytes of all parameters and buffers, those that are shared once."""
    tensors = [*model.parameters(), *model.buffers()]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def test_the_base_is_in_memory_once(base, adapters):
    """Three adapters weigh what the base does and what the three of them do."""
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    lora = sum(
        p.numel() * 4
        for a in adapters
        for name, p in PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), a
        ).named_parameters()
        if "lora" in name or "modules_to_save" in name
    )
    reward = reward_model(adapters=adapters)
    assert stored(reward.inner.model) == stored(plain) + lora  # type: ignore[union-attr]
    assert not any(p.requires_grad for p in reward.inner.model.parameters())  # type: ignore[union-attr]
    reward(**BATCH)
    assert not any(p.requires_grad for p in reward.inner.model.parameters())  # type: ignore[union-attr]


def test_a_recipes_entry_trains_under_trl(base, adapters, tmp_path):
    entry = {"name": "reward_model", "model": base, "adapters": adapters, "combine": "min"}
    [reward] = build_rewards([entry])
    small: dict[str, Any] = {
        **QUIET,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_steps": 1,
    }
    trainer = GRPOTrainer(base, reward, GRPOConfig(str(tmp_path), **small), prompts())
    trainer.train()
    [log] = [log for log in trainer.state.log_history if "reward" in log]
    assert math.isfinite(log["rewards/reward_model/mean"])
    assert log["reward_model/disagreement"] > 0


def test_the_tokenizer_beside_an_adapter_is_taken(base, adapters, tmp_path):
    folder = Path(save_adapter(tmp_path / "own", base, 4))
    assert reward_model(adapters=[adapters[0]]).inner.tokenizer.name_or_path == base  # type: ignore[union-attr]
    tabular_tokenizer(VOCABULARY).save_pretrained(folder)
    reward = reward_model(adapters=[adapters[0], str(folder)])
    assert reward.inner.tokenizer.name_or_path == str(folder)  # type: ignore[union-attr]
    other = reward_model(adapters=[str(folder)], tokenizer=base)
    assert other.inner.tokenizer.name_or_path == base  # type: ignore[union-attr]


def test_a_base_that_moved_is_named(base, adapters, tmp_path):
    moved = save_tiny_llama(tmp_path / "moved")
    reward = reward_model(moved, adapters=adapters)
    torch.testing.assert_close(
        torch.tensor(reward(**BATCH)), torch.tensor(reward_model(adapters=adapters)(**BATCH))
    )


def test_what_does_not_fit(base, adapters, tmp_path):
    causal = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM")
    )
    causal.save_pretrained(tmp_path / "causal")
    elsewhere = save_tiny_llama(tmp_path / "elsewhere")
    other = save_adapter(tmp_path / "other", elsewhere, 5)
    headless = Path(save_adapter(tmp_path / "headless", base, 6))
    remove_head(headless)
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"adapters": [str(tmp_path / "causal")]},
            "is for the task 'CAUSAL_LM'; one of a reward m",
        ),
        ({"adapters": [adapters[0], other]}, "name no base in common: .* has .*elsewhere'. Say it"),
        ({"adapters": [str(headless)]}, r"has no score.weight and its base .* has none either"),
        ({"adapters": ["no/such"]}, "The adapter 'no/such' cannot be opened"),
        ({"adapters": []}, r"adapters is \[\] and model None; give a list of adapters' paths"),
        ({"adapters": adapters[0]}, "adapters is '.*; give a list of adapters' paths"),
        ({"adapters": [3]}, r"adapters is \[3\]"),
        ({"model": 3, "adapters": adapters}, "and model 3; give a list"),
        ({"model": "no/such", "adapters": adapters}, "The base 'no/such' of the reward adapters"),
        (
            {"adapters": adapters, "combine": "max"},
            "reward_model: combine is 'max'; it must be mean or",
        ),
        ({"adapters": adapters, "penalty": -1}, "penalty is -1; it must be 0 or more"),
        ({"model": base, "combine": "min"}, "there is one model to combine. Give adapters, or"),
        ({"model": base, "penalty": 2.0}, "penalty 2.0, and there is one model to combine"),
    ]
    for arguments, says in cases:
        with pytest.raises(ConfigError, match=says):
            reward_model(**arguments)


def test_a_head_that_only_the_base_has_is_said_to_be_missing(base, tmp_path):
    """The adapter was saved with one, and its file has lost it."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.save_pretrained(str(tmp_path / "whole"))
    headless = Path(save_adapter(tmp_path / "headless", base, 6))
    remove_head(headless)
    with pytest.raises(ConfigError, match=r"headless' does not fit its base: .*score"):
        reward_model(str(tmp_path / "whole"), tokenizer=base, adapters=[str(headless)])


def remove_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "score" not in name}
    save_file(weights, file)


def test_an_adapter_of_another_shape(adapters, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not fit its base"):
        reward_model(str(tmp_path), adapters=adapters)
