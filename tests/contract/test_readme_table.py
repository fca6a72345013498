"""The table of KL penalties in README.md is what `trl_ext kl-table` gives."""

import re
from pathlib import Path

import pytest

from trl_ext.kl_table import OTHERS, OURS, graded, markdown

README = Path(__file__).resolve().parents[2] / "README.md"
NUMBER = re.compile(r"-?\d+\.\d+")


def rows(text: str) -> list[str]:
    """The rows of graded methods: those with as many columns as the table has."""
    return [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == 12]


def test_the_table_in_the_readme_is_the_tables_own():
    """All but the last column, which takes longer to train than this test may."""
    ours, shown = (
        rows(text) for text in (markdown(graded([*OURS, *OTHERS], steps=1)), README.read_text())
    )
    assert len(shown) == len(ours)
    for line, expected in zip(shown, ours, strict=True):
        assert NUMBER.sub("", line) == NUMBER.sub("", expected)
        numbers, wanted = (
            [float(n) for n in NUMBER.findall(text)][:-1] for text in (line, expected)
        )
        assert numbers == pytest.approx(wanted, abs=0.011)
