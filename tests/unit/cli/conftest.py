"""The command line in-process, and as the separate process that users start."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trl_ext.cli import main
from trl_ext.recipe import shipped

RECIPE = """\
# Purpose: To be read, in a
#   test of two lines.
# Hardware: none
# Command: trl_ext train x

# Not: in the header.
trainer: rwr
extends: base.yaml
model_name_or_path: some/model
dataset_name: some/data
output_dir: out
learning_rate: 1e-5
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A checkout with one shipped recipe; the current folder is an empty one beside it."""
    (tmp_path / "home/recipes/rwr").mkdir(parents=True)
    (tmp_path / "home/recipes/rwr/first.yaml").write_text(RECIPE)
    (tmp_path / "home/recipes/rwr/base.yaml").write_text("# Purpose: A base.\nseed: 7\n")
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "home/trl_ext")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path / "home"


@pytest.fixture
def trl_ext(capsys) -> Callable[..., tuple[int, str, str]]:
    """trl_ext("show", "x.yaml") -> exit code, standard output, standard error."""

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            code = main(argv)
        except SystemExit as stop:  # argparse
            code = stop.code if isinstance(stop.code, int) else 1
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def python() -> Callable[[str], str]:
    """Run a program in a fresh interpreter and return what it prints."""

    def run(program: str) -> str:
        root = str(Path(__file__).parents[3])
        environment = os.environ | {"PYTHONPATH": root}
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
