"""Numbers that a type lets through and training does not."""

import pytest

from tests.unit.recipe.conftest import LEAST
from trl_ext.errors import ConfigError
from trl_ext.recipe import read_recipe
from trl_ext.recipe.ranges import RANGES, allowed_instead
from trl_ext.recipe.schema import LAUNCH_GROUP, class_fields, config_fields, refused_options
from trl_ext.registry import TRAINERS

OUTSIDE = {
    "per_device_train_batch_size": "0 -8",
    "per_device_eval_batch_size": "0",
    "gradient_accumulation_steps": "0",
    "generation_batch_size": "0",
    "steps_per_generation": "0",
    "num_iterations": "0 -1",
    "num_generations": "0 1 -4",
    "num_generations_eval": "0",
    "max_completion_length": "0 -1",
    "max_tokens_per_micro_batch": "0 -1",
    "temperature": "0 -1 .nan .inf",
    "top_p": "0 1.5 -1 .nan",
    "top_k": "-5",
    "min_p": "2 -0.1",
    "repetition_penalty": "0 -1",
    "learning_rate": "-1 .nan .inf 1e400",
    "weight_decay": "-1 .nan",
    "max_grad_norm": "-0.1 .nan",
    "warmup_steps": "-1 .nan",
    "max_steps": "0 -5",
    "num_train_epochs": "0 -1 .nan",
    "logging_steps": "0 -1 1.5 .nan .inf",
    "save_steps": "0 -1 2.5 .inf",
    "eval_steps": "0 -1",
    "beta": "-1 .nan -.inf",
    "reward_weights": "[1,.nan] [.inf,0]",
    "reward_samples": "0",
    "reward_timeout": "0 -1 .inf .nan 1e300",
    "gamma": "-0.1 1.1 .nan",
    "min_mixed_groups": "0 -0.5 1.5 .nan",
    "max_sampling_rounds": "0 -1",
    "lam": "-0.1 1.1",
    "critic_lam": "-1 2",
    "critic_learning_rate": "0 -1 .inf",
    "early_stop_kl": "0",
    "off_policy_truncation": "0 -1",
    "old_kl_coef": "0",
    "old_kl_target": "0 -1",
    "poe_alpha": "0 -0.5 .inf .nan",
    "process_beta": "0 -1 .inf",
    "process_gamma": "-0.1 1.1",
    "process_learning_rate": "0 -1",
    "process_weight": ".nan .inf",
    "value_clip": "0 .nan",
    "num_processes": "0 -1",
    "num_machines": "0",
}
INSIDE = {
    "top_p": "0.9 1",
    "top_k": "0 50",
    "min_p": "0 0.1 null",
    "num_generations": "2 null",
    "max_completion_length": "1 null",
    "max_tokens_per_micro_batch": "1 null",
    "learning_rate": "0 1e-5",
    "max_grad_norm": "0 .inf",
    "warmup_steps": "0 0.1 100",
    "max_steps": "-1 1",
    "num_train_epochs": "0.5 3",
    "logging_steps": "0.1 1 10 500.0",
    "save_steps": "0.5 1",
    "eval_steps": "0.5 1 null",
    "beta": "0 .inf",
    "reward_timeout": "0.5 null",
    "gamma": "0 1",
    "lam": "0 0.95 1",
    "value_clip": "0.2 null",
    "off_policy_truncation": "2 null",
}
FIELDS = {name: config_fields(TRAINERS.resolve(name)) for name in ("rwr", "reinforce", "ppo")}
LAUNCH = class_fields(LAUNCH_GROUP)


def recipe_with(key: str, value: str) -> str:
    """The least recipe of a trainer that has the key, with the key in line 5."""
    trainer = next(
        name
        for name, fields in FIELDS.items()
        if key in LAUNCH or (key in fields and key not in refused_options(TRAINERS.resolve(name)))
    )
    return LEAST.replace("trainer: rwr", f"trainer: {trainer}") + f"{key}: {value}\n"


def cases(table: dict[str, str]) -> list[tuple[str, str]]:
    return [(key, value) for key, values in table.items() for value in values.split()]


@pytest.mark.parametrize(("key", "value"), cases(OUTSIDE))
def test_outside(write, key, value):
    rewards = "reward_funcs: [exact_match, accuracy_reward]\n"
    write("r.yaml", recipe_with(key, value) + rewards, least=False)
    with pytest.raises(ConfigError) as error:
        read_recipe("r.yaml")
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith(f"  r.yaml:5: {key}: got ")
    assert f"allowed: {RANGES[key].words}" in line


@pytest.mark.parametrize(("key", "value"), cases(INSIDE))
def test_inside(write, key, value):
    write("r.yaml", recipe_with(key, value), least=False)
    assert key in read_recipe("r.yaml").values


def test_null_is_named_where_it_is_allowed(write):
    write("r.yaml", "num_generations: 1\nnum_iterations: 0\n")
    with pytest.raises(ConfigError) as error:
        read_recipe("r.yaml")
    assert str(error.value).splitlines()[1:] == [
        "  r.yaml:5: num_generations: got 1; allowed: a whole number from 2 on, or null.",
        "  r.yaml:6: num_iterations: got 0; allowed: a whole number from 1 on.",
    ]


def test_every_key_is_tested_and_is_a_field():
    assert set(OUTSIDE) == set(RANGES)
    assert set(RANGES) <= set(LAUNCH).union(*FIELDS.values())


def test_a_trainer_that_compares_nothing_within_a_group_takes_groups_of_one(write):
    write("r.yaml", LEAST.replace("rwr", "ppo") + "num_generations: 1\n", least=False)
    assert read_recipe("r.yaml").values["num_generations"] == 1
    write("r.yaml", LEAST.replace("rwr", "ppo") + "num_generations: 0\n", least=False)
    with pytest.raises(ConfigError, match=r"got 0; allowed: a whole number from 1 on, or null"):
        read_recipe("r.yaml")


@pytest.mark.parametrize("trainer", ["rwr", "grpo", "reinforce", "ppo", "sft"])
def test_the_defaults_are_inside(trainer):
    for key, field in config_fields(TRAINERS.resolve(trainer)).items():
        if key in RANGES and field.default is not None:
            assert allowed_instead(key, field.default, field.least) is None, key
