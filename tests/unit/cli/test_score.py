"""`score`: completions in, scored rows, tables and a page out."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_byte_llama
from trl_ext.cli.score_output import HOW_TO_READ
from trl_ext.gibbs_prm import GibbsScorer
from trl_ext.gibbs_prm.scored_file import read_scored


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> str:
    """What `train` leaves: an adapter and its recipe."""
    home = tmp_path_factory.mktemp("run")
    base = save_byte_llama(home / "base")
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, lora).save_pretrained(home / "out")
    AutoTokenizer.from_pretrained(base).save_pretrained(home / "out")
    recipe = {"trainer": "grpo", "beta": 0.25, "model_name_or_path": base}
    (home / "out" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(home / "out")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "What is 2 + 2?", "completions": ["4", "five\nor six"], "label": [True, False]},
        {"prompt": "hi", "completion": "ho", "steps": ["h", "o"], "id": "x", "level": 2},
    ]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_one_completion_is_shown_step_by_step(here, trl_ext, run_folder):
    code, out, err = trl_ext(
        "score", run_folder, "--prompt", "hi", "--completion", "a[b]\nc", "--completion", "d"
    )
    assert code == 0, err
    assert "beta: 0.25, temperature: 1" in out
    first, second = GibbsScorer(run_folder).score(["hi", "hi"], ["a[b]\nc", "d"])
    for scores in (first, second):
        for reward, score in zip(scores.step_rewards, scores.prefix_scores, strict=True):
            assert re.search(rf"{reward:+.3f} │ {score:+.3f}".replace("+", r"\+"), out)
    assert "a[b]" in out
    assert out.count(HOW_TO_READ) == 1
    assert list(here.glob("*.jsonl")) == [here / "in.jsonl"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_file_is_scored_into_another(here, trl_ext, run_folder, name):
    code, out, err = trl_ext(
        "score", run_folder, "in.jsonl", "--output", name, "--html", "page.html"
    )
    assert code == 0, err
    rows = list(read_scored(name))
    assert [(row.row, row.sample) for row in rows] == [(0, 0), (0, 1), (1, 0)]
    assert [row.label for row in rows] == [True, False, None]
    assert [len(row.scores.steps) for row in rows] == [1, 2, 2], "newlines; the third's own"
    assert rows[2].id == "x" and rows[2].columns["level"] == 2
    expected = GibbsScorer(run_folder).score(["hi"], ["ho"], [["h", "o"]])[0]
    assert rows[2].scores.prefix_scores == pytest.approx(expected.prefix_scores, abs=1e-5)
    assert "scored 3 completions, 14 tokens" in out
    assert re.search(r"right: 1 completions, mean score [+-]", out)
    assert f"trl_ext rank {name}" in out and HOW_TO_READ in out
    assert "or six" in Path("page.html").read_text()
    # Again, it would be in the way.
    code, _, err = trl_ext("score", run_folder, "in.jsonl", "--output", name)
    assert code == 2 and "exists and is left alone" in err


def test_a_killed_scoring_goes_on(here, trl_ext, run_folder, monkeypatch):
    """The second window fails; the same command then scores it alone."""
    import trl_ext.gibbs_prm.to_file as streaming

    whole = streaming.score_rows

    def first_only(*args, **kwargs):
        yield next(whole(*args, **kwargs, window=2))
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "score_rows", first_only)
    code, _, err = trl_ext("score", run_folder, "in.jsonl", "--output", "out.jsonl")
    assert code == 130
    assert "2 completions are kept in out.jsonl.partial; the same command goes on" in err
    assert not Path("out.jsonl").exists()
    monkeypatch.setattr(streaming, "score_rows", whole)
    code, out, err = trl_ext(
        "score", run_folder, "in.jsonl", "--output", "out.jsonl", "--beta", "3"
    )
    assert code == 2 and "was begun with beta: 0.25, and now it is 3.0" in err
    code, out, err = trl_ext("score", run_folder, "in.jsonl", "--output", "out.jsonl")
    assert code == 0, err
    assert "going on behind the 2 completions" in out and "scored 1 completions" in out
    assert len(list(read_scored("out.jsonl"))) == 3
    assert not Path("out.jsonl.partial").exists()


def test_a_processbench_file(here, trl_ext, run_folder):
    row = {"id": "g-1", "generator": "m", "problem": "2 + 2?", "steps": ["It is 4.", "So 5."]}
    Path("pb.jsonl").write_text(
        json.dumps(row | {"final_answer_correct": False, "label": 1}) + "\n"
    )
    code, _, err = trl_ext("score", run_folder, "pb.jsonl", "--output", "pb.out.jsonl")
    assert code == 0, err
    [row] = read_scored("pb.out.jsonl")
    assert row.scores.steps == ["It is 4.\n\n", "So 5."]
    assert (row.first_error, row.label, row.columns["generator"]) == (1, False, "m")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "give FILE, or --prompt TEXT and --completion TEXT."),
        (["in.jsonl", "--prompt", "a", "--completion", "b"], "not both"),
        (["--prompt", "a"], "--prompt and --completion go together"),
        (["in.jsonl", "--steps", "line"], "steps is 'line', which is no way to cut. Did you mean"),
        (["in.jsonl", "--steps", "regex:("], "regex"),
        (["in.jsonl", "--steps", "given", "--output", "o.jsonl"], "row 0 has no steps of its own"),
        (["no.jsonl"], "There is no file 'no.jsonl'. Did you mean"),
        (["in.jsonl", "--output", "out.txt"], "the ending must be one of"),
        (["in.jsonl", "--html", "no/page.html"], "Name a file in a folder that exists"),
        (["in.jsonl", "--reference", "no/such"], "The reference cannot be opened at"),
        (["in.jsonl", "--device", "cuda:9"], "--device cuda:9: it cannot be used"),
        (["in.jsonl", "--beta", "0"], "must be a number greater than 0"),
    ],
)
def test_bad_input_is_one_line(here, trl_ext, run_folder, argv, says):
    code, _, err = trl_ext("score", run_folder, *argv)
    assert code == 2
    assert says in err and "Traceback" not in err
    assert sorted(path.name for path in here.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--output", "in.jsonl"], "FILE and --output are one file"),
        (["--html", "./in.jsonl"], "FILE and --html are one file"),
        (["--output", "o.jsonl", "--html", "o.jsonl"], "--output and --html are one file"),
        (["--output", "o.jsonl", "--html", "o.jsonl.partial"], "--html and what is under way are"),
    ],
)
def test_no_file_replaces_another_even_by_force(here, trl_ext, run_folder, options, says):
    before = Path("in.jsonl").read_text()
    code, _, err = trl_ext("score", run_folder, "in.jsonl", *options, "--force")
    assert code == 2 and says in err
    assert [path.name for path in here.iterdir()] == ["in.jsonl"]
    assert Path("in.jsonl").read_text() == before


def test_a_file_that_cannot_be_read_is_told_before_a_model_loads(here, trl_ext):
    Path("rows.txt").touch()
    for name, says in (("rows.txt", "the ending '.txt' is none of"), ("no.jsonl", "no file")):
        code, _, err = trl_ext("score", "no/such/model", name)
        assert code == 2 and says in err


def test_a_terminal_does_not_obey_a_completion(here, trl_ext, run_folder):
    code, out, _ = trl_ext("score", run_folder, "--prompt", "hi", "--completion", "a\x1b[31mb")
    assert code == 0
    assert "a␛[31mb" in out and "\x1b[31mb" not in out


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        ({"prompt": "a"}, [], "there is no key 'completion'"),
        ({"prompt": "a", "completion": "b", "label": "no"}, [], "'no' is a text: write true for"),
        (
            {"prompt": "a", "completion": "b", "steps": ["c"]},
            [],
            "Row 2 of the input, completion 0",
        ),
        ({"prompt": "a", "completion": "b"}, ["--steps", "given"], "row 0 has no steps of its own"),
        ({"prompt": "a", "completion": "b"}, ["--steps", "turn"], "which has no turns"),
        ({"prompt": "a", "completion": "b"}, ["--steps", "lines"], "which is no way to cut"),
    ],
)
def test_a_wrong_row_is_told_before_a_model_loads(here, trl_ext, row, options, says):
    """Without importing what loads one; the model that is named does not exist."""
    with Path("in.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    code, _, err = trl_ext("score", "no/such/model", "in.jsonl", "--output", "o.jsonl", *options)
    assert code == 2 and says in err
    assert not Path("o.jsonl.partial").exists()


def test_a_wrong_row_costs_no_import_of_torch(here, python):
    Path("in.jsonl").write_text('{"prompt": "a"}\n')
    program = (
        "import sys\nfrom trl_ext.cli import main\n"
        "code = main(['score', 'no/such/model', 'in.jsonl', '--output', 'o.jsonl'])\n"
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert python(program).split("\n")[0] == "2 False False"


def test_all_files_in_the_way_are_named(here, trl_ext, run_folder):
    Path("o.jsonl").touch()
    Path("page.html").touch()
    argv = ["score", run_folder, "in.jsonl", "--output", "o.jsonl", "--html", "page.html"]
    code, _, err = trl_ext(*argv)
    assert code == 2
    assert "o.jsonl exists and is left alone" in err
    assert "--html page.html: the file exists and is left alone" in err
    assert trl_ext(*argv, "--force")[0] == 0
