"""Recipes: flat YAML, merged, checked against the source of what it configures, with provenance.

Nothing here imports user code, TRL, transformers or torch, or touches the network.
"""

from trl_ext.recipe.findings import Origin
from trl_ext.recipe.recipe import Recipe, read_recipe

__all__ = ["Origin", "Recipe", "read_recipe"]
