"""The arguments of `collect` and `iterate`, and what they print; what they do is tested apart."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import save_tiny_llama
from trl_ext.cli import iterate, launcher
from trl_ext.cli.collect import NAMES
from trl_ext.collect import FORMS
from trl_ext.collect.samples import Samples
from trl_ext.rwr.offline import OfflineRWRTrainer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def recipe(tmp_path, model, monkeypatch) -> str:
    """A recipe of three prompts, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in "abc"))
    settings: dict[str, Any] = {
        "trainer": "offline_rwr",
        "output_dir": "runs/mine",
        "model_name_or_path": model,
        "bf16": False,
        "dataset_name": "prompts.jsonl",
        "reward_funcs": ["tests.tiny:count_a"],
        "num_generations": 8,
        "per_device_train_batch_size": 8,
        "max_completion_length": 4,
        "max_steps": 1,
        "report_to": "none",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    return "mine.yaml"


def test_the_file_lies_beside_the_output_dir_and_a_table_tells_of_it(trl_ext, recipe):
    code, out, err = trl_ext("collect", recipe, "--limit", "2", "num_generations=4")
    assert code == 0, err
    rows = [json.loads(line) for line in Path("runs/collected.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a"] * 4 + ["b"] * 4
    tokens = sum(len(row["completion_ids"]) for row in rows)
    for name, number in (("prompts", 2), ("completions", 8), ("completion tokens", tokens)):
        assert re.search(rf"^  {name} +{number}$", out, re.MULTILINE), out
    assert "runs/collected.jsonl: written." in out
    code, _, err = trl_ext("collect", recipe, "--limit=2", "num_generations=4")
    assert code == 2 and "is left alone" in err
    assert trl_ext("collect", recipe, "--force", "--limit=2")[0] == 0


def test_forms_have_names_of_their_own(trl_ext, recipe):
    assert list(NAMES) == list(FORMS)
    code, out, err = trl_ext("collect", recipe, "--as", "rankings")
    assert code == 0, err
    [row, *_] = [json.loads(line) for line in Path("runs/rankings.jsonl").read_text().splitlines()]
    assert len(row["completions"]) == len(row["scores"]) == 8
    assert "rankings" in out
    code, out, err = trl_ext("collect", recipe, "--as=preferences", "--output", "p.parquet")
    assert code == 0 and Path("p.parquet").is_file(), err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["collect"], "required: recipe"),
        (["collect", "mine.yaml", "--limit", "0"], "whole number of at least 1"),
        (["collect", "mine.yaml", "--as", "pairs"], "invalid choice: 'pairs'"),
        (["collect", "mine.yaml", "--split", "dev"], "invalid choice: 'dev'"),
        (["collect", "mine.yaml", "--ouput", "x.jsonl"], "ouput: unknown key"),
        (["collect", "mine.yaml", "--output", "x.txt"], "the ending must be one of"),
        (["collect", "mine.yaml", "--output", "mine.yaml/x.jsonl"], "there is no folder mine.yaml"),
        (["collect", "mine.yaml", "num_generations=x"], "num_generations"),
        (["iterate", "mine.yaml"], "required: --rounds"),
        (["iterate", "mine.yaml", "--rounds", "0"], "whole number of at least 1"),
        (["iterate", "mine.yaml", "--rounds=1", "--resume", "--overwrite"], "Choose one"),
        (["iterate", "mine.yaml", "--rounds=1", "trainer=rwr"], "cannot be iterated"),
    ],
)
def test_what_is_wrong_is_said(trl_ext, recipe, argv, says):
    code, _, err = trl_ext(*argv)
    assert code == 2 and says in err, err
    assert not Path("runs/collected.jsonl").exists()


def test_iterate_ends_with_a_table(trl_ext, recipe):
    code, out, err = trl_ext("iterate", recipe, "--rounds", "1")
    assert code == 0, err
    assert re.search(r"^  round +collected", out, re.MULTILINE), out
    assert "The policy of the last round is in runs/mine/round-1." in out
    code, out, err = trl_ext("iterate", recipe, "--rounds", "1", "--resume")
    assert code == 0, err
    code, _, err = trl_ext("iterate", recipe, "--rounds", "1")
    assert code == 2 and "--resume" in err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["collect", "mine.yaml", "--limit", "2", "--as", "rankings", "--force", "seed=1"],
            ["collect", "mine.yaml", "--split=train", "--limit=2", "--as=rankings", "--force"],
        ),
        (
            ["iterate", "mine.yaml", "--rounds", "2", "--resume", "seed=1"],
            ["iterate", "mine.yaml", "--rounds=2", "--resume"],
        ),
    ],
)
def test_several_processes_run_the_same_command(trl_ext, recipe, monkeypatch, argv, expected):
    commands = []

    def execv(path, command):
        commands.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(iterate, "launched", lambda command, _: commands.append(command) or 0)
    monkeypatch.setattr(launcher, "_device_count", lambda: 0)
    assert trl_ext(*argv, "num_processes=2")[0] == 0
    command = commands[0]
    assert command[command.index("trl_ext") + 1 :] == [
        *expected, "seed=1", "num_processes=2", "ddp_backend=gloo"
    ]  # fmt: skip


def test_sigterm_keeps_what_is_sampled_and_it_is_gone_on_with(trl_ext, recipe, monkeypatch):
    write = Samples.write

    def write_and_end(self, rows):
        write(self, rows)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    argv = ("collect", recipe, "num_generations=4", "per_device_eval_batch_size=4")
    with monkeypatch.context() as patched:
        patched.setattr(Samples, "write", write_and_end)
        code, _, err = trl_ext(*argv)
    assert code == 143 and "Interrupted." in err
    kept = re.search(r"(\d+) completions are kept in .*; the same command goes on there", err)
    assert kept, err
    assert signal.getsignal(signal.SIGTERM) is handler
    code, _, err = trl_ext(*argv)
    assert code == 0 and f"Going on from {kept[1]} completions" in err, err


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("collecting", signal.SIGTERM),
        ("collecting", signal.SIGINT),
        ("fitting", signal.SIGTERM),
    ],
)
def test_a_signal_ends_the_rounds_and_the_last_line_says_how_to_go_on(
    trl_ext, recipe, monkeypatch, where, number
):
    at, name = (Samples, "write") if where == "collecting" else (OfflineRWRTrainer, "training_step")
    own = getattr(at, name)

    def and_end(self, *given):
        result = own(self, *given)
        os.kill(os.getpid(), number)
        return result

    handler = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(at, name, and_end)
        code, _, err = trl_ext("iterate", recipe, "--rounds", "1")
    assert code == 128 + number
    last = err.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"trl_ext: stopped \({number.name}\), exit code {code}; resume: .*trl_ext iterate "
        r"runs/mine/recipe\.yaml --rounds 1 --resume",
        last,
    ), err
    assert signal.getsignal(number) is handler
    code, _, err = trl_ext("iterate", *last.partition("trl_ext iterate ")[2].split())
    assert code == 0, err
    assert err.strip().splitlines()[-1] == ("trl_ext: finished, exit code 0; output_dir: runs/mine")


def test_rounds_that_cannot_be_say_so_in_the_last_line(trl_ext, recipe):
    code, _, err = trl_ext("iterate", recipe, "--rounds", "1", "beta=-1")
    assert code == 2 and err.endswith("\ntrl_ext: failed (ConfigError), exit code 2\n")
