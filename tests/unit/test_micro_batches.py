"""Which rows a pass with gradient takes, counted in tokens."""

import sys
from collections import defaultdict
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback

from tests.tiny import QUIET, save_tiny_llama
from trl_ext import (
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    ReinforceConfig,
    ReinforceTrainer,
    RWRConfig,
    RWRTrainer,
)
from trl_ext.errors import ConfigError
from trl_ext.oracle import tabular_tokenizer

G, ROWS = 4, 16
PROMPTS = ["abc", "bca", "cab", "abb"]
# What a packed prompt of three tokens takes: all but its last, with which its completions begin.
BEGIN = 2


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def length_of(row: int) -> int:
    """1 to 6 tokens, each length in each group of four."""
    return 1 + (row * 5) % 6


def rollout(prompts, trainer):
    return {
        "prompt_ids": trainer.processing_class(prompts)["input_ids"],
        "completion_ids": [[1 + row % 5] * length_of(row) for row in range(len(prompts))],
        "logprobs": None,
    }


def odd_groups(prompts, **_) -> list[float]:
    """Only the first and the third group of four have rewards that differ."""
    return [float(row % 2) if row // G % 2 == 0 else 1.0 for row in range(len(prompts))]


MIXED = [row for row in range(ROWS) if row // G % 2 == 0]


class Passes(TrainerCallback):
    """Tokens of each pass with gradient, by optimizer step."""

    def __init__(self):
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.step = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def count(module, positional, named):
            if torch.is_grad_enabled():
                ids = named["input_ids"] if "input_ids" in named else positional[0]
                self.tokens[self.step].append(ids.numel())

        assert model is not None
        model.base_model.register_forward_pre_hook(count, with_kwargs=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.step += 1


def passes(model, folder, of=(GRPOTrainer, GRPOConfig), reward=odd_groups, **options) -> list[int]:
    """Tokens of each pass of one step of 16 completions of 4 prompts, in 4 micro-batches."""
    trainer_class, config_class = of
    settings: dict[str, Any] = (
        QUIET
        | {
            "max_steps": 1,
            "num_generations": G,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "max_completion_length": 6,
            "shuffle_dataset": False,
            "loss_type": "grpo",
        }
        | options
    )
    seen = Passes()
    trainer_class(
        model=model,
        reward_funcs=reward,
        args=config_class(str(folder), **settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
        rollout_func=rollout,
        callbacks=[seen],
    ).train()
    return seen.tokens[0]


EVERY = range(ROWS)
OF_MIXED, OF_ALL = (sum(map(length_of, rows)) for rows in (MIXED, EVERY))


def test_rows_without_credit_have_no_pass(model_path, tmp_path):
    found = passes(model_path, tmp_path)
    assert sum(found) == OF_MIXED + 2 * BEGIN
    # A pass of half of what a padded micro-batch has, 4 rows of 9, holds a group: two will do.
    assert len(found) == 2
    kept = passes(model_path, tmp_path, skip_zero_credit=False)
    assert sum(kept) >= OF_ALL + 4 * BEGIN


def test_what_is_switched_off(model_path, tmp_path):
    alone = passes(model_path, tmp_path, share_prompts=False)
    assert sum(alone) == OF_MIXED + len(MIXED) * BEGIN
    padded = passes(model_path, tmp_path, trim_padding=False)
    assert sum(padded) == len(MIXED) * (3 + 6)
    trls = passes(model_path, tmp_path, trim_padding=False, skip_zero_credit=False)
    assert trls == [4 * (3 + 6)] * 4


@pytest.mark.parametrize("limit", [1, 9, 12, 20, 1000])
def test_passes_have_no_more_tokens_than_allowed(model_path, tmp_path, limit):
    found = passes(model_path, tmp_path, max_tokens_per_micro_batch=limit)
    longest = BEGIN + 6
    assert max(found) <= max(limit, longest)
    assert limit > 1 or len(found) == len(MIXED)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"beta": 0.1, "kl_placement": "none"},
        {"entropy_coef": 0.1},
        {"top_entropy_quantile": 0.5},
    ],
    ids=["kl in the loss", "kl that is logged", "entropy bonus", "tokens of high entropy"],
)
def test_other_terms_need_every_row(model_path, tmp_path, options):
    assert sum(passes(model_path, tmp_path, **options)) >= OF_ALL + 4 * BEGIN


@pytest.mark.parametrize(
    ("of", "options", "rows"),
    [
        ((RWRTrainer, RWRConfig), {"drop_uniform_groups": True}, OF_MIXED),
        ((RWRTrainer, RWRConfig), {"drop_uniform_groups": False}, OF_ALL),
        ((ReinforceTrainer, ReinforceConfig), {"baseline": "group"}, OF_MIXED),
        # The critic learns from all of them.
        ((PPOTrainer, PPOConfig), {}, OF_ALL),
    ],
    ids=["rwr", "rwr, all groups", "reinforce", "ppo"],
)
def test_rows_that_each_trainer_needs(model_path, tmp_path, of, options, rows):
    options = {"loss_type": "dapo", "beta": 0.0} | options
    if of[0] is RWRTrainer:
        options["beta"] = 0.25
    found = sum(passes(model_path, tmp_path, of=of, **options))
    assert rows < found <= rows + 16 * (BEGIN + 1)
    assert found < OF_ALL or rows == OF_ALL


@pytest.fixture(scope="module")
def gpt2_path(tmp_path_factory) -> str:
    """A model that is not run packed, and whose positions padding on the left would shift."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = AutoConfig.for_model(
        "gpt2", vocab_size=6, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tabular_tokenizer(6).save_pretrained(folder)
    return str(folder)


EXACT = {"beta": 0.1, "kl_estimator": "exact", "kl_is_correction": False}


@pytest.mark.parametrize("limit", [12, 20])
@pytest.mark.parametrize("how", ["trimmed", "padded", "compiled", "with states"])
def test_however_rows_are_run_passes_have_no_more_tokens(
    model_path, gpt2_path, tmp_path, monkeypatch, how, limit
):
    if how == "compiled":  # as a model is then called, without the minutes that it takes
        monkeypatch.setattr(Trainer, "__init__", _compiled_later(Trainer.__init__))
    options = EXACT if how == "with states" else {"trim_padding": how != "padded"}
    model = gpt2_path if how == "trimmed" else model_path
    found = passes(model, tmp_path, max_tokens_per_micro_batch=limit, **options)
    # A row of 9 tokens, padded, or of 9 with its last token, is the longest.
    assert max(found) <= limit
    assert all(tokens % (3 + 6) == 0 for tokens in found) or how in ("trimmed", "with states")


def test_padded_passes_hold_rows_of_similar_length(gpt2_path, tmp_path):
    """Rows with signal have 6, 5, 5, 4, 4, 3, 2, 1 tokens, and prompts of 3.

    Of two at a time they are padded to 9, 8, 7, 5; three at a time are always above 20, but for the
    last ones. Four passes it takes, and none of 17 or fewer will do: 9, 2·8, 2·7, 2·6, 4 are five.
    """
    found = passes(gpt2_path, tmp_path, max_tokens_per_micro_batch=20)
    assert found == [2 * 9, 2 * 8, 2 * 7, 2 * 5]


def test_no_more_passes_than_micro_batches_if_nothing_is_said(model_path, tmp_path, monkeypatch):
    """16 rows of 6 tokens and 4 prompts of 2: six times what half a padded micro-batch has, 18."""
    monkeypatch.setattr(sys.modules[__name__], "length_of", lambda row: 6)
    found = passes(model_path, tmp_path, skip_zero_credit=False)
    assert found == [4 * 6 + BEGIN] * 4


def _compiled_later(init: Any) -> Any:
    """transformers compiles what `torch_compile` says when it begins; it says so afterwards."""

    def initialise(self: Any, *args: Any, **given: Any) -> None:
        init(self, *args, **given)
        self.args.torch_compile = True
        self.accelerator.state.dynamo_plugin.backend = "NO"

    return initialise


def test_completions_that_are_masked_have_no_pass(model_path, tmp_path):
    """None of them ends with <eos>. What is left is a prompt of 3 and one column of padding."""
    assert passes(model_path, tmp_path, mask_truncated_completions=True) == [3 + 1]


def test_nothing_to_learn_is_one_short_pass(model_path, tmp_path):
    found = passes(model_path, tmp_path, reward=lambda prompts, **_: [1.0] * len(prompts))
    assert found == [BEGIN + 1]


@pytest.mark.parametrize(
    "options", [{"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}], ids=["bonus", "quantile"]
)
def test_a_limit_that_would_have_no_effect(model_path, tmp_path, options):
    with pytest.raises(ConfigError, match="max_tokens_per_micro_batch=9 has no effect"):
        passes(model_path, tmp_path, max_tokens_per_micro_batch=9, **options)


@pytest.mark.parametrize("limit", [0, -3, 1.5, True, "12"])
def test_a_limit_that_is_none(tmp_path, limit):
    with pytest.raises(ConfigError, match="max_tokens_per_micro_batch"):
        GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_tokens_per_micro_batch=limit)
