"""Checkpoints that are on the disk before they count, and signals that end training in order."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from trl_ext import callbacks
from trl_ext.callbacks import DurableCheckpoints, ShortProgress, StopOnSignal
from trl_ext.record import last_checkpoint

MARK = "trainer_state.json"


class Line(torch.nn.Module):
    """y = w·x; the least that transformers trains."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


@pytest.fixture
def make(tmp_path):
    def build(*added, **options) -> Trainer:
        options = {"max_steps": 3, "save_steps": 1, **options}
        args = TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            per_device_train_batch_size=1,
            **options,
        )
        rows = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([1.0])} for i in range(2)]
        # An nn.Module that is no PreTrainedModel is a Trainer's model too.
        return Trainer(Line(), args, train_dataset=rows, callbacks=list(added))  # pyright: ignore

    return build


@pytest.fixture
def happened(monkeypatch) -> list[tuple[str, str]]:
    """What reaches the disk, when a mark is written and when a folder goes: (what, path)."""
    seen: list[tuple[str, str]] = []
    fsync, save, remove = os.fsync, TrainerState.save_to_json, shutil.rmtree

    def synced(descriptor):
        seen.append(("disk", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def marked(state, path):
        seen.append(("mark", str(path)))
        save(state, path)

    def removed(path, *args, **kwargs):
        seen.append(("gone", str(path)))
        remove(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(TrainerState, "save_to_json", marked)
    monkeypatch.setattr(shutil, "rmtree", removed)
    return seen


def test_all_is_on_the_disk_before_the_mark_and_the_mark_before_an_older_one_goes(
    make, happened, tmp_path
):
    make(DurableCheckpoints(), max_steps=2, save_total_limit=1).train()
    checkpoint = tmp_path / "checkpoint-2"
    mark = str(checkpoint / MARK)
    at = happened.index(("mark", mark))
    before = {path for what, path in happened[:at] if what == "disk"}
    assert before >= {str(path) for path in checkpoint.iterdir() if path.name != MARK}
    assert before >= {str(checkpoint), str(tmp_path)}
    gone = happened.index(("gone", str(tmp_path / "checkpoint-1")))
    assert at < happened.index(("disk", mark)) < gone
    assert happened[at:gone].count(("disk", str(checkpoint))) == 1
    assert not (tmp_path / "checkpoint-1").exists()


def test_the_limit_is_put_back(make):
    trainer = make(DurableCheckpoints(), save_total_limit=2)
    trainer.train()
    assert trainer.args.save_total_limit == 2


def test_what_an_earlier_attempt_left_of_a_step_is_no_checkpoint_while_the_step_is_taken_again(
    make, tmp_path
):
    """Resumed from checkpoint 1 where 2 and 3 are complete: a kill within step 2 leaves no 2."""
    make(DurableCheckpoints()).train()
    (tmp_path / "checkpoint-3" / MARK).unlink()  # else it would be the newest
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(last_checkpoint(tmp_path))

    trainer = make(DurableCheckpoints(), Look())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert seen == [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / MARK).write_text(json.dumps({"global_step": 1}))
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # killed before its first file
    callbacks.remove_checkpoint(checkpoint)
    assert last_checkpoint(tmp_path) is None


def test_a_mark_that_does_not_reach_the_disk_takes_its_checkpoint_with_it(
    make, tmp_path, monkeypatch
):
    fsync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"checkpoint-2/{MARK}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make(DurableCheckpoints()).train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_stop_in_the_middle_of_an_epoch_saves_once(make, happened, tmp_path):
    """An epoch that ends early ends all the same: transformers would write over what was saved."""
    stop = StopOnSignal()

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            signal.raise_signal(signal.SIGTERM)

    options = {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    make(stop, Ask(), DurableCheckpoints(), **options).train()
    assert stop.signal == signal.SIGTERM
    assert [path for what, path in happened if what == "mark"] == [
        str(tmp_path / "checkpoint-1" / MARK)
    ]


def test_a_checkpoint_of_a_run_without_the_callback_is_gone_on_with(make, tmp_path):
    make(max_steps=1).train()
    trainer = make(DurableCheckpoints())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_folders_that_cannot_be_synced_are_left_to_the_system(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(os, "fsync", only_files)
    callbacks.sync_files(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output")))
    with pytest.raises(OSError, match="Input/output"):
        callbacks.sync_files(tmp_path)


class AskAt(StopOnSignal):
    """Gets a signal at the beginning of step 2, as often as asked."""

    def __init__(self, number: int, times: int = 1):
        super().__init__()
        self.number, self.times = number, times

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        if state.global_step == 1:
            for _ in range(self.times):
                signal.raise_signal(self.number)


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 3)]
)
def test_a_signal_ends_training_after_the_step_with_a_checkpoint(
    make, tmp_path, number, times, capsys
):
    before = signal.getsignal(number)
    stop = AskAt(number, times)
    trainer = make(stop, save_strategy="no")
    trainer.train()
    assert stop.signal == number and trainer.state.global_step == 2
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err.count("finishing this step") == 1


def test_a_second_ctrl_c_ends_it_at_once(make, tmp_path):
    stop = AskAt(signal.SIGINT, 2)
    with pytest.raises(KeyboardInterrupt):
        make(stop, save_strategy="no").train()
    stop.restore()
    assert last_checkpoint(tmp_path) is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_training_that_nobody_stops_says_so(make):
    stop = StopOnSignal()
    make(stop).train()
    assert stop.signal == 0 and stop.stepped


def test_the_evaluation_after_training_is_shown(make, capsys):
    """Its bar is closed by then; transformers shows nothing more."""
    trainer = make(ShortProgress(), max_steps=1, logging_steps=1, save_strategy="no")
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    capsys.readouterr()
    trainer.evaluate(trainer.train_dataset)
    loss = trainer.state.log_history[-1]["eval_loss"]
    assert capsys.readouterr().out == f"step 1: eval_loss {loss:.4g}\n"


def test_what_other_processes_log_is_not_shown(make, capsys):
    trainer = make(ShortProgress(), max_steps=1, logging_steps=1, save_strategy="no")
    trainer.state.is_world_process_zero = False
    ShortProgress().on_log(trainer.args, trainer.state, trainer.control, logs={"eval_loss": 1.0})
    assert capsys.readouterr().out == ""
