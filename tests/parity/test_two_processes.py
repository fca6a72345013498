"""Two gloo processes give what one process gives on the same global batch, in every trainer."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.e2e.forked import Forked, ended, two_ranks
from tests.parity import recipe_worker, reward_worker, worker
from tests.parity.recipe_worker import RECIPES
from tests.parity.worker import SAMPLING
from tests.tiny import save_tiny_llama
from trl_ext.registry import TRAINERS

# Of a group of 4 each is within a process, one of 16 spans both.
TABLE: dict[str, str] = {
    **{f"{name}-{group}": SAMPLING[name][0] for name in SAMPLING for group in (4, 16)},
    **{name: RECIPES[name][0] for name in RECIPES},
    "reward_full": "reward",
    "reward_lora": "reward",
}
# What says how long something took.
CLOCK = ("time", "runtime", "per_second", "num_tokens", "epoch", "total_flos")
# Of TRL: means over micro-batches, whatever their size.
OF_MICRO_BATCHES = re.compile(
    "(eval_)?(kl|entropy|mean_token_accuracy|(min|max)_reward|clip_ratio/.*|logits/.*)"
)


def test_every_trainer_is_here():
    """A trainer that is registered gets a row of the table."""
    ours = {
        name for name in TRAINERS.names() if TRAINERS.resolve(name).startswith(("trl_", "trl."))
    }
    assert ours - set(TABLE.values()) == set()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """A tiny model, and two others of its shape."""
    first = save_tiny_llama(tmp_path_factory.mktemp("tiny"))
    found = [first]
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = LlamaForCausalLM.from_pretrained(first)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("expert")
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(first).save_pretrained(folder)
        found.append(str(folder))
    return found


def started(
    row: str, models: list[str], folder: Path, accumulation: int, processes: int
) -> list[Forked]:
    folder.mkdir()
    output = str(folder / "out")
    run: tuple[Callable[..., None], *tuple[Any, ...]]
    if row in RECIPES:
        recipe = recipe_worker.write(row, models, folder, accumulation)
        run = (recipe_worker.main, str(recipe), output)
    elif row.startswith("reward_"):
        run = (reward_worker.main, row.removeprefix("reward_"), models[0], output, accumulation)
    else:
        name, group = row.rsplit("-", 1)
        run = (worker.main, name, models[0], output, accumulation, int(group))
    where: dict[str, Any] = {"folder": folder, "environment": {"TRL_EXPERIMENTAL_SILENCE": "1"}}
    return two_ranks(*run, **where) if processes > 1 else [Forked(*run, **where)]


def trained(runs: list[Forked], folder: Path) -> list[dict[str, Any]]:
    for code, _, err in ended(runs):
        assert code == 0, err[-3000:]
    found = [torch.load(folder / f"out-{rank}") for rank in range(len(runs))]
    assert [each["processes"] for each in found] == [len(runs)] * len(runs)
    return found


def numbers(log: dict[str, float], row: str) -> dict[str, float]:
    kept = {key: value for key, value in log.items() if not key.endswith(CLOCK)}
    if row.startswith("reward_"):
        kept.pop("eval_loss", None)  # transformers counts the row that fills up the last batch
    if accumulation_of(row) == 1:
        return kept
    return {key: value for key, value in kept.items() if not OF_MICRO_BATCHES.fullmatch(key)}


def accumulation_of(row: str) -> int:
    """Of two processes; one takes its global batch at once."""
    return 1 if row.endswith("-16") else 2


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE)
def test_two_processes_are_one(row, models, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = started(row, models, one, 1, 1)
    both = started(row, models, two, accumulation_of(row), 2)
    [expected], ranks = trained(alone, one), trained(both, two)
    for found in ranks:
        assert len(found["history"]) == len(expected["history"])
        for ours, theirs in zip(found["history"], expected["history"], strict=True):
            assert ours.keys() == theirs.keys()
        assert found["evaluation"].keys() == expected["evaluation"].keys()
        # Adam divides by √v: where a gradient is near 0, rounding moves a parameter by up to a
        # percent of the step of 1e-2.
        assert found["parameters"].keys() == expected["parameters"].keys()
        for name, value in expected["parameters"].items():
            torch.testing.assert_close(found["parameters"][name], value, rtol=0, atol=1e-4)
    logs = [*zip(ranks[0]["history"], expected["history"], strict=True)]
    for ours, theirs in [*logs, (ranks[0]["evaluation"], expected["evaluation"])]:
        assert numbers(ours, row) == pytest.approx(numbers(theirs, row), rel=1e-4, abs=1e-6)
