"""The check before any model is loaded: every kind of unusable dataset is refused by name."""

import pytest
from datasets import Dataset, IterableDataset

from trl_ext.errors import DataError
from trl_ext.tasks import check_prompt_only

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("prompt", ["hi", MESSAGES], ids=["plain", "chat"])
def test_prompt_only_datasets_pass(prompt):
    rows = [{"prompt": prompt, "answer": "x"}]
    check_prompt_only(Dataset.from_list(rows), "mine")
    check_prompt_only(IterableDataset.from_generator(lambda: iter(rows)), "mine")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "The dataset mine is empty"),
        ([{"promt": "a", "answer": "b"}], "no column 'prompt'; .* answer, promt. Did you mean"),
        ([{"text": "a"}], "no column 'prompt'; its columns are text"),
        ([{"prompt": "a", "completion": "b"}], "'completion', which makes it a prompt-completion"),
        ([{"chosen": "b", "rejected": "c"}], "a preference dataset"),
        ([{"messages": MESSAGES}], "a language-modelling dataset"),
        ([{"prompt": "a"}, {"prompt": ""}], "row 1: the prompt '' is empty"),
        ([{"prompt": "a"}, {"prompt": None}], "row 1: the prompt None is a NoneType"),
        ([{"prompt": 3}], "row 0: the prompt 3 is a int"),
        ([{"prompt": MESSAGES}, {"prompt": []}], r"row 1: the prompt \[\] is empty"),
        ([{"prompt": ["a", "b"]}], "row 0: .* a message without role and content"),
        ([{"prompt": [{"role": "user"}]}], "row 0: .* a message without role and content"),
    ],
)
def test_unusable_datasets(rows, says):
    with pytest.raises(DataError, match=says):
        check_prompt_only(Dataset.from_list(rows), "mine")


def test_columns_that_only_rewards_read_are_no_obstacle():
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "messages": MESSAGES}]
    check_prompt_only(Dataset.from_list(rows), "mine")


def test_an_empty_stream():
    with pytest.raises(DataError, match="is empty"):
        check_prompt_only(IterableDataset.from_generator(lambda: iter([])), "mine")


def test_a_long_prompt_is_cut_in_the_message():
    rows = [{"prompt": [{"role": "user", "text": "x" * 1000}]}]
    with pytest.raises(DataError) as error:
        check_prompt_only(Dataset.from_list(rows), "mine")
    assert len(str(error.value)) < 300
