"""Collected completions are what was sampled and scored, whatever interrupts the sampling."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.tiny import count_a, save_byte_llama, save_tiny_llama
from trl_ext.collect import FORMS, Collector, collect
from trl_ext.collect.prompts import seed_of
from trl_ext.collect.summary import summarise
from trl_ext.errors import ConfigError, DataError, RewardError, RunError
from trl_ext.oracle import tabular_tokenizer
from trl_ext.recipe import Recipe, read_recipe

PROMPTS = ["a", "ab", "c", "bc", "ca", "b", "cc"]
GROUP, BATCH = 4, 2  # completions of a prompt; prompts of a batch
HERE = "tests.unit.test_collect"


def shares(completions: list[str], **kwargs) -> list[float]:
    """The share of "b"; a second reward."""
    return [completion.count("b") / 4 for completion in completions]


def picky(completions: list[str], **kwargs) -> list[float | None]:
    """Scores only what has a "b"."""
    return [float(len(text)) if "b" in text else None for text in completions]


def never(completions: list[str], **kwargs) -> list[None]:
    """Applies to nothing."""
    return [None] * len(completions)


class Failing:
    """`count_a` that raises in its call number `at`; 0: never."""

    at = 0
    calls = 0

    def __call__(self, completions: list[str], **kwargs) -> list[float]:
        Failing.calls += 1
        if Failing.calls == Failing.at:
            raise KeyboardInterrupt
        return count_a(completions)


def failing() -> Failing:
    """A factory, as recipes name them."""
    return Failing()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def write(tmp_path, model) -> Callable[..., Recipe]:
    """write(temperature=0.7) -> a recipe with seven prompts, two of them a batch."""

    def recipe(rows: list[dict[str, Any]] | None = None, **settings: Any) -> Recipe:
        rows = rows or [{"prompt": p, "number": i} for i, p in enumerate(PROMPTS)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given: dict[str, Any] = {
            "trainer": "rwr",
            "output_dir": str(tmp_path / "out"),
            "model_name_or_path": model,
            "bf16": False,
            "dataset_name": str(tmp_path / "prompts.jsonl"),
            "reward_funcs": ["tests.tiny:count_a", f"{HERE}:shares"],
            "num_generations": GROUP,
            "per_device_train_batch_size": GROUP,
            "per_device_eval_batch_size": GROUP * BATCH,
            "max_completion_length": 4,
            "report_to": "none",
            "disable_tqdm": True,
        }
        given = {key: value for key, value in (given | settings).items() if value is not None}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
        return read_recipe(tmp_path / "recipe.yaml")

    return recipe


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_prob(folder: str, row: dict[str, Any], temperature: float = 1.0) -> float:
    """log π(y|x) by one forward pass over the unpadded row."""
    ids = row["prompt_ids"] + row["completion_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double() / temperature
    begin = len(row["prompt_ids"])
    logps = logits.log_softmax(-1)[begin - 1 : -1]
    return logps.gather(1, torch.tensor(row["completion_ids"])[:, None]).sum().item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_are_what_was_sampled_and_scored(write, model, tmp_path, temperature):
    recipe = write(temperature=temperature, reward_weights=[1.0, 0.5])
    _, written = collect(recipe, tmp_path / "rows.jsonl")
    rows = rows_in(tmp_path / "rows.jsonl")
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    assert [row["group"] for row in rows] == [i for i in range(len(PROMPTS)) for _ in range(GROUP)]
    assert written == len(rows)
    for row in rows:
        assert row["prompt"] == PROMPTS[row["group"]]
        assert row["number"] == row["group"], "the dataset's other columns"
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        ids = row["completion_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["completion"]
        assert row["is_truncated"] == (ids[-1] != tokenizer.eos_token_id)
        assert 1 <= len(ids) <= 4 and tokenizer.eos_token_id not in ids[:-1]
        a, b = row["completion"].count("a") / 4, row["completion"].count("b") / 4
        assert row["rewards"] == {"count_a": a, "shares": b}
        assert row["reward"] == a + 0.5 * b
        assert row["logp"] == pytest.approx(log_prob(model, row, temperature), abs=1e-4)
        assert "ref_logp" not in row
    assert len({row["completion"] for row in rows}) > 5, "no greedy decoding"
    assert not (tmp_path / "rows.jsonl.samples.partial").exists()


def test_dropout_is_off(write, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.9}))
    collector = Collector(write(model_name_or_path=str(folder)))
    collector.trainer.model.train()
    collector.collect(tmp_path / "rows.jsonl", limit=2)
    for row in rows_in(tmp_path / "rows.jsonl"):
        assert row["logp"] == pytest.approx(log_prob(model, row), abs=1e-4)


def test_the_same_seed_gives_the_same_file_and_another_another(write, tmp_path):
    texts = []
    for number, seed in enumerate((3, 3, 4)):
        torch.rand(number)  # what else draws random numbers does not matter
        collect(write(seed=seed), tmp_path / f"{number}.jsonl")
        texts.append((tmp_path / f"{number}.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]
    assert len({seed_of(*four) for four in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0)]}) == 3


def test_two_series_are_two_samples(write, tmp_path):
    collector = Collector(write())
    for series in (1, 2):
        collector.collect(tmp_path / f"{series}.jsonl", series=series)
    assert (tmp_path / "1.jsonl").read_text() != (tmp_path / "2.jsonl").read_text()


def interrupted(recipe: Recipe, output: Path, *, batch: int, limit: int | None = None) -> None:
    """Collect until the rewards of a batch (from 1) are asked for, and no further."""
    Failing.at, Failing.calls = batch, 0
    with pytest.raises(KeyboardInterrupt):
        collect(recipe, output, limit=limit)
    Failing.at = 0
    assert not output.exists()


@pytest.mark.parametrize("batch", [1, 3])
def test_interrupted_and_resumed_it_ends_with_the_same_file(write, tmp_path, batch, capsys):
    recipe = write(reward_funcs=[f"{HERE}:failing"])
    collect(recipe, tmp_path / "whole.jsonl")
    interrupted(recipe, tmp_path / "cut.jsonl", batch=batch)
    done = (batch - 1) * BATCH * GROUP
    assert (f"{done} completions are kept" in capsys.readouterr().err) == (done > 0)
    Failing.calls = 0
    collect(recipe, tmp_path / "cut.jsonl")
    assert Failing.calls == 4 - (batch - 1), "whole batches are not sampled again"
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("lines", [1, 5, 12])
def test_killed_in_the_middle_of_a_line_it_ends_with_the_same_file(write, tmp_path, lines):
    """What is left are `lines` whole ones, the first of which is no row, and half of another."""
    recipe = write(reward_funcs=[f"{HERE}:failing"])
    collect(recipe, tmp_path / "whole.jsonl")
    interrupted(recipe, tmp_path / "cut.jsonl", batch=4)
    partial = tmp_path / "cut.jsonl.samples.partial"
    kept = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join(kept[:lines]) + kept[lines][:20])
    collect(recipe, tmp_path / "cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"seed": 9}, "seed"),
        ({"num_generations": 8, "per_device_train_batch_size": 8}, "num_generations"),
        ({"per_device_eval_batch_size": 16}, "per_device_eval_batch_size"),
        ({"reward_weights": [2.0]}, "reward_weights"),
        ({"rows": [{"prompt": "a", "number": 5}] * 7}, "rows of the dataset"),
    ],
)
def test_other_settings_do_not_go_on_with_a_partial_file(write, tmp_path, change, says):
    reward = {"reward_funcs": [f"{HERE}:failing"]}
    interrupted(write(**reward), tmp_path / "cut.jsonl", batch=3)
    with pytest.raises(ConfigError, match=f"was begun with {says}"):
        collect(write(**(reward | change)), tmp_path / "cut.jsonl")
    collect(write(**(reward | change)), tmp_path / "cut.jsonl", force=True)


def test_another_model_of_the_same_name_does_not_go_on(write, tmp_path, model):
    folder = tmp_path / "model"
    save_tiny_llama(folder)
    recipe = write(model_name_or_path=str(folder), reward_funcs=[f"{HERE}:failing"])
    interrupted(recipe, tmp_path / "cut.jsonl", batch=2)
    save_tiny_llama(folder)
    with pytest.raises(ConfigError, match="was begun with weights"):
        collect(recipe, tmp_path / "cut.jsonl")


def test_what_does_not_matter_may_change(write, tmp_path):
    reward = {"reward_funcs": [f"{HERE}:failing"]}
    collect(write(**reward), tmp_path / "whole.jsonl")
    interrupted(write(**reward), tmp_path / "cut.jsonl", batch=3)
    changed = {"learning_rate": 0.5, "max_steps": 7, "output_dir": "elsewhere", "beta": 3.0}
    collect(write(**reward, **changed), tmp_path / "cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_limit_takes_the_first_prompts(write, tmp_path):
    recipe = write()
    collect(recipe, tmp_path / "all.jsonl")
    summary, _ = collect(recipe, tmp_path / "four.jsonl", limit=4)
    assert rows_in(tmp_path / "four.jsonl") == rows_in(tmp_path / "all.jsonl")[: 4 * GROUP]
    assert summary.prompts == 4
    collect(recipe, tmp_path / "odd.jsonl", limit=3)
    assert {row["group"] for row in rows_in(tmp_path / "odd.jsonl")} == {0, 1, 2}


def test_a_limit_holds_behind_an_interruption(write, tmp_path):
    recipe = write(reward_funcs=[f"{HERE}:failing"])
    collect(recipe, tmp_path / "whole.jsonl", limit=5)
    interrupted(recipe, tmp_path / "cut.jsonl", batch=2, limit=5)
    collect(recipe, tmp_path / "cut.jsonl", limit=5)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_splits(write, tmp_path):
    recipe = write(
        dataset_name="char_reverse",
        model_name_or_path=save_byte_llama(tmp_path / "m"),
        dataset_kwargs={"size": 8, "eval_size": 3},
        reward_funcs=["exact_match"],
    )
    collect(recipe, tmp_path / "train.jsonl")
    summary, _ = collect(recipe, tmp_path / "test.jsonl", split="test")
    assert summary.prompts == 3 and summary.completions == 3 * GROUP
    seen = {row["prompt"] for row in rows_in(tmp_path / "train.jsonl")}
    assert len(seen) == 8
    assert not seen & {row["prompt"] for row in rows_in(tmp_path / "test.jsonl")}


def test_a_stream_gives_the_same_rows(write, tmp_path):
    for name, streaming in (("map", False), ("stream", True)):
        collect(write(dataset_streaming=streaming), tmp_path / f"{name}.jsonl")
    assert rows_in(tmp_path / "map.jsonl") == rows_in(tmp_path / "stream.jsonl")


def test_an_interrupted_stream_goes_on(write, tmp_path):
    recipe = write(dataset_streaming=True, reward_funcs=[f"{HERE}:failing"])
    collect(recipe, tmp_path / "whole.jsonl")
    interrupted(recipe, tmp_path / "cut.jsonl", batch=3)
    collect(recipe, tmp_path / "cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_messages_are_completed_by_messages(write, tmp_path):
    folder = save_byte_llama(tmp_path / "m")
    prompt = [{"role": "user", "content": "hi"}]
    recipe = write(
        [{"prompt": prompt}] * 2, model_name_or_path=folder, reward_funcs=[f"{HERE}:of_chat"]
    )
    collect(recipe, tmp_path / "rows.jsonl")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    for row in rows_in(tmp_path / "rows.jsonl"):
        assert row["prompt"] == prompt
        [said] = row["completion"]
        assert said["role"] == "assistant"
        assert said["content"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert row["reward"] == len(said["content"])


def of_chat(completions: list[Any], **kwargs) -> list[float]:
    """The length of what is said."""
    return [float(len(completion[0]["content"])) for completion in completions]


def test_parquet_has_the_same_rows(write, tmp_path):
    for ending in ("jsonl", "parquet"):
        collect(write(), tmp_path / f"rows.{ending}")
    found = Dataset.from_parquet(str(tmp_path / "rows.parquet"))
    assert isinstance(found, Dataset)
    assert found.to_list() == rows_in(tmp_path / "rows.jsonl")


def test_a_file_of_rows_opens_as_a_dataset(write, tmp_path):
    collect(write(reward_funcs=[f"{HERE}:picky"]), tmp_path / "rows.jsonl")
    rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    assert all("b" in row["completion"] for row in rows)  # pyright: ignore


def test_what_no_reward_scored_is_left_out_and_counted(write, tmp_path):
    everything = write(reward_funcs=[f"{HERE}:shares"])
    collect(everything, tmp_path / "all.jsonl")
    some = [
        row["completion"] for row in rows_in(tmp_path / "all.jsonl") if "b" in row["completion"]
    ]
    summary, written = collect(write(reward_funcs=[f"{HERE}:picky"]), tmp_path / "some.jsonl")
    assert [row["completion"] for row in rows_in(tmp_path / "some.jsonl")] == some
    assert (written, summary.unscored) == (len(some), 28 - len(some))
    assert f"{28 - len(some)} completions that no reward scored" in summary.table("")


def test_a_file_of_nothing_is_refused(write, tmp_path, caplog):
    caplog.set_level("WARNING")
    with pytest.raises(DataError, match="no reward function gave a number"):
        collect(write(reward_funcs=[f"{HERE}:never"]), tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()
    assert "All reward functions returned None" not in caplog.text, "TRL's, of each batch"


def test_logp_is_left_out_where_more_than_a_temperature_shapes_the_sampling(write, tmp_path):
    for option in (
        {"top_p": 0.9},
        {"top_k": 3},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"generation_kwargs": {"no_repeat_ngram_size": 2}},
    ):
        collect(write(**option), tmp_path / "rows.jsonl", force=True, limit=1)
        assert all("logp" not in row for row in rows_in(tmp_path / "rows.jsonl")), option


def test_a_masked_truncated_completion_has_its_logp(write, tmp_path, model):
    collect(write(mask_truncated_completions=True), tmp_path / "rows.jsonl")
    cut = [row for row in rows_in(tmp_path / "rows.jsonl") if row["is_truncated"]]
    assert cut
    for row in cut:
        assert row["logp"] == pytest.approx(log_prob(model, row), abs=1e-4)


def test_the_reference_is_that_of_the_recipe_and_the_policy_may_be_another(write, tmp_path, model):
    """ref_logp and logp of each row by forward passes of the two models."""
    other = tmp_path / "other"
    moved: Any = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    moved.save_pretrained(other)
    recipe = write(reference="fixed")
    collect(recipe, tmp_path / "same.jsonl")
    for row in rows_in(tmp_path / "same.jsonl"):
        assert row["ref_logp"] == pytest.approx(row["logp"], abs=1e-5)
    Collector(recipe, policy=other).collect(tmp_path / "other.jsonl")
    for row in rows_in(tmp_path / "other.jsonl"):
        assert row["logp"] == pytest.approx(log_prob(str(other), row), abs=1e-4)
        assert row["ref_logp"] == pytest.approx(log_prob(model, row), abs=1e-4)
    with pytest.raises(RunError, match="cannot be loaded"):
        Collector(recipe, policy=tmp_path / "none").collect(tmp_path / "none.jsonl")


def test_a_folder_with_an_adapter_is_a_model(write, tmp_path, model):
    """The adapter's own forward pass gives the same log-probabilities."""
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    peft = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn_like(parameter)
    peft.save_pretrained(str(tmp_path / "adapter"))
    merged: Any = peft.merge_and_unload()  # pyright: ignore[reportCallIssue]
    merged.save_pretrained(tmp_path / "merged")
    recipe = write(model_name_or_path=str(tmp_path / "adapter"), use_peft=True)
    collect(recipe, tmp_path / "rows.jsonl")
    rows = rows_in(tmp_path / "rows.jsonl")
    for row in rows:
        assert row["logp"] == pytest.approx(log_prob(str(tmp_path / "merged"), row), abs=1e-4)
    assert any(abs(row["logp"] - log_prob(model, row)) > 0.1 for row in rows)
    other = write(model_name_or_path=str(tmp_path / "adapter"), use_peft=True, lora_r=3)
    with pytest.raises(ConfigError, match=r"an adapter with lora_r 2, and .* asks for lora_r: 3"):
        collect(other, tmp_path / "other.jsonl")


@pytest.mark.parametrize("trainer", ["grpo", "reinforce", "ppo", "offline_rwr"])
def test_every_trainer_that_says_how_samples_the_same(write, tmp_path, trainer):
    """The sampling settings are all that matters of a recipe; grpo and others add a reference."""
    beta = {"beta": 0.1} if trainer != "ppo" else {"critic_learning_rate": 1e-3}
    collect(write(), tmp_path / "rwr.jsonl")
    collect(write(trainer=trainer, **beta), tmp_path / "other.jsonl")
    for ours, theirs in zip(
        rows_in(tmp_path / "other.jsonl"), rows_in(tmp_path / "rwr.jsonl"), strict=True
    ):
        has_reference = trainer != "offline_rwr"
        assert ("ref_logp" in ours) == has_reference
        logp = pytest.approx(theirs["logp"], abs=1e-5)
        assert ours.pop("ref_logp", theirs["logp"]) == logp
        assert ours == theirs | {"logp": logp}


def test_two_rewards_of_one_name_have_two_columns(write, tmp_path):
    recipe = write(reward_funcs=["tests.tiny:count_a", "tests.tiny:count_a"])
    collect(recipe, tmp_path / "rows.jsonl", limit=1)
    assert list(rows_in(tmp_path / "rows.jsonl")[0]["rewards"]) == ["count_a", "count_a_2"]


@pytest.mark.parametrize(
    ("settings", "arguments", "error", "says"),
    [
        ({"trainer": "sft", "reward_funcs": None, "num_generations": None,
          "max_completion_length": None}, {}, ConfigError,
         "trainer: sft samples nothing"),
        ({"rows": [{"prompt": "a", "reward": 1.0}]}, {}, DataError, "column 'reward'"),
        ({"rows": [{"prompt": "a", "reward": 1.0, "group": 3}]}, {}, DataError,
         "column 'reward', 'group'"),
        ({"rows": [{"prompt": "a", "image": "x"}]}, {}, DataError, "no images"),
        ({"rows": [{"prompt": "a", "completion": "x"}]}, {}, DataError, "'completion'"),
        ({"rows": [{"promt": "a"}]}, {}, DataError, "no column 'prompt'"),
        ({}, {"split": "test"}, ConfigError, "test split is asked for"),
        ({}, {"split": "validation"}, ConfigError, "split='validation' must be one of train, test"),
        ({}, {"limit": 0}, ConfigError, "limit=0"),
        ({}, {"limit": True}, ConfigError, "limit=True"),
        ({}, {"form": "pairs"}, ConfigError, "form='pairs' must be one of completions"),
    ],
)  # fmt: skip
def test_refusals_leave_no_file(write, tmp_path, settings, arguments, error, says):
    with pytest.raises(error, match=says):
        collect(write(**settings), tmp_path / "rows.jsonl", **arguments)
    assert not list(tmp_path.glob("rows.jsonl*"))


def test_a_stream_of_what_json_has_not_is_refused_before_the_model(write, tmp_path):
    columns = {"prompt": ["a"], "raw": [b"bytes"]}
    Dataset.from_dict(columns).to_parquet(str(tmp_path / "rows.parquet"))
    prompts = {"dataset_name": str(tmp_path / "rows.parquet"), "dataset_streaming": True}
    with pytest.raises(DataError, match="bytes"):
        Collector(write(**prompts)).dataset("train")


@pytest.mark.parametrize("texts", [["é", "a"], ["a", "é"]])
def test_prompts_that_are_not_utf_8_are_refused_before_the_model(write, tmp_path, texts):
    """Latin-1 passes for text until a row is looked at, the first one or a later one."""
    recipe = write()
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "prompts.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8.* `iconv"):
        collect(recipe, tmp_path / "rows.jsonl")
    assert not list(tmp_path.glob("rows.jsonl*"))


def test_a_file_without_tied_weights_is_loaded_without_a_word(write, tmp_path, caplog):
    """A tied head is not written; a key that is missing for another reason is said."""
    config = LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=0, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    for name in ("start", "moved"):
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tabular_tokenizer(6).save_pretrained(tmp_path / name)
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    assert "lm_head.weight" not in weights
    recipe = write(model_name_or_path=str(tmp_path / "start"))
    caplog.set_level("WARNING")
    Collector(recipe, policy=tmp_path / "moved").collect(tmp_path / "rows.jsonl", limit=1)
    assert "missing keys" not in caplog.text
    for row in rows_in(tmp_path / "rows.jsonl"):
        assert row["logp"] == pytest.approx(log_prob(str(tmp_path / "moved"), row), abs=1e-4)
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "moved" / "model.safetensors")
    assert Collector(recipe, policy=tmp_path / "moved").trainer
    assert "missing keys" in caplog.text and "model.norm.weight" in caplog.text


def test_a_file_that_exists_is_left_alone(write, tmp_path):
    (tmp_path / "rows.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="is left alone"):
        collect(write(), tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"\.jsonl, \.parquet"):
        collect(write(), tmp_path / "rows.txt")


def test_a_reward_that_fails_names_itself_and_keeps_what_is_there(write, tmp_path):
    with pytest.raises(RewardError, match="broken"):
        collect(write(reward_funcs=[f"{HERE}:broken"]), tmp_path / "rows.jsonl")


def broken(completions: list[str], **kwargs) -> list[float]:
    """Raises."""
    raise ValueError("no")


def group_of(rewards: list[float | None], number: int = 0) -> list[dict[str, Any]]:
    """Rows of one prompt; completions are numbered, two tokens each."""
    return [
        {"prompt": "x", "completion": str(i), "reward": reward, "group": number, "note": 7,
         "completion_ids": [1, 0], "is_truncated": i == 0, "logp": -1.0, "rewards": {}}
        for i, reward in enumerate(rewards)
    ]  # fmt: skip


def test_preferences_are_best_and_worst_the_first_of_equals():
    [pair] = FORMS["preferences"](group_of([1.0, 3.0, 0.0, 3.0, 0.0]))
    assert pair == {
        "prompt": "x", "chosen": "1", "rejected": "2", "score_chosen": 3.0, "score_rejected": 0.0,
        "group": 0, "note": 7,
    }  # fmt: skip
    assert FORMS["preferences"](group_of([2.0, 2.0])) == []
    assert FORMS["preferences"](group_of([2.0])) == []
    same_text = [row | {"completion": "y"} for row in group_of([1.0, 2.0])]
    assert FORMS["preferences"](same_text) == []


def test_rankings_have_every_completion_and_its_score():
    [ranking] = FORMS["rankings"](group_of([1.0, 3.0, 1.0]))
    assert ranking == {
        "prompt": "x", "completions": ["0", "1", "2"], "scores": [1.0, 3.0, 1.0],
        "group": 0, "note": 7,
    }  # fmt: skip
    assert FORMS["rankings"](group_of([2.0, 2.0])) == []


@pytest.mark.parametrize("form", ["preferences", "rankings"])
def test_a_form_is_made_of_the_rows_that_would_have_been_written(write, tmp_path, form):
    collect(write(), tmp_path / "rows.jsonl")
    rows = rows_in(tmp_path / "rows.jsonl")
    groups = [rows[i : i + GROUP] for i in range(0, len(rows), GROUP)]
    expected = [row for group in groups for row in FORMS[form](group)]
    summary, written = collect(write(), tmp_path / "form.jsonl", form=form)
    assert rows_in(tmp_path / "form.jsonl") == expected
    assert written == len(expected) == round(len(PROMPTS) * (1 - summary.uniform)) < len(PROMPTS)


def test_a_form_of_uniform_groups_is_refused(write, tmp_path):
    recipe = write(reward_funcs=[f"{HERE}:same"])
    with pytest.raises(DataError, match="no group is one completion better"):
        collect(recipe, tmp_path / "rows.jsonl", form="preferences")
    # The samples are there all the same.
    Failing.calls = 0
    _, written = collect(recipe, tmp_path / "rows.jsonl")
    assert written == 28


def same(completions: list[str], **kwargs) -> list[float]:
    """Likes all alike."""
    return [1.0] * len(completions)


def test_the_summary_by_hand():
    """Means 2 and 5 of two prompts: 3.5, s = sqrt(4.5), half width 1.96·s/sqrt(2) = 2.94."""
    rows = [*group_of([1.0, 3.0, None]), *group_of([5.0, 5.0], 1), *group_of([None], 2)]
    summary = summarise(rows)
    assert (summary.prompts, summary.completions, summary.unscored) == (3, 6, 2)
    assert summary.reward == 3.5
    assert summary.half_width == pytest.approx(2.94)
    assert summary.truncated == 3 / 6
    assert summary.uniform == 2 / 3, "one of equal rewards, one of none"
    assert summary.tokens == 12
    assert "95% interval 0.560 to 6.440" in summary.table("6 completions")
    assert summarise(group_of([1.0])).half_width is None
