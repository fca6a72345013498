"""A policy that TRL's DPO trained through the command is read as the reward it stands for.

The implicit reward of DPO is r = β·log π/π_ref, up to β·log Z(x) (Equation E4): what TRL logs as
`rewards/chosen` and `rewards/rejected`, and what a scorer calls the score of a whole completion.
"""

import json
from pathlib import Path
from statistics import fmean

import pytest
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_ext.cli import main
from trl_ext.gibbs_prm import GibbsScorer

RECIPE = """
trainer: dpo
output_dir: {output_dir}
model_name_or_path: {model}
dataset_name: {data}
beta: 0.3
bf16: false
max_steps: 4
per_device_train_batch_size: 4
learning_rate: 1.0e-2
logging_steps: 2
save_strategy: "no"
report_to: none
dataloader_pin_memory: false
"""
LORA = "use_peft: true\nlora_target_modules: [q_proj, v_proj]\n"


def preferences(folder: Path) -> Path:
    rows = [
        {"prompt": f"{n}+{n}=", "chosen": f"{n + n}", "rejected": f"{n} or so"} for n in range(12)
    ]
    file = folder / "preferences.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rewards_of_trl(policy, reference: str, rows: Dataset, output_dir: Path) -> dict[str, float]:
    """What TRL's trainer itself says of a trained policy."""
    args = DPOConfig(
        str(output_dir),
        beta=0.3,
        per_device_eval_batch_size=len(rows),  # TRL averages over batches, not over rows
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    first = AutoModelForCausalLM.from_pretrained(reference)
    trainer = DPOTrainer(policy, first, args, train_dataset=rows, eval_dataset=rows)
    metrics = trainer.evaluate()
    return {side: metrics[f"eval_rewards/{side}"] for side in ("chosen", "rejected")}


@pytest.mark.equation("E4")
@pytest.mark.parametrize("lora", ["", LORA], ids=["whole", "lora"])
def test_the_implicit_reward_is_what_the_scorer_reads(lora, byte_llama, tmp_path, capsys):
    data, output_dir = preferences(tmp_path), tmp_path / "out"
    recipe = tmp_path / "dpo.yaml"
    recipe.write_text(RECIPE.format(output_dir=output_dir, model=byte_llama, data=data) + lora)
    assert main(["train", str(recipe)]) == 0, capsys.readouterr().err

    scorer = GibbsScorer(str(output_dir))  # β and reference are the recipe's
    assert scorer.beta == 0.3
    rows = load_dataset("json", data_files=str(data), split="train")
    assert isinstance(rows, Dataset)
    # In the saved folder of an adapter transformers opens base and adapter.
    trained = AutoModelForCausalLM.from_pretrained(output_dir)
    expected = rewards_of_trl(trained, byte_llama, rows, tmp_path / "judge")
    for side, reward in expected.items():
        scored = scorer.score(rows["prompt"], rows[side], append_eos=True)
        assert fmean(each.score for each in scored) == pytest.approx(reward, abs=1e-4)
    # Four steps have moved it by far more than that.
    assert expected["chosen"] - expected["rejected"] > 0.05


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosn": "b", "rejected": "c"}, "has no column 'chosen'"),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "chosen is None; it must be a text"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "all tied, all the same"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}, "Make a row of each pair"),
    ],
)
def test_rows_that_are_no_pairs(row, says, byte_llama, tmp_path, capsys):
    data = tmp_path / "preferences.jsonl"
    data.write_text(json.dumps(row) + "\n")
    recipe = tmp_path / "dpo.yaml"
    recipe.write_text(RECIPE.format(output_dir=tmp_path / "out", model=byte_llama, data=data))
    assert main(["train", str(recipe)]) == 2
    assert says in capsys.readouterr().err
