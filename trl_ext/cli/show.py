"""Print the merged recipe, and where each value comes from.

What is printed is itself a recipe: the origins are comments.
"""

import argparse
import json
import shutil
from typing import Any

from trl_ext.recipe import Recipe, read_recipe
from trl_ext.recipe.layers import read_layers
from trl_ext.recipe.schema import COMPUTED, REQUIRED
from trl_ext.recipe.yaml_reader import write_yaml

_WIDEST_COLUMN = 48  # origins stand in one column, at most this far to the right


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments; everything else is an override."""
    parser.usage = "%(prog)s RECIPE [--defaults] [--json] [key=value ...]"
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "--defaults", action="store_true", help="also every key left at its default"
    )
    parser.add_argument("--json", action="store_true", help="values and origins as JSON")


def run(args: argparse.Namespace) -> int:
    """Print a recipe."""
    recipe = read_recipe(args.recipe, args.overrides)
    defaults = recipe.defaults() if args.defaults else {}
    settings = _as_written(recipe, args.overrides)
    show = _json if args.json else _yaml
    print(show(recipe, settings, defaults))
    return 0


def _as_written(recipe: Recipe, overrides: list[str]) -> dict[str, Any]:
    """The recipe's settings: 20 where that was written for a float, which holds 20.0."""
    entries = read_layers(recipe.path, overrides, [])
    return {
        key: entries[key].value if key in entries and entries[key].value == value else value
        for key, value in recipe.settings().items()
    }


def _json(recipe: Recipe, settings: dict[str, Any], defaults: dict[str, Any]) -> str:
    origins = {key: str(origin) for key, origin in recipe.origins.items()}
    known = {key: value for key, value in defaults.items() if _is_literal(value)}
    result = {"values": settings, "origins": origins}
    text = json.dumps(result | ({"defaults": known} if defaults else {}))
    # JSON has no infinity: a string instead of what only Python would read.
    return json.dumps(json.loads(text, parse_constant=str), indent=2)


def _yaml(recipe: Recipe, settings: dict[str, Any], defaults: dict[str, Any]) -> str:
    blocks = []
    for key, value in settings.items():
        if key == "env":
            blocks.append(["env:", ""])
            for name, text in value.items():
                blocks += _block({name: text}, str(recipe.origins[f"env.{name}"]), "  ")
        else:
            blocks += _block({key: value}, str(recipe.origins[key]))
    for key, value in defaults.items():
        if _is_literal(value):
            blocks += _block({key: value}, "default")
        else:
            blocks.append([f"# {key}: computed when training starts", ""])
    return "\n".join(_aligned(blocks))


def _is_literal(value: Any) -> bool:
    return value is not COMPUTED and value is not REQUIRED


def _block(values: dict[str, Any], origin: str, indent: str = "") -> list[list[str]]:
    """The lines of one key, each with its comment: the origin stands at the first."""
    first, *rest = write_yaml(values).rstrip("\n").split("\n")
    return [[indent + first, f"# {origin}"], *([indent + line, ""] for line in rest)]


def _aligned(blocks: list[list[str]]) -> list[str]:
    """Comments in one column; above their line where both do not fit into the terminal."""
    terminal = shutil.get_terminal_size((100, 24)).columns
    column = min(max(len(text) for text, note in blocks if note), _WIDEST_COLUMN)
    lines = []
    for text, note in blocks:
        if note and max(len(text), column) + 2 + len(note) > terminal:
            indent = text[: len(text) - len(text.lstrip())]
            lines += [indent + note, text]
        else:
            lines.append(f"{text:<{column}}  {note}" if note else text)
    return lines
