"""Options of the policy trainers given from Python: wrong types and limits, all named at once."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.tiny import QUIET
from trl_ext.errors import ConfigError
from trl_ext.grpo import GRPOConfig
from trl_ext.policy_config import PolicyConfig
from trl_ext.ppo import PPOConfig
from trl_ext.reinforce import ReinforceConfig
from trl_ext.rwr import RWRConfig


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
            r"stop_strings='\n' is a str; it must be a list of texts or None. "
            r"Write stop_strings=['\n'].",
        ),
        ({"stop_strings": [1]}, "stop_strings=[1] is a list; it must be a list of texts or None."),
        ({"stop_strings": [""]}, "stop_strings=[''] holds an empty text"),
        ({"stop_strings": ["\n", ""]}, "each completion would end with its first token"),
        ({"reward_timeout": "3"}, "reward_timeout='3' is a str; it must be a number or None."),
        ({"reward_timeout": math.inf}, "reward_timeout=inf must be > 0 and at most 86400 seconds"),
        ({"reward_timeout": 0}, "reward_timeout=0 must be > 0"),
        ({"kl_clamp": "1"}, "kl_clamp='1' is a str; it must be a number or None."),
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


# What each config needs beside poe_alpha.
ALPHA_OPTIONS: dict[Any, dict[str, Any]] = {
    GRPOConfig: {"scale_rewards": "none"},
    ReinforceConfig: {},
    PPOConfig: {},
    RWRConfig: {"reference": "fixed"},
}


@pytest.mark.parametrize("of", ALPHA_OPTIONS, ids=lambda of: of.__name__)
def test_alpha_sets_beta(tmp_path, caplog, of):
    made = config(tmp_path, of, poe_alpha=0.4, **ALPHA_OPTIONS[of])
    assert made.beta == 2.5
    assert [r.message for r in caplog.records] == [
        "poe_alpha=0.4: beta set to 2.5 = 1/0.4, so that the target is P_N^0.4 * P_ref^0.6."
    ]
    # Beyond the second model: 1.25 of it, -0.25 of the reference.
    assert config(tmp_path, of, poe_alpha=1.25, **ALPHA_OPTIONS[of]).beta == 0.8
    # The same beta said twice, as when a config is written out and read again.
    again = config(tmp_path, of, poe_alpha=0.3, beta=3.33333333, **ALPHA_OPTIONS[of])
    assert again.beta == pytest.approx(1 / 0.3)


@pytest.mark.parametrize("weights", [None, [1.0], [1], [1.0, 0.5]])
def test_weights_that_leave_alpha_its_meaning(tmp_path, weights):
    """Which of several rewards is the log-ratio is not known here."""
    assert config(tmp_path, ReinforceConfig, poe_alpha=0.5, reward_weights=weights).beta == 2.0


@pytest.mark.parametrize(
    ("of", "options", "says"),
    [
        (GRPOConfig, {"poe_alpha": 0}, "poe_alpha: got 0; it must be greater than 0"),
        (RWRConfig, {"poe_alpha": -0.5}, "poe_alpha: got -0.5; it must be greater than 0"),
        (PPOConfig, {"poe_alpha": math.inf}, "poe_alpha: got inf; it must be greater than 0"),
        (PPOConfig, {"poe_alpha": math.nan}, "poe_alpha: got nan; it must be greater than 0"),
        (PPOConfig, {"poe_alpha": "0.5"}, "poe_alpha='0.5' is a str; it must be a number or None."),
        (
            ReinforceConfig,
            {"poe_alpha": 0.5, "beta": 0.3},
            "poe_alpha=0.5 sets beta to 1/0.5 = 2, and beta is given as 0.3. Remove one",
        ),
        (GRPOConfig, {"poe_alpha": 0.5}, "scale_rewards='group' divides rewards"),
        (RWRConfig, {"poe_alpha": 0.5}, "reference='moving' tilts the policy once more"),
        (
            PPOConfig,
            {"poe_alpha": 0.5, "kl_controller": "adaptive", "kl_target": 1.0},
            "kl_controller='adaptive' moves beta",
        ),
        (ReinforceConfig, {"poe_alpha": 0.5, "kl_placement": "none"}, "leaves no penalty"),
        (
            ReinforceConfig,
            {"poe_alpha": 0.5, "reward_weights": [2.0]},
            "poe_alpha: reward_weights=[2.0] multiplies the only reward, so that 0.5 times 2.0",
        ),
    ],
)
def test_an_alpha_that_cannot_lead_to_its_product_is_refused(tmp_path, of, options, says):
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, of, **options)
    assert says in str(caught.value)
