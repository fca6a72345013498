"""The words of the errors that users meet, kept as files under `snapshots/`.

`UPDATE_SNAPSHOTS=1 pytest tests/contract/test_error_text.py` rewrites them; read the difference.
"""

import os
from pathlib import Path

import pytest

from trl_ext.cli import main
from trl_ext.recipe import shipped
from trl_ext.registry import REWARDS, TRAINERS

SNAPSHOTS = Path(__file__).parent / "snapshots"

LEAST = "trainer: rwr\nmodel_name_or_path: some/model\ndataset_name: some/data\noutput_dir: out\n"

# Name -> (the files, the command line after `validate`).
CASES: dict[str, tuple[dict[str, str], list[str]]] = {
    "everything": (
        {
            "r.yaml": "trainer: rwr\nmodel_name_or_path: 5\nlerning_rate: 1e-5\nbeta: [1, 2]\n"
            "num_generations: 8.5\ndtype: bf16\nseed: 1\nseed: 2\noutput_dir:\nuse_peft: maybe\n"
            "reward_funcs: [acuracy_reward, {weight: 1}]\ndatasets: [{pth: x}]\n"
            "loss_type: grpo\naccelerate_config: fsdp9\n"
        },
        ["r.yaml", "--save_strategy", "epochs"],
    ),
    "empty": ({"r.yaml": "\n# nothing\n"}, ["r.yaml"]),
    "not_a_mapping": ({"r.yaml": "- trainer: rwr\n"}, ["r.yaml"]),
    "not_yaml": ({"r.yaml": "trainer: rwr\nbeta: [1\nseed: 2\n"}, ["r.yaml"]),
    "missing_file": ({"quickstart.yaml": LEAST}, ["quikstart.yaml"]),
    "missing_keys": ({"r.yaml": "seed: 1\n"}, ["r.yaml"]),
    "extends_missing": (
        {"r.yaml": LEAST + "extends: [bse.yaml, 3]\n", "base.yaml": "seed: 1\n"},
        ["r.yaml"],
    ),
    "extends_circle": (
        {
            "a.yaml": LEAST + "extends: b.yaml\n",
            "b.yaml": "extends: c.yaml\n",
            "c.yaml": "extends: a.yaml\n",
        },
        ["a.yaml"],
    ),
    "error_in_extended": (
        {"r.yaml": LEAST + "extends: base/x.yaml\n", "base/x.yaml": "lora_r: a\nsed: 1\n"},
        ["r.yaml"],
    ),
    "unknown_trainer": ({"r.yaml": LEAST.replace("rwr", "rwl")}, ["r.yaml"]),
    "unknown_reward": ({"r.yaml": LEAST + "reward_funcs: [resoning_gym]\n"}, ["r.yaml"]),
    "group_size": ({"r.yaml": LEAST + "num_generations: 7\n"}, ["r.yaml", "num_processes=3"]),
    "key_of_another_trainer": (
        {"r.yaml": LEAST.replace("rwr", "sft") + "drop_uniform_groups: true\n"},
        ["r.yaml"],
    ),
    "command_line": ({"r.yaml": LEAST}, ["r.yaml", "stray", "env=1", "sede=1", "beta=inf"]),
    "trainer_without_source": ({"r.yaml": LEAST}, ["r.yaml", "trainer=nowhere:XTrainer"]),
}


@pytest.mark.parametrize("case", CASES)
def test_error_text(case, tmp_path, monkeypatch, capsys):
    files, argv = CASES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "nothing_is_shipped")
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    assert main(["validate", *argv]) == 2
    compare(case, capsys.readouterr().err)


def compare(case: str, text: str) -> None:
    """The text against its snapshot, without the names that plugins and algorithms add."""
    for kind, registry in (("trainers", TRAINERS), ("rewards", REWARDS)):
        text = text.replace(", ".join(registry.names()), f"<{kind}>")
    path = SNAPSHOTS / f"{case}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"no snapshot {path.name}; run with UPDATE_SNAPSHOTS=1"
    assert text == path.read_text(encoding="utf-8")


def test_no_snapshot_is_left_over():
    assert {path.stem for path in SNAPSHOTS.glob("*.txt")} == set(CASES)
