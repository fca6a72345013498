"""Check a recipe; report everything that is wrong with it.

The rewards of trl_ext that a program verifies are made as training makes them, to see whether their
arguments fit. Nothing of yours is imported, nothing opened or downloaded: what the dataset and
other reward functions hold is seen when training starts.
"""

import argparse

from trl_ext.recipe import Recipe, read_recipe
from trl_ext.recipe.findings import Finding, raise_if_any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments; everything else is an override."""
    parser.usage = "%(prog)s RECIPE [key=value ...]"
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")


def run(args: argparse.Namespace) -> int:
    """Print one line, or raise with all findings."""
    recipe = read_recipe(args.recipe, args.overrides)
    _check_rewards(recipe)
    count = len(recipe.values)
    print(f"ok: {recipe.path}: trainer {recipe.trainer}, {count} key{'s' if count != 1 else ''}")
    return 0


def _check_rewards(recipe: Recipe) -> None:
    """Whether the arguments of verifiable rewards fit.

    Raises:
        ConfigError: if not; with each finding's place.
    """
    from trl_ext.rewards.build import unfit_arguments

    found = [
        Finding(recipe.origins[key], key, problem)
        for key in ("reward_funcs", "gold_reward_funcs")
        for problem in unfit_arguments(recipe.values.get(key) or [])
    ]
    raise_if_any(found, str(recipe.path))
