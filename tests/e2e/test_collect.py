"""`trl_ext collect` and `iterate` in processes of their own: killed for good, and two at a time."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.forked import ended, trl_ext, two_ranks

pytestmark = pytest.mark.slow


def wait_for_lines(path: Path, lines: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < end, f"{path} did not grow"
        time.sleep(0.02)


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_killed_it_goes_on_and_ends_with_the_same_file(command, run, write_recipe, tmp_path):
    recipe = write_recipe()
    assert run("collect", recipe, "--output", "whole.jsonl", "--limit=12")[0] == 0
    cut = ("collect", recipe, "--output", "cut.jsonl", "--limit=12")
    process = command(*cut, REWARD_SECONDS="0.2")
    wait_for_lines(tmp_path / "cut.jsonl.samples.partial", 1 + 16)
    process.kill()
    assert not (tmp_path / "cut.jsonl").exists()
    code, out, err = run(*cut)
    assert code == 0, err
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert "Traceback" not in err and "12" in out


def test_two_at_once_into_one_file_are_refused(command, run, write_recipe, tmp_path):
    arguments = ("collect", write_recipe(), "--output", "rows.jsonl", "--limit=12")
    process = command(*arguments, REWARD_SECONDS="1")
    wait_for_lines(tmp_path / "rows.jsonl.samples.partial", 1)
    code, _, err = run(*arguments)
    process.kill()
    assert code == 1 and "is being written by another process" in err


def test_two_processes_share_the_prompts(run, write_recipe, tmp_path, byte_llama):
    """Five prompts, batches of four: the last has one for two processes."""
    recipe = write_recipe()
    arguments = ("collect", str(recipe), "--output", "rows.jsonl", "--limit=5", "num_processes=2")
    ranks = two_ranks(trl_ext, *arguments, "ddp_backend=gloo", folder=tmp_path, environment={})
    results = ended(ranks)
    for code, _, err in results:
        assert code == 0, err[-3000:]
    assert sum("written." in out for _, out, _ in results) == 1
    rows = rows_in(tmp_path / "rows.jsonl")
    assert [row["group"] for row in rows] == [group for group in range(5) for _ in range(4)]
    assert len({row["prompt"] for row in rows}) == 5
    model: Any = AutoModelForCausalLM.from_pretrained(byte_llama)
    for row in rows:
        assert row["reward"] == len(set(row["completion"]))
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        logps = model(ids).logits[0].log_softmax(-1)[len(row["prompt_ids"]) - 1 : -1]
        logp = logps.gather(1, torch.tensor(row["completion_ids"])[:, None]).sum().item()
        assert row["logp"] == pytest.approx(logp, abs=1e-3)
    assert len({row["completion"] for row in rows}) > 10, "each process samples its own"


def write_offline(write_recipe) -> Path:
    recipe = write_recipe(max_steps=2)
    text = recipe.read_text().replace("trainer: rwr", "trainer: offline_rwr\neval_on_start: true")
    recipe.write_text(text.replace("num_iterations: 2\n", ""))
    return recipe


def test_killed_rounds_go_on_and_end_with_the_same(command, run, write_recipe, tmp_path):
    recipe = write_offline(write_recipe)
    whole = f"output_dir={tmp_path / 'whole'}"
    code, out, err = run("iterate", recipe, "--rounds=2", whole)
    assert code == 0, err[-3000:]
    assert "held-out reward" in out and "round-2" in out
    process = command("iterate", recipe, "--rounds=2", REWARD_SECONDS="0.1")
    wait_for_lines(tmp_path / "run/round-2/completions.jsonl.samples.partial", 1 + 16)
    process.kill()
    code, again, err = run("iterate", recipe, "--rounds=2", "--resume")
    assert code == 0, err[-3000:]
    table = out[out.index("Mean reward") :]
    assert again.replace("/run/", "/whole/").endswith(table)
    for file in ("model.safetensors", "completions.jsonl", "held_out.jsonl"):
        ours, theirs = (tmp_path / each / "round-2" / file for each in ("run", "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), file


def test_rounds_of_two_processes(write_recipe, tmp_path):
    arguments = ("iterate", str(write_offline(write_recipe)), "--rounds=2", "num_processes=2")
    ranks = two_ranks(trl_ext, *arguments, "ddp_backend=gloo", folder=tmp_path, environment={})
    results = ended(ranks)
    for code, _, err in results:
        assert code == 0, err[-3000:]
    assert sum("The policy of the last round is in" in out for _, out, _ in results) == 1
    assert len(rows_in(tmp_path / "run/round-2/completions.jsonl")) == 64 * 4
    assert len(json.loads((tmp_path / "run/iterate.json").read_text())["finished"]) == 2
