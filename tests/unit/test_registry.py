"""Names resolve without importing; loading is lazy and fails loudly."""

import subprocess
import sys

import pytest

from trl_ext import registry
from trl_ext.errors import PluginError, UnknownNameError
from trl_ext.registry import KL_ESTIMATORS, REWARDS, TRAINERS, Registry


def make(**builtin):
    return Registry("shape", "trl_ext.test_shapes", builtin, "a function of a radius")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install distribution metadata with these entry points: what pip leaves behind."""

    def install(**points):
        info = tmp_path / "toy_plugin-1.0.dist-info"
        info.mkdir()
        lines = [f"{name} = {target}" for name, target in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[trl_ext.test_shapes]", *lines]))
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-plugin\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_builtin_name_loads():
    import math

    shapes = make(root="math:sqrt")
    assert shapes.names() == ["root"]
    assert shapes.resolve("root") == "math:sqrt"
    assert shapes.load("root") is math.sqrt


def test_nested_attribute_loads():
    assert make(join="os:path.join").load("join").__name__ == "join"


def test_plugin_adds_a_name(plugin):
    plugin(circle="math:tau")
    shapes = make(root="math:sqrt")
    assert shapes.names() == ["circle", "root"]
    assert shapes.load("circle") == pytest.approx(6.283185307179586)


def test_plugin_cannot_replace_a_builtin_name(plugin):
    plugin(root="math:tau")
    with pytest.raises(PluginError) as caught:
        make(root="math:sqrt").names()
    assert str(caught.value) == (
        "The shape name 'root' stands for 'math:sqrt' already, and a plugin registers it for "
        "'math:tau' in the entry-point group 'trl_ext.test_shapes'. Rename the plugin's entry "
        "point."
    )


def test_object_spelt_out_needs_no_registration():
    assert make().resolve("os.path:join") == "os.path:join"
    assert make().load("os.path:join").__name__ == "join"


def test_unknown_name_lists_what_exists_and_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        make(square="math:sqrt", circle="math:tau").resolve("sqare")
    assert str(caught.value) == (
        "There is no shape called 'sqare'. Did you mean 'square'? Known: circle, square. "
        "Your own is 'package.module:object', or an entry point in the group "
        "'trl_ext.test_shapes'."
    )


@pytest.mark.parametrize(
    "name", ["", ":", "a:", ":b", "a b:c", "a:b:c", "../a:b", "1a:b", "a..b:c"]
)
def test_malformed_name_is_unknown_not_imported(name):
    with pytest.raises(UnknownNameError, match="There is no shape called"):
        make(square="math:sqrt").resolve(name)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_package.module:x", "No module named 'no_such_package'"),
        ("math:no_such_function", "no attribute 'no_such_function'"),
    ],
)
def test_target_that_cannot_be_loaded_says_why(target, reason):
    with pytest.raises(PluginError, match=reason) as caught:
        make(broken=target).load("broken")
    assert f"The shape 'broken' stands for '{target}', which cannot be loaded" in str(caught.value)
    assert "A shape must be a function of a radius." in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError | AttributeError)


def test_error_inside_a_plugin_keeps_its_name_and_traceback(tmp_path, monkeypatch):
    (tmp_path / "toy_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match="ZeroDivisionError: division by zero") as caught:
        make().load("toy_broken:x")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("table", [TRAINERS, REWARDS, KL_ESTIMATORS], ids=lambda table: table.kind)
def test_builtin_targets_are_well_formed(table):
    assert table.names()
    for name in table.names():
        assert name.replace("_", "").isalnum()
        assert table.resolve(table.resolve(name)) == table.resolve(name)


def test_kl_estimators_load():
    from trl_ext import functional

    assert KL_ESTIMATORS.load("k3") is functional.k3


def test_listing_and_resolving_import_nothing():
    program = (
        "import sys; from trl_ext.registry import TRAINERS; "
        "TRAINERS.names(); TRAINERS.resolve('rwr'); "
        "print([m for m in ('torch', 'trl', 'transformers', 'trl_ext.rwr') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_groups_are_the_documented_ones():
    groups = {table.group for table in vars(registry).values() if isinstance(table, Registry)}
    assert groups == {"trl_ext.trainers", "trl_ext.rewards", "trl_ext.kl_estimators"}
