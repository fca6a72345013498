"""With β = ∞ and losses divided by tokens, offline RWR is `trl.SFTTrainer`, number for number."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.e2e.forked import Forked, ended, two_ranks
from tests.tiny import QUIET, save_tiny_llama
from trl_ext.rwr import OfflineRWRConfig, OfflineRWRTrainer
from trl_ext.trl_adapter import end_training

STEPS = 4
OPTIONS: dict[str, Any] = {
    **{name: value for name, value in QUIET.items() if name != "max_completion_length"},
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def logged(rows: int = 40) -> Dataset:
    """Ten prompts with four completions each, of one to four letters."""
    letters = "abcde" * 3
    return Dataset.from_list(
        [
            {
                "prompt": letters[i // 4 :][: 1 + i // 4 % 2] + "abcde"[i // 8],
                "completion": letters[i % 5 :][: 1 + i % 4],
                "reward": float(i % 3),
            }
            for i in range(rows)
        ]
    )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def trained(trainer, steps: int = STEPS):
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert len(logs) == steps
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


def run(model: str, output: str, reduction: str) -> None:
    """One run as one process or one of two: steps of two micro-batches of 4 rows, a last of one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options: dict[str, Any] = OPTIONS | {
        "per_device_train_batch_size": 4 // processes,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "max_steps": -1,
        "token_reduction": reduction,
        "drop_uniform_groups": False,
        "ddp_backend": "gloo" if processes > 1 else None,
    }
    args = OfflineRWRConfig(output + "-run", **options)
    trainer = OfflineRWRTrainer(model, args, logged(36), logged())
    history, parameters = trained(trainer, 5)
    evaluated = trainer.evaluate()
    assert trainer.accelerator.num_processes == processes
    if trainer.accelerator.is_main_process:
        torch.save({"history": history, "parameters": parameters, "eval": evaluated}, output)
    end_training(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "mean", "batch"])
def test_two_processes_are_one(reduction, model_path, tmp_path):
    """The last of five steps has 4 rows, the others 8; 40 rows are evaluated, 16 at once."""

    def output_of(processes: int) -> tuple[Path, list[Forked]]:
        output = tmp_path / f"of-{processes}"
        forked = (run, model_path, str(output), reduction)
        where: dict[str, Any] = {"folder": tmp_path, "environment": {}}
        return output, two_ranks(*forked, **where) if processes > 1 else [Forked(*forked, **where)]

    found = []
    for output, processes in (output_of(1), output_of(2)):
        for code, _, err in ended(processes):
            assert code == 0, err[-3000:]
        found.append(torch.load(output))
    one, two = found
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for name, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], value, rtol=0, atol=1e-4)
    evaluated = ["eval_unweighted_loss"] + (["eval_loss"] if reduction != "batch" else [])
    for name in evaluated:
        assert two["eval"][name] == pytest.approx(one["eval"][name], rel=1e-4)
