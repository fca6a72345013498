"""Metrics of evaluate as rewards: shipped ones, local ones, and what they may do wrong."""

import sys
import time
from pathlib import Path

import evaluate
import pytest

from trl_ext.errors import ConfigError, MissingDependencyError, RewardError, UnknownNameError
from trl_ext.metrics import metric_path
from trl_ext.registry import REWARDS
from trl_ext.rewards import build_rewards, guarded
from trl_ext.rewards.metric import OF_TEXTS

MODULE = """
import datasets
import evaluate


class Toy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features({features}),
        )

    def _compute(self, {inputs}, weight=1):
        return {result}
"""
TEXT = 'datasets.Value("string")'


@pytest.fixture
def metric(tmp_path):
    """metric(name, ...) -> entry of a local metric written for this test."""

    def write(name, result, inputs=("predictions", "references"), kind=TEXT, path="folder"):
        features = "{" + ", ".join(f'"{each}": {kind}' for each in inputs) + "}"
        file = tmp_path / name / f"{name}.py"
        file.parent.mkdir()
        file.write_text(MODULE.format(features=features, inputs=", ".join(inputs), result=result))
        return f"evaluate:{file if path == 'file' else file.parent}"

    return write


def score(entry, completions, **columns):
    (reward,) = build_rewards([entry])
    return guarded(reward, "mine")(["p"] * len(completions), completions, **columns)


def rouge(**options):
    return {"name": "evaluate:rouge", "reference": "answer", **options}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        # "the cat sat" against "the cat sat down": 3 of 3 words and 3 of 4: F = 2·1·¾/(1 + ¾).
        ("rouge1", [6 / 7, 2 / 3, 0.0]),
        # Bigrams: 2 of 2 and 2 of 3: F = 2·⅔/(1 + ⅔).
        ("rouge2", [4 / 5, 0.0, 0.0]),
        ("rougeL", [6 / 7, 1 / 3, 0.0]),
    ],
)
def test_rouge_by_hand(key, expected):
    """The second: "cat the mat" shares {cat, the} with "the cat sat", in the other order.

    So two of three words, no bigram, and a subsequence of one word.
    """
    completions = ["the cat sat", "cat the mat", ""]
    answers = ["the cat sat down", "the cat sat", "the cat"]
    assert score(rouge(key=key), completions, answer=answers) == pytest.approx(expected)


def test_of_several_references_the_best_counts():
    answers = [["no word of it", "the cat sat down"]]
    assert score(rouge(key="rouge1"), ["the cat sat"], answer=answers) == pytest.approx([6 / 7])
    messages = [[{"role": "assistant", "content": "the cat sat"}]]
    assert score(rouge(key="rouge1"), messages, answer=answers) == pytest.approx([6 / 7])


def test_kwargs_reach_compute():
    columns = {"answer": ["cats"]}
    assert score(rouge(key="rouge1"), ["cat"], **columns) == [0.0]
    stemmed = rouge(key="rouge1", kwargs={"use_stemmer": True})
    assert score(stemmed, ["cat"], **columns) == [1.0]


def test_chrf_at_its_ends_and_by_hand():
    entry = {"name": "evaluate:chrf", "reference": "answer"}
    got = score(entry, ["abc", "xyz", "", "ab"], answer=["abc", "abc", "abc", ["cd", "ab"]])
    assert got == pytest.approx([100.0, 0.0, 0.0, 100.0])
    # "ab" against "abc": 1-grams precision 1, recall 2/3; 2-grams 1, 1/2; longer ones are left out
    # where the completion has none. Means 1 and 7/12; F2 = 5·P·R/(4·P + R).
    recall = (2 / 3 + 1 / 2) / 2
    assert score(entry, ["ab"], answer=["abc"]) == pytest.approx(
        [100 * 5 * recall / (4 + recall)], abs=1e-6
    )


def test_numbers_of_a_column_are_compared_as_text():
    assert score(rouge(key="rouge1"), ["it is 7"], answer=[7]) == pytest.approx([1 / 2])


def test_sixty_four_completions_take_seconds():
    """Measured a quarter of a second; the limit only catches a metric that is loaded each time."""
    (reward,) = build_rewards([rouge(key="rougeL")])
    started = time.monotonic()
    reward(["p"] * 64, ["the cat sat on the mat"] * 64, answer=["a cat sat on a mat"] * 64)
    assert time.monotonic() - started < 10


def test_a_local_metric_of_one_number(metric):
    name = metric("toy", "{'length': weight * float(len(predictions[0]))}")
    entry = {"name": name, "reference": "answer"}
    (reward,) = build_rewards([entry])
    assert reward.__name__ == "toy"
    assert score(entry, ["a", "abc"], answer=["x", "y"]) == [1.0, 3.0]
    assert score({**entry, "kwargs": {"weight": 2}}, ["abc"], answer=["y"]) == [6.0]


def test_a_metric_of_the_completion_alone(metric):
    name = metric("alone", "{'n': len(predictions[0])}", inputs=("predictions",), path="file")
    assert score(name, ["abc", ""]) == [3.0, 0.0]
    with pytest.raises(ConfigError, match="takes predictions, and as a reward it is given pred"):
        build_rewards([{"name": name, "reference": "answer"}])


def test_a_list_of_one_number_is_a_number(metric):
    name = metric("listed", "{'f1': [0.5]}")
    assert score({"name": name, "reference": "answer"}, ["a"], answer=["a"]) == [0.5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "'rouge' gives rouge1, rouge2, rougeL, rougeLsum. Say which: key"),
        ({"key": "rouge"}, "gives no 'rouge'. It gives rouge1, rouge2"),
        (
            {"kwargs": {"use_stemer": 1}},
            "TypeError: .*'use_stemer'. It was tried .* Correct kwargs",
        ),
    ],
)
def test_a_wrong_key_or_argument_is_found_when_it_is_made(options, says):
    with pytest.raises(RewardError, match=says):
        build_rewards([rouge(**options)])


@pytest.mark.parametrize(
    ("result", "options", "says"),
    [
        ("{'a': 1, 'b': 2}", {}, "'wrong' gives a, b. Say which: key"),
        ("{'a': 1, 'b': 2}", {"key": "c"}, "gives no 'c'. It gives a, b"),
        ("{'a': 'much'}", {}, r"gives 'much' for its result, which is no number. It was tried on"),
        ("{'a': [1, 2]}", {"key": "a"}, r"gives \[1, 2\] for a, which is no number"),
        ("{}", {}, "gives None for its result, which is no number"),
        ("{'a': 1 / len(predictions[0][9:])}", {}, "'wrong' raised ZeroDivisionError.*Sample 0"),
        ("{'a': 1}", {"kwargs": {"wieght": 2}}, "'wrong' raised TypeError.*'wieght'"),
        ("{'a': float('nan')}", {}, "returned nan, which is not a number"),
    ],
)
def test_what_is_no_result(metric, result, options, says):
    entry = {"name": metric("wrong", result), "reference": "answer", **options}
    with pytest.raises(RewardError, match=says):
        score(entry, ["abc"], answer=["abc"])


def test_an_empty_completion_may_have_its_own_reward(metric):
    name = metric("divides", "{'a': 1 / len(predictions[0])}")
    entry = {"name": name, "reference": "answer"}
    with pytest.raises(RewardError, match="`empty` gives the reward of an empty completion"):
        score(entry, [""], answer=["a"])
    assert score({**entry, "empty": -1}, ["ab", " \n"], answer=["a", "a"]) == [0.5, -1.0]


@pytest.mark.parametrize(
    ("inputs", "kind", "options", "says"),
    [
        (("predictions", "references"), TEXT, {}, "Name the dataset's column with the references"),
        (
            ("sources", "predictions", "references"),
            TEXT,
            {"reference": "answer"},
            "takes predictions, references, sources, and as a reward it is given predictions, ref",
        ),
        (
            ("predictions", "references"),
            'datasets.Value("int64")',
            {"reference": "answer"},
            r"predictions of the type Value\('int64'\), and a completion is a text",
        ),
    ],
)
def test_a_metric_that_wants_other_inputs(metric, inputs, kind, options, says):
    name = metric("other", "{'a': 1}", inputs, kind)
    with pytest.raises(ConfigError, match=says):
        build_rewards([{"name": name, **options}])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"reference": 3}, ConfigError, "reference is 3; it must be a name"),
        ({"key": 3}, ConfigError, "key is 3; it must be a name"),
        ({"kwargs": [1]}, ConfigError, r"kwargs is \[1\]; it must map arguments"),
        ({"empty": "0"}, ConfigError, "empty is '0'; it must be a finite number"),
        ({"empty": float("nan")}, ConfigError, "empty is nan; it must be a finite number"),
        ({"empty": True}, ConfigError, "empty is True"),
        ({"metric": "chrf"}, RewardError, "has a metric already. Remove the argument metric"),
        ({"refrence": "answer"}, RewardError, r"given \(metric: 'rouge', reference: 'answer', ref"),
    ],
)
def test_mistakes(options, error, says):
    with pytest.raises(error, match=says):
        build_rewards([rouge(**options)])


def test_a_column_that_is_not_there():
    with pytest.raises(RewardError, match="'rouge' needs the dataset's column 'answer'"):
        score(rouge(key="rouge1"), ["a"], solution=["a"])


@pytest.mark.parametrize("right", [None, [], {"a": "b"}, [1], ["a", None]])
def test_a_cell_that_is_no_reference(right):
    says = r"is given .* of the column 'answer'; it must be a text, a number, .* Sample 1 of 2"
    with pytest.raises(RewardError, match=says):
        score(rouge(key="rouge1"), ["a", "b"], answer=["a", right])


def test_a_metric_that_cannot_read_made_up_texts_is_asked_about_real_ones(metric):
    entry = {"name": metric("json", "{'n': __import__('json').loads(predictions[0])}")}
    entry |= {"reference": "answer"}
    assert score(entry, ["3"], answer=["3"]) == [3.0]
    with pytest.raises(RewardError, match=r"raised JSONDecodeError: .*completion 'three'\.$"):
        score(entry, ["three"], answer=["3"])


@pytest.mark.parametrize("name", ["bertscores", "some/metric", "./no/such", "/no/such.py"])
def test_what_cannot_be_had_offline_is_said_without_asking_the_hub(name, monkeypatch):
    """Asking takes seconds for each of several addresses, and minutes behind some firewalls."""
    asked = []
    load = evaluate.load

    def seen(*args, **kwargs):
        asked.append(kwargs["download_config"].local_files_only)
        return load(*args, **kwargs)

    monkeypatch.setattr(evaluate, "load", seen)
    with pytest.raises(ConfigError, match=r"one that is shipped \(chrf, rouge\), with the path of"):
        build_rewards([{"name": f"evaluate:{name}", "reference": "answer"}])
    assert asked == [True]


def test_a_module_that_breaks(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "nothing.py").write_text("import evaluate\n")
    (tmp_path / "needy.py").write_text("import no_such_package\nimport evaluate\n")
    for name, error, says in (
        ("broken", ConfigError, "cannot be loaded: ZeroDivisionError: division by zero"),
        ("nothing", ConfigError, "cannot be loaded: TypeError"),
        ("needy", MissingDependencyError, "needy.py': .*pip install no_such_package"),
    ):
        with pytest.raises(error, match=says):
            build_rewards([f"evaluate:{tmp_path}/{name}.py"])


@pytest.mark.parametrize(("name", "package"), [("rouge", "rouge_score"), ("chrf", "sacrebleu")])
def test_a_package_that_is_not_there(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package}.*trl-ext\[metrics\]"):
        build_rewards([{"name": f"evaluate:{name}", "reference": "answer"}])


def test_shipped_modules_have_one_import_a_line():
    """evaluate reads the imports by a regular expression."""
    for file in map(metric_path, OF_TEXTS):
        lines = [line for line in file.read_text().splitlines() if "import " in line]
        assert all(line.startswith(("import ", "from ")) and "," not in line for line in lines)
        assert file.stem == file.parent.name


@pytest.mark.parametrize("name", ["evaluate:rouge", "evaluate:org/metric", "evaluate:./a/b.py"])
def test_the_registry_knows_the_family_and_imports_nothing(name):
    assert REWARDS.resolve(name) == "trl_ext.rewards.metric:MetricReward"
    assert name not in REWARDS.names()


@pytest.mark.parametrize("name", ["evaluate:", "evaluate", "evaluates:a/b"])
def test_what_is_not_of_the_family(name):
    with pytest.raises(UnknownNameError, match="There is no reward called"):
        REWARDS.resolve(name)


def test_a_metric_can_be_isolated():
    assert score(rouge(key="rouge1", isolated=True), ["a", "b"], answer=["a", "a"]) == [1.0, 0.0]


def test_a_folder_of_the_same_name_does_not_hide_what_is_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rouge").mkdir()
    assert score(rouge(key="rouge1"), ["a"], answer=["a"]) == [1.0]
