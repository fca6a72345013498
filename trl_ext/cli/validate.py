"""Check a recipe; report everything that is wrong with it.

Nothing is imported, opened or downloaded: what the dataset and the reward functions hold is seen
when training starts.
"""

import argparse

from trl_ext.recipe import read_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments; everything else is an override."""
    parser.usage = "%(prog)s RECIPE [key=value ...]"
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")


def run(args: argparse.Namespace) -> int:
    """Print one line, or raise with all findings."""
    recipe = read_recipe(args.recipe, args.overrides)
    count = len(recipe.values)
    print(f"ok: {recipe.path}: trainer {recipe.trainer}, {count} key{'s' if count != 1 else ''}")
    return 0
