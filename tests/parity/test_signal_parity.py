"""With what carries no signal left out, gradients are TRL's on the same rollouts."""

import functools
import tempfile
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig as TRLGRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from tests.tiny import QUIET, VOCABULARY, prompts, save_tiny_llama
from trl_ext import GRPOConfig, GRPOTrainer
from trl_ext.kl_penalty import KLController

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


class Gradients(TrainerCallback):
    """The gradient of each step."""

    def __init__(self):
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is not None for p in trained.values())
        self.seen.append({name: p.grad.detach().clone() for name, p in trained.items()})


def rollout(prompts, trainer):
    """Completions of one to six tokens: a function of step and row."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    lengths = torch.randint(1, 7, (len(prompts),), generator=generator).tolist()
    completions = [
        torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]
    ended = [[*ids[:-1], 0] if len(ids) < 6 else ids for ids in completions]
    return {
        "prompt_ids": trainer.processing_class(prompts)["input_ids"],
        "completion_ids": ended,
        "logprobs": None,
    }


def mixed(prompts, completion_ids, **_) -> list[float]:
    """Every second group has one reward; the others, one for each first token."""
    groups = [row // 4 for row in range(len(prompts))]
    return [
        1.0 if group % 2 else float(ids[0])
        for group, ids in zip(groups, completion_ids, strict=True)
    ]


def run(
    trainer_class, config_class, model, folder, lora=False, reward=mixed, source=rollout, **options
):
    settings: dict[str, Any] = (
        QUIET
        | {
            "max_steps": 3,
            # A gradient of another scale shows, and rounding is not blown up: neither clipping to
            # norm 1 nor division by √v, as Adam does.
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "learning_rate": 1e-3,
            "num_generations": 4,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "max_completion_length": 6,
            "beta": 0.0,
        }
        | options
    )
    gradients = Gradients()
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=config_class(str(folder), **settings),
        train_dataset=prompts(),
        rollout_func=source,
        callbacks=[gradients],
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        if lora
        else None,
    )
    torch.manual_seed(0)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return gradients.seen, logs, dict(trainer.model.named_parameters())


@functools.cache
def trls(model, options: frozenset):
    """What TRL's trainer finds; once for all that is compared with it."""
    with tempfile.TemporaryDirectory() as folder:
        return run(TRLGRPOTrainer, TRLGRPOConfig, model, folder, **dict(options))


def compared(model, tmp_path, ours: dict[str, Any] | None = None, /, **options):
    theirs = trls(model, frozenset(options.items()))
    mine = run(GRPOTrainer, GRPOConfig, model, tmp_path / "ours", **options, **(ours or {}))
    assert len(mine[0]) == len(theirs[0]) == 3
    for a, b in zip(mine[0], theirs[0], strict=True):
        norm = torch.stack([gradient.norm() for gradient in b.values()]).norm()
        error = torch.stack([(a[name] - b[name]).norm() for name in b]).norm()
        assert error <= 1e-5 * norm
    assert norm > 1e-3
    for a, b in zip(mine[1], theirs[1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
        assert a.get("reward") == b.get("reward")
    return mine, theirs


@pytest.mark.parametrize(
    ("loss_type", "beta"),
    [*((name, 0.0) for name in LOSS_TYPES), *((name, 0.1) for name in ("grpo", "bnpo", "dapo"))],
)
def test_every_loss_type(model_path, tmp_path, loss_type, beta):
    compared(model_path, tmp_path, loss_type=loss_type, beta=beta)


HOW_OFTEN: list[dict[str, Any]] = [
    {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 16},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
    {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    # Steps that are long enough for the clip, and for policies to differ within a rollout.
    {
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "learning_rate": 0.1,
    },
]
HOW: list[dict[str, Any]] = [
    {"importance_sampling_level": "sequence", "num_iterations": 2, "learning_rate": 0.1},
    {"off_policy_mask_threshold": 0.01, "num_iterations": 2, "learning_rate": 0.1},
    {"entropy_coef": 0.1},
    {"mask_truncated_completions": True},
    {"gradient_checkpointing": True},
    {"lora": True, "beta": 0.1},
    {"scale_rewards": "batch"},
]


@pytest.mark.parametrize("options", HOW_OFTEN, ids=str)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_however_often_a_step_is_taken(model_path, tmp_path, loss_type, options):
    compared(model_path, tmp_path, loss_type=loss_type, **options)


@pytest.mark.parametrize("options", HOW, ids=str)
def test_however_a_step_is_made(model_path, tmp_path, options):
    compared(model_path, tmp_path, **options)


@pytest.mark.parametrize(
    "ours",
    [
        {"trim_padding": False},
        {"share_prompts": False},
        {"skip_zero_credit": False},
        {"trim_padding": False, "skip_zero_credit": False},
        {"max_tokens_per_micro_batch": 12},
        {"max_tokens_per_micro_batch": 1},
        {"max_tokens_per_micro_batch": 100_000},
    ],
    ids=str,
)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo"])
def test_whatever_is_left_out(model_path, tmp_path, loss_type, ours):
    compared(model_path, tmp_path, ours, loss_type=loss_type)


def test_a_step_without_signal_still_moves_by_momentum(model_path, tmp_path):
    def first_step_only(prompts, completion_ids, trainer_state, **_):
        if trainer_state.global_step == 0:
            return mixed(prompts, completion_ids)
        return [0.0] * len(prompts)

    options: dict[str, Any] = {
        "reward": first_step_only,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }
    theirs = run(TRLGRPOTrainer, TRLGRPOConfig, model_path, tmp_path / "trl", **options)
    mine = run(GRPOTrainer, GRPOConfig, model_path, tmp_path / "ours", **options)
    assert all(not gradient.any() for gradient in mine[0][1].values())
    for name, parameter in theirs[2].items():
        torch.testing.assert_close(mine[2][name], parameter, rtol=0, atol=1e-5)


def of_rows(prompts, **_) -> list[float]:
    """Every second group has one reward."""
    return [1.0 if row // 4 % 2 else float(row % 4) for row in range(len(prompts))]


def answers(prompts, trainer):
    """A part of each completion is a tool's, of each sixth one all of it."""
    found = rollout(prompts, trainer)
    masks = [
        [int(row % 6 and (row + at) % 3) for at in range(len(ids))]
        for row, ids in enumerate(found["completion_ids"])
    ]
    return found | {"env_mask": masks}


def of_one_token(prompts, trainer):
    """Prompts of one token, which leave nothing to share; every group has the same."""
    return rollout(prompts, trainer) | {"prompt_ids": [[1]] * len(prompts)}


def of_one_prompt(prompts, trainer):
    return rollout(prompts, trainer) | {"prompt_ids": [[1, 2, 3]] * len(prompts)}


def of_other_prompts(prompts, trainer):
    """Each row has a prompt of its own: no two tokens have the same entropy."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    ids = torch.randint(1, VOCABULARY, (len(prompts), 6), generator=generator).tolist()
    return rollout(prompts, trainer) | {"prompt_ids": ids}


def too_long(prompts, trainer):
    """In one step every completion is truncated."""
    found = rollout(prompts, trainer)
    if trainer.state.global_step == 1:
        found["completion_ids"] = [[1, 2, 3, 4, 5, 1]] * len(prompts)
    return found


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (answers, {"beta": 0.1}),
        (answers, {"loss_type": "bnpo"}),
        (of_one_token, {}),
        (of_one_prompt, {"beta": 0.1}),
        (of_other_prompts, {"top_entropy_quantile": 0.8}),
        (of_other_prompts, {"top_entropy_quantile": 0.8, "loss_type": "grpo"}),
        (too_long, {"mask_truncated_completions": True}),
        (too_long, {"mask_truncated_completions": True, "beta": 0.1}),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_whatever_is_sampled(model_path, tmp_path, source, options):
    compared(model_path, tmp_path, **options, reward=of_rows, source=source)


@pytest.mark.parametrize(
    "estimator", [{"kl_estimator": "k1"}, {"kl_estimator": "exact", "kl_is_correction": False}]
)
def test_the_kl_that_beta_follows_is_a_mean_over_rows(model_path, tmp_path, monkeypatch, estimator):
    """Two parts of a rollout, of as many rows and of differently many passes."""
    options: dict[str, Any] = estimator | {
        "kl_controller": "adaptive",
        "kl_target": 1.0,
        "beta": 0.1,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "max_steps": 5,
    }
    heard: list[float] = []
    monkeypatch.setattr(KLController, "update", lambda self, kl, rows: heard.append(kl))
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"max_tokens_per_micro_batch": 8},
        {"trim_padding": False},
    )
    logs = [
        run(GRPOTrainer, GRPOConfig, model_path, tmp_path, **options, **each)[1]
        for each in (*ways, {"trim_padding": False, "skip_zero_credit": False})
    ]
    found = [[log["kl/sequence"] for log in each] for each in logs]
    by_way = [heard[2 * way : 2 * way + 2] for way in range(len(logs))]
    for way in range(len(ways)):
        assert found[way] == pytest.approx(found[-1], rel=1e-5, abs=1e-5)
        assert by_way[way] == pytest.approx(by_way[-1], rel=1e-5, abs=1e-5)
    # Of two steps each: a mean of means, as each has 16 rows.
    assert by_way[0] == pytest.approx(
        [sum(found[0][i : i + 2]) / 2 for i in (0, 2)], rel=1e-5, abs=1e-5
    )
