"""Logged completions as datasets: their forms, what they must hold, streams as well."""

import json
import logging
import math
import re
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, load_dataset

from tests.tiny import QUIET
from trl_ext.errors import ConfigError, DataError, RewardError
from trl_ext.rewards.guard import guarded_all
from trl_ext.rwr import OfflineRWRConfig
from trl_ext.rwr.offline_data import with_weights

OPTIONS: dict[str, Any] = {
    name: value for name, value in QUIET.items() if name != "max_completion_length"
}
ROWS = [
    {"prompt": "a", "completion": "b", "reward": 0.0},
    {"prompt": "c", "completion": "d", "reward": 3.0},
    {"prompt": "a", "completion": "e", "reward": 1.0},
    {"prompt": "c", "completion": "a", "reward": 1.0},
]
LISTS = {"prompt": "a", "completions": ["b", "c"], "rewards": [1.0, 0.0]}
# β = 1/ln 2: 2^r is (1, 2)/3 of "a" and (8, 2)/10 of "c"; 4 rows, 2 prompts.
WEIGHTS = [2 / 3, 1.6, 4 / 3, 0.4]


@pytest.fixture
def read(tmp_path):
    def rows(dataset: Any, reward_funcs: Any = None, **options: Any):
        settings: dict[str, Any] = OPTIONS | {"beta": 1 / math.log(2)} | options
        config = OfflineRWRConfig(str(tmp_path), **settings)
        if isinstance(dataset, list):
            dataset = Dataset.from_list(dataset)
        rewards = guarded_all(reward_funcs, config.reward_timeout)
        return with_weights(dataset, "train_dataset", config, rewards)[0]

    return rows


def stream(rows: list[dict], shards: int = 1) -> IterableDataset:
    def give(numbers):
        for number in numbers:
            yield from rows[number::shards]

    return IterableDataset.from_generator(give, gen_kwargs={"numbers": list(range(shards))})


def test_rows_of_one_prompt_are_a_group(read):
    found = read([row | {"note": 1} for row in ROWS])
    assert found.column_names == ["prompt", "completion", "weight"]
    assert found["weight"] == pytest.approx(WEIGHTS)
    assert found["completion"] == ["b", "d", "e", "a"]


@pytest.mark.parametrize("names", [[0, 1, 1, 0], ["x", "y", "y", "x"]])
def test_a_column_says_the_groups(read, names, caplog):
    """b and a, d and e: 2^0 and 2^1; 2^3 and 2^1. They mix prompts, which is said."""
    rows = [row | {"group": group} for row, group in zip(ROWS, names, strict=True)]
    assert read(rows)["weight"] == pytest.approx([2 / 3, 1.6, 0.4, 4 / 3])
    assert "some groups hold several prompts (2 more than groups)" in caplog.text


def test_lists_are_rows(read):
    lists = [
        {"prompt": "a", "completions": ["b", "e"], "rewards": [0.0, 1.0], "group": 5},
        {"prompt": "c", "completions": ["d", "a"], "rewards": [3.0, 1.0], "group": 6},
    ]
    for dataset in (Dataset.from_list(lists), stream(lists)):
        found = {row["completion"]: row["weight"] for row in read(dataset)}
        assert found == pytest.approx(dict(zip("bdea", WEIGHTS, strict=True)))


def test_messages_are_texts_with_roles(read):
    rows = [
        row
        | {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in ROWS
    ]
    assert read(rows)["weight"] == pytest.approx(WEIGHTS)


def test_what_collect_writes(read):
    """`rewards` is a mapping there, and ids are lists; null where a reward does not apply."""
    rows = [
        row
        | {
            "rewards": {"right": row["reward"], "short": None},
            "group": "ac".index(row["prompt"]),
            "prompt_ids": [1, 2],
            "completion_ids": [3, 0],
            "logp": -1.5,
            "is_truncated": False,
        }
        for row in ROWS
    ]
    found = read(rows)
    assert found["weight"] == pytest.approx(WEIGHTS)
    assert found.column_names[2:] == ["prompt_ids", "completion_ids", "weight"]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_stream_has_the_weights_of_a_dataset_in_any_order(read, shards):
    found = read(stream(ROWS, shards).shuffle(seed=1, buffer_size=4))
    for _ in range(2):
        assert {row["completion"]: row["weight"] for row in found} == pytest.approx(
            dict(zip("bdea", WEIGHTS, strict=True))
        )
    worker = found.shard(2, 1) if shards == 2 else None
    if worker is not None:
        assert {r["completion"]: r["weight"] for r in worker} == pytest.approx({"d": 1.6, "a": 0.4})


def test_rows_that_weigh_nothing_are_left_out(read):
    assert read(ROWS, beta=0.0)["completion"] == ["d", "e"]


def test_where_a_prompt_ends_matters(read, caplog):
    rows = [
        {"prompt": prompt, "completion": completion, "reward": reward, "group": 0}
        for prompt, completion, reward in (("a", "btc", 1.0), ("atb", "c", 1.0), ("a", "c", 0.0))
    ]
    read(rows)
    assert "repeat a completion" not in caplog.text


def test_a_stream_without_the_rows_that_weigh_nothing(read):
    found = list(read(stream([*ROWS, ROWS[0] | {"reward": -5.0}]), reward_threshold=0.0))
    assert [row["completion"] for row in found] == ["b", "d", "e", "a"]


def test_a_stream_that_changes(read):
    passes = []

    def give():
        passes.append(1)
        yield from ROWS
        if len(passes) > 1:
            yield ROWS[0] | {"completion": "new"}

    dataset = IterableDataset.from_generator(give, features=Dataset.from_list(ROWS).features)
    found = read(dataset)
    with pytest.raises(DataError, match="a row that it did not give"):
        list(found)


def test_logged_probabilities(read):
    """2^r·exp(ref − logp): 1·2 and 2·1, equal; 8·1 and 2·1."""
    logps = [-1 - math.log(2), -1.0, -1.0, -1.0]
    rows = [r | {"logp": p, "ref_logp": -1.0} for r, p in zip(ROWS, logps, strict=True)]
    found = read(rows, importance_weights=True)
    assert found["weight"] == pytest.approx([1, 1.6, 1, 0.4])
    assert read(rows)["weight"] == pytest.approx(WEIGHTS)


def test_a_value_of_each_row(read):
    rows = [row | {"value": 1.0 if row["prompt"] == "c" else 0.0} for row in ROWS]
    tilts = np.array([1, 4, 2, 1])
    assert read(rows, baseline="value")["weight"] == pytest.approx(tilts * 4 / tilts.sum())


def test_repeated_rows_count_and_are_told_once(read, caplog):
    found = read([*ROWS, ROWS[2], ROWS[2]])
    assert found["weight"][2] == pytest.approx(2 / 7 * 3)
    assert caplog.text.count("2 of 6 rows repeat a completion") == 1


def reward_length(completions, **columns):
    return [float(len(c)) for c in completions]


def reward_answer(prompts, completions, answer, **columns):
    return [None if a is None else float(c == a) for c, a in zip(completions, answer, strict=True)]


async def reward_later(completions, **columns):
    return [1.0] * len(completions)


UNSCORED = [
    {"prompt": "a", "completion": "bb", "answer": "bb"},
    {"prompt": "a", "completion": "b", "answer": None},
]


def test_rows_without_rewards_are_scored(read):
    """2·length + right + 1: 4 + 1 + 1 and 2 + (does not apply) + 1: 2^3 to 1."""
    found = read(UNSCORED, [reward_length, reward_answer, reward_later], reward_weights=[2.0, 1, 1])
    assert found["weight"] == pytest.approx([16 / 9, 2 / 9])


def test_rewards_of_the_dataset_are_kept(read, caplog):
    assert read(ROWS, reward_length)["weight"] == pytest.approx(WEIGHTS)
    assert "has rewards of its own" in caplog.text


def test_a_reward_that_fails_names_the_row(read):
    def broken(completions, **columns):
        return [1 / (len(c) - 1) for c in completions]

    with pytest.raises(RewardError, match=r"'broken' raised ZeroDivisionError.*completion 'b'"):
        read(UNSCORED, broken)
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\): no reward applies"):
        read(UNSCORED, reward_answer)
    lists = [{"prompt": "a", "completions": ["b", "c"], "answer": answer} for answer in ("x", None)]
    with pytest.raises(DataError, match=r"row 1, completion 0 \(.*\): no reward applies"):
        read(lists, reward_answer)
    with pytest.raises(ConfigError, match="2 numbers for 1 rewards"):
        read(UNSCORED, reward_length, reward_weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="'some/model' is a model"):
        read(UNSCORED, "some/model")


def changed(number: int, **values) -> list[dict]:
    return [row | values if at == number else row for at, row in enumerate(ROWS)]


IDS = {"prompt_ids": [1], "completion_ids": [2]}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            changed(2, reward=None),
            "row 2: reward is None .missing, or a nan that.* It must be a",
        ),
        (changed(1, reward=math.nan), "row 1: reward is nan. It must be finite"),
        (changed(1, reward=math.inf), "row 1: reward is inf. It must be finite"),
        ([row | {"reward": "1.0"} for row in ROWS], "row 0: reward is '1.0'"),
        ([row | {"reward": True} for row in ROWS], "row 0: reward is True"),
        (changed(3, completion=None), "row 3: completion is None .*. It must be a text"),
        (changed(3, prompt=None), "row 3: prompt is None"),
        ([row | {"completion": 5} for row in ROWS], "row 0: completion is 5"),
        (
            [row | {"prompt": [{"role": "user", "content": "a"}]} for row in ROWS],
            r"row 0: completion is 'b'. It is a text, and the prompt messages.*assistant",
        ),
        ([row | {"prompt": [{"role": "user"}]} for row in ROWS], "row 0: prompt is .{'role'"),
        ([row | {"group": True} for row in ROWS], "row 0: group is True"),
        ([row | {"group": 0.5} for row in ROWS], "row 0: group is 0.5. It must be a text or"),
        (
            [row | {"group": None if at == 1 else 1} for at, row in enumerate(ROWS)],
            "row 1: group is None",
        ),
        ([row | IDS | {"completion_ids": []} for row in ROWS], "row 0: .* at least one token"),
        ([row | IDS | {"prompt_ids": [-1]} for row in ROWS], "row 0: prompt_ids is .-1."),
        ([row | IDS | {"prompt_ids": [0.5]} for row in ROWS], "row 0: prompt_ids is .0.5."),
        ([{"prompt": "a", "reward": 1.0}], "no column 'completion'; its columns are prompt, rew"),
        ([{"prompts": "a", "completion": "b", "reward": 1.0}], "mean to rename 'prompts'"),
        ([{"prompt": "a", "completion": "b", "rewrd": 1.0}], "mean to rename 'rewrd'"),
        ([row | {"weight": 1.0} for row in ROWS], "a column 'weight': weights are computed"),
        ([row | {"input_ids": [1]} for row in ROWS], "taken as prompt_ids and completion_ids"),
        ([row | {"images": []} for row in ROWS], "rows with images are not supported"),
        (
            [{"prompt": "a", "completions": ["b", "c"], "rewards": [1.0]}],
            "row 0: its lists have different lengths: completions 2, rewards 1",
        ),
        (
            [{"prompt": "a", "completions": ["b"], "rewards": 1.0}],
            "row 0: rewards is 1.0; it must be a list",
        ),
        (
            [{"prompt": "a", "completions": ["b"], "rewards": [1.0], "reward": 1.0}],
            "the columns 'reward' and completions",
        ),
        ([{"prompt": "a", "completion": "b"}], "no column 'reward'.* or reward_funcs"),
        ([ROWS[0] | {"reward": None}, ROWS[1]], "row 0: reward is None.* Leave such rows out"),
        ([ROWS[0] | {"reward": True}], "row 0: reward is True.* Write 1 for True"),
        ([ROWS[0] | {"reward": "1.0"}], "row 0: reward is '1.0'.* not as texts"),
        ([{"prompt": "a", "completion": "b", "Reward": 1.0}], "mean to rename 'Reward'"),
        ([{"prompt": "a", "completion": "b", "score": 1.0}], "mean to rename 'score'"),
        ([{"prompt": "a", "response": "b", "reward": 1.0}], "mean to rename 'response'"),
        (
            [LISTS, LISTS | {"rewards": [1.0, None]}],
            "row 1, completion 1: reward is None",
        ),
        ([LISTS | {"completions": ["b", None]}], "row 0, completion 1: completion is None"),
        (
            [{"prompt": "a", "completions": ["b", "c"], "reward": [1.0, 0.0]}],
            "the columns 'reward' and completions: .*, which are completions, rewards, logps",
        ),
        (
            [{"prompt": "a", "completions": ["b", "c"], "scores": [1.0, 0.0]}],
            "no column 'reward' .rewards, a list, beside completions.; .* mean to rename 'scores'",
        ),
        (
            [{"prompt": "a", "completions": [], "rewards": []}],
            "train_dataset has no completion: all of its|train_dataset is empty: it has no row",
        ),
    ],
)
def test_what_has_no_place(read, rows, says):
    for dataset in (Dataset.from_list(rows), stream(rows)):
        with pytest.raises(DataError) as error:
            read(dataset)
        message = str(error.value).replace(" (counted from 0): ", ": ")
        assert re.search(says, message, re.DOTALL), message
        assert ("counted from 0" in str(error.value)) == bool(re.search(r", row \d", message))


def test_texts_that_are_not_utf_8(read, tmp_path):
    """Latin-1 passes for text until a row is looked at."""
    lines = [json.dumps(row | {"prompt": "é"}, ensure_ascii=False) for row in ROWS]
    (tmp_path / "rows.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    with pytest.raises(DataError, match=r"train_dataset holds a text that is not UTF-8.* `iconv"):
        read(rows)


def test_a_list_without_entries_gives_no_row(read):
    found = read([LISTS | {"completions": [], "rewards": []}, LISTS])
    assert found["completion"] == ["b", "c"]


@pytest.mark.parametrize("name", ["logp", "ref_logp"])
def test_log_probabilities_are_checked(read, name):
    rows = [row | {"logp": -1.0, "ref_logp": -1.0} | {name: 0.5} for row in ROWS]
    with pytest.raises(DataError, match=rf"row 0 \(.*\): {name} is 0.5. A log-prob.* at most 0"):
        read(rows, importance_weights=True)
    with pytest.raises(ConfigError, match="importance_weights reads the column 'logp'"):
        read(ROWS, importance_weights=True)
    with pytest.raises(ConfigError, match="baseline: value reads the column 'value'"):
        read(ROWS, baseline="value")


@pytest.mark.parametrize(
    "dataset", [Dataset.from_dict({"prompt": [], "completion": []}), stream([])]
)
def test_no_rows(read, dataset):
    if isinstance(dataset, Dataset):
        dataset = dataset.add_column("reward", [])  # pyright: ignore
    with pytest.raises(DataError, match="train_dataset is empty"):
        read(dataset)


def test_what_is_no_dataset(read):
    with pytest.raises(DataError, match=r"is a dict; .* Take one of its splits"):
        read({"train": Dataset.from_list(ROWS)})
    with pytest.raises(DataError, match=r"is a tuple; .*Dataset.from_list"):
        read(tuple(ROWS))
    with pytest.raises(DataError, match="a stream without the column 'reward'"):
        read(stream(UNSCORED), reward_length)


def test_nothing_is_said_of_ordinary_rows(read, caplog):
    with caplog.at_level(logging.WARNING):
        read(ROWS)
    assert not caplog.records
