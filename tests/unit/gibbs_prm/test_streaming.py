"""Rows of a stream, scored in windows."""

import pytest

from tests.tiny import save_byte_llama
from trl_ext.errors import ConfigError, DataError, RunError
from trl_ext.gibbs_prm import GibbsScorer
from trl_ext.gibbs_prm.files import Row
from trl_ext.gibbs_prm.streaming import score_rows


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> GibbsScorer:
    import torch
    from transformers import AutoModelForCausalLM

    base = save_byte_llama(tmp_path_factory.mktemp("base"))
    policy = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    return GibbsScorer(policy, base, beta=1.0)


ROWS = [
    Row("p", ["a\nb", "c"], labels=[True, False], id=7, columns={"level": 1}),
    Row("qq", ["d\n\ne"], steps=[["d", "e"]], first_errors=[1]),
    Row("r", ["long " * 5, "", "f"], answers=["1", "", "2"]),
]


@pytest.mark.parametrize("window", [1, 2, 100])
def test_rows_come_in_their_order_with_what_is_known(scorer, window):
    found = [row for part in score_rows(scorer, ROWS, window=window) for row in part]
    assert [(row.row, row.sample) for row in found] == [
        (0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2),
    ]  # fmt: skip
    texts = [text for row in ROWS for text in row.completions]
    assert [row.scores.completion for row in found] == texts
    assert [row.label for row in found] == [True, False, None, None, None, None]
    assert [row.first_error for row in found] == [None, None, 1, None, None, None]
    assert [row.answer for row in found] == [None, None, None, "1", "", "2"]
    assert (found[1].id, found[1].columns) == (7, {"level": 1})
    prompts = [row.prompt for row in ROWS for _ in row.completions]
    cuts = ["newline", "newline", ["d", "e"], "newline", "newline", "newline"]
    for one, other in zip(found, scorer.score(prompts, texts, cuts), strict=True):
        assert one.scores.steps == other.steps
        assert one.scores.prefix_scores == pytest.approx(other.prefix_scores, abs=1e-5)


def test_what_is_scored_already_is_left_out(scorer):
    found = [row for part in score_rows(scorer, ROWS, skip=4) for row in part]
    assert [(row.row, row.sample) for row in found] == [(2, 1), (2, 2)]


def test_a_window_at_a_time_is_read(scorer):
    read = []

    def rows():
        for number in range(6):
            read.append(number)
            yield Row("p", ["a"])

    windows = score_rows(scorer, rows(), window=2)
    next(windows)
    assert read == [0, 1]


def test_a_window_takes_about_as_long_as_asked(scorer, monkeypatch):
    """16 rows in 1.6 s are 0.1 s each: for 5 s 50 rows, but at most twice as many as before."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def slow(prompts, *_, **__):
        now[0] += 0.1 * len(prompts)
        return [None] * len(prompts)

    monkeypatch.setattr(scorer, "score", slow)
    rows = [Row("p", ["a"])] * 200
    sizes = [len(part) for part in score_rows(scorer, rows, seconds=5.0)]
    assert sizes == [16, 32, 50, 50, 50, 2]
    assert [len(part) for part in score_rows(scorer, rows[:9], window=4)] == [4, 4, 1]


def test_a_rule_goes_before_the_steps_of_a_row(scorer):
    [[_, _, row, *_]] = score_rows(scorer, ROWS, "whole")
    assert row.scores.steps == ["d\n\ne"]
    with pytest.raises(DataError, match="row 0 has no steps of its own, and steps is 'given'"):
        list(score_rows(scorer, ROWS, "given"))


@pytest.mark.parametrize(
    ("bad", "kind", "says"),
    [
        (Row("", ["a"]), DataError, "Row 4 of the input, completion 0: the prompt '' has no token"),
        (Row("p", ["a", "b" * 5000]), ConfigError, r"Row 4 of the input, completion 1: .* 5000 t"),
        (Row("p", ["a"], steps=[["b"]]), DataError, "Row 4 of the input, completion 0: "),
    ],
)
def test_an_error_names_the_row_of_the_input(scorer, bad, kind, says):
    """Its number in the window is another: the window of two begins with row 3's last."""
    with pytest.raises(kind, match=says):
        list(score_rows(scorer, [*ROWS, Row("p", ["x"]), bad], window=4))


def test_a_failure_of_a_model_names_the_row_of_the_input(scorer, monkeypatch):
    """It is row 1 of the third window of two: the second completion of row 2."""
    real = scorer.token_log_ratios

    def broken(prompt_ids, completion_ids):
        for row, ids in enumerate(completion_ids):
            if not ids:
                raise RunError(f"Row {row}: the policy gives nan")
        return real(prompt_ids, completion_ids)

    monkeypatch.setattr(scorer, "token_log_ratios", broken)
    with pytest.raises(RunError, match=r"\ARow 2 of the input, completion 1: the policy gives nan"):
        list(score_rows(scorer, ROWS, window=2))


def test_only_one_row_number_is_in_an_error(scorer):
    with pytest.raises(ConfigError) as raised:
        list(score_rows(scorer, [*ROWS, Row("p", ["b" * 5000])]))
    assert "completion 0: it has 1 + 5000 tokens" in str(raised.value)


def test_a_column_does_not_replace_the_number_of_its_row(scorer):
    [[found]] = score_rows(scorer, [Row("p", ["a"], columns={"row": 7, "score": 1})])
    assert found.columns == {"input_row": 7, "input_score": 1}
