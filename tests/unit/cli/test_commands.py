"""validate, show, ls, cp and env."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_ext.kl_table import OURS
from trl_ext.recipe import read_recipe
from trl_ext.recipe.yaml_reader import write_yaml


def test_validate(home, trl_ext):
    code, out, err = trl_ext("validate", "rwr/first", "beta=1")
    assert (code, err) == (0, "")
    assert out.startswith("ok: ") and out.endswith("first.yaml: trainer rwr, 6 keys\n")


def test_validate_says_what_is_wrong(home, trl_ext):
    code, out, err = trl_ext("validate", "rwr/first", "--beta", "x", "--sede", "1")
    assert (code, out) == (2, "")
    assert "command line: beta: got 'x'" in err
    assert "command line: sede: unknown key, with the value 1. Did you mean seed?" in err


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("{name: regex_match, pattern: '('}", "'(' is no regular expression: missing )"),
        ("{name: regex_match, patern: a}", "missing a required argument: 'pattern'"),
        ("{name: regex_match, pattern: a, timeout: 3}", "unexpected keyword argument 'timeout'"),
        ("{name: json_schema, schema: {type: strng}}", "no JSON Schema, at type: 'strng'"),
        ("{name: json_schema, schema: {$ref: '#/$defs/a'}}", "refers to '#/$defs/a'"),
        ("{name: reasoning_gym, raeder: lenient}", "no argument 'raeder'"),
        ("{name: reasoning_gym, reader: lax}", "reader is 'lax'; it must be strict or lenient"),
        ("{name: regex_match, pattern: a, isolated: 1}", "it must be true or false"),
        ("{name: regex_match, pattern: a, isolated: true, timeout: 0}", "timeout is 0; it must"),
        ("{name: math_verify, timeout: -1}", "timeout is -1; it must"),
        ("{name: math_verify, column: a}", "unexpected keyword argument 'column'"),
        ("{name: reward_ensemble, members: [{name: regex_match, pattern: '['}]}", "'[' is no reg"),
    ],
)
@pytest.mark.parametrize("key", ["reward_funcs", "gold_reward_funcs"])
def test_validate_makes_verifiable_rewards(home, trl_ext, key, entry, says):
    rewards = {"reward_funcs": "exact_match"} | {key: entry}
    Path("r.yaml").write_text(
        f"extends: {home}/recipes/rwr/first.yaml\neval_strategy: steps\neval_on_start: true\n"
        + "".join(f"{name}: [{reward}]\n" for name, reward in rewards.items())
    )
    code, out, err = trl_ext("validate", "r.yaml")
    assert (code, out) == (2, ""), err
    assert f": {key}: " in err and says in " ".join(err.split()), err


def test_validate_imports_no_reward_of_a_user(home, trl_ext):
    rewards = "[mine.rewards:one, {name: regex_match, pattern: a, isolated: true}, math_verify]"
    code, _, err = trl_ext("validate", "rwr/first", f"reward_funcs={rewards}")
    assert code == 0, err


def test_show(home, trl_ext):
    Path("r.yaml").write_text(
        "trainer: rwr\nextends: recipes/rwr/first.yaml\nenv: {A: 1}\n"
        "reward_funcs: [accuracy_reward]\nnum_processes: 1\n"
    )
    Path("b.yaml").write_text("model_name_or_path: m\ndataset_name: d\noutput_dir: o\n")
    text = Path("r.yaml").read_text().replace("recipes/rwr/first.yaml", "b.yaml")
    Path("r.yaml").write_text(text)
    code, out, _ = trl_ext("show", "r.yaml", "seed=3")
    assert code == 0
    assert out == (
        "trainer: rwr           # r.yaml:1\n"
        "num_processes: 1       # r.yaml:5\n"
        "env:\n"
        "  A: '1'               # r.yaml:3\n"
        "model_name_or_path: m  # b.yaml:1\n"
        "dataset_name: d        # b.yaml:2\n"
        "output_dir: o          # b.yaml:3\n"
        "reward_funcs:          # r.yaml:4\n"
        "- accuracy_reward\n"
        "seed: 3                # command line\n"
    )


def test_show_has_numbers_as_they_were_written(home, trl_ext):
    """A float's field reads 20 as 20.0; a word that YAML takes for a boolean stays a word."""
    Path("r.yaml").write_text(
        f"extends: {home}/recipes/rwr/first.yaml\nreward_timeout: 20\ntemperature: 1.0\n"
        "save_strategy: no\nreward_funcs: [vader, exact_match]\nreward_weights: [1, 2.0]\n"
    )
    code, out, err = trl_ext("show", "r.yaml", "beta=3")
    assert code == 0, err
    for text in ("reward_timeout: 20 ", "temperature: 1.0 ", "save_strategy: 'no' ", "beta: 3 "):
        assert f"\n{text}" in out, out
    assert "- 1\n- 2.0\n" in out
    _, out, _ = trl_ext("show", "r.yaml", "--json")
    assert '"reward_timeout": 20,' in out


def test_show_fits_a_narrow_terminal(home, trl_ext, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    Path("r.yaml").write_text("trainer: rwr\nmodel_name_or_path: m\ndataset_name: d\noutput_dir: o")
    _, out, _ = trl_ext("show", "r.yaml", "num_processes=1")
    assert max(map(len, out.splitlines())) <= 30
    assert "# command line\nnum_processes: 1\n" in out


def test_show_json(home, trl_ext):
    _, out, _ = trl_ext("show", "rwr/first", "--json", "--defaults")
    shown = json.loads(out)
    assert shown["values"]["learning_rate"] == 1e-5
    assert shown["origins"]["seed"].endswith("base.yaml:2")
    assert shown["defaults"]["lora_r"] == 16


VALUES = {
    "run_name": st.text(),
    "beta": st.floats(min_value=0, allow_nan=False),
    "num_train_epochs": st.integers(1, 9) | st.floats(0.1, 9),
    "save_strategy": st.sampled_from(["no", "steps", "epoch", "best"]),
    "bf16": st.booleans() | st.none(),
    "stop_strings": st.lists(st.text(), max_size=3),
    "dataset_kwargs": st.dictionaries(
        st.text(max_size=9), st.text() | st.floats(allow_nan=False) | st.booleans(), max_size=3
    ),
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.fixed_dictionaries({}, optional=VALUES), st.booleans())
def test_show_reads_back(home, trl_ext, values, defaults):
    least = {"trainer": "rwr", "model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    Path("r.yaml").write_text(write_yaml({**least, **values}), encoding="utf-8")
    recipe = read_recipe("r.yaml")
    assert {key: recipe.values[key] for key in values} == values
    code, out, err = trl_ext("show", "r.yaml", *(["--defaults"] if defaults else []))
    assert code == 0, err
    Path("shown.yaml").write_text(out, encoding="utf-8")
    shown = read_recipe("shown.yaml")
    assert {key: shown.values[key] for key in recipe.values} == recipe.values
    for key in set(shown.values) - set(recipe.values):
        assert defaults and shown.values[key] == recipe.defaults()[key], key


def test_ls(home, trl_ext):
    code, out, _ = trl_ext("ls")
    assert code == 0
    assert out == (
        "rwr/base\n    A base.\n"
        "rwr/first\n    To be read, in a test of two lines.\n    Hardware: none\n"
        "\nRun one with `trl_ext train NAME`, copy one with `trl_ext cp NAME`.\n"
    )


def test_show_json_is_json_for_an_infinite_value_too(home, trl_ext):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    code, out, err = trl_ext("show", "rwr/first", "--json", "beta=.inf")
    assert code == 0, err
    assert json.loads(out, parse_constant=refuse)["values"]["beta"] == "Infinity"


def test_ls_json(home, trl_ext):
    _, out, _ = trl_ext("ls", "--json")
    assert json.loads(out)["rwr/first"] == {
        "purpose": "To be read, in a test of two lines.",
        "hardware": "none",
        "command": "trl_ext train x",
    }


def test_ls_fits_a_narrow_terminal(home, trl_ext, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    _, out, _ = trl_ext("ls")
    entries = out.split("\n\n")[0]
    assert max(map(len, entries.splitlines())) <= 20


@pytest.mark.parametrize("destination", [[], ["mine.yaml"], ["."]])
def test_cp_keeps_meaning_the_same(home, trl_ext, destination):
    code, _, err = trl_ext("cp", "rwr/first", *destination)
    assert code == 0, err
    copy = Path("mine.yaml" if destination == ["mine.yaml"] else "first.yaml")
    original = (home / "recipes/rwr/first.yaml").read_text()
    renamed = original.replace("extends: base.yaml", "extends: recipes/rwr/base.yaml")
    assert copy.read_text() == renamed
    assert read_recipe(copy).values == read_recipe("rwr/first").values


def test_cp_of_ones_own_file(home, trl_ext):
    Path("a b").mkdir()
    Path("a b/base.yaml").write_text("seed: 5\n")
    least = "trainer: rwr\nmodel_name_or_path: m\ndataset_name: d\noutput_dir: o\n"
    Path("a b/r.yaml").write_text(least + "extends: ['base.yaml', \"base.yaml\"] # both\n")
    assert trl_ext("cp", "a b/r.yaml", "copy.yaml")[0] == 0
    assert 'extends: ["a b/base.yaml", "a b/base.yaml"] # both' in Path("copy.yaml").read_text()
    assert read_recipe("copy.yaml").values["seed"] == 5


def test_cp_replaces_nothing(home, trl_ext):
    Path("first.yaml").write_text("mine")
    code, _, err = trl_ext("cp", "rwr/first")
    assert code == 2
    assert "first.yaml exists and is left alone" in err
    assert Path("first.yaml").read_text() == "mine"


def test_cp_into_no_folder(home, trl_ext):
    code, _, err = trl_ext("cp", "rwr/first", "no/such/x.yaml")
    assert code == 2
    assert "There is no folder no/such" in err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: \xff\n", "bad.yaml: this is not a text file in UTF-8"),
        (b"a: 1\nb: [1\nc: 2\n", "bad.yaml:3: this is not valid YAML"),
        (b"a: 1\nb: &x [*x]\n", "bad.yaml:2: *x stands for what it is itself a part of"),
    ],
)
def test_cp_of_what_is_no_recipe(home, trl_ext, content, says):
    Path("bad.yaml").write_bytes(content)
    code, _, err = trl_ext("cp", "bad.yaml", "copy.yaml")
    assert code == 2 and says in err
    assert not Path("copy.yaml").exists()


def test_cp_to_where_nothing_can_be_written(home, trl_ext, monkeypatch):
    code, _, err = trl_ext("cp", "rwr/first", "x" * 300)
    assert code == 2 and "cannot be written: File name too long" in err

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "")
    code, _, err = trl_ext("cp", "rwr/first", "x.yaml")
    assert code == 2 and "x.yaml cannot be written: Permission denied" in err


def test_a_recipe_whose_name_is_too_long(home, trl_ext):
    code, _, err = trl_ext("cp", "x" * 300)
    assert code == 2 and "There is no recipe xxx" in err


def test_env(trl_ext):
    code, out, _ = trl_ext("env", "--json")
    facts = json.loads(out)
    assert code == 0
    assert {"trl_ext", "trl", "transformers", "torch", "peft", "python", "device"} <= set(facts)
    assert facts["trl"].startswith("1.16")
    assert "trl_ext " in trl_ext("env")[1]


@pytest.mark.parametrize("argv", [["ls"], ["show", "rwr/first"], ["env"], ["--help"]])
def test_no_colour_in_a_pipe(home, trl_ext, argv):
    assert "\x1b" not in trl_ext(*argv)[1]


@pytest.fixture
def two_methods(monkeypatch):
    monkeypatch.setattr("trl_ext.kl_table.OURS", OURS[:2])
    monkeypatch.setattr("trl_ext.kl_table.OTHERS", [])
    monkeypatch.setattr("trl_ext.cli.kl_table.QUICK_STEPS", 2)


def test_kl_table(two_methods, trl_ext, tmp_path):
    code, out, err = trl_ext("kl-table", "--quick", "--json", str(tmp_path / "t.json"))
    assert (code, err) == (0, "")
    assert "| k2 in the loss | trl_ext | 0.077 |" in out
    rows = json.loads((tmp_path / "t.json").read_text())
    assert [row["method"] for row in rows] == ["k1 in the loss", "k2 in the loss"]
    assert rows[1]["on_policy"]["part"] == "per step"


def test_kl_table_of_ones_own(two_methods, trl_ext, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def difference(p, q):\n    return p - q\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = trl_ext(
        "kl-table", "--quick", "--method", "mine:difference", "--placement", "reward"
    )
    assert code == 0, err
    (row,) = [line for line in out.splitlines() if "mine:difference" in line]
    assert "| yours |" in row and "| whole |" in row
    code, _, err = trl_ext("kl-table", "--quick", "--method", "mine:diference")
    assert code == 2 and "diference" in err


def test_kl_table_of_a_broken_one_computes_nothing(two_methods, trl_ext, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("five = 5\ndef one(p):\n    return p\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("trl_ext.kl_table.graded", lambda *_, **__: pytest.fail("computed"))
    code, _, err = trl_ext("kl-table", "--method", "broken:five")
    assert code == 2 and "broken:five is no function, but of type int" in err
    code, _, err = trl_ext("kl-table", "--method", "broken:one")
    assert code == 2 and "broken:one raised TypeError" in err


def test_kl_table_fails_where_a_claim_is_false(two_methods, trl_ext, monkeypatch):
    liar = dataclasses.replace(OURS[0], claim="whole")
    monkeypatch.setattr("trl_ext.kl_table.OURS", [liar])
    code, _, err = trl_ext("kl-table", "--quick")
    assert code == 1
    assert "Contradicted: k1 in the loss: its on-policy gradient is said to be whole" in err


def test_kl_table_that_cannot_be_written(two_methods, trl_ext, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ext.kl_table.graded", lambda *_, **__: pytest.fail("computed"))
    code, _, err = trl_ext("kl-table", "--json", str(tmp_path))
    assert code == 2 and "cannot be written" in err
    code, _, err = trl_ext("kl-table", "--quick", "--json", str(tmp_path / "no" / "t.json"))
    assert code == 2 and "cannot be written" in err
