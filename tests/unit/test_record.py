import json
import os
from pathlib import Path

import pytest

from trl_ext.errors import ConfigError, RunError
from trl_ext.record import (
    METRICS,
    RunRecord,
    checkpoint_to_resume,
    is_complete,
    is_last_step,
    last_checkpoint,
)


def write_checkpoint(folder, step, text=None):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    state = json.dumps({"global_step": step}) if text is None else text
    (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def test_the_newest_complete_checkpoint_is_found_by_number(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (2, 9, 10):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()
    write_checkpoint(tmp_path, 12, '{"global_step": 1')
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not is_complete(tmp_path / "checkpoint-11")
    assert not is_complete(tmp_path / "checkpoint-12")


def test_resume_from_a_named_checkpoint_or_folder(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 4)
    assert checkpoint_to_resume(tmp_path, False) is None
    assert checkpoint_to_resume(tmp_path, True) == checkpoint
    assert checkpoint_to_resume(tmp_path, str(checkpoint)) == checkpoint
    assert checkpoint_to_resume(tmp_path / "elsewhere", str(tmp_path)) == checkpoint
    with pytest.raises(RunError, match="has none at all"):
        checkpoint_to_resume(tmp_path / "empty", str(tmp_path / "empty"))
    with pytest.raises(RunError, match=r"newest complete one is .*checkpoint-4"):
        checkpoint_to_resume(tmp_path, str(tmp_path / "checkpoint-5"))


def test_a_directory_belongs_to_one_run(tmp_path):
    record = RunRecord(tmp_path / "run")
    record.check_free(resume=False, overwrite=False)
    with record.begun(overwrite=False):
        pass
    record.check_free(resume=False, overwrite=False)  # still empty
    (tmp_path / "run" / "recipe.yaml").write_text("trainer: rwr\n")
    with pytest.raises(ConfigError, match="holds files already"):
        record.check_free(resume=False, overwrite=False)
    with pytest.raises(ConfigError, match="would train over"):
        record.check_free(resume=True, overwrite=False)
    record.describe("trainer: rwr\n")
    with pytest.raises(ConfigError, match="holds another run"):
        record.check_free(resume=False, overwrite=False)
    record.check_free(resume=True, overwrite=False)
    with record.begun(overwrite=False):
        pass
    record.check_free(resume=False, overwrite=True)
    assert (tmp_path / "run" / "recipe.yaml").exists(), "a check removes nothing"
    with record.begun(overwrite=True):
        assert not any((tmp_path / "run").iterdir())
    assert not any((tmp_path / "run").iterdir())


def test_a_directory_is_as_it_was_if_its_new_run_cannot_be_built(tmp_path):
    def fail_in(folder, overwrite):
        with pytest.raises(KeyError), RunRecord(folder).begun(overwrite=overwrite):
            (folder / "completions").mkdir()
            raise KeyError

    fail_in(tmp_path / "new", False)
    assert not (tmp_path / "new").exists()
    old = tmp_path / "old"
    old.mkdir()
    (old / "recipe.yaml").write_text("trainer: rwr\n")
    fail_in(old, True)
    assert [path.name for path in old.iterdir()] == ["recipe.yaml"]
    fail_in(old, False)
    assert (old / "recipe.yaml").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"], "nothing is left aside"


def test_overwrite_never_removes_what_is_not_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"no recipe\.yaml"):
        RunRecord(tmp_path).check_free(resume=False, overwrite=True)
    with pytest.raises(ConfigError, match="holds files already"):
        RunRecord(tmp_path).check_free(resume=False, overwrite=False)
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize(("max_steps", "last"), [(4, True), (3, True), (5, False), (-1, False)])
def test_the_last_step_is_that_of_the_run_that_resumes(tmp_path, max_steps, last):
    checkpoint = write_checkpoint(tmp_path, 4, '{"global_step": 4, "max_steps": 9}')
    assert is_last_step(checkpoint, max_steps) is last


def test_a_torn_last_line_is_left_out(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2, "lo')
    assert RunRecord(tmp_path).rows(METRICS) == [{"step": 1}]


def test_only_the_process_that_writes_writes(tmp_path):
    silent = RunRecord(tmp_path, writes=False)
    silent.append(METRICS, {"step": 1})
    silent.describe("trainer: rwr\n")
    assert not any(tmp_path.iterdir())


def test_steps_that_are_taken_again_are_forgotten(tmp_path):
    record = RunRecord(tmp_path)
    for step in (1, 2, 3):
        record.append(METRICS, {"step": step})
    record.forget_after(2)
    assert [row["step"] for row in record.rows(METRICS)] == [1, 2]
    record.forget_after(-1)
    assert record.rows(METRICS) == []


@pytest.mark.parametrize("written", [1, 2, 3])
def test_killed_while_it_begins_a_folder_is_free_or_a_run(tmp_path, monkeypatch, written):
    """Killed before the file of this number takes its place, of environment, recipe and metrics."""
    record = RunRecord(tmp_path / "run")
    record.output_dir.mkdir()
    places = []

    def replace(path, target):
        places.append(target.name)
        if len(places) == written:
            raise KeyboardInterrupt
        os.replace(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        record.describe("trainer: rwr\n")
        record.append(METRICS, {"step": 1})
        record.forget_after(1)
    assert places == ["environment.json", "recipe.yaml", METRICS][:written]
    assert record.is_run == (written == 3)
    record.check_free(resume=record.is_run, overwrite=False)
    assert record.rows(METRICS) == ([{"step": 1}] if written == 3 else [])
    (record.output_dir / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds"):
        record.check_free(resume=False, overwrite=False)
