"""`--json FILE` of the commands that measure: refused before the work, written after it."""

import json
import os
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigError


def check_json_file(path: Path) -> None:
    """Whether a file can be there, as far as can be told before there is something to write.

    Raises:
        ConfigError: if not.
    """
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise ConfigError(f"--json {path}: cannot be written. Name a file in a folder that exists.")


def write_json_file(found: Any, path: Path) -> None:
    """Write numbers as JSON, which has no NaN and no infinity: those become null.

    Raises:
        ConfigError: if the file cannot be written.
    """
    finite = json.loads(json.dumps(found), parse_constant=lambda _: None)
    try:
        path.write_text(json.dumps(finite, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--json {path}: cannot be written: {error.strerror}. Name a file in a folder that "
            "exists."
        ) from error
