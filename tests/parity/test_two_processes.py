"""Two gloo processes give what one process gives on the same global batch."""

from pathlib import Path

import pytest
import torch

from tests.e2e.forked import Forked, ended, two_ranks
from tests.parity.worker import TRAINERS, main
from tests.tiny import save_tiny_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def started(name: str, model_path: str, output: Path, group: int, processes: int) -> list[Forked]:
    run = (main, name, model_path, str(output), group)
    where = {"folder": output.parent, "environment": {"TRL_EXPERIMENTAL_SILENCE": "1"}}
    return two_ranks(*run, **where) if processes > 1 else [Forked(*run, **where)]


def trained(runs: list[Forked], output: Path):
    for code, _, err in ended(runs):
        assert code == 0, err[-3000:]
    return torch.load(output)


# Groups of 4 lie within a process, a group of 16 spans both.
@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_are_one(name, group, model_path, tmp_path):
    alone = started(name, model_path, tmp_path / "one", group, 1)
    both = started(name, model_path, tmp_path / "two", group, 2)
    one, two = trained(alone, tmp_path / "one"), trained(both, tmp_path / "two")
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for metric in (key for key in theirs if key.startswith(("reward", "rwr/", "kl/"))):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-6), metric
    # Adam divides by √v: where a gradient is near 0, rounding moves a parameter by up to a percent
    # of the step of 1e-2.
    for parameter, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][parameter], value, rtol=0, atol=1e-4)
