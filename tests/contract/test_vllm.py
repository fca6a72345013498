"""Generation by vLLM: TRL's own code path, and a stand-in for the engine (`tests/fake_vllm.py`)."""

import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_utils import set_seed

from tests.fake_vllm import Call, Engine, install
from tests.tiny import QUIET, prompts, save_tiny_llama
from trl_ext import GRPOTrainer, PPOTrainer, ReinforceTrainer, RWRTrainer
from trl_ext.collect import collect
from trl_ext.iterate import iterate
from trl_ext.recipe import read_recipe
from trl_ext.trl_adapter.probe import probe

TRAINERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "grpo": (GRPOTrainer, {"beta": 0.1}),
    "rwr": (RWRTrainer, {"beta": 0.2}),
    "reinforce": (ReinforceTrainer, {"beta": 0.1}),
    "ppo": (PPOTrainer, {"beta": 0.1}),
}


def sums(completion_ids: list[list[int]], **columns) -> list[float]:
    """Reward: the sum of the tokens' numbers."""
    return [sum(ids) / 10 for ids in completion_ids]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engines(monkeypatch, model) -> Iterator[list[Engine]]:
    yield install(monkeypatch, model).built
    # With TRL's variables set, accelerate connects this process to itself.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


class Rollouts(TrainerCallback):
    """Keeps each rollout, and the policy's head when it was made."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Any, Tensor]] = []

    def on_rollout(self, args, state, control, *, trainer, rollout, **kwargs):
        head = trainer.model.lm_head.weight.detach().clone()
        self.seen.append((head, SimpleNamespace(**rollout.batch), trainer.sampler_logps(rollout)))


def make(name: str, model: str, folder, *, rows: Any = None, **options) -> tuple[Any, Rollouts]:
    of, chosen = TRAINERS[name]
    settings: dict[str, Any] = QUIET | {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "temperature": 0.7,
        "use_vllm": True,
        "vllm_mode": "colocate",
    }
    args = of.config_class(str(folder), **(settings | chosen | options))
    kept = Rollouts()
    dataset = rows or prompts()
    return of(model, sums, args, dataset, eval_dataset=prompts(2), callbacks=[kept]), kept


def padded(rows: list[list[float]], like: Tensor) -> Tensor:
    filled = torch.zeros_like(like)
    for row, numbers in zip(filled, rows, strict=True):
        row[: len(numbers)] = torch.tensor(numbers)
    return filled


def assert_is_that_of(call: Call, seen: tuple[Tensor, Any, Tensor]) -> None:
    head, batch, sampler_logps = seen
    assert torch.equal(call.weights, head.to(torch.bfloat16).float()), "weights of this very step"
    masks = batch.prompt_mask.bool()
    asked = [row[mask].tolist() for row, mask in zip(batch.prompt_ids, masks, strict=True)]
    assert asked == [prompt for prompt in call.prompts for _ in range(call.params.n)]
    for row, completion in zip(batch.completion_ids, call.completions, strict=True):
        assert row[: len(completion)].tolist() == completion
    assert torch.equal(batch.sampling_per_token_logps, padded(call.logps, sampler_logps))
    assert torch.equal(sampler_logps, batch.sampling_per_token_logps)


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("name", TRAINERS)
def test_each_step_samples_with_the_weights_of_the_step_before(
    name, mode, model, engines, tmp_path
):
    trainer, kept = make(name, model, tmp_path, vllm_mode=mode)
    trainer.train()
    [engine] = engines
    assert engine.events == ["sync", "reset", "generate"] * 2
    first, second = engine.calls
    assert not torch.equal(first.weights, second.weights), "a step moves the weights"
    for call, seen in zip(engine.calls, kept.seen, strict=True):
        assert_is_that_of(call, seen)
        assert (call.params.temperature, call.params.max_tokens) == (0.7, 4)
        assert (call.params.top_p, call.params.top_k, call.params.logprobs) == (1.0, 0, 0)
        # The server samples a prompt's completions together, a colocated engine row by row.
        assert (call.params.n, len(call.prompts)) == ((1, 8) if mode == "colocate" else (4, 2))
    if mode == "colocate":
        assert engine.options["model"] == model and engine.options["max_num_seqs"] == 8
        assert engine.options["logprobs_mode"] == "processed_logprobs"


def test_an_engine_that_sleeps_gets_its_weights_before_each_use(model, engines, tmp_path):
    trainer, kept = make("rwr", model, tmp_path, vllm_enable_sleep_mode=True)
    trainer.train()
    trainer.evaluate()
    once = ["wake weights", "sync", "reset", "wake kv_cache", "generate", "sleep"]
    assert engines[0].events == ["sleep", *once * 3]
    assert_is_that_of(engines[0].calls[-1], kept.seen[-1])


def test_an_evaluation_samples_its_own_number_of_completions(model, engines, tmp_path):
    options = {"num_generations_eval": 2, "per_device_eval_batch_size": 4}
    trainer, _ = make("grpo", model, tmp_path, vllm_mode="server", **options)
    trainer.train()
    metrics = trainer.evaluate()
    call = engines[0].calls[-1]
    assert (call.params.n, len(call.prompts)) == (2, 2)
    assert engines[0].events[-3:] == ["sync", "reset", "generate"], "after the last step"
    expected = sum(sum(ids) for ids in call.completions) / 10 / len(call.completions)
    assert metrics["eval_reward"] == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_the_correction_enters_the_loss(mode, model, engines, tmp_path):
    """On-policy, π = π_old: the loss is the mean over completions of −A·ρ, summed over tokens.

    ρ = π_old/μ of a token, at most clip_max; or of a completion, and 0 above clip_max.
    """
    limit = 1.001
    options = {
        "beta": 0.0,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": limit,
        "loss_type": "grpo",
        "max_steps": 1,
    }
    trainer, kept = make("grpo", model, tmp_path, **options)
    trainer.train()
    [(_, batch, _)] = kept.seen
    expected = 0.0
    for row, advantage in enumerate(batch.advantages.tolist()):
        logps = engines[0].calls[0].logps[row]
        log_ratios = [
            own - sampler
            for own, sampler in zip(batch.old_per_token_logps[row].tolist(), logps, strict=False)
        ]
        ratios = [min(torch.tensor(each).exp().item(), limit) for each in log_ratios]
        if mode == "sequence_mask":
            ratio = torch.tensor(sum(log_ratios)).exp().item()
            ratios = [ratio if ratio <= limit else 0.0] * len(logps)
        assert set(ratios) != {1.0}, "bfloat16 shows"
        expected -= advantage * sum(ratios) / len(ratios) / 8
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-6)


def ratios_of(batch: Any, call: Call, row: int, limit: float | None, *, whole: bool) -> list[float]:
    """ρ = π_old/μ of each token, at most `limit`; or of the completion, 0 above it."""
    own = batch.old_per_token_logps[row].tolist()
    logs = [ours - vllms for ours, vllms in zip(own, call.logps[row], strict=False)]
    if not whole:
        return [min(math.exp(each), limit or math.inf) for each in logs]
    ratio = math.exp(sum(logs))
    return [ratio if limit is None or ratio <= limit else 0.0] * len(logs)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_the_correction_enters_a_loss_of_tokens(name, mode, model, engines, tmp_path):
    """On-policy REINFORCE: −ρ_t·Ψ_t·log π_t, Ψ_t the return; PPO: ρ_t·(−A_t + ½(V_t − R_t)²).

    dr_grpo adds them up over 8 rows of at most 4 tokens.
    """
    limit = 1.001
    options = {
        "beta": 0.0,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": limit,
        "max_steps": 1,
    }
    options |= {"baseline": "none"} if name == "reinforce" else {"whiten_advantages": False}
    trainer, kept = make(name, model, tmp_path, **options)
    trainer.train()
    [(_, batch, _)], [call], expected = kept.seen, engines[0].calls, 0.0
    for row, ids in enumerate(call.completions):
        ratios = ratios_of(batch, call, row, limit, whole=mode == "sequence_mask")
        for t, ratio in enumerate(ratios):
            if name == "reinforce":
                loss = -sum(ids) / 10 * batch.old_per_token_logps[row, t].item()
            else:
                error = batch.old_values[row, t] - batch.returns[row, t]
                loss = (error.square() / 2 - batch.advantages[row, t]).item()
            expected += ratio * loss / (8 * 4)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("limit", [1.0005, None])
def test_the_correction_enters_the_weights_of_completions(limit, model, engines, tmp_path):
    """w ∝ ρ·exp(r/β) over the 4 completions of a prompt, ρ = Π_t π_old/μ, 0 above the limit."""
    options = {"vllm_importance_sampling_clip_max": limit, "max_steps": 1, "beta": 0.5}
    trainer, kept = make("rwr", model, tmp_path, **options)
    trainer.train()
    [(_, batch, _)], [call] = kept.seen, engines[0].calls
    tilted = []
    for row, ids in enumerate(call.completions):
        [ratio, *_] = ratios_of(batch, call, row, limit, whole=True)
        tilted.append(ratio * math.exp(sum(ids) / 10 / 0.5))
    assert (0.0 in tilted) == (limit is not None)
    for group in range(2):
        weights, among = batch.advantages[group * 4 : group * 4 + 4], tilted[group * 4 :][:4]
        if weights.any():  # else all rewards of the group are equal
            assert weights.tolist() == pytest.approx([t / sum(among) for t in among], abs=1e-6)


def test_a_penalty_in_the_reward_is_that_of_the_policy(model, engines, tmp_path):
    """r at the last token, −β·(log π_old − log π_ref) at each: not of vLLM's rounded copy."""
    trainer, kept = make("reinforce", model, tmp_path, beta=0.5, max_steps=1)
    trainer.train()
    [(_, batch, _)], [call] = kept.seen, engines[0].calls
    kl = batch.old_per_token_logps - batch.ref_per_token_logps
    for row, ids in enumerate(call.completions):
        expected = [-0.5 * each for each in kl[row, : len(ids)].tolist()]
        expected[-1] += sum(ids) / 10
        assert batch.token_rewards[row, : len(ids)].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("corrected", [True, False])
def test_a_log_probability_that_vllm_leaves_out_is_the_policys(
    corrected, model, engines, tmp_path, monkeypatch
):
    monkeypatch.setattr(Engine, "nan_at", 0)
    options = {"beta": 0.1, "vllm_importance_sampling_correction": corrected}
    trainer, kept = make("reinforce", model, tmp_path, **options)
    trainer.train()
    for _, batch, sampler_logps in kept.seen:
        assert batch.sampling_per_token_logps[:, 0].isnan().all()
        assert sampler_logps.isfinite().all()
        if corrected:
            assert torch.equal(sampler_logps[:, 0], batch.old_per_token_logps[:, 0])
        assert torch.equal(sampler_logps[:, 1:], batch.sampling_per_token_logps[:, 1:])
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history[:2])


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_the_longest_batch_first_is_as_long_as_asked(mode, model, engines, tmp_path):
    trainer, _ = make("ppo", model, tmp_path, vllm_mode=mode)
    took: list[Any] = []

    class Probe(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            took.append(probe(trainer))

    trainer.add_callback(Probe())
    trainer.train()
    assert took[0].longest == 2 + 4
    first, *later = engines[0].calls
    assert {len(ids) for ids in first.completions} == {4} and first.params.min_tokens == 4
    assert {len(prompt) for prompt in first.prompts} == {2}
    assert [call.params.min_tokens for call in later] == [0, 0]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_completion_ends_at_a_stop_string(mode, model, engines, tmp_path):
    """Tokens are letters: "b" is token 2. Such an end is no truncation, as of transformers."""
    options = {"stop_strings": ["b"], "generation_kwargs": {"stop_token_ids": [4]}, "max_steps": 1}
    trainer, _ = make("rwr", model, tmp_path, vllm_mode=mode, **options)
    trainer.train()
    [call] = engines[0].calls
    assert set(call.params.stop_token_ids or []) == {0, 2, 4}
    assert any(2 in ids for ids in call.completions)
    ends = {0, 2}
    cut_off = sum(ids[-1] not in ends for ids in call.completions) / len(call.completions)
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == pytest.approx(cut_off)


def write_recipe(folder, model: str, **settings):
    """Two prompts, eight completions of each."""
    Dataset.from_dict({"prompt": ["a", "bc"]}).to_json(folder / "prompts.jsonl")
    given = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": model,
        "dataset_name": str(folder / "prompts.jsonl"),
        "reward_funcs": ["tests.contract.test_vllm:sums"],
        "beta": 0.1,
        "num_generations": 8,
        "per_device_eval_batch_size": 16,
        "max_completion_length": 2,
        "stop_strings": ["b"],
        "use_vllm": True,
        "vllm_mode": "colocate",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(given | settings))
    return read_recipe(path)


def rows_in(path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_holds(rows: list[dict[str, Any]], call: Call) -> None:
    """A row has what the engine sampled, and the engine's own log-probabilities: it is μ."""
    assert [row["completion_ids"] for row in rows] == call.completions
    for row, logps in zip(rows, call.logps, strict=True):
        assert row["logp"] == pytest.approx(sum(logps), abs=1e-5)
        assert row["reward"] == pytest.approx(sum(row["completion_ids"]) / 10)
        assert row["is_truncated"] == (row["completion_ids"][-1] not in (0, 2))


def test_collect_writes_what_the_engine_sampled(model, engines, tmp_path):
    recipe = write_recipe(tmp_path, model, trainer="rwr", temperature=3.0)
    collect(recipe, tmp_path / "rows.jsonl")
    rows = rows_in(tmp_path / "rows.jsonl")
    [engine] = engines
    assert engine.events == ["sync", "reset", "generate"]
    assert engine.options["max_num_seqs"] == 16, "as many as are sampled at a time"
    assert_holds(rows, engine.calls[0])
    assert {row["is_truncated"] for row in rows} == {True, False}


@pytest.mark.parametrize("reference", ["moving", "fixed"])
def test_iterate_samples_each_round_with_the_policy_before_it(reference, model, engines, tmp_path):
    more: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2, "drop_uniform_groups": False}
    recipe = write_recipe(tmp_path, model, trainer="offline_rwr", reference=reference, **more)
    set_seed(0)
    iterate(recipe, 2)
    assert not torch.distributed.is_initialized(), "one process does not connect to itself"
    first, second = (engine for engine in engines if engine.calls)
    for number, (engine, policy) in enumerate(((first, model), (second, None)), start=1):
        folder = policy or str(tmp_path / f"run/round-{number - 1}")
        head: Any = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
        assert torch.equal(engine.calls[0].weights, head.to(torch.bfloat16).float())
        assert_holds(rows_in(tmp_path / f"run/round-{number}/completions.jsonl"), engine.calls[0])
    assert not torch.equal(first.calls[0].weights, second.calls[0].weights)
