"""With signal on some of two processes only, parameters are TRL's and those of one process."""

import pytest
import torch

from tests.e2e.forked import Forked, ended, two_ranks
from tests.parity.signal_worker import OURS, RUNS, main
from tests.tiny import save_tiny_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """Of one process, and of the two ranks of a run of two."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny_llama(folder / "tiny")
    where = {"folder": folder, "environment": {"TRL_EXPERIMENTAL_SILENCE": "1"}}
    runs = [
        Forked(main, model, str(folder / "one"), **where),
        *two_ranks(main, model, str(folder / "two"), **where),
    ]
    for code, _, err in ended(runs):
        assert code == 0, err[-3000:]
    return [torch.load(folder / name) for name in ("one-0", "two-0", "two-1")]


@pytest.mark.parametrize("how", OURS)
@pytest.mark.parametrize("name", RUNS)
def test_parameters_are_trls(found, name, how):
    one, *both = found
    for run in found:
        torch.testing.assert_close(
            run[name, how]["parameters"], run[name, "trl"]["parameters"], rtol=0, atol=1e-6
        )
    for run in both if name != "bnpo" else ():  # which divides by the tokens of a micro-batch
        torch.testing.assert_close(
            run[name, how]["parameters"], one[name, how]["parameters"], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("how", OURS)
@pytest.mark.parametrize("name", RUNS)
def test_backward_passes_are_as_many_on_all_ranks(found, name, how):
    _, first, second = found
    assert first[name, how]["passes"] == second[name, how]["passes"]
    assert all(first[name, how]["passes"])
