"""What PPO does with a rollout: rewards, advantages, steps, and options that do not go together."""

import copy
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.tiny import QUIET, VOCABULARY, count_a, prompts, save_tiny_llama
from trl_ext.errors import ConfigError, RunError
from trl_ext.oracle import tabular_tokenizer
from trl_ext.ppo import PPOConfig, PPOTrainer
from trl_ext.rollout import Rollout


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


class Spy(PPOTrainer):
    """Keeps each rollout and its credit."""

    def assign_credit(self, rollout):
        credit = super().assign_credit(rollout)
        self.seen = [*getattr(self, "seen", []), (rollout, credit)]
        return credit


class KeepWeights(TrainerCallback):
    """The first parameter after every step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.weights.append(next(model.parameters()).detach().clone())


@pytest.fixture
def make(model_path, tmp_path):
    def build(reward=count_a, callbacks=None, **options) -> Spy:
        settings: dict[str, Any] = QUIET | {
            "per_device_train_batch_size": 8,
            "num_generations": 1,
            "max_steps": 1,
        }
        args = PPOConfig(str(tmp_path / "out"), **(settings | options))
        held_out = prompts(8) if args.eval_strategy != "no" else None
        return Spy(model_path, reward, args, prompts(), held_out, callbacks=callbacks)

    return build


def test_advantages_have_mean_0_and_deviation_1_over_tokens(make):
    trainer = make(beta=0.0)
    trainer.train()
    [(rollout, credit)] = trainer.seen
    kept = credit[rollout.mask.bool()]
    assert kept.mean().abs() < 1e-5
    assert kept.std(unbiased=False).item() == pytest.approx(1.0, rel=1e-4)
    assert (credit[~rollout.mask.bool()] == 0).all()


def test_without_whitening_and_with_a_critic_that_says_0_credit_is_the_discounted_return(make):
    gamma, lam = 0.9, 0.8
    trainer = make(beta=0.0, whiten_advantages=False, gamma=gamma, lam=lam)
    trainer.train()
    [(rollout, credit)] = trainer.seen
    lengths = rollout.mask.sum(1)
    for row, length in enumerate(lengths.tolist()):
        reward = rollout.rewards_PG[row, 0].item()
        expected = [reward * (gamma * lam) ** (length - 1 - t) for t in range(length)]
        assert credit[row, :length].tolist() == pytest.approx(expected, abs=1e-6)
        targets = rollout.batch["returns"][row, :length].tolist()
        assert targets == pytest.approx(
            [reward * gamma ** (length - 1 - t) for t in range(length)], abs=1e-6
        ), "critic_lam=1: Monte Carlo"


@pytest.mark.parametrize("bootstrap", [True, False])
def test_a_truncated_completion_is_worth_what_the_critic_says_would_follow(make, bootstrap):
    trainer = make(
        lambda completions, **_: [1.0] * len(completions),
        beta=0.0,
        bootstrap_truncated=bootstrap,
        critic_lam=0.0,
        whiten_advantages=False,
    )
    torch.nn.init.normal_(trainer.critic.head.weight)
    base = trainer.model.model

    def value(row: int, tokens: int) -> float:
        """Of the state after so many tokens, each completion alone, without padding."""
        batch = rollout.batch
        ids = [batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]]
        ids = torch.cat([*ids, batch["completion_ids"][row, :tokens]])[None]
        with torch.no_grad():
            return head(before(input_ids=ids).last_hidden_state[0, -1]).item()

    before, head = copy.deepcopy(base), copy.deepcopy(trainer.critic.head)
    trainer.train()
    [(rollout, _)] = trainer.seen
    ids, returns = rollout.batch["completion_ids"], rollout.batch["returns"]
    ended = (ids == 0).any(1)
    assert ended.any() and not ended.all()
    for row in range(len(ids)):
        last = int(rollout.mask[row].sum()) - 1
        cut_off = bootstrap and not ended[row]
        expected = [value(row, t + 1) for t in range(last)]
        expected.append(value(row, last + 1) if cut_off else 1.0)
        assert returns[row, : last + 1].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_values_do_not_train_the_policy_below_them(make):
    """Other targets, the same advantages: one step takes the policy to the same place."""
    policies = []
    for lam in (0.0, 1.0):
        trainer = make(beta=0.0, critic_lam=lam)
        torch.manual_seed(0)
        torch.nn.init.normal_(trainer.critic.head.weight)
        trainer.train()
        policies.append([p.detach().clone() for p in trainer.model.parameters()])
    for ours, theirs in zip(*policies, strict=True):
        assert torch.equal(ours, theirs)


def test_early_stop_takes_no_step_once_the_policy_has_left_the_old_one(make):
    """The first of five steps on a rollout finds a KL of 0, the second one that is too large."""
    keep = KeepWeights()
    trainer = make(
        callbacks=[keep], num_iterations=5, max_steps=10, learning_rate=0.1, early_stop_kl=1e-6
    )
    trainer.train()
    moved = [not torch.equal(*pair) for pair in zip(keep.weights, keep.weights[1:], strict=False)]
    assert moved == [False] * 4 + [True] + [False] * 4
    assert len(trainer.seen) == 2


@pytest.mark.parametrize(("target", "factor"), [(1e-9, 2.0), (1e9, 0.5)])
def test_the_penalty_coefficient_doubles_or_halves(make, target, factor):
    trainer = make(
        surrogate="penalty",
        old_kl_target=target,
        num_iterations=2,
        max_steps=6,
        learning_rate=0.05,
    )
    trainer.train()
    assert trainer.old_kl.beta == factor**2, "two rollouts were heard of before the third"


def test_the_unscored_train_neither_policy_nor_critic(make):
    trainer = make(lambda completions, **_: [None] * len(completions), beta=0.0)
    trainer.train()
    [(_, credit)] = trainer.seen
    assert (credit == 0).all()
    assert (trainer.critic.head.weight == 0).all()


def test_a_critic_that_diverges_stops_the_run_by_name(make):
    trainer = make(max_steps=2)
    with torch.no_grad():
        trainer.critic.head.bias.fill_(torch.inf)
    with pytest.raises(RunError, match="critic's gradient in step 1 is not finite"):
        trainer.train()


def test_an_optimizer_given_by_hand_trains_the_critic_too(model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    settings: dict[str, Any] = QUIET | {"per_device_train_batch_size": 8, "max_steps": 2}
    trainer = PPOTrainer(
        model,
        lambda completions, **_: [1.0] * len(completions),
        PPOConfig(str(tmp_path), num_generations=1, beta=0.0, **settings),
        prompts(),
        processing_class=tabular_tokenizer(VOCABULARY),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    )
    trainer.train()
    assert (trainer.critic.head.bias != 0).all()


def test_a_scheduler_given_by_hand_is_refused(model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings: dict[str, Any] = QUIET | {"per_device_train_batch_size": 8, "max_steps": 2}
    trainer = PPOTrainer(
        model,
        count_a,
        PPOConfig(str(tmp_path), beta=0.0, **settings),
        prompts(),
        processing_class=tabular_tokenizer(VOCABULARY),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )
    with pytest.raises(ConfigError, match=r"Give the optimizer alone"):
        trainer.train()


@pytest.mark.parametrize("limit", [1.0, 0.0, -1.0])
def test_the_critic_goes_towards_the_reward_whatever_clips_its_gradient(make, limit):
    """transformers takes a limit of 0 or less for none."""
    trainer = make(lambda completions, **_: [1.0] * len(completions), beta=0.0, max_grad_norm=limit)
    trainer.train()
    assert trainer.critic.head.bias.item() > 0


def test_what_a_tools_answer_earned_is_earned_by_the_token_that_called_it(make):
    trainer = make(lambda completions, **_: [0.0] * len(completions), beta=0.0)
    trainer.reward_funcs[0].checked.token_rewards = {0: [0.0, 5.0, 0.25, 1.0]}
    mask = torch.tensor([[1, 1, 1, 1]])
    batch = {"completion_mask": mask, "tool_mask": torch.tensor([[1, 0, 0, 1]])}
    rewards = trainer.token_rewards(Rollout(torch.tensor([[6.25]]), batch, slice(0, 1)))
    assert rewards.tolist() == [[5.25, 0.0, 0.0, 1.0]]


def test_the_best_checkpoint_brings_its_critic(make, tmp_path):
    """The reward falls by itself from evaluation to evaluation: the first is the best."""
    calls = iter(range(1000))
    trainer = make(
        lambda completions, **_: [-float(next(calls))] * len(completions),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        per_device_eval_batch_size=8,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
    )
    trainer.train()
    first = load_file(tmp_path / "out" / "checkpoint-1" / "critic" / "head.safetensors")
    last = load_file(tmp_path / "out" / "checkpoint-3" / "critic" / "head.safetensors")
    assert torch.equal(trainer.critic.head.weight, first["weight"])
    assert not torch.equal(first["weight"], last["weight"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lam": 1.5}, r"lam=1.5 must be between 0 and 1"),
        ({"gamma": -0.1}, r"gamma=-0.1 must be between 0 and 1"),
        ({"critic_lam": 2.0}, "critic_lam=2.0 must be between 0 and 1"),
        ({"critic": "lora"}, "critic='lora' must be one of head, adapter, model"),
        ({"surrogate": "trpo"}, "surrogate='trpo' must be one of clip, penalty"),
        ({"value_clip": 0.0}, "value_clip=0.0 must be greater than 0"),
        ({"critic_learning_rate": -1.0}, "critic_learning_rate=-1.0 must be greater than 0"),
        ({"early_stop_kl": 0.1}, "early_stop_kl=0.1 does nothing with one step a rollout"),
        ({"surrogate": "penalty"}, "surrogate='penalty' does nothing with one step a rollout"),
        (
            {"critic_learning_rate": math.inf},
            "critic_learning_rate=inf must be greater than 0",
        ),
        ({"beta": math.nan}, "beta: got nan; it must be from 0 on, and finite"),
        ({"beta": -1.0}, "beta: got -1.0; it must be from 0 on, and finite"),
        ({"old_kl_coef": 2.0}, "old_kl_coef=2.0 does nothing with surrogate='clip'"),
        (
            {"surrogate": "penalty", "num_iterations": 2, "epsilon": 0.1},
            "epsilon=0.1 does nothing with surrogate='penalty'",
        ),
        (
            {
                "early_stop_kl": 0.1,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 2,
                "steps_per_generation": 3,
            },
            "3, must be a multiple of gradient_accumulation_steps, 2",
        ),
        ({"kl_estimator": "k4"}, "There is no KL estimator called 'k4'"),
        ({"loss_type": "sapo"}, "loss_type='sapo' must be one of dr_grpo, luspo"),
        ({"scale_rewards": "group"}, "scale_rewards='group' does nothing here"),
        ({"kl_estimator": "k3"}, "k3 in the reward"),
        ({"whiten_advantages": 1}, "whiten_advantages=1 is a int; it must be True or False"),
    ],
)
def test_bad_options(tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        PPOConfig(str(tmp_path), **(QUIET | options))


def test_several_findings_are_told_at_once(tmp_path):
    wrong: dict[str, Any] = QUIET | {"gamma": 2.0, "lam": 3.0}
    with pytest.raises(ConfigError, match=r"(?s)gamma=2.*lam=3"):
        PPOConfig(str(tmp_path), **wrong)


def test_what_is_logged(make):
    trainer = make(num_iterations=2, max_steps=4, learning_rate=0.05)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ppo/old_kl" in log]
    old_kl, clipped = ([log[f"ppo/{name}"] for log in logs] for name in ("old_kl", "clip_fraction"))
    assert old_kl[0] == old_kl[2] == 0 and clipped[0] == clipped[2] == 0, "first uses of a rollout"
    assert old_kl[1] > 0 and 0 < clipped[1] <= 1
    assert all("kl/sequence" in log for log in logs)
    assert all("ppo/value_error" in logs[i] for i in (0, 2)), "once a rollout"
