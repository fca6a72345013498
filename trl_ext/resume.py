"""Whether a recipe goes on with the run that its `output_dir` holds, and how a user does so."""

import errno
import shlex
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from trl_ext.environment import command_name
from trl_ext.errors import ConfigError, OutOfMemoryError, RunError, TrlExtError
from trl_ext.recipe import Recipe
from trl_ext.record import RECIPE, RunRecord, is_complete, last_checkpoint
from trl_ext.smaller import KEYS, SHARED_OUT, is_same_batch

# What changes how long a run goes on and what it shows, but no step of it.
_MAY_CHANGE = (
    "accelerate_config",
    "disable_tqdm",
    "env",
    "max_steps",
    "num_completions_to_print",
    "num_generations_eval",
    "num_machines",
    "num_processes",
    "num_train_epochs",
    "output_dir",
    "per_device_eval_batch_size",
    "push_to_hub",
    "report_to",
    "reward_timeout",
    "run_name",
)
_MAY_CHANGE_PREFIXES = (
    "dataloader_",
    "eval_",
    "hub_",
    "log_",
    "logging_",
    "save_",
    "machine_",
    "watch_",
)


def check_same_run(
    recipe: Recipe,
    checkpoint: Path,
    *,
    command: str = "train",
    flags: str = "--resume",
    may_change: Collection[str] = (),
) -> None:
    """Whether a recipe is the one that a checkpoint's run began with, as far as its steps go.

    A checkpoint holds the optimizer, the schedule and a half-used rollout: with another learning
    rate, β or group size it would go on with neither the old value nor the new one.

    Args:
        recipe: that goes on.
        checkpoint: a file or folder beside the recipe that the run began with.
        command, flags: which go on with that run.
        may_change: keys that may have another value, beside those that no step depends on.

    Raises:
        ConfigError: if it differs; it lists every key.
    """
    file = checkpoint.parent / RECIPE
    if not file.is_file():
        return
    began, goes_on = (yaml.safe_load(text) for text in (file.read_text(), recipe.to_yaml()))
    if is_same_batch(began, goes_on):
        may_change = (*may_change, *SHARED_OUT)
    changed = [
        f"  {key}: was {_shown(began, key)}, now {_shown(goes_on, key)}"
        for key in sorted(began.keys() | goes_on.keys())
        if began.get(key) != goes_on.get(key) and not (_may_change(key) or key in may_change)
    ]
    if changed:
        lines = "\n".join(changed)
        raise ConfigError(
            f"--resume goes on from {checkpoint}, and the recipe differs from the one of that "
            f"run:\n{lines}\nGo on as it began: {command_name()} {command} {file} {flags}. Or "
            "begin another run with output_dir=..."
        )


def _may_change(key: str) -> bool:
    return key in _MAY_CHANGE or key.startswith(_MAY_CHANGE_PREFIXES)


def _shown(settings: dict[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "not set"


def resume_command(output_dir: Path) -> str:
    """What to type to go on with a run."""
    return f"{command_name()} train --resume {shlex.quote(str(output_dir))}"


def what_is_left(output_dir: Path) -> str:
    """What a stopped run has left, and the command that goes on from there."""
    newest, command = last_checkpoint(output_dir), resume_command(output_dir)
    if newest is None:
        return f"No checkpoint had been saved; {command} starts again from the beginning."
    return f"The newest complete checkpoint is {newest}; go on from it with: {command}"


def instead_of(checkpoint: Path) -> str:
    """What to do where a checkpoint cannot be resumed from."""
    earlier = last_checkpoint(checkpoint.parent, before=checkpoint)
    if earlier:
        return f"Go on from the one before it: --resume {earlier}."
    return "There is none before it: begin again with --overwrite."


def explained(
    error: Exception,
    record: RunRecord,
    step: int,
    resumed: Path | None = None,
    *,
    phase: str = "train",
) -> Exception:
    """What a user is told of a failure in training, and what to do next.

    Args:
        error: what was raised.
        record: of the run.
        step: the last one that was finished.
        resumed: the checkpoint that was being loaded; None once steps were taken.
        phase: what the trainer was at.

    Returns:
        An error for it, or, where nothing is known of it, itself with a note.
    """
    next_step = instead_of(resumed) if resumed else what_is_left(record.output_dir)
    if isinstance(error, TrlExtError):
        return type(error)(f"{error}\n{next_step}")
    if _lost_another(error):
        return RunError(f"Another process of this run has ended; its error says why.\n{next_step}")
    if is_out_of_memory(error):
        recipe = shlex.quote(str(record.output_dir / RECIPE))
        return OutOfMemoryError(
            f"Out of memory after step {step}, in the phase {phase!r}: {_first_line(error)}\n"
            f"It depends on {KEYS[phase]}. What would fit: {command_name()} plan {recipe}\n"
            f"{next_step}",
            phase,
        )
    if resumed:
        reason = _first_line(error)
        return RunError(
            f"{resumed} cannot be resumed from: {reason} Is a file damaged? {next_step}"
        )
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if _was_saving(record, step) or is_full:
        return saving_failed(error, record, step)
    error.add_note(next_step)
    return error


def saving_failed(error: Exception, record: RunRecord, step: int) -> RunError:
    """What a user is told when a checkpoint or the result cannot be written."""
    free = shutil.disk_usage(record.output_dir).free / 1e9
    return RunError(
        f"Saving at step {step} failed: {_first_line(error)}. A checkpoint that it had half "
        f"written is removed. The disk of {record.output_dir} has {free:.1f} GB free: is it full, "
        f"or a quota used up? {what_is_left(record.output_dir)}"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was no room on the device, or in the machine."""
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error) or isinstance(error, MemoryError)


def _lost_another(error: Exception) -> bool:
    """Whether a collective failed because another process is gone, which has said why."""
    from torch.distributed import DistBackendError

    gone = ("Connection closed by peer", "Connection reset by peer")
    is_gloo = isinstance(error, RuntimeError) and any(text in str(error) for text in gone)
    return is_gloo or isinstance(error, DistBackendError)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _was_saving(record: RunRecord, step: int) -> bool:
    """Whether training failed while it wrote a checkpoint; a half-written one is removed."""
    checkpoint = record.output_dir / f"checkpoint-{step}"
    if not checkpoint.exists() or is_complete(checkpoint):
        return False
    if record.writes:
        shutil.rmtree(checkpoint)
    return True


def last_line(what: str, code: int, output_dir: Path | None) -> str:
    """The line that says to a script how `trl_ext train` ended; the last one that it prints.

    Args:
        what: `finished`, `failed (RewardError)`, `stopped (SIGTERM)`, ...
        code: the exit code.
        output_dir: of the run; None where the recipe could not be read.
    """
    line = f"trl_ext: {what}, exit code {code}"
    if output_dir is None or code == 2 or not RunRecord(output_dir).is_run:
        return line
    then = f"output_dir: {output_dir}" if code == 0 else f"resume: {resume_command(output_dir)}"
    return f"{line}; {then}"
