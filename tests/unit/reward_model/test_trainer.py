"""What `RewardTrainer` does beyond TRL's: K completions, adapters, order effect, metrics."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
)

from tests.parity.reward_worker import QUIET
from tests.tiny import save_tiny_llama
from trl_ext import RewardConfig, RewardTrainer
from trl_ext.errors import ConfigError, DataError, RunError
from trl_ext.functional import centering_loss, pairwise_loss, plackett_luce_loss
from trl_ext.poe.reward_models import reward_model
from trl_ext.reward_model.collator import ComparisonCollator, on_grid

ROWS = [
    {"prompt": "ab", "completions": ["a", "bc", "cde", "e"], "scores": [1.0, 3.0, 2.0, 2.0]},
    {"prompt": "c", "completions": ["d", "ee"], "scores": [0.0, 1.0]},
    {"prompt": "dd", "completions": ["a", "b", "c"], "scores": [1.0, 0.5, 0.0]},
    {"prompt": "e", "completions": ["abc", "b", "cc"], "scores": [0.0, 2.0, 2.0]},
]
RANKS = [[4.0, 1.0, 2.0, 2.0], [2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 1.0, 1.0]]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make(model_path, tmp_path):
    def trainer(rows: Any = ROWS, parts: dict[str, Any] | None = None, model=None, **options):
        settings: dict[str, Any] = QUIET | {
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
        }
        settings |= {"output_dir": str(tmp_path / "out")} | options
        args = RewardConfig(**settings)
        data = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return RewardTrainer(model or model_path, args, train_dataset=data, **(parts or {}))

    return trainer


def score(model, tokenizer, prompt: str, completion: str) -> torch.Tensor:
    """The reward of one completion alone, without padding."""
    ids = tokenizer(prompt + completion + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    return model(ids).logits[0, 0]


@pytest.mark.parametrize(
    "options", [{}, {"loss_type": "plackett_luce"}, {"center_rewards_coefficient": 0.3}], ids=str
)
def test_the_loss_is_the_mean_over_prompts_of_rewards_taken_one_by_one(make, options):
    """And one forward pass serves all twelve completions."""
    trainer = make(**options)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert batch["input_ids"].shape[0] == 12
    passes = []
    trainer.model.register_forward_hook(lambda *_: passes.append(1))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert len(passes) == 1
    loss.backward()
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    total = torch.zeros(())
    for row, ranks in zip(ROWS, RANKS, strict=True):
        texts = [
            score(trainer.model, trainer.processing_class, row["prompt"], text)
            for text in row["completions"]
        ]
        rewards, order = torch.stack(texts)[None], torch.tensor([ranks])
        if "loss_type" in options:
            total = total + plackett_luce_loss(rewards, order).sum()
        else:
            total = total + pairwise_loss(rewards, order).sum()
        if "center_rewards_coefficient" in options:
            total = total + 0.3 * centering_loss(rewards, order).sum()
    assert loss.item() == pytest.approx(total.item() / 4, rel=1e-5)
    (total / 4).backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_outputs_are_of_the_best_and_the_worst(make):
    """What compute_metrics is given, as chosen and rejected in TRL; of ties the first."""
    trainer = make()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        _, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        expected = [
            score(trainer.model, trainer.processing_class, row["prompt"], row["completions"][at])
            for picked in ([1, 1, 0, 1], [0, 0, 2, 0])
            for row, at in zip(ROWS, picked, strict=True)
        ]
    torch.testing.assert_close(outputs.logits, torch.stack(expected)[:, None])


def test_a_batch_by_hand():
    rows = [
        {"ranking_ids": [[1, 2], [3]], "ranks": [2.0, 1.0], "margin": 0.5},
        {"ranking_ids": [[4], [5, 6, 7], [8]], "ranks": [1.0, 1.0, 3.0], "margin": 1},
    ]
    batch = ComparisonCollator(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 0], [4, 0, 0], [3, 0, 0], [5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [2, 1, 1, 3, 1]
    assert batch["ranks"].tolist() == [[2, 1, 0], [1, 1, 3]]
    assert batch["margin"].tolist() == [0.5, 1.0]
    grid = on_grid(torch.tensor([1.0, 4.0, 3.0, 5.0, 8.0]), batch["ranks"])
    assert grid.tolist() == [[1, 3, 0], [4, 5, 8]]
    assert ComparisonCollator(0, pad_to_multiple_of=8)(rows)["input_ids"].shape == (5, 8)


def test_metrics_are_over_pairs(make):
    """By hand: 5 of 6 and 0 of 1 pairs right, 5/7, where a mean of batches would give 5/12."""
    trainer = make()
    trainer.model.train()
    # Differences of the first: 1.5, 1, 2.5, −0.5, 1, 1.5; of the second −0.25.
    trainer._remember(torch.tensor([[3.0, 1.5, 2.0, 0.5]]), torch.tensor([[1.0, 2, 3, 4]]))
    trainer._remember(torch.tensor([[0.5, 0.25]]), torch.tensor([[2.0, 1]]))
    margins = [1.5, 1, 2.5, -0.5, 1, 1.5, -0.25]
    found = trainer.own_metrics()
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["margin"] == pytest.approx(sum(margins) / 7)
    assert found["mean_reward"] == pytest.approx(7.75 / 6)
    assert (found["min_reward"], found["max_reward"]) == (0.375, 1.75)  # means over batches
    assert found["log_loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 7)
    by_margin = {k: v for k, v in found.items() if k.startswith("accuracy_margin")}
    assert by_margin == {
        "accuracy_margin_0_to_0.5": 0.0,
        "accuracy_margin_0.5_to_1": 0.0,
        "accuracy_margin_1_to_2": 1.0,
        "accuracy_margin_2_to_inf": 1.0,
    }
    assert trainer.own_metrics() == {}, "the next line begins anew"


def test_evaluation_has_its_own_metrics(make):
    trainer = make(parts={"eval_dataset": {"one": Dataset.from_list(ROWS[:1])}})
    logs = trainer.evaluate()
    assert logs["eval_one_loss"] > 0 and 0 <= logs["eval_accuracy"] <= 1
    # A set that is given then, with rows of either form.
    pairs = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert trainer.evaluate(pairs)["eval_accuracy"] in (0.0, 1.0)
    with pytest.raises(DataError, match="eval_dataset has no column 'rejected'"):
        trainer.evaluate(pairs.remove_columns("rejected"))


def test_a_streamed_dataset_trains_as_a_whole_one_does(make):
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1}
    whole = make(**options)
    streamed = make(IterableDataset.from_generator(lambda: iter(ROWS * 2)), **options)
    for trainer in (whole, streamed):
        trainer.train()
    # A batch is all four rows, in whatever order.
    for mine, other in zip(whole.model.parameters(), streamed.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


def test_rows_that_are_too_long_are_counted(make, caplog):
    with caplog.at_level(logging.WARNING):
        # ab + cde + <eos> and e + abc + <eos>: 6 and 5 tokens.
        assert len(make(max_length=5).train_dataset) == 3
    assert "train dataset: 1 of 4 rows have a sequence of more than max_length" in caplog.text
    caplog.clear()
    pairs = [{"prompt": "a", "chosen": "b" * n, "rejected": "c"} for n in (1, 9)]
    with caplog.at_level(logging.WARNING):
        assert len(make(pairs, max_length=5).train_dataset) == 1
    assert "1 of 2 rows have a sequence of more" in caplog.text
    with pytest.raises(DataError, match=r"4 of 4 rows .* no row is left. Set a larger max_length"):
        make(max_length=2)
    assert len(make(max_length=None).train_dataset) == 4


LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "SEQ_CLS"])
def test_an_adapter_keeps_its_head(make, task, tmp_path):
    """It is trained and saved, whatever the task says; opened as a reward it gives the same."""
    config = LoraConfig(**LORA, task_type=task)
    trainer = make(parts={"peft_config": config})
    assert (config.task_type, config.modules_to_save) == (task, None), "the caller's own"
    before = trainer.model.base_model.model.score.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.base_model.model.score.weight, before)
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    weights = load_file(folder / "adapter_model.safetensors")
    assert [name for name in weights if "score" in name] == ["base_model.model.score.weight"]
    assert_gives_the_same(trainer, folder)


def assert_gives_the_same(trainer, folder: Path, atol=1e-5) -> None:
    trainer.model.eval()
    reward: Any = reward_model(str(folder))
    prompts, completions = ["ab", "c", "e"], ["cde", "d", "a"]
    end = trainer.processing_class.eos_token
    # TRL trains on texts that end with the end token, and hands rewards what they are given.
    found = reward(prompts, [c + end for c in completions], [[1]] * 3)
    with torch.no_grad():
        expected = [
            score(trainer.model, trainer.processing_class, *both).item()
            for both in zip(prompts, completions, strict=True)
        ]
    assert found == pytest.approx(expected, abs=atol)
    assert len({round(value, 4) for value in expected}) == 3


def test_a_full_model_opens_as_a_reward_without_remarks(make, tmp_path):
    trainer = make(order_effect=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert_gives_the_same(trainer, tmp_path / "saved")
    _, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_adapters_and_head_train_after_an_evaluation_pass(make, dtype):
    """bitsandbytes on a CPU with AVX512-BF16 loses gradients there; bfloat16 heads lose steps."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
    parts = {"quantization_config": nf4, "peft_config": LoraConfig(**LORA)}
    trainer = make(parts=parts, model_init_kwargs={"dtype": dtype})
    trainer.evaluate(trainer.train_dataset)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    trainer.train()
    assert len(trained) == 5  # A and B in two layers, and the head
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())
    head = next(p for name, p in trained.items() if "score" in name)
    assert head.dtype == torch.float32


def test_an_adapter_without_a_head_is_refused(make, model_path):
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1)
    bare = get_peft_model(model, LoraConfig(**LORA))
    with pytest.raises(ConfigError, match=r"judge by random .* modules_to_save .* \['score'\]"):
        make(model=bare)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1)
    kept = get_peft_model(model, LoraConfig(**LORA, modules_to_save=["score"]))
    assert isinstance(make(model=kept).model, PeftModel)


# α learns from who is shown first: of either pair of orders the first wins three times of four,
# so that the likeliest model has r_a = r_b and σ(α) = 3/4, α = log 3.
SHOWN = [
    {"prompt": "a", "completions": order, "ranks": ranks}
    for order in (["b", "cd"], ["cd", "b"])
    for ranks in ([1, 2], [1, 2], [1, 2], [2, 1])
]


@pytest.mark.equation("E49")
def test_the_order_effect_is_learned_beside_the_rewards(make):
    trainer = make(
        SHOWN,
        order_effect=True,
        order_effect_learning_rate=0.1,
        per_device_train_batch_size=8,
        max_steps=80,
        logging_steps=80,
    )
    trainer.train()
    assert trainer.order_effect.item() == pytest.approx(math.log(3), abs=0.02)
    log = next(log for log in trainer.state.log_history if "order_effect" in log)
    assert log["order_effect"] == pytest.approx(trainer.order_effect.item())


def test_the_order_effect_has_its_own_learning_rate(make):
    """Adam's first step is its learning rate: 0.25 for α, however small the model's is."""
    trainer = make(
        SHOWN,
        order_effect=True,
        order_effect_learning_rate=0.25,
        learning_rate=1e-6,
        weight_decay=0.5,
        per_device_train_batch_size=8,
        max_steps=1,
    )
    trainer.train()
    assert trainer.order_effect.item() == pytest.approx(0.25, abs=1e-3)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_ends_with_the_same_parameters(make, lora, tmp_path):
    def run(folder: str, **how):
        trainer = make(
            ROWS * 2,
            {"peft_config": LoraConfig(**LORA) if lora else None},
            output_dir=str(tmp_path / folder),
            order_effect=True,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(**how)
        return trainer

    whole = run("whole")
    saved = tmp_path / "whole" / "checkpoint-2"
    halfway = json.loads((saved / "order_effect.json").read_text())["order_effect"]
    resumed = run("resumed", resume_from_checkpoint=str(saved))
    assert resumed.order_effect.item() == whole.order_effect.item() != halfway
    for mine, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    (saved / "order_effect.json").unlink()
    with pytest.raises(RunError, match=r"has no order_effect.json: .* set order_effect to false"):
        run("again", resume_from_checkpoint=str(saved))


def test_the_best_model_has_its_order_effect(make):
    trainer = make(
        SHOWN,
        {"eval_dataset": Dataset.from_list(SHOWN)},
        order_effect=True,
        order_effect_learning_rate=1.0,  # log 3 = 1.1: the first step is the best
        lr_scheduler_type="constant",
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        max_steps=3,
        per_device_train_batch_size=8,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    assert trainer.order_effect.item() == pytest.approx(1, abs=1e-3)
    last = json.loads((best.parent / "checkpoint-3" / "order_effect.json").read_text())
    assert last["order_effect"] > 1.2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss_type": "hinge"}, "loss_type='hinge' must be one of"),
        ({"order_effect": 1}, "order_effect=1 must be True or False"),
        ({"order_effect_learning_rate": 0}, "order_effect_learning_rate=0 must be a number great"),
        ({"order_effect_learning_rate": True}, "order_effect_learning_rate=True must be"),
        ({"center_rewards_coefficient": -1.0}, "center_rewards_coefficient=-1.0 must be None, or"),
        ({"max_length": 2.5}, "max_length=2.5 must be None, or a whole number from 1"),
        (
            {"order_effect": True, "loss_type": "plackett_luce"},
            "order_effect=True with loss_type='plackett_luce': an order effect belongs to pairs",
        ),
        (
            {"order_effect": True, "ddp_find_unused_parameters": True},
            "with ddp_find_unused_parameters=True: .* would count as unused. Remove it",
        ),
    ],
)
def test_options_that_are_wrong(options, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        RewardConfig(str(tmp_path), **QUIET, **options)
    with pytest.raises(ConfigError, match=r"(?s)RewardConfig:.*loss_type.*max_length"):
        RewardConfig(str(tmp_path), **QUIET, loss_type="hinge", max_length=0)  # pyright: ignore


def test_parts_that_do_not_fit_together(make, model_path, tmp_path):
    with pytest.raises(ConfigError, match="args of type RewardConfig, got RewardConfig of trl\\."):
        args = trl.RewardConfig(str(tmp_path), **QUIET)
        RewardTrainer(model_path, args, train_dataset=Dataset.from_list(ROWS))  # pyright: ignore
    with pytest.raises(DataError, match="needs a train_dataset, got None"):
        RewardTrainer(model_path, RewardConfig(str(tmp_path), **QUIET))
    with pytest.raises(ConfigError, match=r"task_type is .*TOKEN_CLS.*; a reward model is a seq"):
        make(parts={"peft_config": LoraConfig(**LORA, task_type="TOKEN_CLS")})
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(model_path))
    with pytest.raises(ConfigError, match="no data_collator of its own kind, got DataCollatorW"):
        make(parts={"data_collator": collator})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match="an optimizer of your own is given"):
        make(SHOWN, {"optimizers": (optimizer, None)}, order_effect=True)
    with pytest.raises(
        DataError, match=r"train_dataset, row 0 .counted from 0.: .* ranks count from 1"
    ):
        make([ROWS[0] | {"ranks": [0, 1, 2, 3]}], model="there/is/no/such/model")
