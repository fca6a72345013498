"""Generated questions: disjoint splits, worked examples, settings, and what is refused."""

import json
import sys
from typing import Any

import pytest

from trl_ext.errors import ConfigError, DataError, MissingDependencyError, UnknownNameError
from trl_ext.tasks import load_splits
from trl_ext.tasks.reasoning_gym import _Source

SHORT: dict[str, Any] = {"min_words": 1, "max_words": 2}


def load(task: str = "letter_counting", **kwargs: Any) -> tuple[Any, Any]:
    return load_splits({"dataset_name": f"reasoning_gym/{task}", "dataset_kwargs": kwargs})


def test_columns_and_sizes():
    train, test = load(size=20, eval_size=10, **SHORT)
    assert (len(train), len(test)) == (20, 10)
    assert train.column_names == ["prompt", "question", "answer", "task", "entry"]
    assert train[0]["task"] == "letter_counting"
    assert json.loads(train[0]["entry"])["settings"] == SHORT


def test_without_eval_size_there_is_no_test_split():
    assert load(size=5)[1] is None
    assert load(size=5, eval_size=0)[1] is None


@pytest.mark.parametrize("seeds", [{"seed": 3, "eval_seed": 3}, {"seed": 3, "eval_seed": 4}])
def test_no_question_is_in_both_splits(seeds):
    """Seed and index are added up inside: the same or neighbouring seeds draw the same questions.

    So unless something excludes them, 40 questions from seed 3 hold nearly all 20 of the others.
    """
    train, test = load(size=40, eval_size=20, num_examples=2, **seeds, **SHORT)
    assert not set(train["question"]) & set(test["question"])
    assert len(set(test["question"])) == 20


def test_worked_examples_come_from_neither_split():
    """1 x 1 digit products are 100 questions; 4 shown + 40 held out leave 56 to train on."""
    kwargs: dict[str, Any] = {
        "min_digits": 1,
        "max_digits": 1,
        "num_examples": 4,
        "eval_size": 40,
        "size": 500,
    }
    train, test = load("products", **kwargs)
    shown = {part.partition("\nA:")[0][3:] for part in train[0]["prompt"].split("\n\n")[:4]}
    assert len(shown) == 4
    assert not shown & (set(train["question"]) | set(test["question"]))
    assert len(set(train["question"])) == 56
    assert "500 questions, 56 of them different" in train.info.description


def test_the_description_gives_the_score_of_the_commonest_answer():
    _, test = load(size=1, eval_size=40, **SHORT)
    ones = list(test["answer"]).count("1")
    assert f"always answering '1' would be right for {ones / 40:.0%}" in test.info.description


def test_the_held_out_split_does_not_depend_on_the_training_size():
    assert load(size=5, eval_size=10, **SHORT)[1][:] == load(size=50, eval_size=10, **SHORT)[1][:]


def test_the_same_seeds_give_the_same_rows():
    assert load(size=5, seed=9, **SHORT)[0][:] == load(size=5, seed=9, **SHORT)[0][:]
    assert load(size=5, seed=9, **SHORT)[0][:] != load(size=5, seed=10_000, **SHORT)[0][:]


def test_plain_prompts_end_where_the_answer_starts():
    row = load(size=1, num_examples=2, **SHORT)[0][0]
    parts = row["prompt"].split("\n\n")
    assert len(parts) == 3
    assert parts[2] == f"Q: {row['question']}\nA:"
    assert all(part.rpartition("\nA: ")[2].isdigit() for part in parts[:2])


def test_a_template_with_braces_of_its_own():
    row = load(size=1, num_examples=1, template="{question} {x} =", **SHORT)[0][0]
    shot, question = row["prompt"].split("\n\n")
    assert question == f"{row['question']} {{x}} ="
    assert "{x} = " in shot


def test_chat_prompts_show_examples_as_turns():
    row = load(size=1, num_examples=1, format="chat", **SHORT)[0][0]
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
    assert row["prompt"][1]["content"].isdigit()
    assert row["prompt"][2]["content"] == row["question"]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"min_word": 1}, r"no key 'min_word'. Did you mean min_words\? .*max_words, min_words"),
        ({"sise": 1}, "Did you mean size"),
        ({"min_words": 3, "max_words": 2}, "refuses the settings .*max_words must be >= min_words"),
        ({"min_words": "two"}, "refuses the settings"),
        ({"size": 0}, "size is 0; it must be a whole number from 1 on"),
        ({"size": True}, "size is True; it must be a whole number from 1 on"),
        ({"size": 2.5}, "size is 2.5; it must be a whole number"),
        ({"eval_size": -1}, "eval_size is -1"),
        ({"seed": True}, "seed is True"),
        ({"format": "chatml"}, "format is 'chatml'; it must be plain or chat"),
        ({"template": "Q:"}, "contains {question}"),
    ],
)
def test_bad_settings(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        load(**kwargs)


def test_settings_that_fail_only_when_a_question_is_drawn():
    with pytest.raises(ConfigError, match=r"products refuses the settings {'max_digits': 1.5}: "):
        load("products", size=3, max_digits=1.5)


def test_an_unknown_task_gives_the_nearest_and_how_to_list_them():
    with pytest.raises(UnknownNameError, match="Did you mean letter_counting") as error:
        load("leter_counting")
    assert "DATASETS" in str(error.value)
    assert len(str(error.value)) < 500


def test_too_few_different_questions():
    with pytest.raises(DataError, match=r"gave 100 fresh questions in .* where 200 were asked for"):
        load("products", min_digits=1, max_digits=1, eval_size=200)
    with pytest.raises(DataError, match="gave 0 fresh questions"):
        load("products", min_digits=1, max_digits=1, eval_size=100, size=1)


def test_a_task_without_answers_cannot_show_examples():
    with pytest.raises(ConfigError, match="no answers to show"):
        load("propositional_logic", size=1, num_examples=2)


def test_a_task_whose_verifier_needs_more_than_json_is_refused():
    """The verifier compares boards as tuples; JSON makes lists of them."""
    source = _Source("letter_counting", {})
    entry = source.any(1, 0, ())[0]

    class Judge:
        def score_answer(self, answer, entry):
            return float(isinstance(entry["metadata"]["span"], tuple))

    source._generator = lambda **_: Judge()
    source.check_stored(entry)  # a list stays one: the same score, 0, both times
    entry["metadata"]["span"] = tuple(entry["metadata"]["span"])
    with pytest.raises(DataError, match="rejects its own answer once"):
        source.check_stored(entry)


@pytest.mark.parametrize("key", ["dataset_config", "dataset_streaming"])
def test_loading_options_do_not_apply(key):
    with pytest.raises(ConfigError, match=f"{key} is True, which does nothing"):
        load_splits({"dataset_name": "reasoning_gym/products", key: True})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(MissingDependencyError, match="pip install reasoning-gym"):
        load()
