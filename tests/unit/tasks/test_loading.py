"""Files, directories and hub ids: what loads, and how each mistake is reported."""

import json
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from trl_ext.errors import ConfigError, DataError
from trl_ext.tasks import load_splits as typed_load_splits

load_splits: Any = typed_load_splits
ROWS = [{"prompt": f"question {i}", "answer": str(i)} for i in range(4)]
CHAT = [{"prompt": [{"role": "user", "content": f"question {i}"}]} for i in range(4)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def write(path, rows):
    Dataset.from_list(rows).to_json(path) if path.suffix != ".json" else path.write_text(
        json.dumps(rows)
    )
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["plain", "chat"])
def test_json(tmp_path, ending, rows):
    train, test = load_splits({"dataset_name": write(tmp_path / f"data.{ending}", rows)})
    assert train.to_list() == rows
    assert test is None


def test_parquet_and_csv(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "data.parquet")
    Dataset.from_list([{"prompt": "a,b", "answer": "x"}]).to_csv(tmp_path / "data.csv")
    assert load_splits({"dataset_name": str(tmp_path / "data.parquet")})[0].to_list() == ROWS
    read = load_splits({"dataset_name": str(tmp_path / "data.csv")})[0].to_list()
    assert read == [{"prompt": "a,b", "answer": "x"}]


def test_a_directory_of_files(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS[:2])
    train, test = load_splits({"dataset_name": str(tmp_path)})
    assert (len(train), len(test)) == (4, 2)


def test_what_save_to_disk_wrote(tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "two")
    assert len(load_splits({"dataset_name": str(tmp_path / "one")})[0]) == 4
    assert len(load_splits({"dataset_name": str(tmp_path / "two")})[1]) == 1


def test_arguments_of_load_dataset(tmp_path):
    files = {"train": write(tmp_path / "a.jsonl", ROWS), "held": write(tmp_path / "b.jsonl", ROWS)}
    script = {"dataset_name": "json", "dataset_kwargs": {"data_files": files}}
    train, test = load_splits({**script, "dataset_test_split": "held"})
    assert (len(train), len(test)) == (4, 4)


def test_streaming(tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS)
    train, _ = load_splits({"dataset_name": path, "dataset_streaming": True})
    assert isinstance(train, IterableDataset)
    assert list(train) == ROWS


def test_no_dataset():
    with pytest.raises(DataError, match=r"names no dataset. Set dataset_name to reasoning_gym/"):
        load_splits({})


def test_a_missing_file_gives_the_nearest(tmp_path):
    write(tmp_path / "prompts.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no file or directory .*Did you mean .*prompts.jsonl"):
        load_splits({"dataset_name": str(tmp_path / "promts.jsonl")})
    with pytest.raises(DataError, match="Nor is there a directory"):
        load_splits({"dataset_name": str(tmp_path / "nowhere" / "prompts.jsonl")})


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "data.txt").write_text("a")
    with pytest.raises(DataError, match=r"none of .jsonl, .json, .parquet, .csv"):
        load_splits({"dataset_name": str(tmp_path / "data.txt")})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("empty.jsonl", ""),
        ("blank.jsonl", "\n \n"),
        ("none.json", "[]"),
        ("empty.csv", ""),
        ("header.csv", "prompt,answer\n"),
    ],
)
def test_a_file_without_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name} has no rows. Write at least one"):
        load_splits({"dataset_name": str(tmp_path / name)})


def test_the_ending_may_be_in_capitals(tmp_path):
    (tmp_path / "DATA.JSONL").write_text(json.dumps(ROWS[0]))
    assert load_splits({"dataset_name": str(tmp_path / "DATA.JSONL")})[0].to_list() == ROWS[:1]
    with pytest.raises(DataError, match=r"no file or directory 'nowhere.JSONL'"):
        load_splits({"dataset_name": "nowhere.JSONL"})


def test_a_file_has_no_configurations(tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(ConfigError, match="dataset_config is 'main', which does nothing for"):
        load_splits({"dataset_name": path, "dataset_config": "main"})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("char_revers", "char_reverse"),
        ("reasoning_gim/gcd", "reasoning_gym/gcd"),
        ("reasoning_gym", "reasoning_gym/<task>"),
    ],
)
def test_a_misspelt_generated_task_gives_the_nearest(name, meant):
    with pytest.raises(DataError, match=f"Did you mean '{meant}'"):
        load_splits({"dataset_name": name})


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_an_unreadable_file(tmp_path, name):
    (tmp_path / name).write_text('{"prompt": "a"}\n{"prompt": ')
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        load_splits({"dataset_name": str(tmp_path / name)})


def test_a_hub_name_that_cannot_be_reached():
    with pytest.raises(DataError, match=r"nobody/nothing cannot be read: .* needs the network"):
        load_splits({"dataset_name": "nobody/nothing"})


def test_a_wrong_split_lists_those_found(tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(
        DataError, match=r"dataset_train_split is 'trian', .* splits train. Did you"
    ):
        load_splits({"dataset_name": path, "dataset_train_split": "trian"})
    with pytest.raises(DataError, match="dataset_test_split is 'validation'"):
        load_splits({"dataset_name": path, "dataset_test_split": "validation"})


def test_a_split_among_the_arguments_is_refused(tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(ConfigError, match="use dataset_train_split"):
        load_splits({"dataset_name": path, "dataset_kwargs": {"split": "train"}})
