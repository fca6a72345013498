"""The files that `trl_ext generate` writes: refused before the work, opened once there is a row."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trl_ext.errors import ConfigError, RunError

if TYPE_CHECKING:
    from trl_ext.poe.side_by_side import Row


def check_file(name: str | None, option: str, force: bool, suffix: str = "") -> None:
    """Whether an option's file can be written, before there is something to write.

    Raises:
        ConfigError: if not.
    """
    if name is None:
        return
    path = Path(name)
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise ConfigError(
            f"{option} {name}: cannot be written. Name a file in a folder that exists."
        )
    if suffix and path.suffix.lower() != suffix:
        raise ConfigError(f"{option} {name}: the picture is a {suffix}. Name a {suffix} file.")
    if os.path.lexists(path) and not force:
        raise ConfigError(
            f"{option} {name}: the file exists and is left alone. Give another name, or --force."
        )
    if not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
        raise ConfigError(
            f"{option} {name}: you may not write there. Name a file in a folder of yours."
        )


def check_two_files(output: str | None, plot: str | None) -> None:
    """Whether --output and --plot are two files.

    Raises:
        ConfigError: if the picture would replace the numbers.
    """
    if output and plot and os.path.realpath(output) == os.path.realpath(plot):
        raise ConfigError(
            f"--output {output} and --plot {plot} are one file. Give --output another name, such "
            f"as {Path(plot).with_suffix('.json')}."
        )


class RowFile:
    """`--output` as .jsonl, a row as soon as it is known; nothing without a name.

    A file that is there is replaced once there is a first row: what fails before leaves it alone.
    """

    def __init__(self, name: str | None):
        self._name = name
        self._file: TextIO | None = None

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, rows: "Sequence[Row]") -> None:
        """Add rows, and have them on disk.

        Raises:
            RunError: if they cannot be written.
        """
        if self._name is None:
            return
        lines = [json.dumps(row.record(), ensure_ascii=False) + "\n" for row in rows]
        try:
            if self._file is None:
                # Closed when the command ends, in __exit__.
                self._file = open(self._name, "w", encoding="utf-8")  # noqa: SIM115
            self._file.writelines(lines)
            self._file.flush()
        except OSError as error:
            if self._file is not None:
                with suppress(OSError):  # it would try to write once more
                    self._file.close()
                self._file = None
            raise not_written("--output", self._name, error) from error


def write_json(name: str, found: Any) -> None:
    """Write `--output` of a sweep. JSON has no NaN: it becomes null.

    Raises:
        RunError: if it cannot be written.
    """
    finite = json.loads(json.dumps(found), parse_constant=lambda _: None)
    try:
        Path(name).write_text(json.dumps(finite, indent=2, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise not_written("--output", name, error) from error


def not_written(option: str, name: str, error: OSError) -> RunError:
    """The error for a file that could not be written after all."""
    return RunError(
        f"{option} {name}: cannot be written: {error.strerror}. Free space there, or give another "
        "name."
    )
