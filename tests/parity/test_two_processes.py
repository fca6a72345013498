"""Two gloo processes give what one process gives on the same global batch."""

import os
import subprocess
import sys

import pytest
import torch

from tests.parity.worker import TRAINERS
from tests.tiny import save_tiny_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def trained(name: str, model_path: str, output, group: int, processes: int):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tests.parity.worker"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(
        [*command, name, model_path, str(output), str(group)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output)


# Groups of 4 lie within a process, a group of 16 spans both.
@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_are_one(name, group, model_path, tmp_path):
    one = trained(name, model_path, tmp_path / "one", group, 1)
    two = trained(name, model_path, tmp_path / "two", group, 2)
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for metric in (key for key in theirs if key.startswith(("reward", "rwr/", "kl/"))):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-6), metric
    # Adam divides by √v: where a gradient is near 0, rounding moves a parameter by up to a percent
    # of the step of 1e-2.
    for parameter, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][parameter], value, rtol=0, atol=1e-4)
