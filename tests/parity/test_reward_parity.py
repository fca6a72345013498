"""With two completions a prompt `RewardTrainer` is `trl.RewardTrainer`, number for number."""

from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig

from tests.parity.reward_worker import QUIET, RANKINGS
from tests.tiny import save_byte_llama, save_tiny_llama
from trl_ext import RewardConfig, RewardTrainer

STEPS = 4
LETTERS = "abcde"
OF_TRL = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens", "loss")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def texts(row: int) -> tuple[str, str, str]:
    """A prompt and two different completions, of lengths that differ."""
    better = LETTERS[row % 5] * (1 + row % 3)
    return LETTERS[: 1 + row % 4], better, LETTERS[(row + 2) % 5] * (1 + row % 2)


def pairs(rows: int = 32) -> list[dict[str, Any]]:
    names = ("prompt", "chosen", "rejected")
    return [dict(zip(names, texts(row), strict=True)) for row in range(rows)]


def as_rankings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same comparisons as lists, the better one first."""
    rest = [{k: v for k, v in row.items() if k not in ("chosen", "rejected")} for row in rows]
    lists = [{"completions": [row["chosen"], row["rejected"]], "ranks": [1, 2]} for row in rows]
    return [{**of_row, **of_list} for of_row, of_list in zip(rest, lists, strict=True)]


def trained(trainer_class, config_class, model, rows, tmp_path, lora=None, eval_rows=None, **more):
    """Each step's log without TRL's times, the parameters after the last, the evaluation."""
    settings: dict[str, Any] = (
        QUIET | {"max_steps": STEPS, "learning_rate": 1e-2, "per_device_train_batch_size": 8} | more
    )
    trainer = trainer_class(
        model,
        config_class(str(tmp_path), **settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(eval_rows or rows[:8]),
        peft_config=lora and LoraConfig(**lora),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert len(logs) == STEPS
    parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return logs, parameters, trainer.evaluate()


def assert_same(ours, theirs) -> None:
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert (mine["loss"], mine["grad_norm"]) == (other["loss"], other["grad_norm"])
        for name in OF_TRL:
            assert mine[name] == pytest.approx(other[name], abs=1e-6), name
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])
    for name in OF_TRL:
        assert ours[2][f"eval_{name}"] == pytest.approx(theirs[2][f"eval_{name}"], abs=1e-6), name


LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "SEQ_CLS"}
CASES = {
    "plain": {},
    "centered": {"center_rewards_coefficient": 0.1},
    "dropout": {"disable_dropout": False, "weight_decay": 0.1},
    "lora": {"lora": LORA},
}


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_two_completions_are_trl(name, margin, model_path, tmp_path):
    rows = [row | ({"margin": 0.1 * (i % 7)} if margin else {}) for i, row in enumerate(pairs())]
    of_trl = trl.RewardTrainer, trl.RewardConfig
    theirs = trained(*of_trl, model_path, rows, tmp_path / "trl", **CASES[name])
    assert any(log["grad_norm"] > 1e-3 for log in theirs[0]), "nothing was trained"
    of_ours = RewardTrainer, RewardConfig
    assert_same(trained(*of_ours, model_path, rows, tmp_path / "pairs", **CASES[name]), theirs)
    lists = as_rankings(rows)
    assert_same(trained(*of_ours, model_path, lists, tmp_path / "lists", **CASES[name]), theirs)


def test_plackett_luce_of_two_is_trl(model_path, tmp_path):
    theirs = trained(trl.RewardTrainer, trl.RewardConfig, model_path, pairs(), tmp_path / "trl")
    options = {"loss_type": "plackett_luce"}
    ours = trained(RewardTrainer, RewardConfig, model_path, pairs(), tmp_path / "pl", **options)
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=0, atol=1e-4)


MESSAGES = {
    "prompt": [{"role": "user", "content": "Say a"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "bcd"}],
}
TOOL = '[{"type": "function", "function": {"name": "f", "parameters": {}}}]'


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Say a: ", "chosen": "a", "rejected": "b"},
        {"prompt": "Ends already ", "chosen": "a<eos>", "rejected": ""},
        MESSAGES,
        MESSAGES | {"chat_template_kwargs": {"mood": "gay"}},
        MESSAGES | {"tools": TOOL},
    ],
    ids=["text", "end token", "messages", "template arguments", "tools"],
)
def test_tokens_are_those_of_trl(row, tmp_path):
    """Of both row forms; what a template is told changes them."""
    path = save_byte_llama(tmp_path / "bytes")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template += "{{ mood }}{% if tools %}{{ tools[0].function.name }}{% endif %}"
    made = []
    of_trl, of_ours = (trl.RewardTrainer, trl.RewardConfig), (RewardTrainer, RewardConfig)
    for (kind, config), rows in ((of_trl, [row]), (of_ours, as_rankings([row]))):
        args: Any = config(str(tmp_path / "out"), **QUIET)
        data = Dataset.from_list(rows)
        trainer = kind(path, args, train_dataset=data, processing_class=tokenizer)
        made.append(next(iter(trainer.train_dataset or [])))
    assert made[1]["ranking_ids"] == [made[0]["chosen_ids"], made[0]["rejected_ids"]]


@pytest.mark.parametrize("loss_type", ["bradley_terry", "plackett_luce"])
def test_accumulation_changes_nothing(loss_type, model_path, tmp_path):
    """One micro-batch of 8 and four of 2: the same steps to rounding."""
    runs = [
        trained(
            RewardTrainer,
            RewardConfig,
            model_path,
            RANKINGS * 8,
            tmp_path / str(accumulation),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            loss_type=loss_type,
            center_rewards_coefficient=0.1,
            lr_scheduler_type="constant",
        )
        for accumulation in (1, 4)
    ]
    for one, four in zip(runs[0][0], runs[1][0], strict=True):
        for name in ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "ece", "num_tokens"):
            assert one[name] == pytest.approx(four[name], rel=1e-4), name
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=0, atol=1e-4)
