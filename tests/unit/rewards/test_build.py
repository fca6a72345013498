"""Entries of `reward_funcs`: functions, functions with arguments, factories, and mistakes."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from trl.trainer.utils import get_callable_name, is_async_callable

from trl_ext.errors import ConfigError, DataError, PluginError, RewardError, UnknownNameError
from trl_ext.rewards import build_rewards

HERE = "rewards_to_load"


@pytest.fixture(autouse=True)
def loadable(monkeypatch):
    spec = spec_from_file_location(HERE, Path(__file__).with_name(f"{HERE}.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, HERE, module)


def built(entry):
    (reward,) = build_rewards([entry])
    return reward


def score(entry):
    return built(entry)(prompts=["p", "p"], completions=["a", "bcd"])


def test_no_entries():
    assert build_rewards([]) == []


@pytest.mark.parametrize(
    ("entry", "scores"),
    [
        (f"{HERE}:longer", [1, 3]),
        ({"name": f"{HERE}:longer", "scale": 2.0}, [2, 6]),
        (f"{HERE}:takes_anything", [0, 0]),
        ({"name": f"{HERE}:at_most", "limit": 2}, [1, 0]),
        ({"name": f"{HERE}:at_most", "limit": 2, "step": 0.5}, [0.5, 0]),
        (f"{HERE}:instance", [6, 8]),
        ({"name": f"{HERE}:Counter", "start": 1}, [2, 4]),
    ],
)
def test_what_an_entry_scores(entry, scores):
    assert score(entry) == scores


def test_a_registered_name_with_an_argument():
    reward = built({"name": "reasoning_gym", "reader": "lenient"})
    assert get_callable_name(reward) == reward.__name__ == "reasoning_gym"
    assert reward.keywords == {"reader": "lenient"}


def test_an_async_function_stays_async():
    assert is_async_callable(built({"name": f"{HERE}:slow_longer", "scale": 2.0}))


@pytest.mark.parametrize(
    ("entry", "error", "says"),
    [
        ("reasoning_gim", UnknownNameError, "Did you mean 'reasoning_gym'"),
        (f"{HERE}:nothing", PluginError, "cannot be loaded"),
        (3, RewardError, "neither a name nor a mapping"),
        ({"reader": "lenient"}, RewardError, "neither a name nor a mapping"),
        (f"{HERE}:not_a_function", RewardError, "is a int, not a function"),
        (
            {"name": "reasoning_gym", "raeder": "lenient"},
            RewardError,
            r"no argument 'raeder'. Its signature: reasoning_gym\(completions",
        ),
        (
            {"name": "reasoning_gym", "timeuot": 3},
            RewardError,
            "also takes isolated, and with isolated: true timeout and failure_reward",
        ),
        (
            {"name": "regex_match", "pattern": "a", "isolated": True, "timeuot": 3},
            RewardError,
            "'timeuot'.*also takes isolated, and with isolated: true timeout and failure_reward",
        ),
        (f"{HERE}:at_most", RewardError, r"missing a required argument: 'limit'. .*at_most\(limit"),
        ({"name": f"{HERE}:at_most", "most": 2}, RewardError, r"given \(most: 2\).*at_most\(limit"),
        (f"{HERE}:makes_nothing", RewardError, r"makes_nothing\(\), and gave None"),
        ("builtins:dir", RewardError, "does not say which arguments"),
        ("builtins:dict", RewardError, "does not say which arguments"),
        (
            {"name": "reasoning_gym", "reader": "foo"},
            RewardError,
            "'reasoning_gym': reader is 'foo'; it must be strict or lenient",
        ),
        ({"name": f"{HERE}:measured", "unit": 3}, RewardError, "unit is 3; it must be letters or"),
        (
            {"name": f"{HERE}:breaks", "path": "w"},
            RewardError,
            r"breaks' was called as a factory.*given \(path: 'w'\), and raised OSError: no w",
        ),
        ({"name": f"{HERE}:breaks", "path": "w."}, RewardError, r"OSError: no w\. Correct"),
        (f"{HERE}:exits", RewardError, r"given \(none\), and raised SystemExit: 0"),
        (f"{HERE}:refuses", RewardError, "^no such words$"),
        ({"name": "log_ratio", "expert": None}, ConfigError, "^The expert is None. An expert is"),
        ({"name": f"{HERE}:reads", "path": "w"}, DataError, "^There is no file 'w'.$"),
    ],
)
def test_mistakes(entry, error, says):
    with pytest.raises(error, match=says):
        build_rewards([entry])
