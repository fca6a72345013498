"""Recipes and configs that come with trl_ext, and how the names of files are found.

A checkout keeps them in `recipes/` and `configs/` beside the package; a wheel carries them inside
it. Both are named alike: `recipes/rwr/quickstart.yaml`, `configs/lora.yaml`.
"""

import difflib
import importlib.util
import os
from pathlib import Path
from typing import Any

import yaml

from trl_ext.errors import ConfigError, UnknownNameError

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder(kind: str) -> Path:
    """The folder of the shipped files of a kind: "recipes" or "configs"."""
    inside = _PACKAGE / f"_{kind}"
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def recipe_names() -> list[str]:
    """The shipped recipes as `train` takes them, such as `rwr/quickstart`."""
    folder = shipped_folder("recipes")
    files = sorted(folder.rglob("*.yaml"))
    return [file.relative_to(folder).with_suffix("").as_posix() for file in files]


def find_recipe(name: str | Path) -> Path:
    """A recipe's file: a path on disk first, then a shipped recipe; `.yaml` may be left out.

    Raises:
        UnknownNameError: if there is neither; it names the nearest recipes.
    """
    path = Path(name)
    for candidate in (path, path.with_name(path.name + ".yaml") if path.name else path):
        if os.path.isfile(candidate):  # unlike Path.is_file, also of a name that is too long
            return candidate
    shipped = find_shipped(path.as_posix()) or find_shipped(f"recipes/{path.as_posix()}")
    if shipped:
        return shipped
    raise UnknownNameError(_no_such_recipe(path))


def _no_such_recipe(path: Path) -> str:
    here = [file.as_posix() for file in sorted(path.parent.glob("*.yaml"))]
    known = here + recipe_names()
    close = difflib.get_close_matches(path.as_posix(), known, n=3, cutoff=0.5)
    what = (
        f"{path} is a folder, not a recipe."
        if os.path.isdir(path)
        else f"There is no recipe {path}."
    )
    hint = f" Nearest: {', '.join(close)}." if close else ""
    return (
        f"{what}{hint} `trl_ext ls` lists the shipped recipes; your own is a path to a YAML file."
    )


def find_shipped(name: str) -> Path | None:
    """The shipped file with a name such as `recipes/rwr/quickstart` or `configs/lora.yaml`."""
    kind, _, below = os.path.normpath(name).replace(os.sep, "/").partition("/")
    if kind not in ("recipes", "configs") or not below:
        return None
    base = shipped_folder(kind) / below
    candidates = (base, base.with_name(base.name + ".yaml"))
    return next((file for file in candidates if os.path.isfile(file)), None)


def shipped_name(path: Path) -> str | None:
    """The inverse of `find_shipped`: the name of a shipped file, None for any other file."""
    for kind in ("recipes", "configs"):
        folder = shipped_folder(kind).resolve()
        if path.resolve().is_relative_to(folder):
            return f"{kind}/{path.resolve().relative_to(folder).as_posix()}"
    return None


def extended_path(name: str, written_in: Path) -> Path:
    """Where a file lies that `extends` names by its path."""
    return written_in.parent / os.path.expanduser(name)


def find_extended(name: str, written_in: Path) -> Path | None:
    """A file that `extends` names: beside the file that names it, or shipped.

    In a wheel `../../configs/lora.yaml` leads elsewhere than in a checkout, so a path written in
    a shipped recipe is also followed through the shipped names.
    """
    beside = extended_path(name, written_in)
    if os.path.isfile(beside):
        return Path(os.path.normpath(beside))
    home = shipped_name(written_in)
    through = find_shipped(os.path.join(os.path.dirname(home), name)) if home else None
    return through or find_shipped(name)


def accelerate_configs() -> dict[str, Path]:
    """Name -> file of the Accelerate configs that TRL ships and that trl_ext ships.

    Where both have a name (fsdp2, single_gpu, zero2, zero3) it is that of trl_ext's file, which
    takes all GPUs of the machine and leaves precision to the recipe.
    """
    spec = importlib.util.find_spec("trl")
    places = list(spec.submodule_search_locations or []) if spec else []
    folders = [Path(place, "accelerate_configs") for place in places]
    folders.append(shipped_folder("configs") / "accelerate")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def find_accelerate_config(name: str) -> Path | None:
    """An Accelerate config by path or by name."""
    path = Path(name)
    return path if os.path.isfile(path) else accelerate_configs().get(name)


def read_accelerate_config(name: str | None) -> dict[str, Any]:
    """What an Accelerate config says; nothing where none is named.

    Raises:
        ConfigError: if there is no such config, or it is not a YAML mapping.
    """
    if name is None:
        return {}
    path = find_accelerate_config(name)
    if path is None:
        names = ", ".join(accelerate_configs())
        raise ConfigError(f"got {name!r}; allowed: the path of a file, or one of {names}.")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not an Accelerate config: it holds no 'key: value' lines.")
    return config
