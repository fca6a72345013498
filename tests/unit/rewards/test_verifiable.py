"""Rewards that a program verifies: what is right, what is not, and what is refused."""

import json
import logging
import re
import sys
import threading

import pytest
import trl.rewards

from trl_ext.errors import ConfigError, MissingDependencyError, RewardError
from trl_ext.registry import REWARDS
from trl_ext.rewards import build_rewards, guarded


def score(entry, completions, **columns):
    (reward,) = build_rewards([entry])
    return guarded(reward, "mine")(["p"] * len(completions), completions, **columns)


MATH = {"name": "math_verify", "isolated": False}
CASES = [
    ("1/2", r"so it is \boxed{\frac{1}{2}}", 1.0),
    ("1/2", "The answer is 0.5.", 1.0),
    (r"\frac{1}{2}", "0.5", 1.0),
    (r"$\frac{1}{2}$", "2/4", 1.0),
    ("1/2", "The answer is 2.", 0.0),
    ("42", "I do not know", 0.0),
    ("42", "", 0.0),
    # The number before the root is not the answer, though it is what math-verify reads of it alone.
    (r"2\sqrt{3}", "2", 0.0),
    (r"2\sqrt{3}", r"$\sqrt{12}$", 1.0),
    ("x^2 + 2x + 1", r"$(x+1)^2$", 1.0),
    ("1,234", "1234", 1.0),
    (r"So \boxed{7}", "7", 1.0),
    ("", "7", None),
]


def test_math_verify_compares_values():
    answers, completions, expected = zip(*CASES, strict=True)
    assert score(MATH, list(completions), answer=list(answers)) == list(expected)
    messages = [[{"role": "assistant", "content": text}] for text in completions]
    assert score(MATH, messages, answer=list(answers)) == list(expected)


def test_math_verify_is_isolated_and_stops_what_never_ends(caplog):
    """sympy would write out a number of 10^(10^9) digits; the others keep their rewards."""
    completions = ["7", r"\boxed{10^{10^{10^{9}}}}", "8"]
    with caplog.at_level(logging.WARNING):
        scores = score({"name": "math_verify", "timeout": 2}, completions, answer=[7, 8, 8])
    assert scores == [1.0, None, 1.0]
    assert "'math_verify': one completion is not scored" in caplog.text
    assert "took longer than 2 s" in caplog.text


def test_math_verify_needs_no_alarm_and_no_main_thread(caplog, monkeypatch):
    for module in ("parser", "grader"):  # it warns once, of the time limits that are off
        monkeypatch.setattr(f"math_verify.{module}.TIMEOUT_WARNING_SHOWN", False)
    found = []

    def work():
        found.append(score(MATH, ["7"], answer=[7]))

    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [[1.0]]
    assert not caplog.text


@pytest.mark.parametrize("name", ["math_verify", "regex_match"])
def test_a_column_that_is_not_there(name):
    more = {"pattern": "(a)", "group": 1} if name == "regex_match" else {}
    with pytest.raises(RewardError, match=f"{name}' needs the dataset's column 'solution'"):
        score({"name": name, "reference": "solution", **more}, ["a"], answer=["a"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pattern": r"\d+"}, [1, 1, 0, 0]),
        ({"pattern": r"\d+", "how": "full"}, [0, 1, 0, 0]),
        ({"pattern": r"(?i)NOTHING"}, [0, 0, 1, 0]),
        ({"pattern": r"(\s*\d+)", "group": 1, "reference": "answer"}, [1, 0, 0, 0]),
        ({"pattern": r"(?P<n>\d+)?", "group": "n", "reference": "answer"}, [0, 0, 0, 1]),
    ],
)
def test_regex_match(options, expected):
    """In the last the optional group matches the empty text where no digit comes first."""
    completions = ["it is 12 or 13", "7", "nothing", ""]
    answers = [" 12", 8, "nothing", ""]
    assert score({"name": "regex_match", **options}, completions, answer=answers) == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pattern": "("}, r"'\(' is no regular expression: missing \)"),
        ({"pattern": 3}, "3 is no regular expression"),
        ({"pattern": "(a)", "group": 1}, "group is 1 and reference None; give both"),
        ({"pattern": "(a)", "reference": "answer"}, "group is None and reference 'answer'"),
        ({"pattern": "(a)", "group": 2, "reference": "answer"}, "no group 2. It has 1 groups"),
        ({"pattern": "(?P<n>a)", "group": "m", "reference": "x"}, r"names \['n'\]"),
        ({"pattern": "(a)", "group": True, "reference": "answer"}, "no group True"),
        ({"pattern": "(a)", "group": -1, "reference": "answer"}, "no group -1"),
        ({"pattern": "a", "how": "match"}, "how is 'match'; it must be search or full"),
    ],
)
def test_what_is_no_pattern(options, says):
    with pytest.raises((ConfigError, RewardError), match=says):
        score({"name": "regex_match", **options}, ["a"], answer=["a"])


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


def test_json_schema():
    cases = {
        '{"name": "Ada"}': 1,
        ' {"name": "Ada", "age": 36}\n': 1,
        '{"name": "Ada", "age": -1}': 0,
        '{"name": "Ada", "age": "36"}': 0,
        '{"age": 36}': 0,
        '{"name": "Ada", "job": 1}': 0,
        '```json\n{"name": "Ada"}\n```': 0,
        "{'name': 'Ada'}": 0,
        "": 0,
        "null": 0,
        "[" * 100_000: 0,
    }
    got = score({"name": "json_schema", "schema": PERSON}, list(cases))
    assert got == list(cases.values())


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (True, "1", 1),
        (True, "NaN", 0),
        (True, "-Infinity", 0),
        (False, "1", 0),
        ({"multipleOf": 0.1}, "1" * 400, 0),  # larger than a float
        ({}, "1" * 5000, 0),  # more digits than Python reads
        # A tree: a list of trees. One of two levels, and one that is deeper than Python goes.
        ({"type": "array", "items": {"$ref": "#"}}, "[[],[]]", 1),
        ({"type": "array", "items": {"$ref": "#"}}, "[1]", 0),
        ({"type": "array", "items": {"$ref": "#"}}, "[" * 900 + "]" * 900, 0),
        ({"$id": "https://a.b/c", "$ref": "#/$defs/d", "$defs": {"d": {"const": 1}}}, "1", 1),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3}, "4", 1),
    ],
)
def test_json_at_the_edges(schema, text, expected):
    assert score({"name": "json_schema", "schema": schema}, [text]) == [expected]


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("person.json", "schema is 'person.json'; it must be a mapping"),
        ([], r"schema is \[\]; it must be a mapping"),
        ({"type": "strin"}, "no JSON Schema, at type: 'strin' is not valid"),
        ({"properties": {"a": {"minimum": "3"}}}, "at properties/a/minimum"),
        (
            {"$ref": "https://example.com/person"},
            "refers to 'https://example.com/person', which is",
        ),
        ({"items": [{"$ref": "#/$defs/person"}]}, None),
        (
            {"allOf": [{"$ref": "#/$defs/person"}]},
            "refers to '#/\\$defs/person', which is not in it",
        ),
    ],
)
def test_what_is_no_schema(schema, says):
    with pytest.raises(ConfigError, match=says or "no JSON Schema, at items"):
        build_rewards([{"name": "json_schema", "schema": schema}])


@pytest.mark.parametrize(
    ("entry", "module"),
    [
        (MATH, "math_verify"),
        ({"name": "json_schema", "schema": True}, "jsonschema"),
    ],
)
def test_a_package_that_is_not_there(entry, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'trl-ext\[verify\]'"):
        build_rewards([entry])


def test_every_reward_of_trl_has_a_name():
    modules = {"accuracy_rewards", "format_rewards", "other_rewards"}
    theirs = {name for name in dir(trl.rewards) if name.islower() and name[0] != "_"} - modules
    assert len(theirs) >= 6
    assert theirs <= set(REWARDS.names())
    for name in theirs:
        assert REWARDS.load(name) is getattr(trl.rewards, name)


def test_rewards_of_trl_are_built_from_entries():
    # 4 tokens of at most 4, the last 2 of them punished: (4 − 2 − 4)/2; 5 are too many: −1.
    # Of the bigrams 55, 55, 55 one is new: 1 − 1/3, times −1.
    (punish,) = build_rewards(
        [{"name": "get_soft_overlong_punishment", "max_completion_len": 4, "soft_punish_cache": 2}]
    )
    (repeat,) = build_rewards([{"name": "get_repetition_penalty_reward", "ngram_size": 2}])
    ids = [[5, 5, 5, 5], [1, 2, 3, 4, 5]]
    columns = {"prompts": ["p", "p"], "completions": ["a", "b"], "completion_ids": ids}
    assert punish(**columns) == [-1.0, -1.0]
    assert repeat(**columns) == pytest.approx([-2 / 3, 0.0])
    (cosine,) = build_rewards([{"name": "get_cosine_scaled_reward", "max_len": 8}])
    right = [[{"role": "assistant", "content": r"\boxed{3}"}]]
    # Half of the length: halfway between 0.5 and 1.
    assert cosine(completions=right, solution=["$3$"], completion_ids=[[1] * 4]) == [0.75]


def test_docstrings_say_what_is_given():
    for name in ("math_verify", "regex_match", "json_schema", "reward_ensemble"):
        assert re.search(r"\bArgs:", REWARDS.load(name).__doc__)


def test_a_schema_travels_to_the_process_of_the_reward():
    entry = {"name": "json_schema", "schema": PERSON, "isolated": True}
    assert score(entry, [json.dumps({"name": "Ada"}), "{}"]) == [1.0, 0.0]
