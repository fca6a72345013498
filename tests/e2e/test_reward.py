"""A reward model trained through the command: what the terminal says of held-out comparisons."""

import json
from pathlib import Path

from trl_ext.cli import main

RECIPE = """
trainer: reward
output_dir: {output_dir}
model_name_or_path: {model}
dataset_name: {data}
bf16: false
max_steps: 2
per_device_train_batch_size: 4
learning_rate: 1.0e-2
logging_steps: 1
eval_on_start: true
save_strategy: "no"
report_to: none
dataloader_pin_memory: false
"""


def rankings(folder: Path) -> Path:
    folder.mkdir()
    for split, count in (("train", 8), ("test", 3)):
        rows = [
            {"prompt": f"{n}+{n}=", "completions": [f"{n + n}", "x"], "scores": [1.0, 0.0]}
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_held_out_accuracy_is_shown_before_and_after_training(byte_llama, tmp_path, capsys):
    """The evaluation after the last step is the end's: eval_strategy is "no"."""
    output_dir, recipe = tmp_path / "out", tmp_path / "reward.yaml"
    data = rankings(tmp_path / "data")
    recipe.write_text(RECIPE.format(output_dir=output_dir, model=byte_llama, data=data))
    assert main(["train", str(recipe)]) == 0
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["eval_accuracy"] for row in rows if "eval_accuracy" in row}
    assert list(found) == [0, 2]
    said = capsys.readouterr().out
    for step, accuracy in found.items():
        assert f"step {step}: eval_loss" in said
        assert f"eval_accuracy {accuracy:.4g}" in said
    gain = found[2] - found[0]
    assert f"  accuracy  {found[0]:7.3f}  {found[2]:7.3f}  {gain:+7.3f}\n" in said
    assert "on 3 rows; after = step 2\n\nThe model is in" in said
