"""What a run leaves in its `output_dir`, and which runs and checkpoints may be built on.

recipe.yaml        the resolved recipe, itself a recipe
environment.json   versions, device, git commit, command line
metrics.jsonl      one line a log step
evaluations.jsonl  one line an evaluation: the reward of every held-out completion
checkpoint-N/      what a killed run resumes from
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_ext.environment import environment
from trl_ext.errors import ConfigError, RunError
from trl_ext.recipe.secrets import hide_secrets

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
# transformers writes this file of a checkpoint last, and the policy trainers everything before it.
_WRITTEN_LAST = "trainer_state.json"


class RunRecord:
    """The files of one run.

    Args:
        output_dir: where the run lives.
        writes: whether this process writes; of several, one does.
    """

    def __init__(self, output_dir: str | Path, *, writes: bool = True):
        self.output_dir = Path(output_dir)
        self.writes = writes

    @property
    def is_run(self) -> bool:
        """Whether `output_dir` holds a run, and not just files of somebody's."""
        return all((self.output_dir / file).is_file() for file in (RECIPE, ENVIRONMENT))

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Whether `output_dir` may become this run's own; nothing is changed.

        Raises:
            ConfigError: if it holds anything, and neither resume nor overwrite is asked for; or if
                what would be resumed or removed is not a run.
            RunError: if no directory can be there.
        """
        name = str(self.output_dir)
        with _writing(name):
            above = next(path for path in self.output_dir.absolute().parents if path.exists())
            if not above.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{above} is a file")
            held = self.writes and self.output_dir.exists() and self._is_held()
        if not held:
            return
        if not self.is_run and (resume or overwrite):
            what = "--resume would train over" if resume else "--overwrite would remove"
            raise ConfigError(
                f"{what} output_dir {name!r}, which holds files but no {RECIPE} and {ENVIRONMENT} "
                "of a run. Give another output_dir, or empty it yourself."
            )
        if overwrite and Path.cwd().is_relative_to(self.output_dir.resolve()):
            raise ConfigError(
                f"--overwrite would remove output_dir {name!r}, which the current folder is or "
                "lies in. Give another output_dir, or go elsewhere."
            )
        if not (resume or overwrite):
            raise ConfigError(
                f"output_dir {name!r} holds another run. Continue it with --resume, replace it "
                "with --overwrite, or give another: output_dir=..."
                if self.is_run
                else f"output_dir {name!r} holds files already. Give another: output_dir=..., or "
                "empty it yourself."
            )

    def _is_held(self) -> bool:
        """Whether the folder holds anything but what a start leaves that was killed within it."""
        names = {path.name for path in self.output_dir.iterdir()}
        begun = {_new(RECIPE), _new(ENVIRONMENT), ENVIRONMENT}
        return bool(names) and not (_new(RECIPE) in names and names <= begun)

    @contextmanager
    def begun(self, *, overwrite: bool) -> Iterator[None]:
        """The directory, made; with `overwrite` an empty one. As it was, if the body fails.

        What it held is put aside while the body builds what comes instead.

        Raises:
            RunError: if it cannot be made or emptied.
        """
        here = self.output_dir.resolve()
        aside = here.with_name(f".{here.name}.replaced-{os.getpid()}")
        held = here.exists() and any(here.iterdir())
        replaces = self.writes and overwrite and held
        with _writing(str(self.output_dir)):
            if replaces:
                here.rename(aside)
            if self.writes:
                here.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except BaseException:
            if self.writes and (replaces or not held):
                shutil.rmtree(here, ignore_errors=True)
            if replaces:
                aside.rename(here)
            raise
        if replaces:
            shutil.rmtree(aside)

    def describe(self, recipe_yaml: str) -> None:
        """Write the resolved recipe and the environment."""
        if not self.writes:
            return
        record = environment() | {"command": hide_secrets(sys.argv)}
        self._write(RECIPE, recipe_yaml)
        self._write(ENVIRONMENT, json.dumps(record, indent=2) + "\n")
        # The recipe last: both are there, or the folder is no run yet.
        for file in (ENVIRONMENT, RECIPE):
            (self.output_dir / _new(file)).replace(self.output_dir / file)

    def _write(self, file: str, text: str) -> None:
        """Write a file beside its place, to the disk: what has its place is never half of it."""
        with (self.output_dir / _new(file)).open("w") as new:
            new.write(text)
            new.flush()
            os.fsync(new.fileno())

    def append(self, file: str, row: dict[str, Any]) -> None:
        """Add a line to `metrics.jsonl` or `evaluations.jsonl`."""
        if self.writes:
            with (self.output_dir / file).open("a") as lines:
                lines.write(json.dumps(row) + "\n")

    def rows(self, file: str) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` or `evaluations.jsonl`; none if the file is not there.

        A last line without its end was being written when the run was killed: it is left out.
        """
        path = self.output_dir / file
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [_row(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if row is not None]

    def forget_after(self, step: int) -> None:
        """Drop lines of steps after `step`: a resumed run takes those steps again."""
        if not self.writes:
            return
        for file in (METRICS, EVALUATIONS):
            kept = [row for row in self.rows(file) if row["step"] <= step]
            if (self.output_dir / file).exists():
                self._write(file, "".join(json.dumps(row) + "\n" for row in kept))
                (self.output_dir / _new(file)).replace(self.output_dir / file)


def _new(file: str) -> str:
    """Where a file of the record is written before it takes its place."""
    return f".{file}.new"


def _row(line: str) -> dict[str, Any] | None:
    """A line of a record; None for one that no run wrote."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


@contextmanager
def _writing(output_dir: str) -> Iterator[None]:
    """What the file system says about an `output_dir`, as an error that names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"output_dir {output_dir!r} cannot be a run's folder: {reason}. Give a folder that can "
            "be made and written: output_dir=..."
        ) from error


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, so that it can be resumed from."""
    try:
        state = json.loads((checkpoint / _WRITTEN_LAST).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and f"checkpoint-{state.get('global_step')}" == checkpoint.name


def is_last_step(checkpoint: Path, max_steps: int) -> bool:
    """Whether nothing is left to train after a checkpoint.

    Args:
        checkpoint: a complete one.
        max_steps: of the run that resumes; not positive if its length is given in epochs.
    """
    state = json.loads((checkpoint / _WRITTEN_LAST).read_text())
    return state["global_step"] >= (max_steps if max_steps > 0 else state["max_steps"])


def last_checkpoint(output_dir: Path, before: Path | None = None) -> Path | None:
    """The newest complete checkpoint, of those before `before`, or None.

    A half-written one is passed over.
    """
    numbered = [
        path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdecimal()
    ]
    newest_first = sorted(numbered, key=lambda path: int(path.name.split("-")[1]), reverse=True)
    if before in newest_first:
        newest_first = newest_first[newest_first.index(before) + 1 :]
    return next((path for path in newest_first if is_complete(path)), None)


def checkpoint_to_resume(output_dir: Path, resume: bool | str) -> Path | None:
    """What `--resume` (True: the newest) or `--resume CHECKPOINT` goes on from; None: nothing.

    Raises:
        RunError: if the named checkpoint is not there or not complete.
    """
    if not isinstance(resume, str):
        return last_checkpoint(output_dir) if resume else None
    named = Path(resume)
    inside = last_checkpoint(named)
    if is_complete(named) or inside:
        return inside or named
    newest = last_checkpoint(output_dir)
    raise RunError(
        f"--resume {resume}: there is no complete checkpoint of that name. "
        + (f"The newest complete one is {newest}." if newest else f"{output_dir} has none at all.")
    )


def is_first_process() -> bool:
    """Whether this is the only process, or the first of several that a launcher started."""
    return os.environ.get("RANK", "0") == "0"
