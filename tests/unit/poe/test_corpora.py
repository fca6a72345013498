"""Texts and prompts from files."""

import json
import sys

import pytest
from datasets import Dataset, DatasetDict, are_progress_bars_disabled

from trl_ext.errors import DataError, MissingDependencyError
from trl_ext.poe.corpora import corpus_texts, read_prompts
from trl_ext.tasks import load_splits

CHAT = [{"role": "user", "content": "Hello"}]


def test_a_text_file_has_one_text_a_line(tmp_path):
    (tmp_path / "c.txt").write_text("One.\n\n  Two.\n", encoding="utf-8")
    assert corpus_texts(str(tmp_path / "c.txt")) == ["One.", "  Two."]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_a_dataset_has_a_column(tmp_path, kind):
    data = Dataset.from_dict({"body": ["a", "b"], "text": ["c", "d"]})
    path = tmp_path / f"d.{kind}"
    write = {"jsonl": data.to_json, "parquet": data.to_parquet, "folder": data.save_to_disk}
    write[kind](str(path))
    assert corpus_texts(str(path)) == ["c", "d"]
    assert corpus_texts(str(path), "body") == ["a", "b"]
    with pytest.raises(DataError, match="no column 'txet'; its columns are body, text"):
        corpus_texts(str(path), "txet")


def test_pydoc_is_prose_one_paragraph_a_text():
    texts = corpus_texts("pydoc")
    assert sum(map(len, texts)) > 100_000
    assert any("context manager" in text for text in texts)
    assert not any("\n" in text or ">>>" in text for text in texts)
    assert len(set(texts)) == len(texts)


def test_a_python_without_pydoc(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(MissingDependencyError, match="or give a text file"):
        corpus_texts("pydoc")


@pytest.mark.parametrize(
    ("content", "column", "says"),
    [
        (b"\n \n", None, "holds no text. Write one text a line"),
        (b"a\xff", None, "not a text file in UTF-8: invalid start byte at byte 1"),
        (b"a\n", "body", "plain text, which has no columns. Leave column out"),
        (None, None, "There is no corpus .*Give a text file"),
    ],
)
def test_what_is_no_corpus(tmp_path, content, column, says):
    if content is not None:
        (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(DataError, match=says):
        corpus_texts(str(tmp_path / "c.txt"), column)


def test_what_is_no_data_file(tmp_path):
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(DataError, match=r"jsonl has no rows\. Write at least one, .*column 'text'"):
        corpus_texts(str(tmp_path / "c.jsonl"))
    with pytest.raises(DataError, match=r"jsonl has no rows\. Write at least one, .*column 'body'"):
        corpus_texts(str(tmp_path / "c.jsonl"), "body")
    (tmp_path / "c.csv").write_bytes(b"text\n\xff\n")
    with pytest.raises(DataError, match=r"c.csv cannot be read: UnicodeDecodeError: .*called .txt"):
        corpus_texts(str(tmp_path / "c.csv"))
    saved = DatasetDict({"test": Dataset.from_dict({"text": ["a"]})})
    saved.save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="d has no split 'train', which is the one that is read"):
        corpus_texts(str(tmp_path / "d"))


def test_progress_is_of_terminals_only(tmp_path, capfd, monkeypatch):
    (tmp_path / "c.csv").write_text("text\na\n")
    corpus_texts(str(tmp_path / "c.csv"))
    assert capfd.readouterr().err == ""
    assert not are_progress_bars_disabled()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    (tmp_path / "other.csv").write_text("text\nb\n")
    corpus_texts(str(tmp_path / "other.csv"))
    assert "Generating train split" in capfd.readouterr().err


def test_prompts_of_a_text_file(tmp_path):
    (tmp_path / "p.txt").write_text("One?\n\nTwo?")
    assert read_prompts(str(tmp_path / "p.txt")) == ["One?", "Two?"]


def test_prompts_are_texts_or_messages(tmp_path):
    rows = [{"prompt": "One?"}, {"prompt": CHAT, "answer": 1}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_prompts(str(tmp_path / "p.jsonl")) == ["One?", CHAT]
    Dataset.from_dict({"prompt": [CHAT]}).to_parquet(str(tmp_path / "p.parquet"))
    assert read_prompts(str(tmp_path / "p.parquet")) == [CHAT]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "\n", "p.txt is empty. Write one prompt a line"),
        ("p.jsonl", "", "p.jsonl is empty"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"text": "b"}',
            "jsonl:2: there is no key 'prompt'",
        ),
        ("p.jsonl", '{"prompt": "a"', "jsonl:1: this is not JSON"),
        ("p.jsonl", "[1]", r"jsonl:1: there is no key 'prompt', but \[1\]"),
        ("p.jsonl", '{"prompt": " "}', "jsonl:1: the prompt is ' '; it must be a text"),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}', "jsonl:1: the prompt is .*list of messages"),
        ("p.csv", "text\nb\n", "no column 'prompt'; its columns are text"),
        ("p.jsonl", '{"prompt": "a\\ud800"}', "jsonl:1: the prompt has half a character"),
        ("p.csv", "", "p.csv has no rows. Write at least one, with the column 'prompt'"),
        ("p.parquet", "a", "p.parquet cannot be read: ArrowInvalid: .* Is it cut, or of another"),
        (None, "", "There is no prompt file"),
    ],
)
def test_what_is_no_prompt_file(tmp_path, name, content, says):
    if name is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says):
        read_prompts(str(tmp_path / (name or "no.txt")))


def test_a_generated_task_means_its_held_out_prompts():
    prompts = read_prompts("openings")
    _, held_out = load_splits({"dataset_name": "openings"})
    assert held_out is not None and prompts == list(held_out["prompt"])
