"""Every equation of a done issue has code that claims it and a test that proves it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_equation_is_missing():
    tool = [sys.executable, "scripts/equations.py", "--quiet"]
    run = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
