"""Completions to score, read from files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm import raw_rows
from trl_ext.gibbs_prm.files import Row, read_rows

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}

PROCESS = {
    "id": "gsm8k-0",
    "generator": "some-model",
    "problem": "1+1+1?",
    "steps": ["1+1=2", "2+1=4", "So 4."],
    "final_answer_correct": False,
    "label": 1,
}


def rated(text: str, rating: int | None) -> dict[str, Any]:
    return {"text": text, "rating": rating, "flagged": None}


def step(*completions, chosen: int | None = 0, human: Any = None) -> dict[str, Any]:
    return {
        "completions": list(completions),
        "human_completion": human,
        "chosen_completion": chosen,
    }


def prm800k(*steps, finish_reason: str | None = "solution") -> dict[str, Any]:
    return {
        "labeler": "someone",
        "generation": 9,
        "question": {"problem": "1+1+1?", "ground_truth_answer": "3"},
        "label": {"steps": list(steps), "total_time": 1, "finish_reason": finish_reason},
    }


def write(folder: Path, name: str, rows: list[Any]) -> Path:
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    return path


def read(folder: Path, *rows: Any, name: str = "r.jsonl", format: str = "auto") -> list[Row]:
    return list(read_rows(write(folder, name, list(rows)), format=format))


def only(folder: Path, row: Any, **options) -> Row:
    [found] = read(folder, row, **options)
    return found


def test_one_completion_a_row(tmp_path):
    assert only(tmp_path, {"prompt": "p", "completion": "c"}) == Row("p", ["c"])
    row = {"prompt": "p", "completion": "c", "steps": ["c"], "label": True, "id": 7}
    found = only(tmp_path, row | {"answer": "4", "level": "hard"})
    assert found == Row("p", ["c"], [["c"]], [True], None, 7, ["4"], {"level": "hard"})


def test_several_completions_a_row(tmp_path):
    row = {"prompt": "p", "completions": ["a", "b"], "steps": [["a"], [1]], "reward": [0.5, 2]}
    found = only(tmp_path, row | {"answers": ["4", "5"], "seed": 3})
    assert (found.completions, found.steps) == (["a", "b"], [["a"], [1]])
    assert (found.labels, found.answers, found.columns) == ([0.5, 2], ["4", "5"], {"seed": 3})


@pytest.mark.parametrize("key", ["label", "labels", "correct", "reward", "rewards"])
def test_keys_of_labels(tmp_path, key):
    found = only(tmp_path, {"prompt": "p", "completion": "c", key: True})
    assert (found.labels, found.columns) == ([True], {})


def test_a_second_label_is_written_through(tmp_path):
    row = {"prompt": "p", "completion": "c", "label": True, "reward": 0.5}
    found = only(tmp_path, row)
    assert (found.labels, found.columns) == ([True], {"reward": 0.5})


def test_messages(tmp_path):
    one = only(tmp_path, {"prompt": [USER], "completion": [FOUR]})
    assert (one.prompt, one.completions) == ([USER], [[FOUR]])
    null = {"prompt": "p", "completion": "c", "completions": None, "steps": None, "label": None}
    assert only(tmp_path, null).completions == ["c"]
    two = only(tmp_path, {"prompt": [USER], "completions": [[FOUR], []]})
    assert two.completions == [[FOUR], []]


def test_processbench(tmp_path):
    found = only(tmp_path, PROCESS)
    assert found == Row(
        "1+1+1?",
        ["1+1=2\n\n2+1=4\n\nSo 4."],
        [["1+1=2", "2+1=4", "So 4."]],
        [False],
        [1],
        "gsm8k-0",
        None,
        {"generator": "some-model"},
    )
    assert only(tmp_path, PROCESS | {"label": -1}).first_errors == [-1]
    assert only(tmp_path, PROCESS | {"label": 2}).first_errors == [2]


def test_prm800k_takes_what_was_chosen(tmp_path):
    found = only(
        tmp_path,
        prm800k(
            step(rated("A", 1)),
            step(rated("B", -1), rated("C", 0), chosen=1),
            # No rating is no decision: not an error.
            step(rated("D", None)),
            step(rated("E", -1), chosen=None, human={"text": "F", "rating": None}),
        ),
    )
    assert (found.prompt, found.completions) == ("1+1+1?", ["A\n\nC\n\nD\n\nF"])
    assert (found.steps, found.first_errors) == ([["A", "C", "D", "F"]], [-1])
    assert (found.labels, found.id, found.answers) == ([True], None, None)
    assert found.columns == {
        "labeler": "someone",
        "generation": 9,
        "question": {"ground_truth_answer": "3"},
        "finish_reason": "solution",
    }


def test_prm800k_stops_at_the_error_that_was_found(tmp_path):
    # The last step of the solution is the first of its completions; the others replace it.
    last = step(rated("C", -1), rated("D", 0), rated("E", -1), chosen=None)
    found = only(tmp_path, prm800k(step(rated("A", 0)), last, finish_reason="found_error"))
    assert (found.steps, found.first_errors, found.labels) == ([["A", "C"]], [1], [False])
    # Nothing chosen and nothing wrong: the solution has ended before.
    given_up = step(rated("C", 0), chosen=None)
    found = only(tmp_path, prm800k(step(rated("A", 0)), given_up, finish_reason="give_up"))
    assert (found.steps, found.first_errors) == ([["A"]], [-1])
    after = only(tmp_path, prm800k(step(rated("A", 0)), last, step(rated("Z", 1))))
    assert after.steps == [["A", "C"]]


def test_prm800k_first_of_several_errors(tmp_path):
    row = prm800k(step(rated("A", 1)), step(rated("B", -1)), step(rated("C", -1)))
    assert only(tmp_path, row).first_errors == [1]
    assert only(tmp_path, prm800k(finish_reason=None)) == Row(
        "1+1+1?",
        [""],
        [[]],
        None,
        [-1],
        None,
        None,
        {
            "labeler": "someone",
            "generation": 9,
            "question": {"ground_truth_answer": "3"},
            "finish_reason": None,
        },
    )


@pytest.mark.parametrize("human", ["F", {"text": "F"}])
def test_prm800k_a_human_step_is_a_text_or_an_object(tmp_path, human):
    row = prm800k(step(rated("A", -1), chosen=None, human=human))
    assert only(tmp_path, row).steps == [["F"]]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, False], "id": "x"},
        {"prompt": [USER], "completion": [FOUR], "reward": 0.5},
        PROCESS,
        prm800k(step(rated("A", 1)), step(rated("B", -1), chosen=None), finish_reason="give_up"),
        prm800k(step(rated("A", -1), chosen=None, human={"text": "F"}), step(rated("B", 1))),
    ],
)
def test_a_row_is_the_same_in_every_kind_of_file(tmp_path, name, row):
    from_lines = only(tmp_path, row)
    rows = read(tmp_path, row, row, name=name)
    assert rows == [from_lines, from_lines]


def test_csv(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text(
        'prompt,completion,label,steps,id,note\n"p, 1","a\nb",True,"[""a"", ""b""]",7,true\n'
        "q,c,0.5,,8,\n",
        encoding="utf-8-sig",
    )
    first, second = read_rows(path)
    assert first == Row("p, 1", ["a\nb"], [["a", "b"]], [True], None, "7", None, {"note": "true"})
    assert second == Row("q", ["c"], None, [0.5], None, "8", None, {"note": "", "steps": None})


def test_csv_of_processbench_and_of_several(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text('problem,steps,final_answer_correct,label\np,"[""a""]",False,0\n')
    assert list(read_rows(path)) == [Row("p", ["a"], [["a"]], [False], [0])]
    path.write_text('prompt,completions,rewards\np,"[""a"", ""b""]","[1, 2]"\n')
    assert list(read_rows(path)) == [Row("p", ["a", "b"], None, [1, 2])]


def test_a_long_cell_of_a_csv_file(tmp_path):
    long = "a" * 200_000
    (tmp_path / "r.csv").write_text(f"prompt,completion\np,{long}\n")
    [row] = read_rows(tmp_path / "r.csv")
    assert row.completions == [long]


def test_rows_are_read_one_by_one(tmp_path, monkeypatch):
    """What is wrong behind a row does not keep it from being read; nor does a small buffer."""
    good = {"prompt": "p" * 50, "completion": "[1, {"}
    monkeypatch.setattr(raw_rows, "_CHUNK", 16)
    for name, text in [
        ("r.jsonl", json.dumps(good) + "\n\n{"),
        ("r.json", f" [{json.dumps(good)} , {{"),
        ("r.json", f"{json.dumps(good)}\n{{"),
    ]:
        (tmp_path / name).write_text(text)
        rows = read_rows(tmp_path / name)
        assert next(rows) == Row("p" * 50, ["[1, {"])
        with pytest.raises(DataError, match="this is not JSON"):
            next(rows)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
def test_an_array_is_read_in_pieces(tmp_path, monkeypatch, size):
    monkeypatch.setattr(raw_rows, "_CHUNK", size)
    rows = [{"prompt": "p" * n, "completion": "é"} for n in range(1, 40)]
    assert [row.prompt for row in read(tmp_path, *rows, name="r.json")] == [
        row["prompt"] for row in rows
    ]


def test_a_format_may_be_named(tmp_path):
    both = PROCESS | {"prompt": "p", "completion": "c", "label": 0, "steps": ["c"]}
    assert only(tmp_path, both).prompt == "p"
    assert only(tmp_path, both, format="processbench").prompt == "1+1+1?"
    with pytest.raises(ConfigError, match=r"format is 'prm80k'; .* Did you mean 'prm800k'\?"):
        read_rows(tmp_path / "r.jsonl", format="prm80k")


def test_formats_are_not_mixed(tmp_path):
    with pytest.raises(DataError, match=r"r.jsonl:2: .* format processbench, .*r.jsonl:1 is not"):
        read(tmp_path, {"prompt": "p", "completion": "c"}, PROCESS)


PLAIN = {"prompt": "p", "completion": "c"}
PAIR = {"prompt": "p", "completions": ["a", "b"]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([1], r"the row is \[1\]; it must be an object"),
        ({"text": "a"}, r"the keys \['text'\] are those of no format: plain has"),
        ({"prompt": "p", "completoin": "c"}, "no key 'completion', .* to rename 'completoin'"),
        ({"completion": "c"}, "no key 'prompt'"),
        (PLAIN | {"completions": ["c"]}, '"completion" and "completions"; leave one out'),
        (PLAIN | {"completion": 3}, "completion is 3; it must be a text or a list of messages"),
        (PLAIN | {"prompt": None}, "prompt is None; it must be a text"),
        (PLAIN | {"prompt": [{"content": "a"}]}, "prompt is .*; it must be a text or a list of"),
        (PLAIN | {"completion": [FOUR]}, "one is a text and the other is a list of messages"),
        (PAIR | {"completions": []}, r"completions is \[\]; it must be a list"),
        (PAIR | {"completions": ["a", 3]}, "completions is .*; it must be a list"),
        (PAIR | {"completions": [[FOUR], "a"]}, "one is a text and the other"),
        (PLAIN | {"steps": "c"}, "steps is 'c'; it must be a list of texts"),
        (PLAIN | {"steps": ["c", 1]}, "steps is .*; it must be a list of texts"),
        (
            PAIR | {"steps": ["a", "b"]},
            "steps is .*; it must be a list: for each completion a list",
        ),
        (PAIR | {"labels": [True]}, "labels has 1 entries, and there are 2 completions"),
        (PAIR | {"label": True}, "label is True; it must be a list: for each completion"),
        (PLAIN | {"label": "yes"}, "label is 'yes'; it must be true, false or a finite number"),
        (PLAIN | {"reward": float("nan")}, "reward is nan; it must be .* finite"),
        (PLAIN | {"correct": 1}, "correct is 1; it must be true or false"),
        (PLAIN | {"answer": 4}, "answer is 4; it must be a text"),
        ({**PROCESS, "steps": []}, r"steps is \[\]; it must be a list of at least one text"),
        ({**PROCESS, "steps": ["a", 1]}, "steps is .*; it must be a list of at least one text"),
        ({**PROCESS, "problem": 1}, "problem is 1; it must be a text"),
        (
            {**PROCESS, "label": 3},
            "label is 3; it must be the first wrong step, from 0 to 2, or -1",
        ),
        ({**PROCESS, "label": -2}, "label is -2"),
        ({**PROCESS, "label": True}, "label is True"),
        ({**PROCESS, "label": None}, "label is None"),
        ({**PROCESS, "final_answer_correct": 1}, "final_answer_correct is 1; .*true or false"),
        ({k: v for k, v in PROCESS.items() if k != "steps"}, "no key 'steps'"),
        ({"question": 1, "label": {}}, "question is 1; it must be an object"),
        ({"question": {}, "label": {}}, "no key 'question.problem'"),
        ({"question": {"problem": "p"}}, "no key 'label'"),
        ({"question": {"problem": "p"}, "label": {}}, "no key 'label.steps'"),
        (prm800k(3), r"label.steps\[0\] is 3; it must be an object"),
        (prm800k(step(rated("A", 1)), {}), r"no key 'label.steps\[1\].completions'"),
        (prm800k(step(rated("A", 2))), r"label.steps\[0\].completions is .*-1, 0, 1 or null"),
        (prm800k(step({"rating": 1})), r"label.steps\[0\].completions is .*\"text\" and"),
        (prm800k(step(rated("A", 1), chosen=1)), "chosen_completion is 1; .* of the 1 completions"),
        (prm800k(step(rated("A", 1), chosen=-1)), "chosen_completion is -1"),
    ],
)
def test_what_is_no_row(tmp_path, row, says):
    good = PROCESS if "problem" in row else prm800k() if "question" in row else PLAIN
    with pytest.raises(DataError, match=f"r.jsonl:2: .*{says}"):
        read(tmp_path, good, row)
    with pytest.raises(DataError, match=f"r.json, row 1: .*{says}"):
        read(tmp_path, good, row, name="r.json")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("r.jsonl", b"", "r.jsonl is empty. Write at least one row: plain has"),
        ("r.jsonl", b"\n \n", "r.jsonl is empty"),
        ("r.json", b"", "r.json is empty"),
        ("r.json", b" [ ] ", "r.json is empty"),
        ("r.csv", b"", "r.csv is empty"),
        ("r.csv", b"prompt,completion\n", "r.csv is empty"),
        ("r.jsonl", b'{"a"', "r.jsonl:1: this is not JSON: .* one object a line"),
        ("r.jsonl", b'[{"prompt": "a"}]', r"r.jsonl:1: the row is \[.*must be an object"),
        ("r.json", b"[", "r.json, row 0: this is not JSON"),
        ("r.json", b'[{"prompt": "a", "completion": "b"}', "row 1: the array goes on with ''"),
        ("r.json", b'[{"prompt": "a", "completion": "b"},]', "row 1: this is not JSON"),
        ("r.json", b'[{"prompt": "a", "completion": "b"};', "row 1: .* goes on with ';'"),
        ("r.jsonl", b'"\xff"', "not text in UTF-8: invalid start byte at byte 1"),
        ("r.csv", b"prompt,completion\na,b,c\n", "r.csv:2: .* header, which has 2"),
        ("r.csv", b"prompt,completion\na\n", "r.csv:2: .* header, which has 2"),
        ("r.csv", b'prompt,completion\na,"b\n', "r.csv:2: this is not CSV: unexpected end"),
        ("r.csv", b"prompt,completion,label\na,b,(\n", "r.csv:2: label: this is not JSON"),
        ("r.csv", b"prompt,completion,label\na,b,NaN\n", "r.csv:2: label is nan; it must be true"),
        ("r.parquet", b"PAR1", "r.parquet is not a parquet file, or is cut"),
        ("r.txt", b"a", "the ending '.txt' is none of .jsonl, .json, .parquet, .csv"),
    ],
)
def test_what_is_no_file(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(read_rows(tmp_path / name))


def test_an_empty_parquet_file(tmp_path):
    Dataset.from_dict({"prompt": []}).to_parquet(str(tmp_path / "r.parquet"))
    with pytest.raises(DataError, match=r"r.parquet is empty"):
        list(read_rows(tmp_path / "r.parquet"))


def test_a_missing_file_is_told_at_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match=r"no file .*rowz.jsonl'. Did you mean .*rows.jsonl'\?"):
        read_rows(tmp_path / "rowz.jsonl")
    with pytest.raises(DataError, match="Nor is there a directory"):
        read_rows(tmp_path / "nowhere" / "r.jsonl")
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(DataError, match="There is no file"):
        read_rows(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "[" * 5000, "a.jsonl:1: this JSON cannot be read: maximum recursion"),
        ("a.jsonl", "1" * 5000, "a.jsonl:1: this JSON cannot be read: Exceeds the limit"),
        ("a.json", "[" * 5000, "a.json, row 0: this JSON cannot be read: maximum recursion"),
        ("a.json", '[{"prompt": "p", "completion": "c"}] {', "behind the end of the array .*'{'"),
        ("a.json", "[] 3", "behind the end of the array .*'3'"),
        ("a.csv", "prompt,prompt,completion\na,b,c\n", "two columns have the name 'prompt'"),
        (
            "a.jsonl",
            '{"prompt": "p", "completion": "c", "label": 1' + "0" * 400 + "}",
            "label is 1000.*; it must be true, false or a finite number",
        ),
    ],
)
def test_what_a_hostile_file_holds(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says):
        list(read_rows(tmp_path / name))


def test_a_pipe_is_refused(tmp_path):
    """It would be read once for its digest, and be empty for the rows."""
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match="is a pipe or a device"):
        read_rows(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "r.jsonl",
            b'{"prompt": "p", "completions": ["a", "b", "c"], "labels": ["yes", "no", "yes"]}',
            r"1: labels is .*; it must be a list: .* true, false or a finite number\. "
            "'yes' and 'no' are texts: write true for what is right and false for what is not",
        ),
        (
            "r.jsonl",
            b'{"prompt": "p", "completion": "a", "correct": "true"}',
            "correct is 'true'; it must be true or false. 'true' is a text",
        ),
        (
            "r.jsonl",
            b'{"prompt": "p", "completions": ["a", "b", "c", "d", "e"], "label": '
            b'["v", "w", "x", "y", "z"]}',
            "'v' and 'w' and 'x' and 'y' and others are texts",
        ),
        (
            "r.json",
            b'[{"problem": "p", "steps": ["a"], "final_answer_correct": "yes", "label": 0}]',
            "final_answer_correct is 'yes'; it must be true or false. 'yes' is a text",
        ),
        ("r.csv", b"prompt,completion,label\na,b,right\n", "2: label is 'right'; .* is a text"),
        ("r.csv", b"prompt,completion,correct\na,b,not so\n", "2: correct is 'not so'; .* text"),
        (
            "r.jsonl",
            b'{"prompt": "p", "completion": "a", "label": null, "reward": [1]}',
            r"number\.$",
        ),
    ],
)
def test_labels_that_are_texts(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(read_rows(tmp_path / name))
