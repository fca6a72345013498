import pytest
import yaml

from trl_ext.recipe import read_recipe
from trl_ext.recipe.secrets import hide_secrets, is_secret


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("hub_token", True),
        ("env.HF_TOKEN", True),
        ("env.WANDB_API_KEY", True),
        ("env.DB_PASSWORD", True),
        ("env.TOKENIZERS_PARALLELISM", False),
        ("eos_token", False),
        ("reward_funcs", False),
    ],
)
def test_what_is_secret(key, secret):
    assert is_secret(key) is secret


def test_a_command_line_hides_secrets_in_every_form():
    line = ["train", "a.yaml", "hub_token=x", "--hub_token=x", "--hub_token", "x", "seed=1"]
    line += ["env.HF_TOKEN=x=y", "--resume"]
    hidden = hide_secrets(line)
    assert not any("x" in word for word in hidden if word != "a.yaml")
    assert [hidden[0], hidden[1], hidden[6], hidden[8]] == ["train", "a.yaml", "seed=1", "--resume"]
    assert len(hidden) == len(line)


def test_the_resolved_recipe_has_no_secret():
    overrides = ["hub_token=abc", "env.HF_TOKEN=abc", "env.OMP_NUM_THREADS=1"]
    recipe = read_recipe("rwr/quickstart", overrides)
    assert recipe.values["hub_token"] == "abc", "it is used"
    written = yaml.safe_load(recipe.to_yaml())
    assert "abc" not in recipe.to_yaml()
    assert written["env"] == {"OMP_NUM_THREADS": "1"}
    assert written["trainer"] == "rwr"
