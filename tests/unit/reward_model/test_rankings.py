"""Which rows a reward model learns from, and what is said of those that are none."""

import logging
import math

import pytest
from datasets import Dataset, IterableDataset

from tests.parity.reward_worker import QUIET
from tests.tiny import save_tiny_llama
from trl_ext import RewardConfig, RewardTrainer
from trl_ext.errors import DataError
from trl_ext.reward_model.rankings import comparisons, preference_pairs

GOOD = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}
MESSAGE = {"role": "user", "content": "hi"}


def read(rows, name="train_dataset", *, stream=False, loss_type="bradley_terry", order=False):
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if stream else None
    dataset = dataset or Dataset.from_list(rows)
    return list(comparisons(dataset, name, loss_type=loss_type, order_effect=order))


def test_ranks_are_one_plus_the_number_of_better_ones():
    three = {"prompt": "p", "completions": ["a", "b", "c", "d"]}
    assert read([three | {"ranks": [7, 2, 7, 1]}])[0]["ranks"] == [3, 2, 3, 1]
    assert read([three | {"scores": [0.5, 1.0, 0.5, -2.0]}])[0]["ranks"] == [2, 1, 2, 4]
    both = {"ranks": [2.5, 1.0, 2.5, 4.0], "scores": [0.5, 1.0, 0.5, -2.0]}
    assert read([three | both])[0]["ranks"] == [2, 1, 2, 4]


@pytest.mark.parametrize("stream", [False, True])
def test_rows_that_compare_nothing_are_left_out(stream, caplog):
    rows = [
        GOOD,
        GOOD | {"ranks": [1, 1]},
        GOOD | {"completions": ["a"], "ranks": [1]},
        GOOD | {"completions": ["a", "a"]},
        GOOD | {"completions": [], "ranks": []},
    ]
    with caplog.at_level(logging.WARNING):
        assert [row["completions"] for row in read(rows, stream=stream)] == [["a", "b"]]
    assert stream or "train_dataset: 4 of 5 rows compare nothing" in caplog.text
    with pytest.raises(DataError, match=r"2 of 2 rows compare nothing: .* Nothing is left"):
        read([GOOD | {"ranks": [1, 1]}] * 2)
    pairs = [{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "a"}]
    assert len(read(pairs, stream=stream)) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"ranks": ["1", "2"]}, "the rank of completion 0 is '1'; it must be a finite number"),
        ({"ranks": [True, False]}, "the rank of completion 0 is True; it must be a finite number"),
        ({"ranks": [1.0, math.nan]}, "the rank of completion 1 is nan; it must be a finite"),
        ({"ranks": [1.0, None]}, "the rank of completion 1 is None; it must be a finite"),
        ({"ranks": [-1, 2]}, "rank of completion 0 is -1; ranks count from 1.*column 'scores'"),
        ({"ranks": [0, 1]}, "rank of completion 0 is 0; ranks count from 1"),
        ({"ranks": [1, 2, 3]}, "2 completions and 3 ranks; each completion needs one rank"),
        ({"ranks": 1}, "2 completions and ranks 1; each completion needs one rank"),
        ({"ranks": None}, "neither ranks nor scores"),
        ({"scores": [1.0, math.inf]}, "the score of completion 1 is inf; it must be a finite"),
        ({"scores": [1.0]}, "2 completions and 1 scores; each completion needs one score"),
        ({"scores": [1.0, 2.0]}, r"ranks \[1, 2\] and scores \[1.0, 2.0\] order the compl.*better"),
        ({"scores": [1.0, 1.0]}, "order the completions differently"),
        ({"completions": "ab"}, "completions is 'ab'; it must be a list of completions"),
        ({"completions": [1, 2]}, "the completion 0 is 1; it must be a text, or a list of mess"),
        ({"completions": [[MESSAGE], [MESSAGE]]}, "completion 0 is .* and the prompt is a text"),
        ({"completions": [[], []]}, r"the completion 0 is \[\]; it must be"),
        ({"prompt": None}, "the prompt is None; it must be a text, or a list of messages"),
        ({"margin": "big"}, "the margin is 'big'; it must be a finite number"),
        ({"margin": math.nan}, "the margin is nan; it must be"),
        ({"margin": None}, "the margin is None; it must be"),
    ],
)
def test_a_row_that_is_no_comparison_is_named(row, says, stream):
    with pytest.raises(
        DataError, match=f"The dataset train_dataset, row 0 .counted from 0.: .*{says}"
    ):
        read([GOOD | row], stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_the_row_has_its_number(stream):
    rows = [GOOD, GOOD | {"ranks": [1, 1]}, GOOD | {"ranks": [0, 1]}]
    with pytest.raises(
        DataError, match=r"The dataset train_dataset, row 2 .counted from 0.: the rank of compl"
    ):
        read(rows, stream=stream)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"chosen": "a", "rejected": None},
            "row 0 .counted from 0.: the rejected is None; it must be a text",
        ),
        ({"chosen": "a", "rejected": [MESSAGE]}, "different kinds: chosen a text, rejected messa"),
        (
            {"prompt": 3, "chosen": "a", "rejected": "b"},
            "row 0 .counted from 0.: the prompt is 3; it must be",
        ),
        (
            {"chosen": "a", "rejected": "b", "margin": True},
            "row 0 .counted from 0.: the margin is True",
        ),
        ({"chosen": "a"}, "no column 'rejected'; its columns are chosen"),
        ({"chosen": "a", "rejectd": "b"}, "Did you mean to rename 'rejectd' to 'rejected'"),
        ({"prompt": "a", "completion": ["b"]}, "rename 'completion' to 'completions'"),
        ({"prompt": "a", "completions": ["b"]}, "no column 'ranks'; its .* A row has prompt, co"),
        ({"prompt": "a", "completions": ["b"], "score": [1]}, "rename 'score' to 'scores'"),
        ({"completions": ["b"], "ranks": [1]}, "no column 'prompt'"),
        (GOOD | {"chosen": "a"}, "has both completions and chosen, and only one can"),
    ],
)
def test_pairs_and_columns(row, says):
    with pytest.raises(DataError, match=says):
        read([row])


def test_what_is_no_dataset():
    for wrong in ([GOOD], {"train": Dataset.from_list([GOOD])}):
        with pytest.raises(DataError, match=r"eval_dataset is a .*; it must be a datasets.Dataset"):
            comparisons(wrong, "eval_dataset", loss_type="bradley_terry", order_effect=False)
    with pytest.raises(DataError, match="is empty"):
        read([])


def test_a_margin_belongs_to_pairs():
    with pytest.raises(DataError, match=r"has a margin, .* loss_type is 'plackett_luce'"):
        read([GOOD | {"margin": 1.0}], loss_type="plackett_luce")


def test_an_order_effect_needs_the_order():
    with pytest.raises(DataError, match="which do not say which of the two was shown first"):
        read([{"chosen": "a", "rejected": "b"}], order=True)
    with pytest.raises(DataError, match=r"in all rows .* better completion is shown first"):
        read([GOOD, GOOD], order=True)
    with pytest.raises(DataError, match=r"in all rows .* better completion is shown last"):
        read([GOOD | {"ranks": [2, 1]}], order=True)
    assert len(read([GOOD, GOOD | {"ranks": [2, 1]}], order=True)) == 2
    mixed = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 3]}
    assert len(read([mixed], order=True)) == 1


def test_messages_and_other_columns_stay():
    row = {
        "prompt": [MESSAGE],
        "completions": [[MESSAGE], [{"role": "assistant", "content": "b"}]],
        "scores": [0.0, 1.0],
        "source": "me",
    }
    assert read([row]) == [row | {"ranks": [2.0, 1.0]}]


def test_what_is_tokenised_is_left_alone():
    dataset = Dataset.from_list([{"chosen_ids": [1], "rejected_ids": [2]}])
    assert comparisons(dataset, "it", loss_type="bradley_terry", order_effect=False) is dataset


@pytest.mark.parametrize(
    "columns", [("ranking_ids",), ("chosen_ids", "ranks"), ("ranking_ids", "x")]
)
def test_tokens_without_what_belongs_to_them(columns):
    rows = Dataset.from_list([{key: [[1], [2]] for key in columns}])
    says = "is tokenised, and its columns are .*; it must have ranking_ids and ranks, or chosen_ids"
    with pytest.raises(DataError, match=says):
        comparisons(rows, "mine", loss_type="bradley_terry", order_effect=False)


def test_messages_need_a_chat_template(tmp_path):
    said = [{"role": "user", "content": "a"}]
    answers = [[{"role": "assistant", "content": text}] for text in "bc"]
    rankings = {"prompt": said, "completions": answers, "ranks": [1, 2]}
    pairs = {"prompt": said, "chosen": answers[0], "rejected": answers[1]}
    model = save_tiny_llama(tmp_path / "model")
    for row in (rankings, pairs):
        with pytest.raises(DataError, match=r"train dataset holds messages, .* chat_template_path"):
            RewardTrainer(
                model, RewardConfig(str(tmp_path), **QUIET), train_dataset=Dataset.from_list([row])
            )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (GOOD, "mine has the columns prompt, completions, ranks, and a trainer of pairs takes"),
        ({"prompt": "p", "chosn": "a", "rejected": "b"}, "no column 'chosen'.* rename 'chosn' to"),
        (
            {"prompt": "p", "chosen": None, "rejected": "b"},
            "row 0 .counted from 0.: the chosen is None; it must be",
        ),
        (
            {"prompt": "p", "chosen": 3, "rejected": 4},
            "row 0 .counted from 0.: the chosen is 3; it must be a text",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "1 of 1 rows compare nothing"),
    ],
)
def test_what_is_no_pair(row, says):
    with pytest.raises(DataError, match=says):
        preference_pairs(Dataset.from_list([row]), "mine")


def test_pairs_that_differ_are_kept_as_they_are():
    rows = [{"prompt": "p", "chosen": "a", "rejected": other, "id": 7} for other in ("b", "a")]
    assert list(preference_pairs(Dataset.from_list(rows), "mine")) == rows[:1]
