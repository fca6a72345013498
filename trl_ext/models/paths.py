"""Whether a model is where a setting says it is, as far as shows without opening it."""

import difflib
import os
from pathlib import Path

from trl_ext.bundled import BUNDLED, PREFIX

ADAPTER_FILE = "adapter_config.json"
MODEL_FILES = ("config.json", ADAPTER_FILE)


def place_problem(
    name: str, *, files: tuple[str, ...] = MODEL_FILES, folders_first: bool = True
) -> str | None:
    """What is wrong with a path or a `bundled:` name; None: nothing, or it is the hub's to know.

    Args:
        name: a folder, a hub id or a `bundled:` name, as `load_causal` takes it. Whatever looks
            like a hub id and is no folder here is left to the hub.
        files: one of these is in the folder of a model.
        folders_first: "a/b" is a folder where there is a folder "a", and no hub id.
    """
    path = Path(name)
    allowed = (
        f"allowed: a folder with {' or '.join(files)}, a hub id (owner/name), or one of "
        f"{', '.join(PREFIX + short for short in BUNDLED)}."
    )
    if name.startswith(PREFIX):
        known = name.removeprefix(PREFIX) in BUNDLED
        close = difflib.get_close_matches(name, [PREFIX + short for short in BUNDLED], n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return None if known else f"got {name!r}, which is no bundled model.{hint} {allowed}"
    if os.path.isdir(name):
        if any(os.path.isfile(path / file) for file in files):
            return None
        return f"got {name!r}, a folder that holds no {' and no '.join(files)}; {allowed}"
    if os.path.exists(name):
        return f"got {name!r}, which is a file; {allowed}"
    if not _is_path(name, path, folders_first):
        return None
    return f"got {name!r}, and there is no such folder.{_nearest(path)} {allowed}"


def _is_path(name: str, path: Path, folders_first: bool) -> bool:
    """Whether this can be no hub id, which is a name or owner/name."""
    if not name or name[0] in "./~" or len(path.parts) > 2 or "\\" in name or name.endswith("/"):
        return True
    return folders_first and len(path.parts) == 2 and os.path.isdir(path.parent)


def _nearest(path: Path) -> str:
    """The most alike of what lies beside the first part that is missing, or where that would be."""
    missing = path
    while not os.path.isdir(missing.parent):
        missing = missing.parent
    folder = missing.parent
    listed = os.listdir(folder) if os.access(folder, os.R_OK) else []
    beside = [name for name in listed if os.path.isdir(folder / name)]
    for close in difflib.get_close_matches(missing.name, beside, n=1):
        meant = folder / close / path.relative_to(missing)
        return f" Did you mean {str(meant)!r}?" if os.path.isdir(meant) else _nearest(meant)
    return (
        f" The nearest that exists is {str(folder.absolute() if folder == Path() else folder)!r}."
    )
