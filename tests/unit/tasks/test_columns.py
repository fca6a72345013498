"""The check before any model is loaded: every kind of unusable dataset is refused by name."""

from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, Json

from trl_ext.errors import DataError
from trl_ext.tasks import check_prompt_only

MESSAGES = [{"role": "user", "content": "hi"}]


PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image"}]}]
CALLS = [
    {"role": "user", "content": "hi", "tool_calls": None},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]},
]


@pytest.mark.parametrize(
    "prompt", ["hi", MESSAGES, PARTS, CALLS], ids=["plain", "chat", "parts", "tool calls"]
)
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
        (
            [{"prompt": MESSAGES}, {"prompt": [{"role": "user", "content": None}]}],
            "row 1: .* a message whose content is None; it must be a text, or a list of parts",
        ),
        ([{"prompt": [{"role": "user", "content": 3}]}], "row 0: .* whose content is 3; it must"),
        ([{"prompt": [{"role": "user", "content": ["a"]}]}], r"row 0: .* content is \['a'\]; it"),
        ([{"prompt": [{"role": None, "content": "a"}]}], "row 0: .* whose role is None, which"),
        ([{"prompt": "a", "prompts": "b"}], "column 'prompts': TRL .* Rename the column"),
        ([{"prompt": "a", "completions": "b"}], "column 'completions': TRL"),
        ([{"prompt": "a", "completion_ids": [1]}], "column 'completion_ids': TRL"),
        ([{"prompt": "a", "trainer_state": 1}], "column 'trainer_state': TRL"),
    ],
)
def test_unusable_datasets(rows, says):
    with pytest.raises(DataError, match=says):
        check_prompt_only(Dataset.from_list(rows), "mine")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{"prompt": "a"}], r"^mine is a list; it must be a datasets.Dataset or .*from_list\(rows"),
        ("data.jsonl", "mine is a str; it must be"),
        (3, "mine is a int; it must be"),
        ({"prompt": ["a"]}, r"mine is a dict; .* one of its splits, or Dataset.from_dict"),
        (
            DatasetDict({"train": Dataset.from_list([{"prompt": "a"}])}),
            "is a DatasetDict; .* its splits",
        ),
        (torch.utils.data.TensorDataset(torch.zeros(2)), "mine is a TensorDataset; it must be"),
    ],
)
def test_what_is_no_dataset_at_all(given: Any, says):
    with pytest.raises(DataError, match=says):
        check_prompt_only(given, "mine")


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (["a", MESSAGES], r"row 1: .* is a list of messages, and that of row 0 is a text\. Write"),
        ([MESSAGES, MESSAGES, "a"], "row 2: the prompt 'a' is a text, and that of row 0 is a list"),
    ],
)
def test_texts_and_messages_do_not_mix(prompts, says):
    features = Features({"prompt": Json()})
    dataset = Dataset.from_dict({"prompt": prompts}, features=features)
    with pytest.raises(DataError, match=says):
        check_prompt_only(dataset, "mine")


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
