"""`trl_ext env`: what it prints, its exit code, and that a broken torch does not break it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_ext.cli import env
from trl_ext.doctor import Finding, Probed
from trl_ext.environment import environment

FINDINGS = {
    "ok": Finding("gpu", "ok", "NVIDIA H100."),
    "note": Finding("processes", "note", "2 GPUs are visible.", "accelerate_config=ddp"),
    "warning": Finding("disk", "warning", "a word " * 20, "Make room."),
    "error": Finding("torch", "error", "it cannot be imported.", "Install it."),
}


@pytest.fixture
def found(monkeypatch):
    """found("ok", "error"): these are what the doctor finds; returns what it was asked."""
    asked = []

    def fake(*levels: str, probed: Probed | None = None) -> list:
        def diagnose(probed, **options):
            asked.append(options)
            return [FINDINGS[level] for level in levels]

        monkeypatch.setattr(env, "diagnose", diagnose)
        monkeypatch.setattr(env, "probe", lambda: probed or Probed({"torch": {"device": "H100"}}))
        return asked

    return fake


@pytest.mark.parametrize(
    ("levels", "code", "last"),
    [
        (["ok"], 0, "Nothing is wrong."),
        (["ok", "note"], 0, "Nothing is wrong."),
        (["warning", "warning"], 0, "2 warnings."),
        (["warning", "error"], 1, "1 error and 1 warning."),
    ],
)
def test_the_exit_code_is_that_of_errors(found, trl_ext, levels, code, last):
    found(*levels)
    assert trl_ext("env")[0] == code
    assert trl_ext("env")[1].splitlines()[-1] == last
    assert trl_ext("env", "--json")[0] == code


def test_what_is_printed(found, trl_ext, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    found("ok", "note", "warning")
    _, out, err = trl_ext("env")
    assert err == "" and max(map(len, out.splitlines())) <= 60
    table, findings = out.split("\n\n")[:2]
    assert "trl_ext       " in table and "\ndevice        H100\n" in table
    assert findings.startswith(
        "ok       gpu: NVIDIA H100.\n"
        "note     processes: 2 GPUs are visible.\n"
        "         → accelerate_config=ddp\n"
        "warning  disk: a word"
    )
    assert "\n         word" in findings and findings.endswith("\n         → Make room.")


def test_json_keeps_the_record_of_a_run(found, trl_ext):
    """What environment.json has stays as it is there; the findings come beside."""
    found("ok", "error")
    facts = json.loads(trl_ext("env", "--json")[1])
    assert facts.pop("findings") == [
        {"name": "gpu", "level": "ok", "says": "NVIDIA H100.", "do": ""},
        {"name": "torch", "level": "error", "says": "it cannot be imported.", "do": "Install it."},
    ]
    assert facts == environment(device="H100")
    assert list(facts) == list(environment())


def test_options_reach_the_doctor(found, trl_ext):
    asked = found("ok")
    trl_ext("env")
    trl_ext("env", "--hub", "--output-dir", "/big/runs")
    assert asked == [{"output": "outputs", "hub": False}, {"output": "/big/runs", "hub": True}]


@pytest.mark.parametrize(
    ("probed", "device"),
    [
        (Probed(), "unknown without torch"),
        (Probed(errors={"torch": "x"}), "unknown: torch cannot be imported"),
    ],
)
def test_a_device_without_torch(found, trl_ext, probed, device):
    found("ok", probed=probed)
    assert json.loads(trl_ext("env", "--json")[1])["device"] == device


def test_a_broken_torch(tmp_path):
    """The whole command, where importing torch kills Python: said in a finding, and exit code 1."""
    for name in ("torch", "bitsandbytes", "flash_attn"):
        (tmp_path / f"{name}.py").write_text("import os; os.abort()\n")
    root = str(Path(__file__).parents[3])
    paths = os.pathsep.join((str(tmp_path), root))
    command = [sys.executable, "-m", "trl_ext", "env", "--json", "--output-dir", str(tmp_path)]
    variables = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=root)
    assert (done.returncode, done.stderr) == (1, "")
    facts = json.loads(done.stdout)
    assert facts["device"] == "unknown: torch cannot be imported" and facts["trl"]
    (broken,) = [finding for finding in facts["findings"] if finding["name"] == "torch"]
    assert broken["level"] == "error" and "Python died of signal 6" in broken["says"]


def test_nothing_heavy_is_imported_beside_the_probe(python):
    program = (
        "import sys; import trl_ext.cli.env; print({'torch', 'transformers'} & {*sys.modules})"
    )
    assert python(program) == "set()\n"
