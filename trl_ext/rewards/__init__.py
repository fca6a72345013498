"""Reward functions with TRL's signature: (prompts, completions, **columns) -> one number each.

`build_rewards` turns the `reward_funcs` of a recipe into callables, `guarded` makes a callable
name the sample when it fails.
"""

from trl_ext.rewards.build import build_rewards
from trl_ext.rewards.exact_match import exact_match
from trl_ext.rewards.guard import guarded
from trl_ext.rewards.reasoning_gym import reasoning_gym

__all__ = ["build_rewards", "exact_match", "guarded", "reasoning_gym"]
