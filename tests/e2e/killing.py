"""`trl_ext` that kills itself at its k-th event, as the kernel or a power cut would.

Events are: a file in `output_dir` about to be opened for writing, renamed, removed or brought to
the disk; before and after a `torch.save`; a call of the model; the middle of a backward pass.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, TrainerState

from tests.e2e.forked import trl_ext

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def counted(kill_at: int, output_dir: str, log: str, *arguments: str) -> None:
    """`trl_ext` with these arguments, killed at its event number `kill_at`; 0: never.

    `log` gets what was brought to the disk (path, size and time of change) and, at the end, the
    number of events.
    """
    inside = os.path.abspath(output_dir)
    seen = 0

    def event(opened: str = "") -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            if opened and os.path.isfile(opened):
                os.truncate(opened, 0)  # what opening it does, killed before the first byte
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(name: str, details: tuple) -> None:
        if name == "open" and isinstance(details[0], str) and _writes(details):
            path = os.path.abspath(details[0])
            if path.startswith(inside):
                event(path if details[2] & os.O_TRUNC else "")
        elif name in _CHANGES and os.path.abspath(os.fsdecode(details[0])).startswith(inside):
            event()

    _log_what_is_on_the_disk(log, event)
    _around(torch, "save", event)
    _around(torch.Tensor, "backward", event)
    _around(LlamaForCausalLM, "forward", event)
    sys.addaudithook(heard)
    try:
        trl_ext(*arguments)
    finally:
        with open(log, "a") as lines:
            lines.write(f"events {seen}\n")


def counted_by_rank(kill_at: list[int], output_dir: str, log: str, *arguments: str) -> None:
    """As `counted`, in each of several processes: of each its number and its log, `log`-rank."""
    rank = int(os.environ["RANK"])
    counted(kill_at[rank], output_dir, f"{log}-{rank}", *arguments)


def late_second(*arguments: str) -> None:
    """`trl_ext`, where the second process is late with its random state.

    The first one fails where it marks a checkpoint before that is there.
    """
    save, mark = torch.save, TrainerState.save_to_json

    def late(obj, file, *args, **kwargs):
        if os.path.basename(str(file)) == "rng_state_1.pth":
            time.sleep(1)
        return save(obj, file, *args, **kwargs)

    def marked(self, json_path):
        assert os.path.getsize(os.path.join(os.path.dirname(json_path), "rng_state_1.pth")) > 0
        mark(self, json_path)

    torch.save, TrainerState.save_to_json = late, marked
    trl_ext(*arguments)


def _writes(details: tuple) -> bool:
    return isinstance(details[2], int) and bool(details[2] & (os.O_WRONLY | os.O_RDWR))


def _around(owner, name: str, event) -> None:
    function = getattr(owner, name)

    def call(*args, **kwargs):
        event()
        result = function(*args, **kwargs)
        event()
        return result

    setattr(owner, name, call)


def _log_what_is_on_the_disk(log: str, event) -> None:
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        event()
        fsync(descriptor)
        about = os.fstat(descriptor)
        with open(log, "a") as lines:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            lines.write(f"{about.st_size} {about.st_mtime_ns} {path}\n")

    os.fsync = synced


def cut_power(output_dir: Path, log: Path) -> int:
    """Halve every file of a checkpoint that is not on the disk as it is; how many."""
    lines = log.read_text().splitlines() if log.exists() else []
    kept = {tuple(line.split(" ", 2)) for line in lines}
    lost = 0
    for path in output_dir.glob("checkpoint-*/**/*"):
        about = path.stat()
        if path.is_file() and (str(about.st_size), str(about.st_mtime_ns), str(path)) not in kept:
            os.truncate(path, about.st_size // 2)
            lost += 1
    return lost
