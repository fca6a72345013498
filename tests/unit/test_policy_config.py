"""Options of the policy trainers given from Python: wrong types and limits, all named at once."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.tiny import QUIET
from trl_ext.errors import ConfigError
from trl_ext.grpo import GRPOConfig
from trl_ext.policy_config import PolicyConfig


def config(tmp_path, of: Any = PolicyConfig, **options: Any) -> PolicyConfig:
    return of(str(tmp_path), **(QUIET | options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta": "0.5"}, "beta='0.5' is a str; it must be a number."),
        ({"beta": None}, "beta=None is a NoneType; it must be a number."),
        ({"beta": True}, "beta=True is a bool; it must be a number."),
        (
            {"stop_strings": "\n"},
            r"stop_strings='\n' is a str; it must be None or a list, each entry a text. "
            r"Write stop_strings=['\n'].",
        ),
        ({"stop_strings": [1]}, "stop_strings=[1] is a list; it must be None or a list, each"),
        ({"stop_strings": [""]}, "stop_strings=[''] holds an empty text"),
        ({"stop_strings": ["\n", ""]}, "each completion would end with its first token"),
        ({"reward_timeout": "3"}, "reward_timeout='3' is a str; it must be None or a number."),
        ({"reward_timeout": math.inf}, "reward_timeout=inf must be > 0 and at most 86400 seconds"),
        ({"reward_timeout": 0}, "reward_timeout=0 must be > 0"),
        ({"kl_clamp": "1"}, "kl_clamp='1' is a str; it must be None or a number."),
        ({"kl_estimator": 3}, "kl_estimator=3 is a int; it must be a text."),
        ({"kl_is_correction": "no"}, "kl_is_correction='no' is a str; it must be True or False."),
    ],
)
@pytest.mark.parametrize("of", [PolicyConfig, GRPOConfig])
def test_bad_options(tmp_path, of, options, says):
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, of, **options)
    assert says in str(caught.value)


def test_all_of_them_are_said_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, beta=None, stop_strings="a", use_bias_correction_kl=False)
    lines = str(caught.value).splitlines()
    assert [line.strip().partition("=")[0] for line in lines[1:]] == [
        "use_bias_correction_kl",
        "stop_strings",
        "beta",
    ]


def test_numbers_of_either_kind_pass(tmp_path):
    made = config(tmp_path, beta=0, stop_strings=["\n", "."], reward_timeout=3, kl_horizon=100)
    assert made.reward_timeout == 3


def test_an_option_of_an_unlisted_type_is_left_to_its_owner(tmp_path):
    @dataclass
    class OwnConfig(PolicyConfig):
        table: dict[str, float] | None = None
        words: list[Any] = field(default_factory=list)

    config(tmp_path, OwnConfig, table={"a": 1.0}, words=[1, "a"])
