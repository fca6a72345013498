"""Recipes of a few lines, written to a temporary folder that is the current one."""

from collections.abc import Callable
from pathlib import Path

import pytest

# The least that a recipe must say.
LEAST = """\
trainer: rwr
model_name_or_path: some/model
dataset_name: some/data
output_dir: out
"""


@pytest.fixture
def write(tmp_path, monkeypatch) -> Callable[..., Path]:
    """write(name, text, least=True) -> path; the least recipe comes first unless least=False."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str, *, least: bool = True) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((LEAST if least else "") + text, encoding="utf-8")
        return path

    return write_file
