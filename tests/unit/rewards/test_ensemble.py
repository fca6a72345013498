"""Several rewards as one: against the members' own scores, in recipes, and what is refused."""

import logging
import math
from pathlib import Path

import pytest

from trl_ext.errors import ConfigError, RewardError, UnknownNameError
from trl_ext.recipe.check import check_rewards
from trl_ext.recipe.findings import Origin
from trl_ext.recipe.yaml_reader import Entry
from trl_ext.rewards import build_rewards, guarded
from trl_ext.rewards.ensemble import RewardEnsemble

COMPLETIONS = ["a", "bbb", "cc"]
# Scores by member: the length; 4, 0, 0; none, −1, none.
MEMBERS = [
    {"name": "rewards_to_load:longer"},
    {"name": "rewards_to_load:at_most", "limit": 1, "step": 4},
    "rewards_to_load:only_of_three",
]


@pytest.fixture(autouse=True)
def loadable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def score(completions=COMPLETIONS, *, columns=None, **arguments):
    (reward,) = build_rewards([{"name": "reward_ensemble", "members": MEMBERS, **arguments}])
    return guarded(reward, "mine")(["p"] * len(completions), completions, **(columns or {}))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # (1, 4), (3, 0, −1), (2, 0): the third member leaves itself out of two.
        ({}, [2.5, 2 / 3, 1.0]),
        ({"combine": "mean"}, [2.5, 2 / 3, 1.0]),
        ({"combine": "min"}, [1.0, -1.0, 0.0]),
        # Deviations from the mean 1.5; variance (49 + 4 + 25)/9/3; 1.
        (
            {"combine": "uncertainty", "penalty": 0.5},
            [2.5 - 0.75, 2 / 3 - 0.5 * math.sqrt(78 / 27), 0.5],
        ),
        ({"combine": "uncertainty"}, [1.0, 2 / 3 - math.sqrt(78 / 27), 0.0]),
    ],
)
def test_by_hand(arguments, expected):
    assert score(**arguments) == pytest.approx(expected, abs=1e-12)


def test_the_disagreement_is_logged_beside_what_members_log():
    logged = {}
    score(columns={"log_metric": logged.__setitem__})
    assert logged == {
        "reward_ensemble/disagreement": pytest.approx((1.5 + math.sqrt(78 / 27) + 1) / 3)
    }


def test_where_no_member_applies_the_ensemble_does_not():
    members = ["rewards_to_load:only_of_three"]
    logged = {}
    assert score(members=members) == [None, -1.0, None]
    assert score(["a"], members=members, columns={"log_metric": logged.__setitem__}) == [None]
    assert logged == {}
    assert score([]) == []


def test_columns_reach_the_members_and_what_they_ask_for_the_trainer():
    entry = {"name": "reward_ensemble", "members": ["exact_match", "rewards_to_load:asks"]}
    (reward,) = build_rewards([entry])
    assert reward.asks_for == {"prompt_ids"}
    assert guarded(reward, "mine").asks_for == {"prompt_ids"}
    columns = {"answer": ["a", "b"], "prompt_ids": [[1], [1, 1]]}
    # exact_match 1, 0; the prompts' lengths 1, 2
    assert reward(["p", "p"], ["a", "a"], **columns) == [1.0, 1.0]


def test_one_number_a_token_counts_by_its_sum():
    reward = RewardEnsemble([lambda completions, **_: [[1.0, 2.0]], lambda **_: [1.0]])
    assert reward(["p"], ["ab"], completion_ids=[[3, 4]]) == [2.0]


def test_a_member_that_fails_is_named():
    def broken(completions, **columns):
        raise KeyError("b")

    says = r"'reward_ensemble member 1 \(broken\)' raised KeyError: 'b'. Sample 0 of 1"
    with pytest.raises(RewardError, match=says):
        RewardEnsemble(["rewards_to_load:longer", broken])(["p"], ["a"])


def test_a_trainer_shows_its_policy_to_the_members():
    class Checks:
        def __init__(self):
            self.seen = []

        def __call__(self, completions, **columns):
            return [0.0] * len(completions)

        def check_policy(self, model):
            self.seen.append(model)

    one, two = Checks(), Checks()
    ensemble = RewardEnsemble([one, lambda completions, **_: [0.0], two])
    guarded(ensemble, "mine").check_policy("policy")
    assert one.seen == two.seen == ["policy"]
    assert ensemble.check_tokenizer is None


def test_an_isolated_member_that_breaks_is_left_out(caplog):
    members = [
        "rewards_to_load:longer",
        {"name": "rewards_to_load:breaks_on", "isolated": True},
    ]
    with caplog.at_level(logging.WARNING):
        assert score(["exit", "a"], members=members) == [4.0, 1.0]
    assert "'breaks_on': one completion is not scored" in caplog.text


def test_an_ensemble_in_an_ensemble():
    inner = {"name": "reward_ensemble", "members": MEMBERS[:2], "combine": "min"}
    # min: 1, 0, 0; with the lengths 1, 3, 2
    assert score(members=[inner, "rewards_to_load:longer"]) == [1.0, 1.5, 1.0]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"members": []}, ConfigError, r"members is \[\]; it must be a list of rewards"),
        ({"members": "exact_match"}, ConfigError, "members is 'exact_match'; it must be a list"),
        ({"members": {"name": "exact_match"}}, ConfigError, "members is {'name'"),
        ({"members": None}, ConfigError, "members is None"),
        ({"members": ["exact_mach"]}, UnknownNameError, "Did you mean 'exact_match'"),
        ({"members": [3]}, RewardError, "neither a name nor a mapping"),
        ({"combine": "max"}, RewardError, "combine is 'max'; it must be mean or min or uncert"),
        ({"penalty": "1"}, ConfigError, "penalty is '1'; it must be a number"),
        ({"penalty": True}, ConfigError, "penalty is True"),
        ({"penalty": -0.1}, ConfigError, "penalty is -0.1; it must be 0 or more"),
        ({"penalty": math.inf}, ConfigError, "penalty is inf"),
        ({"members": ["rewards_to_load:slow_longer"]}, ConfigError, "no asynchronous reward"),
    ],
)
def test_mistakes(arguments, error, says):
    with pytest.raises(error, match=says):
        score(**arguments)


def test_validate_resolves_the_members_names():
    """TRL's spelling with dots becomes ours, and everything wrong is found, each once."""
    members = ["exact_mach", {"name": "my_lib.rewards.kind"}, {"model": "a"}, "evaluate:rouge"]
    inner = {"name": "reward_ensemble", "members": members}
    given = {"reward_funcs": [{"name": "reward_ensemble", "members": [inner, "vader"]}]}
    findings = []
    entries = {"reward_funcs": Entry(given["reward_funcs"], Origin("r.yaml", 7))}
    values = check_rewards(given, entries, findings)
    said = [str(finding) for finding in findings]
    assert len(said) == 2
    assert "r.yaml:7" in said[0] and "Did you mean 'exact_match'" in said[0]
    assert "has no name. Give `name`" in said[1]
    resolved = values["reward_funcs"][0]["members"][0]["members"]
    assert resolved[1] == {"name": "my_lib.rewards:kind"}
    assert given["reward_funcs"][0]["members"][0] is inner and members[1] == {
        "name": "my_lib.rewards.kind"
    }
