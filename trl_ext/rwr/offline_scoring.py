"""Scores for logged completions that have none yet."""

import asyncio
import inspect
import math
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from trl_ext.errors import ConfigError, DataError
from trl_ext.rwr.logged_row import PLACE
from trl_ext.rwr.offline_config import OfflineRWRConfig

# Completions that a reward is given at once.
_BATCH = 64


def scored(
    dataset: Dataset, reward_funcs: list[Any], config: OfflineRWRConfig, name: str
) -> list[float]:
    """The weighted sum of the rewards of every row.

    Args:
        dataset: rows of prompt, completion and whatever columns the rewards read.
        reward_funcs: guarded reward functions.
        config: has `reward_weights`.
        name: what to call the dataset in errors.

    Raises:
        ConfigError: if a reward is a model, or the weights are not one a reward.
        DataError: if no reward applies to a row.
        RewardError: if a reward fails.
    """
    weights = config.reward_weights or [1.0] * len(reward_funcs)
    if len(weights) != len(reward_funcs):
        raise ConfigError(
            f"reward_weights has {len(weights)} numbers for {len(reward_funcs)} rewards. Give one "
            "for each."
        )
    for reward_func in reward_funcs:
        if not hasattr(reward_func, "checked"):
            raise ConfigError(
                f"The reward {str(reward_func)[:80]!r} is a model. Give a function, such as the "
                "reward {name: reward_model, model: ...} of trl_ext."
            )
    found: list[float] = []
    hidden = config.disable_tqdm or config.process_index > 0
    with tqdm(total=len(dataset), desc=f"Scoring {name}", unit=" rows", disable=hidden) as bar:
        for batch in dataset.iter(_BATCH):
            assert isinstance(batch, dict)
            by_reward = [_called(reward_func, batch) for reward_func in reward_funcs]
            first = len(found)
            places = batch.get(PLACE, range(first, first + len(batch["prompt"])))
            for place, *values in zip(places, *by_reward, strict=True):
                where = f"{name}, row {place} (counted from 0)"
                found.append(_summed(values, weights, where))
            bar.update(len(batch["prompt"]))
    return found


def _called(reward_func: Any, batch: dict[str, list]) -> list[float | None]:
    own = ("prompt", "completion", PLACE)
    columns = {key: values for key, values in batch.items() if key not in own}
    scores = reward_func(prompts=batch["prompt"], completions=batch["completion"], **columns)
    return asyncio.run(scores) if inspect.iscoroutine(scores) else scores


def _summed(values: list[float | None], weights: list[float], where: str) -> float:
    applicable = [w * v for v, w in zip(values, weights, strict=True) if v is not None]
    if not applicable:
        raise DataError(
            f"{where}: no reward applies to it (all returned None). Leave it out, or "
            "add a reward that scores it."
        )
    return math.fsum(applicable)
