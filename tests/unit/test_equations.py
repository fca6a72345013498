"""The tool behind `make equations`, on toy trees."""

import pytest

from scripts import equations


@pytest.fixture
def tree(tmp_path):
    """Write {relative path: source} and return the root."""

    def write(files):
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("docstring", "ids"),
    [
        ("Equation E3.", ["E3"]),
        ("By Equations E3, E5.", ["E3", "E5"]),
        ("Equations E1-E3", ["E1", "E2", "E3"]),
        ("Equations E1–E2, E9 and E11.", ["E1", "E2", "E9", "E11"]),
        ("Equation\n    E4, which is nice. Equation E4 again", ["E4"]),
        ("Equation E3 on a GPU, E8 is not claimed here", ["E3"]),
        ("see E3; the equation holds", []),
    ],
)
def test_claimed_ids(docstring, ids):
    assert equations.claimed_ids(docstring) == ids


def test_functions_methods_and_classes_count_modules_do_not(tree):
    root = tree(
        {
            "trl_ext/a.py": '"""Equation E1."""\n'
            'def f():\n    """Equation E2."""\n'
            'class C:\n    """Equation E3."""\n'
            '    def g(self):\n        """Equation E4."""\n'
            "    # Equation E5\n    def h(self): ...\n"
        }
    )
    path = root / "trl_ext/a.py"
    assert equations.find_functions(root) == {
        "E2": [f"{path}:2 f"],
        "E3": [f"{path}:4 C"],
        "E4": [f"{path}:6 C.g"],
    }


def test_marks_on_tests_classes_and_modules_count(tree):
    root = tree(
        {
            "tests/test_a.py": "import pytest\n"
            "@pytest.mark.equation('E1', 'E2')\ndef test_one(): ...\n"
            "@pytest.mark.slow\ndef test_two(): ...\n"
            "@pytest.mark.equation('E3')\nclass TestThree:\n    def test_x(self): ...\n",
            "tests/test_b.py": "pytestmark = [pytest.mark.slow, pytest.mark.equation('E4')]\n",
            "tests/helper.py": "@pytest.mark.equation('E5')\ndef not_a_test(): ...\n",
        }
    )
    one, two = root / "tests/test_a.py", root / "tests/test_b.py"
    assert equations.find_tests(root) == {
        "E1": [f"{one}::test_one"],
        "E2": [f"{one}::test_one"],
        "E3": [f"{one}::TestThree"],
        "E4": [str(two)],
    }


def test_problems_name_what_is_missing():
    found = equations.problems(
        {"E3": ["f"], "E4": ["f"]}, {"E3": ["t"], "E99": ["u"]}, ["E3", "E4"]
    )
    assert found == [
        "E4 (log form of the optimum; implicit reward) has no test marked "
        "@pytest.mark.equation('E4')",
        "E99 is not an equation of this project: u",
    ]


def test_main_fails_with_the_list_and_passes_when_complete(tree, capsys):
    assert equations.main(["--root", str(tree({"trl_ext/a.py": "", "tests/test_a.py": ""}))]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("E1   objective")
    assert "E52 (gambler's ruin) has no function whose docstring" in printed.err

    done = sorted(equations.DONE)
    root = tree(
        {
            "trl_ext/a.py": f'def f():\n    """Equations {", ".join(done)}."""\n',
            "tests/test_a.py": f"@pytest.mark.equation{tuple(done)}\ndef test_f(): ...\n",
        }
    )
    assert equations.main(["--root", str(root), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_every_equation_has_a_title():
    assert list(equations.TITLES) == [f"E{i}" for i in range(1, 58)]
    assert set(equations.TITLES) >= equations.DONE
