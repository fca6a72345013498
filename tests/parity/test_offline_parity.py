"""With β = ∞ and losses divided by tokens, offline RWR is `trl.SFTTrainer`, number for number."""

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.parity.recipe_worker import completed
from tests.tiny import QUIET, save_tiny_llama
from trl_ext.rwr import OfflineRWRConfig, OfflineRWRTrainer

STEPS = 4
OPTIONS: dict[str, Any] = {
    **{name: value for name, value in QUIET.items() if name != "max_completion_length"},
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def logged(rows: int = 40) -> Dataset:
    return Dataset.from_list(completed(rows))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def trained(trainer):
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert len(logs) == STEPS
    parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return [(log["loss"], log["grad_norm"]) for log in logs], parameters


CELLS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3},
    "shuffled": {"shuffle_dataset": True},
    "packed": {"packing": True, "max_length": 16, "per_device_train_batch_size": 2},
    "packed and shuffled": {"packing": True, "max_length": 16, "shuffle_dataset": True},
    "padding-free": {"padding_free": True, "max_length": None},
    "lora": {},
}


@pytest.mark.equation("E10")
@pytest.mark.parametrize("cell", CELLS)
def test_supervised_fine_tuning_is_trls(model_path, tmp_path, cell):
    rows, same = logged(), OPTIONS | CELLS[cell]
    lora: dict[str, Any] = {"peft_config": LoraConfig(**LORA)} if cell == "lora" else {}
    theirs = trained(
        SFTTrainer(
            model_path,
            SFTConfig(str(tmp_path / "trl"), **same),
            train_dataset=rows.remove_columns("reward"),
            **lora,
        )
    )
    own = {"beta": math.inf, "token_reduction": "batch"}
    ours = trained(
        OfflineRWRTrainer(
            model_path, OfflineRWRConfig(str(tmp_path / "ours"), **(same | own)), rows, **lora
        )
    )
    assert ours[0] == theirs[0]
    assert any(norm > 1e-3 for _, norm in ours[0]), "nothing was trained"
    assert all(torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])


def test_evaluation_is_trls(model_path, tmp_path):
    rows = logged()
    theirs = SFTTrainer(
        model_path,
        SFTConfig(str(tmp_path / "trl"), **OPTIONS),
        train_dataset=rows.remove_columns("reward"),
        eval_dataset=rows.remove_columns("reward"),
    ).evaluate()
    own = {"beta": math.inf, "token_reduction": "batch"}
    args = OfflineRWRConfig(str(tmp_path / "ours"), **(OPTIONS | own))
    ours = OfflineRWRTrainer(model_path, args, rows, rows).evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert ours[name] == theirs[name]
