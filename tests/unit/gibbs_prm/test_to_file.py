"""Rows scored into a file: what a kill leaves is gone on with, and mistakes cost no scoring."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import save_byte_llama
from trl_ext.errors import ConfigError, DataError, RunError
from trl_ext.gibbs_prm import GibbsScorer, Row, read_rows, read_scored, score_to_file
from trl_ext.gibbs_prm.rows_to_score import check_first

ROWS = [
    Row("p", ["a\nb", "c"], labels=[True, False], columns={"level": 1}),
    Row("qq", ["d\n\ne"], steps=[["d", "e"]]),
    Row("r", [f"{number}" for number in range(40)]),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """π and π_ref."""
    home = tmp_path_factory.mktemp("models")
    base = save_byte_llama(home / "base")
    policy = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    policy.save_pretrained(home / "policy")
    return str(home / "policy"), base


@pytest.fixture(scope="module")
def scorer(models) -> GibbsScorer:
    return GibbsScorer(*models, beta=1.0)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, rows: list[dict[str, Any]]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["s.jsonl", "s.parquet"])
def test_rows_and_files_are_scored_alike(here, scorer, name):
    seen = []

    def watch(rows, done):
        seen.append((len(rows), done))

    assert score_to_file(scorer, ROWS[:2], name, watch=watch) == Path(name)
    assert seen == [(0, 0), (3, 3)]
    found = list(read_scored(name))
    assert [(row.row, row.sample, row.label) for row in found] == [
        (0, 0, True), (0, 1, False), (1, 0, None),
    ]  # fmt: skip
    direct = scorer.score(
        ["p", "p", "qq"], ["a\nb", "c", "d\n\ne"], ["newline", "newline", ["d", "e"]]
    )
    for row, scores in zip(found, direct, strict=True):
        assert row.scores.prefix_scores == pytest.approx(scores.prefix_scores, abs=1e-5)
        assert row.scores.steps == scores.steps
    file = write("in.jsonl", [{"prompt": "p", "completions": ["a\nb", "c"]}])
    score_to_file(scorer, file, "other.jsonl", "whole")
    assert [row.scores.steps for row in read_scored("other.jsonl")] == [["a\nb"], ["c"]]
    assert sorted(os.listdir()) == sorted(["in.jsonl", "other.jsonl", name])


def killed_behind_a_window(scorer: GibbsScorer, rows: str) -> int:
    """Scores in a process of its own, which is killed behind the first window; its exit status.

    The scores are known before the fork: a forked torch has lost its threads.
    """

    def kill(part, _):
        if part:
            os.kill(os.getpid(), signal.SIGKILL)

    of_all = [(row.prompt, text) for row in read_rows(rows) for text in row.completions]
    scores = dict(zip(of_all, scorer.score(*map(list, zip(*of_all, strict=True))), strict=True))
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        scorer.score = lambda prompts, completions, *_, **__: [
            scores[key] for key in zip(prompts, completions, strict=True)
        ]
        score_to_file(scorer, rows, "s.jsonl", watch=kill)
    finally:
        os._exit(1)


def test_a_killed_scoring_goes_on(here, scorer):
    """Behind 16 of 40 completions; the lock on the file dies with its holder."""
    rows = [{"prompt": "r", "completion": f"{number}"} for number in range(40)]
    write("in.jsonl", rows)
    assert killed_behind_a_window(scorer, "in.jsonl") == -signal.SIGKILL
    assert not Path("s.jsonl").exists() and Path("s.jsonl.partial").exists()
    seen = []
    score_to_file(scorer, "in.jsonl", "s.jsonl", watch=lambda rows, done: seen.append((rows, done)))
    assert seen[0] == ([], 16)
    scored = [row for part, _ in seen for row in part]
    assert [row.row for row in scored] == list(range(16, 40)), "none of the first 16 once more"
    found = list(read_scored("s.jsonl"))
    assert [(row.row, row.scores.completion) for row in found] == [
        (number, f"{number}") for number in range(40)
    ]
    assert sorted(os.listdir()) == ["in.jsonl", "s.jsonl"]


def begun(scorer, rows, steps: Any = None, **options) -> None:
    """Stopped behind the first window."""

    def stop(part, done):
        if part:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_to_file(scorer, rows, "s.jsonl", steps, watch=stop, **options)


def test_what_is_another_scoring_does_not_go_on(here, models, scorer):
    begun(scorer, ROWS, re.compile("b"))
    other = GibbsScorer(*models, beta=2.0)
    for how, says in (
        ({}, "beta: 1.0, and now it is 2.0"),
        ({"steps": re.compile("b", re.IGNORECASE)}, "steps: "),
        ({"steps": "whole"}, "steps: "),
        ({"rows": ROWS[:2]}, "input: 'rows, sha256"),
        ({"append_eos": True}, "append_eos: False, and now it is True"),
    ):
        options: dict[str, Any] = {"rows": ROWS, "steps": re.compile("b")} | how
        rows, steps = options.pop("rows"), options.pop("steps")
        with pytest.raises(ConfigError, match=f"was begun with {says}"):
            score_to_file(scorer if how else other, rows, "s.jsonl", steps, **options)
    halved = GibbsScorer(*models, beta=1.0, dtype="bfloat16")
    with pytest.raises(ConfigError, match="was begun with dtype: "):
        score_to_file(halved, ROWS, "s.jsonl", re.compile("b"))
    score_to_file(other, ROWS, "s.jsonl", force=True)
    assert {row.scores.beta for row in read_scored("s.jsonl")} == {2.0}


def test_what_was_scored_is_kept_where_a_later_row_is_wrong(here, scorer):
    """Its prompt has no token, which only the tokenizer tells."""
    rows = [*ROWS, Row("", ["x"])]
    with pytest.raises(DataError, match="Row 3 of the input, completion 0: the prompt ''"):
        score_to_file(scorer, rows, "s.jsonl")
    assert len(Path("s.jsonl.partial").read_text().splitlines()) == 1 + 16


def test_a_second_scoring_into_one_file(here, scorer):
    def second(rows, done):
        with pytest.raises(RunError, match="is being written by another process"):
            score_to_file(scorer, ROWS, "s.jsonl")

    score_to_file(scorer, ROWS, "s.jsonl", watch=second)
    assert len(list(read_scored("s.jsonl"))) == 43


@pytest.mark.parametrize(
    ("rows", "output", "kind", "says"),
    [
        ([], "s.jsonl", DataError, "There is no completion to score"),
        (iter(ROWS), "s.jsonl", ConfigError, "may be gone through only once"),
        (None, "s.jsonl", ConfigError, "rows is a NoneType"),
        ([{"prompt": "a"}], "s.jsonl", DataError, "rows holds a dict; each must be a Row"),
        ("no.jsonl", "s.jsonl", DataError, "There is no file 'no.jsonl'"),
        (ROWS, "s.txt", ConfigError, "the ending must be one of"),
        (ROWS, "/dev/null/s.jsonl", ConfigError, "Name a file in a folder of yours"),
    ],
)
def test_what_cannot_be_scored_leaves_nothing(here, scorer, rows, output, kind, says):
    with pytest.raises(kind, match=says):
        score_to_file(scorer, rows, output)
    assert os.listdir() == []
    with pytest.raises(ConfigError, match="scorer is a str; it must be a GibbsScorer"):
        score_to_file("outputs/mine", ROWS, "s.jsonl")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("row", "steps", "says"),
    [
        ({"prompt": 3, "completion": "a"}, None, "prompt is 3; it must be a text"),
        ({"prompt": "p", "completion": "a", "label": "right"}, None, "'right' is a text: write tr"),
        ({"prompt": "p", "completion": "a"}, "given", "row 1 has no steps of its own"),
        ({"prompt": "p", "completion": "a"}, "turn", "Row 0 of the input, completion 0: steps is"),
        ({"prompt": "p", "completion": "ab", "steps": ["b", "a"]}, None, "Row 1 .*Step 0 .from 0"),
        ({"prompt": "p", "completion": "ab", "steps": [2, 1]}, None, "Row 1 .* must increase"),
        (
            {"prompt": [{"role": "user", "content": 5}], "completion": []},
            None,
            "Row 1 of the input, completion 0: the prompt: the content of message 0 is 5",
        ),
    ],
)
def test_the_first_rows_are_checked_without_a_model(here, row, steps, says):
    steps_of_first = {"steps": ["a"]} if steps == "given" else {}
    rows = write("in.jsonl", [{"prompt": "p", "completion": "a", **steps_of_first}, row])
    with pytest.raises(DataError, match=says):
        check_first(read_rows(rows), steps)


def test_what_only_a_tokenizer_tells_is_not_refused_before():
    """Special tokens at the end are part of no step, and empty prompts may have a first token."""
    check_first([Row("", ["a b<eos>"], steps=[["a", "b"]]), Row("p", [""], steps=[[]])])
    check_first([Row("p", ["a"]), Row("p", ["b"], steps=[["x"]])], count=1)
    picture = Row("p", ["a"], columns={"picture": b"x"})
    check_first([picture], is_written=False)
    with pytest.raises(DataError, match=r"Row 0 of the input has a column with b'x'"):
        check_first([picture])
    with pytest.raises(ConfigError, match="steps is 'lines', which is no way to cut"):
        check_first([Row("p", ["a"])], "lines")
