"""The watch says the same in each of two gloo processes, and what it says in one."""

import json
from pathlib import Path

import pytest

from tests.e2e.forked import Forked, ended, two_ranks
from tests.parity.watch_worker import main
from tests.tiny import save_tiny_llama

pytestmark = pytest.mark.slow


def said(folder: Path, runs: list[Forked]) -> list[dict]:
    for code, _, err in ended(runs):
        assert code == 0, err[-3000:]
    return [json.loads((folder / f"watch-{rank}").read_text()) for rank in range(len(runs))]


def test_two_processes_decide_as_one(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    environment = {"TRL_EXPERIMENTAL_SILENCE": "1"}
    alone, both = tmp_path / "alone", tmp_path / "both"
    alone.mkdir()
    both.mkdir()
    run = (main, model)
    [one] = said(alone, [Forked(*run, str(alone / "watch"), folder=alone, environment=environment)])
    first, second = said(
        both, two_ranks(*run, str(both / "watch"), folder=both, environment=environment)
    )
    assert json.dumps(first) == json.dumps(second)
    assert first["step"] == one["step"] == 3
    assert "gold reward fell" in first["stopped"]
    assert first["history"]["best"]["step"] == one["history"]["best"]["step"] == 2
    assert len(first["history"]["best"]["gold"]) == 13
    rows = zip(first["history"]["evaluations"], one["history"]["evaluations"], strict=True)
    for ours, theirs in rows:
        assert ours.keys() == theirs.keys() and "kl" in ours
        for name in ours.keys() - {"step", "best_step"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4, nan_ok=True), name
    assert (both / "watch-run" / "best" / "model.safetensors").is_file()
    assert (both / "watch-run" / "checkpoint-3" / "rollout_1.pt").is_file()
