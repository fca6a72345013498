"""A process reward that learns: its gradient, its models, its checkpoints, its processes."""

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.e2e.forked import Forked, ended, two_ranks
from tests.parity.worker import GLOBAL_BATCH, rollout
from tests.tiny import QUIET, VOCABULARY, count_a, prompts, save_tiny_llama
from trl_ext.errors import ConfigError, RewardError, RunError
from trl_ext.gibbs_prm import GibbsScorer
from trl_ext.gibbs_prm.online import OnlineScorer
from trl_ext.gibbs_prm.process_reward import Rows
from trl_ext.grpo import GRPOTrainer
from trl_ext.oracle import tabular_tokenizer
from trl_ext.reinforce import ReinforceTrainer
from trl_ext.trl_adapter import end_training

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
RATE = 1e-2


@pytest.fixture(autouse=True)
def silence(monkeypatch) -> None:
    """TRL warns that `rollout_func` may change."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def other_path(model_path, tmp_path_factory) -> str:
    """Another model of the same tokens."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(model_path)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tabular_tokenizer(VOCABULARY).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(model_path, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(5)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), lora).save_pretrained(folder)
    return str(folder)


def made(model: Any, folder: Path, kind: Any = ReinforceTrainer, lora=None, **options) -> Any:
    """A trainer whose completions are a function of step and row."""
    settings: dict[str, Any] = QUIET | {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 2,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "process_learning_rate": RATE,
        "process_beta": 0.5,
        "beta": 0.0,
    }
    args = kind.config_class(str(folder / "out"), **(settings | options.pop("settings", {})))
    parts = {"reward_funcs": count_a, "rollout_func": rollout, "peft_config": lora} | options
    if not isinstance(model, str):
        parts["processing_class"] = tabular_tokenizer(VOCABULARY)
    return kind(model=model, args=args, train_dataset=prompts(), **parts)


@pytest.fixture
def make(model_path, tmp_path):
    def build(lora=None, kind=ReinforceTrainer, parts=None, **settings) -> Any:
        parts = parts or {}
        return made(model_path, tmp_path, kind, lora, settings=settings, **parts)

    return build


def watch(trainer: Any) -> list[Any]:
    """The rollouts, with the weighted process rewards that they were given."""
    seen, added = [], trainer.process_reward.added

    def spy(credit, rollout):
        seen.append((rollout, added(credit, rollout)))
        return seen[-1][1]

    trainer.process_reward.added = spy
    return seen


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain_log_ratio(policy, reference, rollout, row: int) -> Tensor:
    """(t,) log π_φ/π_ref of one completion, by one pass without padding of each."""
    batch = rollout.batch
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
    ids = torch.cat([prompt, completion])[None]
    before = slice(len(prompt) - 1, -1)
    of_policy = policy(input_ids=ids).logits[0, before].log_softmax(-1)
    with torch.no_grad():
        of_reference = reference(input_ids=ids).logits[0, before].log_softmax(-1)
    return (of_policy - of_reference).gather(1, completion[:, None])[:, 0]


def plain_loss(policy, reference, rollout, beta: float, rows) -> Tensor:
    """−mean(o log σ(r) + (1 − o) log σ(−r)), as PRIME has it."""
    labels = rollout.rewards_PG.flatten()
    losses = []
    for row in rows:
        score = beta * plain_log_ratio(policy, reference, rollout, row).sum()
        label = labels[row]
        losses.append(-label * score.sigmoid().log() - (1 - label) * (-score).sigmoid().log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("limit", [0.0, 1e-3])
def test_the_gradient_is_that_of_the_formula(make, model_path, other_path, limit):
    """By autograd, completion by completion; some are unscored. Two micro-batches of 8."""

    def most(completions, **_):
        return [None if row % 5 == 3 else count_a([c])[0] for row, c in enumerate(completions)]

    trainer = make(
        process_reward=other_path,
        process_reference=model_path,
        max_grad_norm=limit,
        steps_per_generation=2,
        parts={"reward_funcs": most},
        max_steps=1,
    )
    scorer, gradients = trainer.process_reward.scorer, []
    policy, reference = (AutoModelForCausalLM.from_pretrained(p) for p in (other_path, model_path))
    scorer.optimizer.step = lambda: gradients.append([p.grad.clone() for p in scorer.trained()])
    seen = watch(trainer)
    trainer.train()
    [(rollout, _)], [ours] = seen, gradients
    assert len(rollout.batch["completion_ids"]) == 16
    loss = plain_loss(policy, reference, rollout, 0.5, [r for r in range(16) if r % 5 != 3])
    loss.backward()
    exact = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    norm = torch.cat([each.flatten() for each in exact]).norm().item()
    scale = 1.0 if limit == 0 else limit / norm
    assert norm > 0.01
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, scale * theirs, rtol=1e-3, atol=1e-6 * scale)
    [log] = [entry for entry in trainer.state.log_history if "process/loss" in entry]
    assert log["process/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert log["process/grad_norm"] == pytest.approx(norm, rel=1e-3)
    hits = 0
    for row in (r for r in range(16) if r % 5 != 3):
        score = plain_log_ratio(policy, reference, rollout, row).sum().item()
        hits += (score > 0) == (rollout.rewards_PG.flatten()[row].item() > 0.5)
    assert log["process/accuracy"] == pytest.approx(hits / 13)


def test_credit_is_of_the_scores_before_the_step(make, model_path, other_path):
    trainer = make(process_reward=other_path, process_reference=model_path, max_steps=1)
    policy, reference = (AutoModelForCausalLM.from_pretrained(p) for p in (other_path, model_path))
    seen = watch(trainer)
    trainer.train()
    [(rollout, _)] = seen
    for row, given in enumerate(rollout.batch["process_rewards"]):
        exact = 0.5 * plain_log_ratio(policy, reference, rollout, row).detach()
        torch.testing.assert_close(given[: len(exact)], exact, rtol=1e-3, atol=1e-5)
        assert (given[len(exact) :] == 0).all()


def test_the_step_is_adamws_without_decay(make, other_path):
    """Its first step moves every parameter with a gradient by the rate, to its sign."""
    trainer = make(process_reward=other_path, weight_decay=0.5, max_steps=1)
    before = weights_of(trainer.process_reward.scorer.policy)
    gradients: dict[str, Tensor] = {}
    step = trainer.process_reward.scorer.optimizer.step

    def keep():
        named = trainer.process_reward.scorer.policy.named_parameters()
        gradients.update({name: p.grad.clone() for name, p in named})
        step()

    trainer.process_reward.scorer.optimizer.step = keep
    trainer.train()
    for name, after in trainer.process_reward.scorer.policy.named_parameters():
        clear = gradients[name].abs() > 1e-5  # beside Adam's ε of 1e-8
        moved = (after.detach() - before[name])[clear]
        torch.testing.assert_close(moved, -RATE * gradients[name][clear].sign(), rtol=2e-3, atol=0)


def test_it_learns_to_tell_outcomes_apart(make):
    """Whether the last token is an a: 80 rollouts of 16. It begins as a coin: a loss of log 2."""

    def ends_with_a(completions, **_):
        return [float(text.endswith("a")) for text in completions]

    trainer = make(
        parts={"reward_funcs": ends_with_a},
        max_steps=80,
        process_beta=1.0,
        process_learning_rate=2e-3,
        per_device_train_batch_size=16,
    )
    trainer.train()
    losses = [log["process/loss"] for log in trainer.state.log_history if "process/loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(losses[-10:]) / 10 < 0.35


CASES = {
    "all weights": (None, {}),
    "all weights of another": (None, {"process_reward": "other"}),
    "a new adapter on the policy's base": (LORA, {}),
    "a new adapter on another base": (LORA, {"process_reward": "other"}),
    "an adapter on the policy's base": (LORA, {"process_reward": "adapter"}),
    "an adapter beside a whole policy": (None, {"process_reward": "adapter"}),
}


@pytest.fixture
def case(request, make, other_path, adapter):
    lora, settings = CASES[request.param]
    where = {"other": other_path, "adapter": adapter}
    named = {key: where[value] for key, value in settings.items()}

    def build(**more):
        return make(lora, **(named | more))

    return build


EACH = pytest.mark.parametrize("case", CASES, indirect=True)


@EACH
@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["no reference", "reference"])
def test_it_begins_as_its_reference_and_moves_alone(case, beta):
    """First rollout: a ratio of 1. Then π_φ differs, and neither the policy nor π_ref has moved."""
    trainer = case(beta=beta)
    scorer = trainer.process_reward.scorer
    policy_before = weights_of(trainer.model)
    model = getattr(scorer.policy, "model", scorer.policy)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    learning = [p.detach().clone() for p in scorer.trained()]
    seen = watch(trainer)
    trainer.train()
    first, second = (rollout.batch["process_rewards"] for rollout, _ in seen)
    assert first.abs().max() < 1e-6 < 1e-4 < second.abs().max()
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, policy_before[name]), name
    for name, value in frozen.items():
        assert torch.equal(value, dict(model.named_parameters())[name]), name
    assert len(scorer.trained()) == len(learning)
    assert any(
        not torch.equal(was, now) for was, now in zip(learning, scorer.trained(), strict=True)
    )


@EACH
def test_what_learns(case, request):
    """All weights of a model; of an adapter its own, which are not the policy's."""
    trainer = case()
    scorer = trainer.process_reward.scorer
    model = getattr(scorer.policy, "model", scorer.policy)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if isinstance(model, PeftModel):
        assert names and all("lora_" in name and ".default." in name for name in names)
    else:
        assert len(names) == len(list(model.parameters()))
    of_policy = {p.data_ptr() for p in trainer.model.parameters() if p.requires_grad}
    assert not of_policy & {p.data_ptr() for p in scorer.trained()}


def test_a_base_that_is_the_policys_is_there_once(make, adapter, other_path):
    for path, shared in ((None, True), (adapter, True), (other_path, False)):
        trainer = make(LORA, process_reward=path)
        model = trainer.process_reward.scorer.policy.model
        ours, theirs = (
            {p.data_ptr() for n, p in each.named_parameters() if "lora_" not in n}
            for each in (model, trainer.model)
        )
        assert (ours == theirs) == shared, path
        assert shared or not ours & theirs


def test_a_new_adapter_is_of_the_policys_configuration(make):
    trainer = make(LORA)
    lora = trainer.process_reward.scorer.policy.model.peft_config["default"]
    assert (lora.r, set(lora.target_modules)) == (2, {"q_proj", "v_proj"})
    model = trainer.process_reward.scorer.policy.model
    drops = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert drops and all(m.p == 0 for m in drops), "what it scores is what it learns from"
    of_policy = [m for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert any(m.p == 0.5 for m in of_policy), "the policy's own are left alone"


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "lora"])
def test_the_policys_reference_is_not_run_again(make, lora, monkeypatch):
    """With β > 0 TRL has scored the rollout with it: the same scores, and no pass."""
    rewards = []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(OnlineScorer, "_shares_reference", False)
        trainer = make(lora, beta=0.1, max_steps=3)
        seen = watch(trainer)
        trainer.train()
        rewards.append([rollout.batch["process_rewards"] for rollout, _ in seen])
        assert (trainer.process_reward.scorer._reference is None) == shares
    for ours, theirs in zip(*rewards, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert rewards[0][-1].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "lora"),
    [
        ({"process_reward": "other"}, None),
        ({"process_reference": "other"}, LORA),
        ({"process_reward": "adapter"}, LORA),
        ({"sync_ref_model": True, "ref_model_sync_steps": 1}, None),
    ],
    ids=["another model", "another reference", "an adapter", "a reference that moves"],
)
def test_another_reference_than_the_policys_is_run(make, other_path, adapter, settings, lora):
    where = {"other": other_path, "adapter": adapter}
    named = {key: where.get(value, value) for key, value in settings.items()}
    trainer = make(lora, beta=0.1, **named)
    assert trainer.process_reward.scorer._reference is not None
    trainer.train()


def test_a_temperature_is_that_of_the_policy(make, other_path, model_path):
    """At 2 the logits of both are halved; TRL's own reference pass, at that temperature too."""
    trainer = make(
        process_reward=other_path, process_reference=model_path, temperature=2.0, max_steps=1
    )
    policy, reference = (AutoModelForCausalLM.from_pretrained(p) for p in (other_path, model_path))
    for model in (policy, reference):
        with torch.no_grad():
            model.lm_head.weight.mul_(0.5)
    seen = watch(trainer)
    trainer.train()
    [(rollout, _)] = seen
    exact = 0.5 * plain_log_ratio(policy, reference, rollout, 0).detach()
    given = rollout.batch["process_rewards"][0][: len(exact)]
    torch.testing.assert_close(given, exact, rtol=1e-3, atol=1e-5)


@EACH
def test_what_is_saved_is_a_scorer(case, tmp_path):
    """`GibbsScorer` opens it, knows β, temperature and reference, and scores as it did."""
    trainer = case(temperature=2.0, max_steps=3)
    trainer.train()
    trainer.save_model()
    scorer = GibbsScorer(tmp_path / "out" / "process_reward" / "scorer")
    assert (scorer.beta, scorer.temperature) == (0.5, 2.0)
    seen = watch(trainer)
    trainer.process_reward.scorer.optimizer.step = lambda: None
    trainer.args.max_steps = 1
    trainer.train()
    [(rollout, _)] = seen
    batch = rollout.batch
    rows = Rows.of(batch)
    given = batch["process_rewards"]
    assert given.abs().max() > 1e-3
    for row, numbers in enumerate(scorer.token_rewards(rows.prompt_ids, rows.completion_ids)):
        assert given[row, : len(numbers)].tolist() == pytest.approx(numbers, abs=1e-5)


@EACH
@pytest.mark.parametrize("steps", [3, 4], ids=["within a rollout", "between rollouts"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(case, tmp_path, steps):
    options = {
        "max_steps": 6,
        "num_iterations": 2,
        "save_strategy": "steps",
        "save_steps": steps,
        "learning_rate": 1e-2,
    }
    whole = case(**options)
    whole.train()
    resumed = case(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{steps}"))
    for ours, theirs in zip(
        [*resumed.model.parameters(), *resumed.process_reward.scorer.trained()],
        [*whole.model.parameters(), *whole.process_reward.scorer.trained()],
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_without_it_is_refused(make, tmp_path):
    class OfToken:
        def token_rewards(self, prompt_ids, completion_ids):
            return [[0.1] * len(ids) for ids in completion_ids]

    saving = {"save_strategy": "steps", "save_steps": 1}
    frozen = {"process_learning_rate": None, "process_beta": None}
    make(parts={"process_reward": OfToken()}, **frozen, **saving).train()
    with pytest.raises(RunError, match=r"There is no process reward in .*remove process_learning"):
        make(**saving).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_a_damaged_one_is_named(make, tmp_path):
    for lora, file in ((None, "model.safetensors"), (LORA, "adapter_model.safetensors")):
        trainer = make(lora)
        trainer.save_model()
        folder = tmp_path / "out" / "process_reward" / "scorer"
        (folder / file).write_bytes(b"half")
        with pytest.raises(RunError, match=r"The process reward in .* cannot be read"):
            trainer.process_reward.restore(folder.parent)


def test_an_adapter_that_lacks_weights_is_named(make, tmp_path):
    """One of four is gone: peft would go on with what it had."""
    trainer = make(LORA)
    trainer.save_model()
    folder = tmp_path / "out" / "process_reward" / "scorer"
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(iter(weights)))
    save_file(weights, file)
    with pytest.raises(RunError, match=r"cannot be read: weights of the adapter are missing\. Is"):
        trainer.process_reward.restore(folder.parent)


@pytest.mark.parametrize("value", [1.5, -0.25])
def test_rewards_that_are_no_labels_are_refused(make, value):
    reward = {"reward_funcs": lambda completions, **_: [value] * len(completions)}
    with pytest.raises(RewardError, match=rf"one is {value}: .*between 0 and 1.*reward_weights"):
        make(parts=reward).train()
    make(parts=reward, reward_weights=[0.5 / value]).train()


def test_nothing_to_learn_from_changes_nothing(make):
    trainer = make(parts={"reward_funcs": lambda completions, **_: [None] * len(completions)})
    before = weights_of(trainer.process_reward.scorer.policy)
    trainer.train()
    for name, value in trainer.process_reward.scorer.policy.named_parameters():
        assert torch.equal(value, before[name])
    assert not any("process/loss" in log for log in trainer.state.log_history)


def test_a_completion_that_is_masked_as_too_long_teaches_nothing(make, model_path):
    """Its row is empty: the loss is that of the others, which a loop over them gives."""

    def some_end(prompts, trainer):
        drawn = rollout(prompts, trainer)
        rows = enumerate(drawn["completion_ids"])
        return drawn | {"completion_ids": [[*ids, 0] if row % 3 else ids for row, ids in rows]}

    trainer = make(mask_truncated_completions=True, max_steps=1, parts={"rollout_func": some_end})
    seen = watch(trainer)
    policy = copy.deepcopy(trainer.process_reward.scorer.policy)
    trainer.train()
    [(made, credit)] = seen
    kept = made.mask.any(1)
    assert kept.any() and not kept.all()
    assert (credit[~kept] == 0).all()
    reference = AutoModelForCausalLM.from_pretrained(model_path)
    loss = plain_loss(policy, reference, made, 0.5, kept.nonzero()[:, 0].tolist())
    [log] = [entry for entry in trainer.state.log_history if "process/loss" in entry]
    assert log["process/loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_gradient_that_is_not_finite_stops_the_run(make, other_path):
    trainer = make(process_reward=other_path)
    real = trainer.process_reward.scorer._backward

    def broken(*arguments):
        result = real(*arguments)
        trainer.process_reward.scorer.trained()[0].grad.fill_(torch.inf)
        return result

    trainer.process_reward.scorer._backward = broken
    before = weights_of(trainer.process_reward.scorer.policy)
    with pytest.raises(RunError, match="process reward's gradient in step 1 is not finite"):
        trainer.train()
    after = weights_of(trainer.process_reward.scorer.policy)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gradient_checkpointing_changes_nothing(make):
    learnt = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = make(LORA, gradient_checkpointing=checkpointing, max_steps=3)
        trainer.train()
        assert trainer.process_reward.scorer.policy.model.training is checkpointing
        learnt.append([p.detach() for p in trainer.process_reward.scorer.trained()])
    for ours, theirs in zip(*learnt, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_evaluation_teaches_nothing(model_path, tmp_path):
    trainer = made(
        model_path,
        tmp_path,
        settings={"eval_strategy": "steps", "per_device_eval_batch_size": 8},
        eval_dataset=prompts(8),
    )
    before = weights_of(trainer.process_reward.scorer.policy)
    trainer.evaluate()
    after = weights_of(trainer.process_reward.scorer.policy)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_it_cannot_begin_as_is_refused(model_path, tmp_path, make):
    base = AutoModelForCausalLM.from_pretrained(model_path)
    peft = get_peft_model(base, LORA)
    with pytest.raises(ConfigError, match="was given as a PeftModel, which has no path"):
        made(peft, tmp_path)
    with pytest.raises(ConfigError, match="is a IA3Config; a process reward that learns takes Lo"):
        make(IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    on_head = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_path),
        LoraConfig(r=2, target_modules=["lm_head"]),
    )
    on_head.save_pretrained(tmp_path / "on_head")
    with pytest.raises(ConfigError, match="head"):
        make(process_reward=str(tmp_path / "on_head"))


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_sharded_policy_is_refused(make, kind):
    trainer = make()
    setattr(trainer, kind, True)
    with pytest.raises(ConfigError, match=r"is not sharded: use data parallelism"):
        OnlineScorer(trainer, None)


def test_grpo_takes_it_too(make):
    trainer = make(LORA, GRPOTrainer, beta=0.04, learning_rate=1e-3, max_steps=3)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "process/loss" in log]
    assert len(logs) == 3


def worker(model: str, output: str, lora: bool) -> None:
    """Four steps on a global batch of 16 rows, some unscored; all parameters go to a file."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))

    def most(completions, prompts, trainer_state, **_):
        return [None if "bc" in text else count_a([text])[0] for text in completions]

    trainer = made(
        model,
        Path(output + "-run"),
        lora=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False) if lora else None,
        reward_funcs=most,
        settings={
            "per_device_train_batch_size": GLOBAL_BATCH // processes,
            "num_generations": 16,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "max_grad_norm": 1.0,
            "ddp_backend": "gloo" if processes > 1 else None,
            "seed": 3,
        },
    )
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    if trainer.accelerator.is_main_process:
        learnt = [p.detach() for p in trainer.process_reward.scorer.trained()]
        history = [log for log in trainer.state.log_history if "process/loss" in log]
        torch.save({"learnt": learnt, "policy": weights_of(trainer.model), "log": history}, output)
    end_training(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_two_processes_are_one(model_path, tmp_path, lora):
    where = {"folder": tmp_path, "environment": {"TRL_EXPERIMENTAL_SILENCE": "1"}}
    one = Forked(worker, model_path, str(tmp_path / "one"), lora, **where)
    two = two_ranks(worker, model_path, str(tmp_path / "two"), lora, **where)
    for code, _, err in ended([one, *two]):
        assert code == 0, err[-3000:]
    alone, both = (torch.load(tmp_path / name) for name in ("one", "two"))
    for ours, theirs in zip(both["log"], alone["log"], strict=True):
        assert ours.keys() == theirs.keys()
        for metric in (key for key in theirs if key.startswith("process/")):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-6), metric
    for ours, theirs in zip(both["learnt"], alone["learnt"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    for name, value in alone["policy"].items():
        torch.testing.assert_close(both["policy"][name], value, rtol=0, atol=2e-4)


def falling(completions, trainer_state, **_) -> list[float]:
    """Less behind each step: the first evaluation is the best."""
    return [0.9 - trainer_state.global_step / 10 + 0.001 * (len(c) % 2) for c in completions]


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "lora"])
def test_the_best_checkpoint_has_its_scorer(model_path, tmp_path, lora):
    """load_best_model_at_end: policy and scorer are those of step 1, not of step 3."""
    trainer = made(
        model_path,
        tmp_path,
        lora=lora,
        eval_dataset=prompts(8),
        reward_funcs=falling,
        settings={
            "max_steps": 3,
            "learning_rate": 1e-2,
            "per_device_eval_batch_size": 8,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_reward",
            "greater_is_better": True,
        },
    )
    seen, save = {}, trainer.process_reward.save

    def keep(folder):
        save(folder)
        scorer = [p.detach().clone() for p in trainer.process_reward.scorer.trained()]
        seen[Path(folder).parent.name] = scorer, weights_of(trainer.model)

    trainer.process_reward.save = keep
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    now = [p.detach() for p in trainer.process_reward.scorer.trained()]
    (best, policy), (last, _) = seen["checkpoint-1"], seen["checkpoint-3"]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(now, best, strict=True))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(now, last, strict=True))
    for name, value in weights_of(trainer.model).items():
        assert torch.equal(value, policy[name]), name


def raising_worker(model: str, output: str) -> None:
    """Four rows a process; the scorer of the second process raises."""

    class Broken:
        def token_rewards(self, prompt_ids, completion_ids):
            if os.environ["RANK"] == "1":
                raise KeyError("no score")
            return [[0.1] * len(ids) for ids in completion_ids]

    frozen = {"process_learning_rate": None, "process_beta": None, "ddp_backend": "gloo"}
    trainer = made(model, Path(output), process_reward=Broken(), settings=frozen)
    trainer.train()


@pytest.mark.slow
def test_a_scorer_that_raises_on_one_process_ends_both(model_path, tmp_path):
    """Its process names it; the other does not wait for ever for what it would have sent."""
    where = {"folder": tmp_path, "environment": {"TRL_EXPERIMENTAL_SILENCE": "1"}}
    ranks = two_ranks(raising_worker, model_path, str(tmp_path / "run"), **where)
    (one, _, _), (other, _, said) = (rank.end(timeout=120) for rank in ranks)
    assert one != 0 and other != 0
    assert "RewardError: The process reward Broken raised KeyError: 'no score'" in said
