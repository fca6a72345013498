"""Critics of each make: what they share with the policy, where they begin, how they are kept."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.tiny import QUIET, prompts, save_tiny_llama
from trl_ext.errors import ConfigError, RunError
from trl_ext.ppo import Critic, PPOConfig, PPOTrainer
from trl_ext.ppo.beginning import make_critic

IDS = torch.tensor([[1, 2, 3, 4], [3, 3, 1, 2]])
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reward_model(model_path, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train(model_path, tmp_path):
    def run(lora: LoraConfig | None = None, **options) -> PPOTrainer:
        settings: dict[str, Any] = QUIET | {
            "per_device_train_batch_size": 8,
            "num_generations": 1,
            "max_steps": 2,
            "learning_rate": 0.01,
            "critic_learning_rate": 0.01,
            "seed": 1,
        }
        quantization = options.pop("quantization_config", None)
        resume = options.pop("resume", None)
        args = PPOConfig(str(tmp_path / "out"), **(settings | options))
        trainer = PPOTrainer(
            model_path,
            shortness,
            args,
            prompts(),
            peft_config=lora,
            quantization_config=quantization,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def shortness(completions: list[str], **kwargs) -> list[float]:
    """Reward: never the same for all, and hardly ever 0."""
    return [1.0 - len(completion) / 5 for completion in completions]


def values(critic: Critic, policy: Any = None) -> torch.Tensor:
    critic.eval()
    with torch.no_grad():
        if critic.backbone is not None:
            return critic(IDS, torch.ones_like(IDS))
        base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        backbone: Any = base.eval().base_model
        return critic.of_hidden(backbone(IDS).last_hidden_state)


MAKES = [("head", None), ("head", LORA), ("adapter", LORA), ("model", None), ("model", LORA)]


@pytest.mark.parametrize(("kind", "lora"), MAKES, ids=lambda v: v if isinstance(v, str) else None)
def test_each_make_learns_is_saved_and_is_the_same_when_read_again(train, tmp_path, kind, lora):
    trainer = train(lora, critic=kind, save_strategy="steps", save_steps=2)
    assert (trainer.critic.head.weight != 0).any()
    trainer.save_model()
    folder = tmp_path / "out" / "critic"
    again = Critic.from_pretrained(folder, trainer.model)
    ours = values(trainer.critic, trainer.model)
    assert ours.std() > 0
    torch.testing.assert_close(values(again, trainer.model), ours, rtol=1e-5, atol=1e-6)
    # Beside the adapter or the model, as itself: nothing of it is in the policy's own files.
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert json.loads((checkpoint / "critic" / "critic.json").read_text())["kind"] == kind
    plain = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    assert not any("critic" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize(("kind", "lora"), MAKES, ids=lambda v: v if isinstance(v, str) else None)
@pytest.mark.parametrize("steps", [3, 4], ids=["within a rollout", "between rollouts"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(train, tmp_path, kind, lora, steps):
    options = {"critic": kind, "num_iterations": 2, "save_strategy": "steps", "save_steps": steps}
    whole = train(lora, max_steps=6, **options)
    checkpoint = str(tmp_path / "out" / f"checkpoint-{steps}")
    resumed = train(lora, max_steps=6, resume=checkpoint, **options)
    for ours, theirs in zip(
        [*resumed.model.parameters(), *resumed.critic.parameters()],
        [*whole.model.parameters(), *whole.critic.parameters()],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_critic_adapter_shares_the_policys_frozen_weights(train):
    trainer = train(LORA, critic="adapter")
    assert trainer.critic.backbone is not None
    own = dict(trainer.critic.backbone.named_parameters())
    shared = {p.data_ptr() for p in trainer.model.parameters()}
    learnt = {name for name, p in own.items() if p.data_ptr() not in shared}
    assert learnt and all("lora_" in name for name in learnt)
    assert all(p.requires_grad == (name in learnt) for name, p in own.items())


def test_an_adapter_on_all_linear_layers_is_one_of_the_backbone_too(model_path):
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_path),
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for kind in ("adapter", "model"):
        critic = make_critic(kind, policy)
        adapted = [name for name, _ in critic.named_parameters() if "lora_A" in name]
        assert len(adapted) == 14, "seven linear layers in each of two blocks"


def test_a_critic_takes_nothing_from_and_gives_nothing_to_the_policys_gradient(train):
    """Two critics of very different speed, one policy: the values only enter by the advantages."""
    options = {"max_steps": 1, "critic": "adapter"}
    slow, fast = (train(LORA, critic_learning_rate=rate, **options) for rate in (1e-6, 0.5))
    for ours, theirs in zip(slow.model.parameters(), fast.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_a_reward_model_begins_a_critic_of_its_own(model_path, reward_model, lora):
    policy = AutoModelForCausalLM.from_pretrained(model_path)
    if lora is not None:
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"]))
    critic = make_critic("model", policy, reward_model)
    judge = AutoModelForSequenceClassification.from_pretrained(reward_model)
    with torch.no_grad():
        expected = judge(IDS).logits[:, 0]
    torch.testing.assert_close(values(critic)[:, -1], expected)
    head = make_critic("head", policy, reward_model)
    assert torch.equal(head.head.weight, judge.score.weight)


@pytest.fixture
def reward_adapter(model_path, tmp_path) -> tuple[str, torch.Tensor]:
    """A reward model's adapter on the policy's weights, and what it says of two completions."""
    judge = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1)
    judge.config.pad_token_id = 0
    lora = LoraConfig(r=3, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    adapted = get_peft_model(judge, lora)
    adapted.save_pretrained(str(tmp_path / "reward"))
    with torch.no_grad():
        return str(tmp_path / "reward"), adapted.eval()(IDS).logits[:, 0]


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("adapter", LORA), ("model", LORA), ("model", None)],
    ids=["adapter-LoRA", "model-LoRA", "model-whole"],
)
def test_a_reward_adapter_begins_a_critic(model_path, reward_adapter, kind, lora):
    folder, expected = reward_adapter
    policy = AutoModelForCausalLM.from_pretrained(model_path)
    policy = policy if lora is None else get_peft_model(policy, lora)
    critic = make_critic(kind, policy, folder)
    torch.testing.assert_close(values(critic)[:, -1], expected)
    assert any("layers" in name for name, p in critic.named_parameters() if p.requires_grad), (
        "more than the head learns"
    )


def test_a_critic_scores_a_text(train, tmp_path):
    trainer = train(LORA, critic="head")
    trainer.save_model()
    critic = Critic.from_pretrained(tmp_path / "out" / "critic")
    assert not critic.training
    ours = critic(IDS, policy=trainer.model.eval())
    torch.testing.assert_close(ours, values(critic, trainer.model))
    with pytest.raises(ConfigError, match="give that as `policy`"):
        critic(IDS)
    # A folder beside this one: the path below the adapter does not depend on where one stands.
    assert Path(json.loads((tmp_path / "out/critic/critic.json").read_text())["base"]).is_absolute()


@pytest.mark.parametrize(("kind", "lora"), MAKES, ids=lambda v: v if isinstance(v, str) else None)
def test_an_earlier_critic_begins_the_next(train, tmp_path, kind, lora):
    trainer = train(lora, critic=kind)
    trainer.critic.save(tmp_path / "kept")
    again = make_critic(kind, trainer.model, str(tmp_path / "kept"))
    assert (trainer.critic.head.weight != 0).any()
    torch.testing.assert_close(
        values(again, trainer.model), values(trainer.critic, trainer.model), rtol=1e-5, atol=1e-6
    )


def test_qlora_policy_and_critic(train):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for kind in ("head", "adapter", "model"):
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        trainer = train(lora, critic=kind, quantization_config=quantization)
        assert (trainer.critic.head.weight != 0).any()
        # A LoRA B of zeros would be one that no gradient has reached.
        assert all((p != 0).any() for p in trainer.critic.trained())
        if kind != "head":
            assert any("4bit" in type(m).__name__ for m in trainer.critic.modules())


def test_gradient_checkpointing_changes_nothing(train):
    runs = [
        train(LORA, critic="adapter", gradient_checkpointing=on, max_steps=2)
        for on in (True, False)
    ]
    for ours, theirs in zip(*(run.critic.parameters() for run in runs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_what_does_not_go_together_is_said(model_path, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(model_path)
    with pytest.raises(ConfigError, match=r"critic='adapter' shares the policy's frozen weights"):
        make_critic("adapter", policy)
    with pytest.raises(ConfigError, match=r"'no/such' cannot be opened. A critic begins as"):
        make_critic("model", policy, "no/such")
    with pytest.raises(ConfigError, match="neither a reward model nor a critic"):
        make_critic("head", policy, model_path)
    with pytest.raises(RunError, match="holds no critic"):
        Critic.from_pretrained(tmp_path)
    judge = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2)
    judge.save_pretrained(tmp_path / "two")
    with pytest.raises(ConfigError, match="a classifier with 2 labels; a reward model has one"):
        make_critic("model", policy, str(tmp_path / "two"))
    other = get_peft_model(policy, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    for kind in ("adapter", "model"):
        with pytest.raises(ConfigError, match="adapter is a IA3Config; a critic of its own takes"):
            make_critic(kind, other)


def test_an_earlier_critic_that_is_not_fit_is_refused_by_name(model_path, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(model_path)
    folder = tmp_path / "head"
    critic = make_critic("head", policy)
    critic.save(folder)
    with pytest.raises(RunError, match="of kind 'head' for 16 hidden units; this one is of kind"):
        make_critic("model", policy).load(folder)
    with pytest.raises(ConfigError, match=r"this run has critic='model'. Set critic: head"):
        make_critic("model", policy, str(folder))
    weights = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(weights[:20])
    with pytest.raises(RunError, match=r"cannot be read.*Is a file missing or damaged"):
        critic.load(folder)
    (folder / "critic.json").write_text("{")
    with pytest.raises(RunError, match=r"critic\.json is damaged"):
        critic.load(folder)


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian"])
def test_making_a_critic_leaves_the_policy_as_it_is(model_path, init):
    """Some initialisations of LoRA change the weights below, which are shared."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), lora).eval()
    before = policy(IDS).logits.detach()
    make_critic("adapter", policy)
    assert torch.equal(policy(IDS).logits, before)


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_what_the_policy_trains_whole_stays_its_own(model_path, kind):
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"])
    base = AutoModelForCausalLM.from_pretrained(model_path)
    untouched = copy.deepcopy(base)
    policy = get_peft_model(base, lora)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "modules_to_save" in name:
                parameter += 1.0
    critic = make_critic(kind, policy)
    assert trained == [name for name, p in policy.named_parameters() if p.requires_grad]
    ours = {id(p) for p in policy.parameters() if p.requires_grad}
    assert not ours & {id(p) for p in critic.parameters()}
    torch.nn.init.ones_(critic.head.weight)
    expected = critic.of_hidden(untouched.eval().base_model(IDS).last_hidden_state)
    torch.testing.assert_close(values(critic), expected.detach())


def test_a_model_of_its_own_begins_with_the_policys_weights_as_they_are(model_path):
    policy = AutoModelForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        policy.model.embed_tokens.weight.mul_(3)
    critic = make_critic("model", policy)
    for name, weight in policy.base_model.named_parameters():
        assert torch.equal(critic.backbone.get_parameter(name), weight)  # pyright: ignore
        assert critic.backbone.get_parameter(name) is not weight  # pyright: ignore


def test_a_folder_holds_one_critic_the_last(model_path, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(model_path)
    make_critic("model", policy).save(tmp_path / "critic")
    adapted = get_peft_model(policy, LORA)
    second = make_critic("model", adapted)
    torch.nn.init.ones_(second.head.weight)
    second.save(tmp_path / "critic")
    assert {path.name for path in (tmp_path / "critic").iterdir()} == {
        "critic.json",
        "head.safetensors",
        "adapter",
    }
    again = Critic.from_pretrained(tmp_path / "critic")
    torch.testing.assert_close(values(again), values(second))


@pytest.mark.parametrize("lost", ["adapter", "adapter/adapter_model.safetensors"])
def test_a_critic_with_a_part_missing_is_not_read(model_path, tmp_path, lost):
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), LORA)
    critic = make_critic("adapter", policy)
    critic.save(tmp_path / "critic")
    path = tmp_path / "critic" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for read in (critic.load, lambda folder: Critic.from_pretrained(folder, policy)):
        with pytest.raises(RunError, match="cannot be read"):
            read(tmp_path / "critic")


def test_a_critic_reads_the_policys_tokens_and_does_not_look_ahead(model_path, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(model_path)
    small = LlamaConfig(
        vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        bos_token_id=None, eos_token_id=0, intermediate_size=8,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match="knows 4 tokens and the policy writes 6"):
        make_critic("model", policy, str(tmp_path / "small"))
    bert = BertConfig(
        vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, hidden_dropout_prob=0.0, initializer_range=0.5,
    )  # fmt: skip
    bert.num_labels = 1
    BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="looks ahead: what follows a prefix changes its value"):
        make_critic("model", policy, str(tmp_path / "bert"))


def test_a_checkpoint_that_lost_a_part_is_not_resumed(train, tmp_path):
    train(save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / "rollout_0.pt").rename(tmp_path / "kept")
    with pytest.raises(RunError, match=r"has no rollout_0\.pt, which says how far a rollout"):
        train(resume=str(checkpoint))
    (tmp_path / "kept").rename(checkpoint / "rollout_0.pt")
    shutil.rmtree(checkpoint / "critic")
    with pytest.raises(RunError, match="holds no critic"):
        train(resume=str(checkpoint))
