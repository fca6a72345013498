"""Scored rows on their way to a file, and back; what a kill leaves is gone on with."""

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from trl_ext.errors import ConfigError, DataError, RunError
from trl_ext.gibbs_prm.scored import GibbsScores
from trl_ext.gibbs_prm.scored_file import ScoredFile, check_output, read_scored
from trl_ext.gibbs_prm.scored_row import ScoredRow, apart

ABOUT = {"policy": "p", "steps": {"regex": ";"}, "beta": 0.5}


def scored(row: int, sample: int = 0, **known) -> ScoredRow:
    scores = GibbsScores(
        prompt="x",
        completion="a\nb€",
        steps=["a\n", "b€"],
        step_ends=[2, 4],
        prefix_scores=[0.5 + row, -1.0],
        beta=0.5,
        notes=["rounded"],
        merged_into=[0, 1, 1],
        tokens=["a", "\n", "b", "€"],
        token_log_ratios=[1.0, 2 * row, -3.5, 0.0],
    )
    return ScoredRow(row, sample, scores, **known)


ROWS = [
    scored(0, id="q1", label=True, first_error=-1, answer="4", columns={"level": 3}),
    scored(0, 1, id="q1", label=False, first_error=1, answer="5", columns={"level": 3}),
    scored(1),
]


@pytest.mark.parametrize("name", ["s.jsonl", "s.parquet"])
def test_what_is_written_is_read_back(tmp_path, name):
    output = tmp_path / name
    file = ScoredFile(output, ABOUT)
    file.write(ROWS[:1])
    assert not output.exists(), "before all is there"
    file.write(ROWS[1:])
    file.finish()
    found = list(read_scored(output))
    if name.endswith("parquet"):  # a column has a value in every row
        assert found[2].columns == {"level": None}
        found[2] = ScoredRow(1, 0, found[2].scores)
    assert found == ROWS
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_row_says_what_can_be_derived():
    record = ROWS[1].record()
    assert record["step_rewards"] == [0.5, -1.5] and record["score"] == -1.0
    assert record["worst_step"] == 1
    assert "standard_errors" not in record


def test_a_killed_run_is_gone_on_with(tmp_path):
    output = tmp_path / "s.jsonl"
    file = ScoredFile(output, ABOUT)
    file.write(ROWS[:2])
    file.close()
    partial = tmp_path / "s.jsonl.partial"
    with partial.open("a") as half:
        half.write(json.dumps(ROWS[2].record())[:40])
    again = ScoredFile(output, ABOUT)
    assert again.done == 2
    again.write(ROWS[2:])
    again.finish()
    assert list(read_scored(output)) == ROWS


def test_another_scoring_does_not_go_on(tmp_path):
    output = tmp_path / "s.jsonl"
    begun = ScoredFile(output, ABOUT)
    begun.write(ROWS[:1])
    begun.close()
    with pytest.raises(
        ConfigError, match=r"1 completions, was begun with beta: 0\.5, and now .*0\.7"
    ):
        ScoredFile(output, ABOUT | {"beta": 0.7})
    with pytest.raises(ConfigError, match=r"was begun with beta: 0\.5, and now it is None"):
        ScoredFile(output, {k: v for k, v in ABOUT.items() if k != "beta"})
    anew = ScoredFile(output, ABOUT | {"beta": 0.7}, force=True)
    assert anew.done == 0
    anew.close()
    for content in ("", "[]\n", "some text\n", '{"scoring": 3}\n', '{"scoring": {}}'):
        (tmp_path / "s.jsonl.partial").write_text(content)
        with pytest.raises(ConfigError, match="is in the way, and is no scoring"):
            ScoredFile(output, ABOUT)


def test_columns_that_a_parquet_file_cannot_have_are_not_lost(tmp_path):
    output = tmp_path / "s.parquet"
    file = ScoredFile(output, ABOUT)
    file.write([scored(0, columns={"k": 1}), scored(1, columns={"k": ["a"]})])
    with pytest.raises(RunError, match=r"do not fit the columns .*`tail -n \+2 "):
        file.finish()
    assert not output.exists()
    again = ScoredFile(output, ABOUT)
    assert again.done == 2
    again.close()


def test_a_label_may_come_late(tmp_path):
    """A window of parquet is 512 rows: the first has no label, a later one has."""
    output = tmp_path / "s.parquet"
    file = ScoredFile(output, ABOUT)
    file.write([scored(i) for i in range(600)] + [scored(600, label=0.5)])
    file.finish()
    found = list(read_scored(output))
    assert (len(found), found[0].label, found[600].label) == (601, None, 0.5)


def test_outputs_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "there.jsonl").touch()
    (tmp_path / "full.jsonl.partial").symlink_to("/dev/full")
    for name, says in (
        ("s.csv", "the ending must be one of .jsonl, .parquet"),
        ("there.jsonl/s.jsonl", r"there is no folder .*, nor can it be made"),
        ("full.jsonl", r"full.jsonl.partial is no file"),
        ("there.jsonl", "exists and is left alone"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_output(tmp_path / name, force=False)
    check_output(tmp_path / "there.jsonl", force=True)
    check_output(tmp_path / "new" / "folder" / "s.jsonl", force=False)
    assert (tmp_path / "new" / "folder").is_dir()


def test_a_full_disk_says_where_the_rows_are(tmp_path):
    file = ScoredFile(tmp_path / "s.jsonl", ABOUT)
    file._file.close()
    full: Any = open("/dev/full", "ab")  # noqa: SIM115
    file._file = full
    with pytest.raises(RunError, match=r"No space left on device. What is scored so far is in"):
        file.write(ROWS)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no scored completion"),
        ("{}\n", r":1: this is no scored completion: there is no '\w+'"),
        ("3\n", ":1: this is no scored completion"),
        ("{\n", ":1: this is not JSON"),
        ("[" * 5000, ":1: this JSON cannot be read: maximum recursion"),
        ("1" * 5000, ":1: this JSON cannot be read: Exceeds the limit"),
    ],
)
def test_files_that_hold_no_scores(tmp_path, content, says):
    (tmp_path / "s.jsonl").write_text(content)
    with pytest.raises(DataError, match=says):
        list(read_scored(tmp_path / "s.jsonl"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"There is no scored file .*s\.jsonl'\.$"):
        list(read_scored(tmp_path / "s.jsonl"))
    begun = ScoredFile(tmp_path / "s.jsonl", ABOUT)
    with pytest.raises(DataError, match=r"s\.jsonl\.partial is not finished; score on"):
        list(read_scored(tmp_path / "s.jsonl"))
    begun.close()
    for name in ("", "."):
        with pytest.raises(DataError, match="There is no scored file"):
            list(read_scored(name))
    (tmp_path / "s.parquet").write_text("x")
    with pytest.raises(DataError, match="is not a parquet file"):
        list(read_scored(Path(tmp_path / "s.parquet")))


def test_nothing_scored_leaves_nothing_and_is_in_nobodys_way(tmp_path):
    """The input is wrong in its first row, is mended (its digest changes), and scored again."""
    output = tmp_path / "s.jsonl"
    ScoredFile(output, ABOUT).close()
    assert not list(tmp_path.iterdir())
    killed = ScoredFile(output, ABOUT)
    killed._file.close()  # a kill before the first window
    again = ScoredFile(output, ABOUT | {"beta": 0.7})
    again.write(ROWS)
    again.finish()
    assert list(read_scored(output)) == ROWS


def test_two_processes_do_not_write_one_file(tmp_path):
    """The kernel's lock is of an open file: a second one in this process stands for another's."""
    first = ScoredFile(tmp_path / "s.jsonl", ABOUT)
    first.write(ROWS[:1])
    for force in (False, True):
        with pytest.raises(RunError, match="is being written by another process"):
            ScoredFile(tmp_path / "s.jsonl", ABOUT, force=force)
    first.write(ROWS[1:])
    first.finish()
    assert list(read_scored(tmp_path / "s.jsonl")) == ROWS


def test_columns_with_the_names_of_scores_are_kept_beside_them():
    columns = {"row": 7, "beta": 3, "x": 1, "input_row": 8, "rank": 2, "first_error": "?"}
    assert apart(columns) == {
        "input_input_row": 7, "input_beta": 3, "x": 1, "input_row": 8, "input_rank": 2,
        "input_first_error": "?",
    }  # fmt: skip
    record = scored(4, columns={"row": 7, "beta": 9}).record()
    assert (record["row"], record["beta"]) == (4, 0.5)


def test_columns_of_other_kinds_than_json_has(tmp_path):
    """U+D83D is the first half of a character of two."""
    columns = {
        "half": "\ud83d", "nan": float("nan"), "day": date(2020, 1, 2), "price": Decimal("1.50"),
    }  # fmt: skip
    file = ScoredFile(tmp_path / "s.jsonl", ABOUT)
    file.write([scored(0, columns=columns)])
    with pytest.raises(DataError, match=r"Row 1 of the input has a column with b'x', a bytes"):
        file.write([scored(1, columns={"picture": b"x"})])
    file.finish()
    [row] = read_scored(tmp_path / "s.jsonl")
    assert row.columns == {"half": "\ud83d", "nan": None, "day": "2020-01-02", "price": "1.50"}


@pytest.mark.parametrize("value", [{}, 2**70, "\ud83d"])
def test_values_that_a_parquet_file_cannot_have_are_not_lost(tmp_path, value):
    file = ScoredFile(tmp_path / "s.parquet", ABOUT)
    file.write([scored(0, columns={"k": value})])
    with pytest.raises(RunError, match="do not fit the columns"):
        file.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet.partial"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prefix_scores": [1.0]}, "prefix_scores has 1 entries, and steps has 2"),
        ({"prefix_scores": "ab"}, "prefix_scores is 'ab'; it must be a list of finite numbers"),
        ({"prefix_scores": [1.0, float("nan")]}, "must be a list of finite numbers"),
        ({"tokens": None}, "tokens is None"),
        ({"beta": True}, "beta is True"),
        ({"row": -1}, "row is -1"),
        ({"label": "right"}, "label is 'right'; it must be true, false or a finite number"),
        ({"label": 10**400}, "must be true, false or a finite number"),
        ({"first_error": 3}, "names a step that is not there"),
        ({"merged_into": [0, 1, 2]}, "names a step that is not there"),
        ({"answer": ["4"]}, "answer is .'4'.; it must be a text"),
        ({"prompt": [1]}, "prompt is .1.; it must be a text or a list of messages"),
    ],
)
def test_a_row_whose_parts_do_not_fit(tmp_path, change, says):
    (tmp_path / "s.jsonl").write_text(json.dumps(ROWS[0].record() | change) + "\n")
    with pytest.raises(DataError, match=says):
        list(read_scored(tmp_path / "s.jsonl"))
