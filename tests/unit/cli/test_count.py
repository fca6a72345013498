"""`count`: a corpus becomes an expert that `generate` multiplies."""

import os
import re
import shlex
from pathlib import Path

import pytest

from tests.tiny import save_byte_llama
from trl_ext.poe.counted import CountedExpert, NaiveBayesExpert, NGramExpert


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_byte_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("c.txt").write_text("abab\nab\n")
    return tmp_path


def test_what_is_printed_can_be_typed(here, trl_ext, model):
    code, out, err = trl_ext("count", "c.txt", "--tokenizer", model, "--output", "out/ab")
    assert code == 0, err
    # a b a b <eos>, a b <eos>: the pairs ab, ba, b<eos>; a byte is a token.
    said = r"Counted 8 tokens of 2 texts in \d+\.\d s: 3 distinct 2-grams\.\nout/ab: \d+\.\d MB\.\n"
    assert re.match(said, out)
    typed = out.split("trl_ext ")[-1].replace("\\\n", "").replace('"What is a class?"', "Hi")
    assert typed.split()[:4] == ["generate", model, "--expert", "ab=out/ab"]
    code, out, err = trl_ext(*typed.split(), "--max-new-tokens", "2")
    assert code == 0, err
    assert out.startswith("weights: base 1, ab 0.3\n")


@pytest.mark.parametrize(
    ("argv", "kind", "settings", "distinct"),
    [
        ([], NGramExpert, {"order": 2, "pseudo_count": 0.001}, "3 distinct 2-grams"),
        (["--order", "1"], NGramExpert, {"order": 1}, "3 distinct 1-grams"),
        # aba, bab, ab<eos>
        (
            ["--order", "3", "--pseudo-count", "2"],
            NGramExpert,
            {"order": 3, "pseudo_count": 2},
            "3",
        ),
        (["--no-add-eos"], NGramExpert, {"num_tokens": 6}, "2 distinct 2-grams"),
        # At distance 2: a.a, b.b, a.<eos>
        (["--naive-bayes"], NaiveBayesExpert, {"window": 2}, "3 distinct pairs at distance 2"),
        (["--naive-bayes", "--window", "1"], NaiveBayesExpert, {"window": 1}, "at distance 1"),
    ],
)
def test_kinds(here, trl_ext, model, argv, kind, settings, distinct):
    code, out, err = trl_ext("count", "c.txt", "--tokenizer", model, "--output", "out", *argv)
    assert code == 0, err
    assert distinct in out
    assert ("--weight base=1" in out) == (kind is NGramExpert)
    expert = CountedExpert.load("out")
    assert type(expert) is kind
    assert {name: getattr(expert, name) for name in settings} == settings


def test_pydoc(here, trl_ext, model):
    code, out, _ = trl_ext("count", "pydoc", "--tokenizer", model, "--output", "docs")
    assert code == 0
    assert re.match(r"Counted \d{3},\d{3} tokens of [1-9],?\d+ texts", out)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["no.txt"], "There is no corpus 'no.txt'. Give a text file"),
        (["empty.txt"], "The corpus empty.txt holds no text"),
        (["rows.jsonl"], "no column 'text'; its columns are body"),
        (["c.txt", "--column", "body"], "plain text, which has no columns"),
        (["c.txt", "--output", "full"], "--output full: there is something in it already"),
        (["c.txt", "--output", "c.txt"], "--output c.txt: this is a file"),
        (["c.txt", "--tokenizer", "./no"], "--tokenizer ./no: there is no tokenizer"),
        (["c.txt", "--tokenizer", "bundled:no"], "There is no bundled model 'bundled:no'"),
        (["c.txt", "--naive-bayes", "--order", "2"], "--order 2 is of n-grams"),
        (["c.txt", "--window", "2"], "--window 2 is of naive Bayes"),
        (["c.txt", "--order", "0"], "must be a whole number of at least 1, got '0'"),
        (["c.txt", "--pseudo-count", "1e308"], "pseudo_count is 1e+308; it must be at most 1e+15"),
        (["none.jsonl"], "none.jsonl has no rows. Write at least one, with the column 'text'"),
        (["cut.jsonl"], "cut.jsonl cannot be read: ArrowInvalid: JSON parse error"),
        (["pipe.csv"], "pipe.csv is a pipe or a device, and a .csv is read as a whole. Save it"),
        (["c.txt", "--pseudo-count", "0"], "must be a number greater than 0, got '0'"),
    ],
)
def test_what_is_refused(here, trl_ext, model, argv, says):
    Path("empty.txt").write_text("")
    Path("rows.jsonl").write_text('{"body": "a"}\n')
    Path("none.jsonl").write_text("")
    Path("cut.jsonl").write_text('{"text": "a"')
    os.mkfifo("pipe.csv")
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    for option, value in (("--tokenizer", model), ("--output", "out")):
        argv = argv if option in argv else [*argv, option, value]
    code, out, err = trl_ext("count", *argv)
    assert (code, out) == (2, "")
    assert says in err
    assert "dataset_name" not in err
    assert not Path("out").exists()


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_a_models_folder_is_never_written_to(here, trl_ext, model, file):
    Path("model").mkdir()
    Path("model", file).write_text("{}")
    argv = ["count", "c.txt", "--tokenizer", model, "--output", "model", "--force"]
    code, out, err = trl_ext(*argv)
    assert (code, out) == (2, "")
    assert err == (
        f"Error: model is a language model's folder: it has a {file}. A counted expert would hide "
        "the model. Give another folder.\n"
    )
    assert [path.name for path in Path("model").iterdir()] == [file]


@pytest.mark.parametrize("folder", ["base", "product", "my docs/a b"])
def test_any_folder_can_be_typed(here, trl_ext, model, folder):
    _, out, _ = trl_ext("count", "c.txt", "--tokenizer", model, "--output", folder)
    typed = shlex.split(out.split("trl_ext ")[-1].replace("\\\n", ""))
    code, out, err = trl_ext(*typed, "--max-new-tokens", "2")
    assert code == 0, err
    name = {"my docs/a b": "a_b"}.get(folder, f"{folder}_counted")
    assert out.startswith(f"weights: base 1, {name} 0.3\n")


def test_a_corpus_may_come_through_a_pipe(here, trl_ext, model):
    end, begin = os.pipe()  # as <(cat c.txt) gives it
    os.write(begin, Path("c.txt").read_bytes())
    os.close(begin)
    code, out, err = trl_ext("count", f"/dev/fd/{end}", "--tokenizer", model, "--output", "out")
    os.close(end)
    assert code == 0, err
    assert out.startswith("Counted 8 tokens of 2 texts")


def test_force_replaces(here, trl_ext, model):
    argv = ["count", "c.txt", "--tokenizer", model, "--output", "out"]
    assert [trl_ext(*argv)[0], trl_ext(*argv)[0], trl_ext(*argv, "--force")[0]] == [0, 2, 0]
