"""Two processes over which FSDP2 shards give what one process gives on the same global batch."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.e2e.forked import Forked, ended, two_ranks
from tests.parity.sharded_worker import RUNS, STEPS, launched, main
from tests.tiny import save_tiny_llama
from trl_ext.ppo import Critic
from trl_ext.ppo.sharding import OPTIMIZER

pytestmark = pytest.mark.slow

# The processes of a group do one run after another: to start them takes as long as a run.
GROUPS = [
    ["grpo", "grpo_full", "rwr", "reinforce"],
    ["offline_rwr", "reward"],
    ["ppo", "ppo_model", "ppo_lora"],
    ["poe", "poe_lora"],
]
# Adam divides by √v: where a gradient is near 0, rounding moves a parameter by up to a percent of
# the step of 1e-2.
WITHIN = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A tiny model to train, and two experts of the same shape."""
    folder = tmp_path_factory.mktemp("tiny")
    saved = {name: save_tiny_llama(folder / name) for name in ("policy", "a", "b")}
    for seed, name in enumerate(("a", "b")):
        expert = LlamaForCausalLM.from_pretrained(saved[name])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        expert.save_pretrained(saved[name])
    return saved


def started(names: list[str], models: dict[str, str], folder: Path, processes: int) -> list[Forked]:
    folder.mkdir()
    experts = {name: path for name, path in models.items() if name != "policy"}
    run = (main, names, models["policy"], experts, str(folder))
    where = {"folder": folder, "environment": {"TRL_EXPERIMENTAL_SILENCE": "1"}}
    if processes == 1:
        return [Forked(*run, **where)]
    where["environment"] |= launched()
    return two_ranks(*run, **where)


@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_shards_are_one(names, models, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    runs = [*started(names, models, one, 1), *started(names, models, two, 2)]
    for code, _, err in ended(runs):
        assert code == 0, err[-3000:]
    for name in names:
        check(name, torch.load(one / f"{name}.pt"), torch.load(two / f"{name}.pt"))
        check_files(name, models["policy"], two / name, torch.load(two / f"{name}.pt"))


def check(name: str, one: dict, two: dict) -> None:
    """Metrics and parameters are those of one process, and those of a run that was interrupted."""
    ours, theirs = ([log for log in run["history"] if "grad_norm" in log] for run in (two, one))
    assert len(ours) == len(theirs) == STEPS
    for sharded, alone in zip(ours, theirs, strict=True):
        assert sharded.keys() == alone.keys()
        compared = (key for key in alone if key.startswith(("grad_", "kl/", "ppo/", "reward")))
        for metric in compared:
            assert sharded[metric] == pytest.approx(alone[metric], rel=1e-4, abs=1e-5), metric
    torch.testing.assert_close(two["parameters"], one["parameters"], **WITHIN)
    torch.testing.assert_close(two["resumed"], two["parameters"], rtol=0, atol=0)


def check_files(name: str, start: str, folder: Path, run: dict) -> None:
    """What is saved is whole: a model, an adapter, a critic that load without FSDP."""
    last = folder / f"checkpoint-{STEPS}"
    for saved in (folder / "saved", last):
        if RUNS[name].is_lora:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), saved)
            weights = model.state_dict()
        else:
            weights = load_file(saved / "model.safetensors")
        policy = {n: p for n, p in run["parameters"].items() if not n.startswith("critic.")}
        torch.testing.assert_close(weights, policy, rtol=0, atol=0)
        if name.startswith("ppo"):
            critic = Critic.from_pretrained(saved / "critic").state_dict()
            for parameter, value in critic.items():
                torch.testing.assert_close(value, run["parameters"][f"critic.{parameter}"])
    if name.startswith("ppo"):
        assert (last / OPTIMIZER).is_file() and not (folder / "saved" / OPTIMIZER).exists()
