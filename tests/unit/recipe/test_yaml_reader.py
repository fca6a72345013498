"""YAML scalars as a recipe means them, duplicates, and a writer that reads back the same."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.recipe.findings import COMMAND_LINE
from trl_ext.recipe.yaml_reader import read_scalar, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),  # PyYAML: the text "1e-5"
        ("1E6", 1e6),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("010", 10),  # PyYAML: octal, 8
        ("1_000", 1000),
        ("0x10", 16),
        ("1:30", "1:30"),  # PyYAML: base sixty, 90
        ("2024-01-01", "2024-01-01"),  # PyYAML: a date
        ("=", "="),  # PyYAML: cannot construct
        ("yes", True),
        ("true", True),
        ("~", None),
        ("", None),
        ("[1, 1e-3]", [1, 0.001]),
        ("{a: no}", {"a": False}),
        ("1.2.3", "1.2.3"),
        ("'5'", "5"),
        ("a: b: c", "a: b: c"),  # not YAML
    ],
)
def test_scalars(text, value):
    read = read_scalar(text, COMMAND_LINE).value
    assert read == value
    assert type(read) is type(value)


def test_only_an_unquoted_word_keeps_its_text():
    assert read_scalar("no", COMMAND_LINE).text == "no"
    assert read_scalar("'no'", COMMAND_LINE).text is None


def test_entries_remember_their_lines(write):
    path = write("a.yaml", "# comment\na: 1\n\nb:\n  - 2\nenv:\n  X: 007\n", least=False)
    findings = []
    entries = read_yaml(path, "a.yaml", findings)
    assert {key: entry.value for key, entry in entries.items()} == {
        "a": 1,
        "b": [2],
        "env.X": "007",  # a variable is text, as written
    }
    assert {key: str(entry.origin) for key, entry in entries.items()} == {
        "a": "a.yaml:2",
        "b": "a.yaml:4",
        "env.X": "a.yaml:7",
    }
    assert findings == []


def test_a_duplicate_is_found_at_every_depth(write):
    path = write("a.yaml", "a: 1\nb: [{c: 1, c: 2}]\na: 2\nenv:\n  X: 1\n  X: 2\n", least=False)
    findings = []
    read_yaml(path, "a.yaml", findings)
    assert [(str(f.origin), f.key) for f in findings] == [
        ("a.yaml:2", "b[0].c"),
        ("a.yaml:3", "a"),
        ("a.yaml:6", "env.X"),
    ]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(["1e-5", "010", "no", "2024-01-01", "1:30", "~", ".inf", "a\nb", "# x", ""]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(JSON)
def test_what_is_written_reads_back(value):
    text = write_yaml({"key": value})
    assert read_scalar(text, COMMAND_LINE).value == {"key": value}
    assert yaml.safe_load(text) == {"key": value}, "PyYAML, and so TRL, reads it the same way"


@given(st.text())
def test_a_scalar_is_one_line(text):
    assert write_yaml({"key": text}).count("\n") == 1


def test_a_file_that_cannot_be_read(tmp_path):
    findings = []
    assert read_yaml(tmp_path, "a.yaml", findings) == {}  # a folder; root may read every file
    assert str(findings[0]) == "a.yaml: cannot be read: Is a directory"


def test_a_file_that_is_not_utf8(tmp_path):
    path = Path(tmp_path, "a.yaml")
    path.write_bytes(b"a: \xff\n")
    findings = []
    assert read_yaml(path, "a.yaml", findings) == {}
    assert str(findings[0]) == "a.yaml: this is not a text file in UTF-8: invalid start byte"


@pytest.mark.parametrize("text", ["a: 1\n".encode("utf-16"), "a: 1\n".encode("utf-16-le")])
def test_another_encoding_is_named(tmp_path, text):
    path = Path(tmp_path, "a.yaml")
    path.write_bytes(text)
    findings = []
    assert read_yaml(path, "a.yaml", findings) == {}
    assert "not a text file in UTF-8" in str(findings[0])


DEEP = "[" * 500 + "]" * 500


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: &x {c: *x}", "a.yaml:2: *x stands for what it is itself a part of"),
        ("a: 1\nb: &x [1, [*x]]", "a.yaml:2: *x stands for what it is itself a part of"),
        (f"a: 1\nb: {DEEP}", "a.yaml:2: nested more than 50 deep"),
        ("a: 1\nb: 0x_", "a.yaml:2: b: '0x_' cannot be read as !!int"),
        ("a: 1\nb: [1, !!int abc]", "a.yaml:2: b: 'abc' cannot be read as !!int"),
        ("a: 1\nb: !!float abc", "a.yaml:2: b: 'abc' cannot be read as !!float"),
        ("a: 1\nb: !!float ''", "a.yaml:2: b: '' cannot be read as !!float"),
        ("a: 1\nb: !!bool maybe", "a.yaml:2: b: 'maybe' cannot be read as !!bool"),
        ("a: 1\nb: !!timestamp foo", "a.yaml:2: b: could not determine a constructor"),
        ("a: 1\nb: " + "9" * 5000, "a.yaml:2: b: '9999"),
    ],
)
def test_what_pyyaml_fails_at_is_a_finding(write, text, says):
    path = write("a.yaml", text + "\nd: 2\n", least=False)
    findings = []
    entries = read_yaml(path, "a.yaml", findings)
    assert len(findings) == 1
    assert str(findings[0]).startswith(says)
    if findings[0].key:
        assert entries["a"].value == 1 and entries["d"].value == 2, "the rest is read"
    assert len(str(findings[0])) < 200


@pytest.mark.parametrize("text", ["0x_", "!!int abc", "!!bool maybe", "9" * 5000, "&x [*x]", DEEP])
def test_on_the_command_line_it_is_text(text):
    assert read_scalar(text, COMMAND_LINE).value == text


def test_an_alias_may_be_used_twice(write):
    path = write("a.yaml", "a: &x {y: [1]}\nb: [*x, *x]\n", least=False)
    findings = []
    assert read_yaml(path, "a.yaml", findings)["b"].value == [{"y": [1]}] * 2
    assert findings == []


def test_aliases_of_aliases_take_no_time(write):
    # 2^40 paths lead to the innermost list.
    lines = ["a0: &a0 [1]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 41)]
    findings = []
    path = write("a.yaml", "\n".join(lines), least=False)
    assert len(read_yaml(path, "a.yaml", findings)) == 41
