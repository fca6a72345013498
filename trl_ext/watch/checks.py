"""What would leave the watch nothing to measure."""

import logging
from typing import Any

import torch

from trl_ext.errors import ConfigError, RewardError
from trl_ext.watch.measures import Completions

logger = logging.getLogger(__name__)

# With fewer, a test over prompts says nothing.
LEAST_PROMPTS = 10


def check_held_out_prompts(trainer: Any) -> None:
    """Whether a trainer evaluates on prompts enough.

    Raises:
        ConfigError: if not.
    """
    given = trainer.eval_dataset
    if given is None or trainer.args.eval_strategy == "no":
        raise ConfigError(
            "The gold reward is measured on held-out prompts, and there are none: give an "
            "eval_dataset, and eval_strategy='steps' with eval_steps. In a recipe "
            "dataset_kwargs.eval_size or dataset_test_split makes them."
        )
    if isinstance(given, dict):
        raise ConfigError(
            "The gold reward is measured on one set of held-out prompts, and eval_dataset has "
            f"{len(given)}: {', '.join(given)}. Give one."
        )
    if hasattr(given, "__len__") and len(given) < LEAST_PROMPTS:
        raise ConfigError(
            f"eval_dataset has {len(given)} prompts; a test over prompts needs {LEAST_PROMPTS} or "
            "more, and hundreds to see a small fall of the gold reward."
        )


def check_gold(seen: Completions, *, is_first: bool) -> None:
    """Whether the gold reward measures anything, and anything else than the proxy.

    Raises:
        RewardError: if it scored nothing.
    """
    gold, proxy = seen.gold_PG, seen.proxy_PG
    assert gold is not None
    if gold.isnan().all():
        raise RewardError(
            f"The gold reward is None for all {gold.numel()} held-out completions: nothing is "
            "measured. Return a number for each, or at least for some."
        )
    varies = len(set(proxy[~proxy.isnan()].tolist())) > 1
    if is_first and varies and torch.equal(gold.nan_to_num(), proxy.nan_to_num()):
        logger.warning(
            "Reward-hacking watch: gold and proxy reward are equal on all %d held-out completions. "
            "If they are one and the same, it measures nothing held out.",
            gold.numel(),
        )
