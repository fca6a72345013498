"""Which command runs, what an error looks like, and what is imported on the way."""

import shlex
import subprocess
import sys

import pytest

from trl_ext import errors
from trl_ext.cli import COMMANDS

HEAVY = ("torch", "transformers", "trl", "datasets", "rich", "numpy")


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["validate", "r.yaml"],
        ["show", "r.yaml", "--defaults"],
        ["show", "r.yaml", "--json"],
        ["validate", "r.yaml", "lerning_rate=1", "trainer=rwx"],
        ["ls"],
        ["cp", "r.yaml", "s.yaml"],
    ],
)
def test_nothing_heavy_is_imported(tmp_path, monkeypatch, python, argv):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "trainer: rwr\nmodel_name_or_path: m\ndataset_name: d\noutput_dir: o\n"
        "reward_funcs: [reasoning_gym, no_such_module:f]\n"
    )
    program = f"""
import sys
from trl_ext.cli import main
try:
    code = main({argv!r})
except SystemExit as stop:
    code = stop.code
ours = [name for name in sys.modules if name.startswith("trl_ext.") and name.count(".") == 1]
print([code, sorted(set(sys.modules) & {set(HEAVY)!r}), "trl_ext.rwr" in ours])
"""
    code = 2 if "lerning_rate=1" in argv else 0
    assert python(program).splitlines()[-1] == str([code, [], False])


def test_no_command_prints_help(trl_ext):
    code, out, _ = trl_ext()
    assert code == 0
    assert "commands:" in out and "validate" in out


def test_an_unknown_command(trl_ext):
    code, _, err = trl_ext("trian")
    assert code == 2
    assert "there is no command 'trian'. Did you mean train?" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 2),
        (errors.UnknownNameError("x"), 2),
        (errors.DataError("x"), 2),
        (errors.MissingDependencyError("x"), 2),
        (errors.PluginError("x"), 2),
        (errors.RewardError("x"), 1),
        (errors.RunError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(trl_ext, monkeypatch, error, code):
    def fail(argv):
        raise error

    monkeypatch.setattr("trl_ext.cli._run", fail)
    got, out, err = trl_ext("ls")
    assert got == code
    assert out == ""
    assert err == ("Interrupted.\n" if code == 130 else "Error: x\n")


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_debug_shows_the_traceback(trl_ext, monkeypatch, how):
    monkeypatch.setenv("TRL_EXT_DEBUG", "1" if how == "variable" else "0")
    with pytest.raises(errors.UnknownNameError):
        trl_ext("validate", "nope", *(["--debug"] if how == "flag" else []))


def test_a_bug_keeps_its_traceback(trl_ext, monkeypatch):
    monkeypatch.setattr("trl_ext.cli._run", lambda argv: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trl_ext("ls")


def test_a_pipe_that_closes_early_is_no_error(tmp_path):
    recipe = tmp_path / "r.yaml"
    text = "trainer: rwr\nmodel_name_or_path: m\ndataset_name: d\noutput_dir: o\n"
    recipe.write_text(text + f"run_name: {'x' * 200_000}\n")  # more than a pipe holds
    command = f"{shlex.quote(sys.executable)} -m trl_ext show {recipe} | head -c 10"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stderr == ""


def test_every_command_documents_itself(trl_ext):
    for name, text in COMMANDS.items():
        code, out, _ = trl_ext(name, "--help")
        assert code == 0
        assert text.removesuffix(".") in out
