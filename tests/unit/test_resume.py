"""What a user is told of a failure in training, and the line that a script reads."""

import errno
import json
from pathlib import Path

import pytest
import torch

from trl_ext.errors import OutOfMemoryError, RewardError, RunError
from trl_ext.record import RunRecord
from trl_ext.resume import explained, last_line, saving_failed, what_is_left


def checkpoint(folder: Path, step: int, *, complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if complete:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


@pytest.fixture
def record(tmp_path) -> RunRecord:
    folder = tmp_path / "a run"
    folder.mkdir()
    for file in ("recipe.yaml", "environment.json"):
        (folder / file).write_text("{}")
    return RunRecord(folder)


def test_the_command_to_go_on_with_can_be_pasted(record):
    assert what_is_left(record.output_dir).startswith("No checkpoint had been saved; ")
    newest = checkpoint(record.output_dir, 2)
    checkpoint(record.output_dir, 3, complete=False)
    left = what_is_left(record.output_dir)
    assert f"The newest complete checkpoint is {newest}; go on from it with: " in left
    assert left.endswith(f"train --resume '{record.output_dir}'")


def test_a_run_that_is_none_has_nothing_to_go_on_with(tmp_path):
    for code, folder in ((1, tmp_path), (1, tmp_path / "nowhere"), (1, None), (2, tmp_path)):
        assert last_line("failed (X)", code, folder) == f"trl_ext: failed (X), exit code {code}"


def test_an_error_of_ours_keeps_its_kind_and_says_what_is_left(record):
    told = explained(RewardError("it raised"), record, 4)
    assert type(told) is RewardError
    assert str(told).startswith("it raised\nNo checkpoint had been saved; ")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nA long tale."),
        RuntimeError("[enforce fail at x] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_no_memory(record, error):
    told = explained(error, record, 4, phase="generate")
    assert isinstance(told, OutOfMemoryError) and told.phase == "generate"
    assert "Out of memory after step 4, in the phase 'generate': " in str(told)
    assert "It depends on fewer gradient_accumulation_steps" in str(told)
    assert "long tale" not in str(told)
    assert f" plan '{record.output_dir}/recipe.yaml'\n" in str(told)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_whatever_was_being_written(record, number):
    told = explained(OSError(number, "No space left on device"), record, 4)
    assert isinstance(told, RunError)
    assert f"The disk of {record.output_dir} has " in str(told)


def test_a_checkpoint_that_was_being_written_is_removed(record):
    kept, half = checkpoint(record.output_dir, 3), checkpoint(record.output_dir, 4, complete=False)
    told = explained(RuntimeError("File too large\nat line 3"), record, 4)
    assert str(told).startswith("Saving at step 4 failed: File too large. ")
    assert f"newest complete checkpoint is {kept};" in str(told)
    assert not half.exists() and kept.exists()


def test_of_several_processes_one_removes(record):
    half = checkpoint(record.output_dir, 4, complete=False)
    explained(RuntimeError("File too large"), RunRecord(record.output_dir, writes=False), 4)
    assert half.exists()


def test_a_checkpoint_that_cannot_be_loaded_names_the_one_before(record):
    before, damaged = checkpoint(record.output_dir, 3), checkpoint(record.output_dir, 4)
    told = explained(ValueError("bad header\nand more"), record, 0, damaged)
    assert isinstance(told, RunError)
    assert f"{damaged} cannot be resumed from: bad header Is a file damaged? " in str(told)
    assert str(told).endswith(f"--resume {before}.")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
    ],
)
def test_a_process_that_lost_another_does_not_tell_its_own_tale(record, error):
    told = explained(error, record, 4)
    assert isinstance(told, RunError)
    assert str(told).startswith("Another process of this run has ended; its error says why.\n")


def test_what_is_unknown_stays_what_it_is(record):
    error = AttributeError("deep inside")
    assert explained(error, record, 4) is error
    assert error.__notes__ == [what_is_left(record.output_dir)]


def test_the_free_space_is_that_of_the_output_dir(record, monkeypatch):
    asked = []
    usage = type("usage", (), {"free": 2.34e9})
    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or usage)
    assert "has 2.3 GB free" in str(saving_failed(OSError("x"), record, 1))
    assert asked == [record.output_dir]
