"""The longest batch first: it is the longest there can be, and leaves no trace."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from tests.tiny import QUIET, count_a, prompts, save_tiny_llama
from trl_ext import (
    GRPOTrainer,
    OfflineRWRConfig,
    OfflineRWRTrainer,
    PPOTrainer,
    ReinforceTrainer,
    RewardConfig,
    RewardTrainer,
    RWRTrainer,
)
from trl_ext.errors import ConfigError, RewardError
from trl_ext.trl_adapter.probe import LongestBatchFirst, probe

POLICIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "grpo": (GRPOTrainer, {"beta": 0.1, "kl_controller": "adaptive", "kl_target": 1e-3}),
    "reinforce": (ReinforceTrainer, {"gradient_accumulation_steps": 2}),
    "ppo": (PPOTrainer, {"num_iterations": 2, "early_stop_kl": 1e-3}),
    "rwr": (RWRTrainer, {"optim": "adafactor", "weight_decay": 0.1}),
}
LOGGED = [
    {"prompt": prompt, "completion": completion, "reward": reward}
    for prompt in ("a", "bb", "abcd")
    for completion, reward in (("a", 1.0), ("bcd", 0.0), ("eeeeee", 0.5), ("d", 0.25))
]
PAIRS = [{"prompt": p, "chosen": "a" * n, "rejected": "bb"} for p in "abc" for n in (1, 2, 5, 3)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def noisy(completions, **kwargs) -> list[float]:
    """A reward whose random numbers go on from where they were."""
    return [c + random.random() + np.random.random() for c in count_a(completions)]


def policy(name: str, model: str, folder, reward=noisy, dataset=None, **options) -> Any:
    of, chosen = POLICIES[name]
    settings: dict[str, Any] = QUIET | {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
        "max_steps": 3,
        "learning_rate": 1e-2,
    }
    args = of.config_class(str(folder), **(settings | chosen | options))
    return of(model, reward, args, dataset or prompts())


def offline(name: str, model: str, folder) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "max_length": 32,
        "logging_steps": 1,
    }
    if name == "offline_rwr":
        rows = Dataset.from_list(LOGGED)
        return OfflineRWRTrainer(model, OfflineRWRConfig(**settings), train_dataset=rows)
    rows = Dataset.from_list(PAIRS)
    if name == "reward":
        return RewardTrainer(model, RewardConfig(**settings), train_dataset=rows)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    return DPOTrainer(model, args=DPOConfig(**settings), train_dataset=rows, peft_config=lora)


def trained(make, *where, probed: bool) -> tuple[dict[str, torch.Tensor], list[dict], int]:
    set_seed(1)
    trainer = make(*where)
    if probed:
        trainer.add_callback(LongestBatchFirst(trainer))
    trainer.train()
    parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    timing = ("time", "runtime", "per_second")
    history = [
        {key: value for key, value in log.items() if not any(part in key for part in timing)}
        for log in trainer.state.log_history
    ]
    return parameters, history, trainer.state.num_input_tokens_seen


@pytest.mark.parametrize(
    ("make", "name"),
    [(policy, name) for name in POLICIES]
    + [(offline, name) for name in ("offline_rwr", "reward", "dpo")],
)
def test_a_run_is_what_it_is_without(make, name, model_path, tmp_path, capsys):
    without = trained(make, name, model_path, tmp_path / "without", probed=False)
    probed = trained(make, name, model_path, tmp_path / "probed", probed=True)
    assert "The longest batch fits" in capsys.readouterr().err
    for parameter, value in without[0].items():
        assert torch.equal(probed[0][parameter], value), parameter
    assert probed[1:] == without[1:]


def test_prompts_are_the_longest_and_no_completion_ends_early(model_path, tmp_path):
    seen: list[tuple[str, int]] = []

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.extend(zip(prompts, map(len, completion_ids), strict=True))
        trainer.end_rollout()
        return count_a(completions)

    dataset = Dataset.from_dict({"prompt": ["a", "abcde", "ab", "abcd", "b", "ccc"]})
    trainer = policy("grpo", model_path, tmp_path, reward, dataset)

    class Probe(LongestBatchFirst):
        def on_train_begin(self, args, state, control, **kwargs):
            self.took = probe(trainer)
            self.states = len(trainer.optimizer.state)
            self.gradients = [p.grad for p in trainer.model.parameters()]
            self.buffered = trainer._buffered_inputs
            self.is_spent = trainer._rollout_is_spent
            control.should_training_stop = True

    first = Probe(trainer)
    trainer.add_callback(first)
    trainer.train()
    # 8 rows are 2 prompts with 4 completions each; 5 is max_completion_length.
    assert seen[:8] == [("abcde", 5)] * 4 + [("abcd", 5)] * 4
    assert (first.took.rows, first.took.longest) == (8, 10)
    assert first.took.peak_bytes > 0 and first.took.total_bytes is None
    assert first.states == 0, "the states that it made are gone"
    assert all(gradient is None for gradient in first.gradients)
    assert trainer.generation_config.min_new_tokens is None
    assert first.buffered is None, "a rollout that nothing is trained on is dropped"
    assert not first.is_spent and "_tell" not in vars(trainer)


def test_the_longest_rows_of_logged_data(model_path, tmp_path):
    trainer = offline("offline_rwr", model_path, tmp_path)
    batches: list[dict[str, Any]] = []
    collate = trainer.data_collator

    def watched(rows):
        batches.append(collate(rows))
        return batches[-1]

    trainer.data_collator = watched
    trainer.add_callback(LongestBatchFirst(trainer))
    trainer.train()
    # "abcd" with "eeeeee" and the end token is 11 tokens, "bb" with it 9, "abcd" with "bcd" 8,
    # "a" with "eeeeee" 8.
    assert batches[0]["attention_mask"].sum(1).tolist() == [11, 9, 8, 8]


def test_a_failing_reward_fails_in_the_first_minute(model_path, tmp_path):
    def reward(completions, **kwargs):
        raise ValueError("no key for the judge")

    trainer = policy("grpo", model_path, tmp_path, reward)
    trainer.add_callback(LongestBatchFirst(trainer))
    with pytest.raises(RewardError, match="no key for the judge"):
        trainer.train()


def test_what_cannot_be_probed_is_refused_at_once(model_path, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}] * 8))
    trainer = policy("grpo", model_path, tmp_path, dataset=stream)
    with pytest.raises(ConfigError, match=r"--probe .* a stream are not known .* Remove --probe"):
        LongestBatchFirst(trainer)
