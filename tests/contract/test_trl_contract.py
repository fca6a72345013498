"""What `trl_ext/trl_adapter/` relies on in TRL. A new version fails here first."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from transformers import Trainer
from trl import GRPOTrainer

from tests.tiny import QUIET, count_a, prompts, save_tiny_llama
from trl_ext.policy_config import PolicyConfig
from trl_ext.trl_adapter import PolicyTrainer

SIGNATURES = {
    (GRPOTrainer, "_calculate_rewards"): (
        "inputs",
        "prompts",
        "completions",
        "completion_ids_list",
    ),
    (GRPOTrainer, "_generate"): ("prompts",),
    (GRPOTrainer, "_generate_and_score_completions"): ("inputs",),
    (GRPOTrainer, "_compute_loss"): ("model", "inputs"),
    (GRPOTrainer, "_get_per_token_logps_and_entropies"): (
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    ),
    (GRPOTrainer, "_get_train_sampler"): ("dataset",),
    (GRPOTrainer, "_prepare_inputs"): ("generation_batch",),
    (Trainer, "_init_training_state"): (
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    (Trainer, "_load_best_model"): (),
    (Trainer, "_load_from_checkpoint"): ("resume_from_checkpoint", "model"),
    (Trainer, "_save_rng_state"): ("output_dir",),
    (Trainer, "_load_rng_state"): ("checkpoint",),
}


def test_supported_version():
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17"), (
        "run tests/contract and tests/parity, then widen the range in pyproject.toml"
    )


@pytest.mark.parametrize(("owner", "method"), SIGNATURES, ids=lambda value: str(value))
def test_signature_of_what_is_overridden(owner, method):
    names = tuple(inspect.signature(getattr(owner, method)).parameters)[1:]
    assert names == SIGNATURES[owner, method]


def test_every_override_of_an_underscore_method_is_pinned():
    ours = [each for each in PolicyTrainer.__mro__ if each.__module__.startswith("trl_ext.")]
    names = {name for each in ours for name in vars(each)}
    own = {name for name in names if name.startswith("_") and name[1] != "_"}
    inherited = {name for name in own if hasattr(GRPOTrainer, name)}
    called = {"_load_from_checkpoint"}
    assert inherited == {method for _, method in SIGNATURES} - called


class Spy(PolicyTrainer):
    """Records what the hooks see and what TRL calls; its loss is −A·log π, gradient of TRL's."""

    def assign_credit(self, rollout):
        self.seen_rollouts = [*getattr(self, "seen_rollouts", []), rollout]
        return super().assign_credit(rollout)

    def policy_loss(self, micro_batch):
        self.seen = [*getattr(self, "seen", []), micro_batch]
        per_token = -micro_batch.credit[:, None] * micro_batch.per_token_logps
        return (per_token * micro_batch.mask).sum() / micro_batch.mask.sum()

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


@pytest.fixture
def make_spy(tmp_path):
    path = save_tiny_llama(tmp_path / "model")

    def make(reward=count_a, **options) -> Spy:
        settings: dict[str, Any] = QUIET | {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_steps": 1,
        }
        args = PolicyConfig(str(tmp_path / "out"), **(settings | options))
        return Spy(path, reward, args, prompts())

    return make


def test_batch_keys_and_shapes(make_spy):
    spy = make_spy(num_iterations=2, beta=0.1)
    spy.train()
    (rollout,) = spy.seen_rollouts
    expected = {
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "advantages",
        "num_items_in_batch",
        "ref_per_token_logps",
    }
    assert set(rollout.batch) == expected | {"old_per_token_logps"}
    rows, tokens = rollout.batch["completion_ids"].shape
    assert rollout.rewards_PG.shape == (2, 4)
    assert rollout.batch["advantages"].shape == (rows,)
    assert rollout.batch["ref_per_token_logps"].shape == (rows, tokens)
    assert spy.seen[0].per_token_logps.requires_grad


def test_without_credit_and_kl_trls_loss_is_zero_so_ours_is_all_of_it(make_spy):
    spy = make_spy()
    spy.train()
    (micro_batch,) = spy.seen
    logged = next(log["loss"] for log in spy.state.log_history if "loss" in log)
    ours = -(micro_batch.credit[:, None] * micro_batch.per_token_logps * micro_batch.mask).sum()
    assert logged == pytest.approx((ours / micro_batch.mask.sum()).item(), rel=1e-3)


def test_the_loss_runs_one_forward_pass_and_a_reference_one_more(make_spy):
    """So the log-probabilities remembered last are those of the policy, with gradient."""
    without, with_reference = make_spy(), make_spy(beta=0.1)
    without.train()
    with_reference.train()
    assert (without.calls, with_reference.calls) == (1, 2)


@pytest.mark.parametrize("beta", [0.1, 0.0])
def test_the_reference_scores_last_before_the_rewards(make_spy, beta):
    """So what was scored last is the reference's, and TRL puts the same tensor into the batch."""
    seen = []

    def reward(completions, completion_ids, prompt_ids, ref_per_token_logps, **columns):
        seen.append((completion_ids, prompt_ids, ref_per_token_logps, spy.calls))
        return count_a(completions)

    spy = make_spy(reward, num_iterations=2, beta=beta)
    spy.train()
    [(completion_ids, prompt_ids, logps, calls)] = seen
    [rollout] = spy.seen_rollouts
    assert calls == 2, "the old policy, then the reference"
    batch = rollout.batch
    for row, ids in enumerate(completion_ids):
        size = len(ids)
        assert ids == batch["completion_ids"][row, :size].tolist()
        assert logps[row] == batch["ref_per_token_logps"][row, :size].tolist()
        assert prompt_ids[row] == batch["prompt_ids"][row, batch["prompt_mask"][row] == 1].tolist()


def test_trainer_state_is_the_last_file_of_a_checkpoint_to_be_written(make_spy):
    """`trl_ext.record.is_complete` takes it for the sign that all others are there."""
    spy = make_spy(save_strategy="steps", save_steps=1, num_iterations=2)
    spy.train()
    (checkpoint,) = Path(spy.args.output_dir).glob("checkpoint-*")
    times = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert {"rollout_0.pt", "rng_state.pth", "optimizer.pt", "scheduler.pt"} < set(times)
    assert max(times, key=lambda name: times[name]) == "trainer_state.json"


def test_the_loss_is_scaled_for_accumulation_by_the_trainer_itself():
    assert GRPOTrainer.loss_is_scaled_for_ga is True


def test_names_that_the_adapter_reads(make_spy):
    spy = make_spy()
    for name in (
        "_logs",
        "_metrics",
        "_pending_extra_logs",
        "_step",
        "_buffered_inputs",
        "_tokenizer",
        "ref_model",
        "temperature",
        "epsilon_low",
        "epsilon_high",
        "loss_type",
        "max_completion_length",
        "beta",
        "eos_token_ids",
        "generation_kwargs",
        "generation_config",
        "num_generations",
        "num_generations_eval",
        "num_iterations",
        "reward_weights",
        "use_vllm",
    ):
        assert hasattr(spy, name), name
    assert torch.is_tensor(spy.reward_weights)
