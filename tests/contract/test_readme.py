"""What README.md shows works: its recipe is one, and its Python runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trl_ext.recipe import read_recipe

REPOSITORY = Path(__file__).resolve().parents[2]


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    found = re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
    assert found, language
    return found


def test_the_recipe_is_the_quickstarts(tmp_path):
    """So that a reader who types it sees what the page shows. What it leaves out is listed."""
    (tmp_path / "mine.yaml").write_text(blocks("yaml")[0])
    ours = read_recipe(tmp_path / "mine.yaml").values
    shipped = read_recipe("rwr/quickstart").values
    differs = {key for key in ours.keys() | shipped.keys() if ours.get(key) != shipped.get(key)}
    assert differs <= {
        "output_dir",
        "attn_implementation",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_r",
        "num_generations_eval",
        "save_strategy",
        "save_steps",
        "report_to",
        "dataloader_pin_memory",
    }


@pytest.mark.slow
def test_the_python_runs(tmp_path):
    """One block after the other, on a tiny model, which the bundled one's name stands for."""
    program = "\n".join(blocks("python")).replace('"bundled:smollm2-135m-instruct"', "tiny")
    prelude = (
        "from pathlib import Path\nfrom tests.tiny import save_byte_llama\n"
        f"tiny = save_byte_llama(Path({str(tmp_path / 'tiny')!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude + program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
