"""Datasets by name: generated tasks, local files and directories, and the hub.

`load_splits` reads the dataset keys of a recipe; `check_prompt_only` says before any model is
loaded whether a trainer that samples completions can use what it returned.
"""

from trl_ext.tasks.columns import check_prompt_only
from trl_ext.tasks.loading import load_splits

__all__ = ["check_prompt_only", "load_splits"]
