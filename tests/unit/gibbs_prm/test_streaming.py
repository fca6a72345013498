"""Rows of a stream, scored in windows."""

import pytest

from tests.tiny import save_byte_llama
from trl_ext.errors import ConfigError, DataError
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
