"""What the watch leaves in `output_dir`: the best policy, and all that was measured."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_ext.errors import RunError
from trl_ext.watch.measures import Change

BEST = "best"
HACKING = "hacking.json"
PICTURE = "hacking.png"


class BestPolicy:
    """`output_dir/best`: the policy with the best gold reward, replaced as a whole.

    Args:
        trainer: a `PolicyTrainer`.
        resumes: a better one that is there already is of this run, and stays.
    """

    def __init__(self, trainer: Any, *, resumes: bool):
        self.trainer = trainer
        self.folder = Path(trainer.args.output_dir) / BEST
        self._gold = self._gold_of_kept() if resumes else -math.inf

    def keep(self, evaluation: Mapping[str, Any]) -> None:
        """Save the policy as it is, with the numbers of its evaluation in `hacking.json`.

        The one before stays until this one is whole. All processes call it.

        Raises:
            RunError: if it cannot be written.
        """
        gold = evaluation["gold_reward"][0]
        if gold <= self._gold:
            return
        self._gold = gold
        new = self.folder.with_name(f".{BEST}-new")
        try:
            if self._writes:
                shutil.rmtree(new, ignore_errors=True)
            self.trainer.accelerator.wait_for_everyone()
            self.trainer.save_policy(new)
            self.trainer.accelerator.wait_for_everyone()
            if self._writes:
                write_json(with_names(evaluation), new / HACKING)
                self._replace_by(new)
        except OSError as error:
            raise RunError(
                f"The best policy cannot be saved in {self.folder}: {error}. Is the disk full?"
            ) from error

    @property
    def _writes(self) -> bool:
        return self.trainer.accelerator.is_main_process

    @property
    def _old(self) -> Path:
        return self.folder.with_name(f".{BEST}-old")

    def _replace_by(self, new: Path) -> None:
        shutil.rmtree(self._old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(self._old)
        new.rename(self.folder)
        shutil.rmtree(self._old, ignore_errors=True)

    def _gold_of_kept(self) -> float:
        if self._writes and self._old.exists() and not self.folder.exists():
            self._old.rename(self.folder)  # it was being replaced when the run was killed
        self.trainer.accelerator.wait_for_everyone()
        file = self.folder / HACKING
        kept = json.loads(file.read_text()) if file.is_file() else {}
        return kept["gold_reward"]["mean"] if kept else -math.inf


def with_names(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation of `History` as files have it: what its lists hold has names."""
    names = {"gold_change": Change._fields}
    return {
        key: dict(zip(names.get(key, ("mean", "standard_error")), value, strict=True))
        if isinstance(value, list)
        else value
        for key, value in evaluation.items()
    }


def write_json(record: Any, file: Path) -> None:
    """Write a file as a whole or not at all. NaN, which JSON does not have, is null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half_written = file.with_name(f".{file.name}")
    half_written.write_text(json.dumps(_with_null(record), indent=2) + "\n")
    os.replace(half_written, file)


def _with_null(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _with_null(each) for key, each in value.items()}
    return [_with_null(each) for each in value] if isinstance(value, list | tuple) else value
