"""Which KL options are refused, with what advice; and that the truth table says the same."""

import re

import pytest

from tests.tiny import QUIET
from trl_ext.errors import ConfigError
from trl_ext.grpo import GRPOConfig
from trl_ext.kl_rules import GRADIENTS, UNSOUND, kl_findings
from trl_ext.kl_table import OURS, Bench
from trl_ext.rwr import RWRConfig

SOUND = {
    "beta": 0.1,
    "kl_estimator": "k3",
    "kl_placement": "loss",
    "kl_is_correction": True,
    "kl_clamp": None,
    "kl_controller": "constant",
    "kl_target": None,
    "kl_horizon": 10_000,
    "kl_topk": 64,
    "allow_biased_kl": False,
}


def method_of(estimator: str, placement: str, corrected: bool) -> str:
    """The row of the truth table that a combination is."""
    where = "reward and loss" if placement == "both" else f"the {placement}"
    return f"{'ratio·' if corrected else ''}{estimator} in {where}"


@pytest.mark.parametrize("combination", [*GRADIENTS, *UNSOUND], ids=str)
def test_the_rules_are_what_the_truth_table_finds(combination):
    (method,) = [m for m in OURS if m.name == method_of(*combination)]
    part = Bench().grade(method).part
    if combination in GRADIENTS:
        assert part == GRADIENTS[combination]
    else:
        assert part not in ("whole", "per step")


def test_every_combination_is_decided():
    loss = {(k, "loss", corrected) for k in ("k1", "k2", "k3") for corrected in (True, False)}
    reward = {(k, "reward", False) for k in ("k1", "k2", "k3")}
    exact = {("exact", where, False) for where in ("loss", "reward", "both")}
    assert GRADIENTS.keys() | UNSOUND.keys() == loss | reward | exact | {("topk", "loss", False)}
    assert not GRADIENTS.keys() & UNSOUND.keys()


@pytest.mark.parametrize("combination", UNSOUND, ids=str)
def test_what_is_unsound_is_refused_with_a_way_out_that_is_not(combination):
    names = ("kl_estimator", "kl_placement", "kl_is_correction")
    values = SOUND | dict(zip(names, combination, strict=True))
    ((option, message),) = kl_findings(values)
    assert option == "kl_estimator" and "allow_biased_kl: true" in message
    assert kl_findings(values | {"allow_biased_kl": True}) == []
    assert kl_findings(values | {"beta": 0.0}) == [], "there is no penalty at all"
    assert kl_findings(values | {"kl_placement": "none"}) == []
    advised = values | {
        key: {"true": True, "false": False}.get(value, value)
        for key, value in re.findall(r"(kl_\w+): (\w+)", message.split("; or")[0].split(", or")[0])
    }
    assert kl_findings(advised) == [], "the first advice is sound"


@pytest.mark.parametrize(
    ("values", "option", "says"),
    [
        ({"kl_placement": "los"}, "kl_placement", "got 'los'; allowed: loss, reward, both, none"),
        ({"kl_controller": "pid"}, "kl_controller", "allowed: constant, adaptive, proportional"),
        ({"kl_clamp": 0.0}, "kl_clamp", "must be greater than 0"),
        ({"kl_controller": "adaptive"}, "kl_target", "needs a target"),
        ({"kl_controller": "adaptive", "kl_target": -1.0}, "kl_target", "greater than 0"),
        ({"kl_target": 3.0}, "kl_target", "does nothing with kl_controller: constant"),
        (
            {"kl_controller": "adaptive", "kl_target": 3.0, "beta": 0.0},
            "beta",
            "must start above 0",
        ),
        (
            {"kl_placement": "reward", "kl_estimator": "k1"},
            "kl_is_correction",
            "Set it to false",
        ),
        ({"kl_placement": "both"}, "kl_placement", "both is for kl_estimator: exact"),
        ({"kl_estimator": "exact"}, "kl_is_correction", "would only add variance"),
        (
            {"kl_estimator": "topk", "kl_placement": "both", "kl_is_correction": False},
            "kl_estimator",
            "a lower bound, and so is its gradient. Use kl_estimator: exact",
        ),
        ({"kl_topk": 0}, "kl_topk", "must be greater than 0"),
        ({"kl_estimator": "mine"}, "kl_estimator", "kl-table --method mine --placement loss"),
    ],
    ids=str,
)
def test_other_mistakes(values, option, says):
    ((found, message),) = kl_findings(SOUND | values)
    assert found == option and says in message


def test_a_config_says_all_of_it_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        GRPOConfig(str(tmp_path), **QUIET, beta=0.1, kl_clamp=-1.0, use_bias_correction_kl=False)
    text = str(caught.value)
    assert "GRPOConfig:" in text and "kl_clamp" in text
    assert "use_bias_correction_kl=False" in text and "kl_is_correction says" in text


def test_regression_has_no_penalty(tmp_path):
    with pytest.raises(ConfigError, match=r"kl_placement='reward' does nothing.*beta is in the"):
        RWRConfig(str(tmp_path), **QUIET, kl_placement="reward")
