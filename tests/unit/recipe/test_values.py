"""Which values pass for a field, and as what."""

import math

import pytest

from trl_ext.errors import ConfigError
from trl_ext.recipe import read_recipe

GOOD = [
    ("learning_rate: 1e-5", 1e-5),
    ("learning_rate: 1", 1.0),
    ("beta: .inf", math.inf),
    ("max_steps: -1", -1),
    ("logging_steps: 10", 10.0),
    ("bf16: null", None),
    ("bf16: yes", True),
    ("save_strategy: no", "no"),
    ("save_strategy: best", "best"),
    ("report_to: none", "none"),
    ("report_to: [wandb]", ["wandb"]),
    ("dtype: bfloat16", "bfloat16"),
    ("lora_target_modules: all-linear", ["all-linear"]),
    ("lora_target_modules: [q, v]", ["q", "v"]),
    ("reward_weights: [1, 0.5]\nreward_funcs: [exact_match, accuracy_reward]", [1.0, 0.5]),
    ("model_init_kwargs: {a: 1e-3}", {"a": 1e-3}),
    ("model_init_kwargs: '{\"a\": 1}'", '{"a": 1}'),
    ("lr_scheduler_kwargs: {min_lr: 1e-6}", {"min_lr": 1e-6}),
    ("pad_to_multiple_of: 8", 8),
    ("trackio_static_space_id: false", False),
    ("reference: fixed", "fixed"),
    ("accelerator_config: {split_batches: true}", {"split_batches": True}),
]


@pytest.mark.parametrize(("line", "value"), GOOD)
def test_passes(write, line, value):
    write("r.yaml", line + "\n")
    read = read_recipe("r.yaml").values[line.partition(":")[0]]
    assert read == value
    assert type(read) is type(value)


BAD = [
    ("num_generations: 8.5", "got 8.5; allowed: a whole number or null."),
    ("num_generations: 8.0", "got 8.0; allowed: a whole number or null. Write 8."),
    ("num_generations: true", "got true; allowed: a whole number or null."),
    ("num_generations: '8'", "got '8'; allowed: a whole number or null. Write it without quotes."),
    ("beta: [1, 2]", "got [1, 2]; allowed: a number."),
    ("beta: [1]", "got [1]; allowed: a number. Write 1, without brackets."),
    ("beta: inf", "got 'inf'; allowed: a number. Write .inf."),
    ("eval_delay: -inf", "got '-inf'; allowed: a number. Write -.inf."),
    ("beta:", "got null; allowed: a number."),
    ("dtype: bf16", "Did you mean bfloat16?"),
    ("save_strategy: epochs", "one of no, steps, epoch, best. Did you mean epoch?"),
    ("save_strategy: true", "got true; allowed: one of no, steps, epoch, best."),
    ("use_peft: 1", "got 1; allowed: true or false."),
    ("run_name: 7", 'got 7; allowed: text or null. If text is meant, write it in quotes: "7".'),
    ("run_name: yes", "got true; allowed: text or null. If the word is meant, write it in quotes"),
    ("lora_target_modules: [q, 1]", "allowed: a list of {text} or null. Wrong at [1]:"),
    ("datasets: [{path: a}, {path: b, nme: c}]", "Wrong at [1].nme: unknown key."),
    ("model_init_kwargs: [1]", "got [1]; allowed: a mapping or text or null."),
    ("reference: fixd", "one of moving, fixed. Did you mean fixed?"),
    ("dataset_kwargs: 5", "got 5; allowed: a mapping or null."),
]


@pytest.mark.parametrize(
    "line",
    [
        "reward_funcs: [1]",
        "learning_rate: inf",
        "learning_rate: [-1]",
        "num_generations: '0'",
        "num_generations: '8.5'",
        "num_generations: 0.0",
    ],
)
def test_no_advice_that_would_be_refused(write, line):
    write("r.yaml", line + "\n")
    with pytest.raises(ConfigError) as error:
        read_recipe("r.yaml")
    assert "Write" not in str(error.value)


@pytest.mark.parametrize(("line", "message"), BAD)
def test_is_refused(write, line, message):
    write("r.yaml", line + "\n")
    with pytest.raises(ConfigError) as error:
        read_recipe("r.yaml")
    key = line.partition(":")[0]
    assert f"r.yaml:5: {key}: " in str(error.value)
    assert message in str(error.value)
