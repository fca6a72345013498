"""Precedence: command line over recipe over extended files, left to right."""

import pytest

from trl_ext.errors import ConfigError
from trl_ext.recipe import read_recipe
from trl_ext.recipe.layers import parse_overrides


def values_and_origins(recipe, *keys):
    return {key: (recipe.values[key], str(recipe.origins[key])) for key in keys}


def test_the_later_layer_wins(write):
    write("base/one.yaml", "seed: 1\nmax_steps: 1\nlora_r: 1\nlora_alpha: 1\n", least=False)
    write("base/two.yaml", "max_steps: 2\nlora_r: 2\nlora_alpha: 2\n", least=False)
    write("r.yaml", "extends: [base/one.yaml, base/two.yaml]\nlora_r: 3\nlora_alpha: 3\n")
    recipe = read_recipe("r.yaml", ["lora_alpha=4"])
    assert values_and_origins(recipe, "seed", "max_steps", "lora_r", "lora_alpha") == {
        "seed": (1, "base/one.yaml:1"),
        "max_steps": (2, "base/two.yaml:1"),
        "lora_r": (3, "r.yaml:6"),
        "lora_alpha": (4, "command line"),
    }


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("folder", "r.yaml:5: extends: folder is a folder; name a file in it"),
        ("x" * 300, "r.yaml:5: extends: there is no file xxx"),
        ("~no_such_user/x.yaml", "r.yaml:5: extends: there is no file ~no_such_user/x.yaml"),
    ],
)
def test_extends_of_what_is_no_file(write, name, says):
    write("folder/a.yaml", "seed: 1\n", least=False)
    write("r.yaml", f"extends: {name}\n")
    with pytest.raises(ConfigError) as error:
        read_recipe("r.yaml")
    assert says in str(error.value)


def test_extends_is_relative_to_the_file_that_names_it(write):
    write("a/b/leaf.yaml", "seed: 5\n", least=False)
    write("a/middle.yaml", "extends: b/leaf.yaml\n", least=False)
    write("r.yaml", "extends: a/middle.yaml\n")
    assert values_and_origins(read_recipe("r.yaml"), "seed") == {"seed": (5, "a/b/leaf.yaml:1")}


def test_the_same_file_twice_is_no_circle(write):
    write("leaf.yaml", "seed: 5\n", least=False)
    write("left.yaml", "extends: leaf.yaml\n", least=False)
    write("right.yaml", "extends: leaf.yaml\n", least=False)
    write("r.yaml", "extends: [left.yaml, right.yaml]\n")
    assert read_recipe("r.yaml").values["seed"] == 5


def test_environment_variables_are_merged_one_by_one(write):
    write("base.yaml", "env: {A: 1, B: 1}\n", least=False)
    write("r.yaml", "extends: base.yaml\nenv: {B: true}\n")
    recipe = read_recipe("r.yaml", ["env.C=1e-5"])
    assert recipe.env == {"A": "1", "B": "true", "C": "1e-5"}
    assert str(recipe.origins["env.B"]) == "r.yaml:6"


@pytest.mark.parametrize(
    "tokens",
    [["beta=0.5"], ["--beta=0.5"], ["--beta", "0.5"], ["beta=1", "--beta", ".5"]],
)
def test_forms_of_an_override(write, tokens):
    write("r.yaml", "beta: 2.0\n")
    assert read_recipe("r.yaml", tokens).values["beta"] == 0.5


def test_a_switch_and_a_negative_number():
    findings = []
    tokens = ["--use_peft", "--max_steps", "-1", "--run_name", "a=b", "--x"]
    assert parse_overrides(tokens, findings) == [
        ("use_peft", "true"),
        ("max_steps", "-1"),
        ("run_name", "true"),  # `a=b` is an override itself; run_name=a=b says the other
        ("a", "b"),
        ("x", "true"),
    ]
    assert findings == []


def test_one_entry_of_a_mapping(write):
    write("r.yaml", "dataset_kwargs: {size: 10, seed: 1}\n")
    recipe = read_recipe("r.yaml", ["dataset_kwargs.size=20", "model_init_kwargs.a.b=1"])
    assert recipe.values["dataset_kwargs"] == {"size": 20, "seed": 1}
    assert recipe.values["model_init_kwargs"] == {"a": {"b": 1}}


def test_the_command_line_is_text_where_text_is_wanted(write):
    write("r.yaml", "")
    overrides = ["run_name=2024", "model_revision=1e5", "output_dir=a: b", "save_strategy=no"]
    recipe = read_recipe("r.yaml", [*overrides, "use_peft=no"])
    values = {key: recipe.values[key] for key in ("run_name", "model_revision", "output_dir")}
    assert values == {"run_name": "2024", "model_revision": "1e5", "output_dir": "a: b"}
    assert recipe.values["save_strategy"] == "no"
    assert recipe.values["use_peft"] is False


def test_the_trainer_can_be_overridden(write):
    write("r.yaml", "")
    assert read_recipe("r.yaml", ["trainer=sft"]).trainer == "sft"


@pytest.mark.parametrize("token", ["stray", "extends=a.yaml", "env=1", "-x"])
def test_what_cannot_be_overridden(write, token):
    write("r.yaml", "")
    with pytest.raises(ConfigError, match="command line: "):
        read_recipe("r.yaml", [token])
