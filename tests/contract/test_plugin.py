"""A third-party package adds a trainer and a reward; this repository knows of neither.

The package is `tests/plugin_package`. pip installs it into a temporary folder, which only the child
processes here have on their path.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.forked import Forked, trl_ext
from tests.tiny import save_byte_llama

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "plugin_package"

RECIPE = """\
trainer: echo
model_name_or_path: bundled:smollm2-135m-instruct
dataset_name: reasoning_gym/letter_counting
reward_funcs: [short_answers]
output_dir: outputs/echo
num_generations: 4
per_device_train_batch_size: 4
{gain}: 2.0
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the plugin installed. Its build happens in a copy, which it litters."""
    folder = tmp_path_factory.mktemp("plugin")
    source, target = folder / "source", folder / "site"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
    # Offline: the build backend, setuptools, comes from the test environment.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    flags = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    install = subprocess.run([*pip, *flags, str(source)], capture_output=True, text=True)
    assert install.returncode == 0, install.stderr
    return target


@pytest.fixture
def python(site):
    """Run Python with the plugin installed."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"}
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, env=environment, cwd=site.parent, capture_output=True, text=True
        )

    return run


@pytest.fixture
def forked(site):
    """Run a function with the plugin installed, where TRL is imported and the plugin is not."""

    def run(function, *arguments: str) -> tuple[int, str, str]:
        environment = {"PYTHONPATH": str(site), "COLUMNS": "200"}
        return Forked(function, *arguments, folder=site.parent, environment=environment).end()

    return run


def test_names_are_listed_and_load(forked):
    program = """
import json, sys
from trl_ext.registry import REWARDS, TRAINERS
listed = ["echo" in TRAINERS.names(), "short_answers" in REWARDS.names()]
imported = "trl_ext_echo" in sys.modules
trainer, reward = TRAINERS.load("echo"), REWARDS.load("short_answers")
scores = reward(prompts=["?", "?"], completions=["a b c", [{"role": "assistant", "content": "a"}]])
bases = [base.__name__ for base in trainer.__mro__]
print(json.dumps([listed, imported, bases[:2], trainer.config_class.__name__, scores]))
"""
    code, out, err = forked(exec, program)
    assert code == 0, err
    listed, imported, bases, config, scores = json.loads(out.splitlines()[-1])
    assert listed == [True, True]
    assert not imported, "listing names must import no plugin"
    assert (bases, config) == (["EchoTrainer", "RWRTrainer"], "EchoConfig")
    assert scores == [1 / 4, 1 / 2]


def test_a_recipe_for_it_validates(python, tmp_path):
    recipe = tmp_path / "echo.yaml"
    recipe.write_text(RECIPE.format(gain="gain"))
    run = python("-m", "trl_ext", "validate", str(recipe))
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_misspelt_field_of_its_config_is_found(python, tmp_path):
    recipe = tmp_path / "echo.yaml"
    recipe.write_text(RECIPE.format(gain="gian"))
    run = python("-m", "trl_ext", "validate", str(recipe))
    printed = run.stdout + run.stderr
    assert run.returncode != 0
    assert "echo.yaml:8" in printed
    assert "gian" in printed and "gain" in printed
    assert "Traceback" not in printed


def test_this_repository_knows_nothing_of_it():
    folders = [ROOT / name for name in ("trl_ext", "recipes", "configs")]
    sources = [p for folder in folders for p in folder.rglob("*") if p.suffix in {".py", ".yaml"}]
    assert sources
    for path in [*sources, ROOT / "pyproject.toml"]:
        assert "trl_ext_echo" not in path.read_text("utf-8"), path


def test_building_it_left_nothing_here():
    files = {p.name for p in SOURCE.iterdir()} - {"__pycache__"}
    assert files == {"pyproject.toml", "trl_ext_echo"}


@pytest.mark.slow
def test_it_trains(forked, tmp_path):
    settings = {
        "model_name_or_path": save_byte_llama(tmp_path / "model"),
        "dataset_name": "char_reverse",
        "output_dir": tmp_path / "out",
        "max_completion_length": 4,
        "max_steps": 2,
        "report_to": "none",
    }
    recipe = tmp_path / "echo.yaml"
    recipe.write_text(RECIPE.format(gain="gain"))
    overrides = [f"{key}={value}" for key, value in settings.items()]
    code, out, err = forked(trl_ext, "train", str(recipe), *overrides)
    assert code == 0, out + err
    assert "short_answers" in (tmp_path / "out" / "metrics.jsonl").read_text()
