"""Copy a shipped recipe, to change it.

Files that the recipe extends are not copied: the copy names the shipped ones.
"""

import argparse
import json
import os
from pathlib import Path

import yaml

from trl_ext.errors import ConfigError
from trl_ext.recipe.layers import display_name
from trl_ext.recipe.shipped import find_extended, find_recipe, shipped_name
from trl_ext.recipe.yaml_reader import UNREADABLE, compose, unreadable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("recipe", help="the name of a shipped recipe, or a file")
    parser.add_argument(
        "destination", nargs="?", default=".", help="a file or folder; default: here"
    )


def run(args: argparse.Namespace) -> int:
    """Copy a recipe; a file that exists is never replaced."""
    source, destination = find_recipe(args.recipe), Path(args.destination)
    if os.path.isdir(destination):
        destination = destination / source.name
    if not os.path.isdir(destination.parent):
        raise ConfigError(f"There is no folder {destination.parent}. Make it first.")
    text = _rewritten(source, destination)
    try:
        with destination.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"{destination} exists and is left alone. Give another name: "
            f"trl_ext cp {args.recipe} OTHER.yaml"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{destination} cannot be written: {error.strerror}. Give another name or folder: "
            f"trl_ext cp {args.recipe} OTHER.yaml"
        ) from error
    print(f"{destination}\nTrain it with `trl_ext train {destination}`.")
    return 0


def _rewritten(source: Path, destination: Path) -> str:
    """The recipe's text, with what it extends named so that it is found from the destination."""
    try:
        text = source.read_text(encoding="utf-8")
        nodes = _extends_nodes(text)
    except UNREADABLE as error:
        raise ConfigError(
            f"{unreadable(error, display_name(source))}. Nothing is copied."
        ) from error
    # From the end of the file, so that earlier positions stay true.
    for node in reversed(nodes):
        file = find_extended(node.value, source)
        if file:
            beside = os.path.relpath(file.resolve(), destination.resolve().parent)
            name = shipped_name(file) or json.dumps(Path(beside).as_posix(), ensure_ascii=False)
            text = text[: node.start_mark.index] + name + text[node.end_mark.index :]
    return text


def _extends_nodes(text: str) -> list[yaml.ScalarNode]:
    root = compose(text)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    for key, value in pairs:
        if key.value == "extends":
            nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
            return [node for node in nodes if isinstance(node, yaml.ScalarNode)]
    return []
